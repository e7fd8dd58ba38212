"""What ``rmsprop_`` promises beside its arithmetic: what it changes and what it takes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hogstream.kernels import available_backends, rmsprop_
from update_testing import (
    BACKENDS,
    CPU_BACKENDS,
    FULL,
    State,
    assert_same_bits,
    formula,
    fresh_state,
    normal,
    update_,
)


@pytest.mark.parametrize("backend", BACKENDS)
def test_updates_in_place_and_returns_none(backend):
    operands = [torch.full((2, 3), 0.5, device=backend.device) for _ in range(5)]
    param, grad, ms, grad_avg, momentum_buffer = operands
    pointers = [each.data_ptr() for each in operands]
    returned = rmsprop_(  # type: ignore[func-returns-value]
        *(param, grad, ms),
        grad_avg=grad_avg,
        momentum_buffer=momentum_buffer,
        backend=backend.name,
        alpha=0.9,
        **FULL,
    )
    assert returned is None
    assert [each.data_ptr() for each in operands] == pointers
    assert torch.all(param < 0.5)
    assert all(torch.all(each != 0.5) for each in (ms, momentum_buffer))
    assert all(torch.all(each == 0.5) for each in (grad, grad_avg))  # as the gradient is


def test_picks_a_backend_for_the_cpu():
    state, grad = fresh_state(normal(100, torch.float32, 0)), normal(100, torch.float32, 1)
    expected = formula(state, grad)
    rmsprop_(state.param, grad, state.ms)
    assert_same_bits(state, expected)


def test_every_backend_is_listed():
    assert set(available_backends()) == {"triton", "numba", "numpy"}
    assert available_backends()["numpy"] is None


def test_takes_a_leaf_that_requires_grad():
    param = torch.ones(3, requires_grad=True)
    (grad,) = torch.autograd.grad((param * param).sum(), param)
    rmsprop_(param, grad, torch.zeros(3))
    assert param.is_leaf
    assert param.requires_grad
    assert torch.all(param < 1)


def test_takes_a_lazily_negated_gradient():
    state, grad = fresh_state(normal(100, torch.float32, 0)), normal(100, torch.float32, 1)
    expected = formula(state, -grad)
    rmsprop_(state.param, torch._neg_view(grad), state.ms)
    assert_same_bits(state, expected)


def test_autograd_notices_the_update():
    for place in (0, 2, 3, 4):
        operands = [torch.ones(3) for _ in range(5)]
        operands[place].requires_grad_()
        loss = operands[place].square().sum()
        param, grad, *state = operands
        update_(State(param, *state), grad, **FULL)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("order", ["C", "F"])
def test_takes_a_read_only_gradient(order):
    param, grad, ms = (np.arange(6.0).reshape(2, 3).copy(order) for _ in range(3))
    expected = formula(State(torch.tensor(param), torch.tensor(ms)), torch.tensor(grad))
    grad.flags.writeable = False
    rmsprop_(param, grad, ms)
    assert_same_bits(State(torch.tensor(param), torch.tensor(ms)), expected)
    assert np.array_equal(grad, np.arange(6.0).reshape(2, 3))


def test_takes_operands_side_by_side_in_one_buffer():
    buffer = normal(500, torch.float32, seed=0).abs()
    momentum_buffer, ms, param, grad, grad_avg = buffer.split(100)
    state = State(param, ms, grad_avg, momentum_buffer)
    expected = formula(state, grad, **FULL)
    update_(state, grad, **FULL)
    assert_same_bits(state, expected)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_strides_along_axes_of_one_element_do_not_matter(backend):
    param, ms = torch.ones(2, 1, 3).permute(2, 1, 0), torch.zeros(2, 1, 3).permute(2, 1, 0)
    grad = torch.arange(1.0, 7.0).as_strided((3, 1, 2), (1, 99, 3))
    assert grad.stride() != param.stride()
    rmsprop_(param, grad, ms, lr=1.0, alpha=0.0, backend=backend.name)
    assert torch.equal(ms, grad.square())
