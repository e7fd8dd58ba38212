"""Gradients through steps, as torch's tests of its optimizers have them, over its tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from torch_suite import LeastSquares, Row, each_info, params_of, rows

each_differentiable = pytest.mark.parametrize(
    "row",
    [
        param
        for param in rows(differentiable=True)
        for row in param.values
        if isinstance(row, Row) and row.kwargs["differentiable"]
    ],
)


def double(device: str, *values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, device=device, requires_grad=True)


@each_differentiable
def test_gradients_pass_through_a_step_and_its_state(row):
    state = {"square_avg": double(row.device, 0.5, 0.2, 0.9)}
    if row.kwargs.get("momentum"):
        state["momentum_buffer"] = double(row.device, 0.1, -0.7, 0.4)
    if row.kwargs.get("centered"):  # well below the root of the other, whose difference has a root
        state["grad_avg"] = double(row.device, 0.01, -0.02, 0.005)

    def after(param: torch.Tensor, grad: torch.Tensor, *values: torch.Tensor) -> tuple[Any, ...]:
        param = param.clone()
        param.grad = grad
        optimizer = row.make([param])
        copies = {name: value.clone() for name, value in zip(state, values, strict=True)}
        step = torch.zeros((), dtype=torch.float64)
        optimizer.state[param].update({"step": step, **copies})
        optimizer.step()
        return param, *(optimizer.state[param][name] for name in state)

    param, grad = double(row.device, 0.3, 0.8, -0.4), double(row.device, 0.6, -0.2, 0.7)
    assert gradcheck(after, (param, grad, *state.values()))


def distance_after_steps(make: Any, start: torch.Tensor, **options: Any) -> torch.Tensor:
    """How far from the origin three steps on the gradients of a loss lead, as a graph."""
    param = start.clone()
    optimizer = make([param], **options)
    for _ in range(3):
        x = param.clone()  # the step changes the parameter in place
        loss = ((x - 1) ** 4).sum() + x.prod()
        (param.grad,) = torch.autograd.grad(loss, param, create_graph=True)
        optimizer.step()
    return param.square().sum()


@each_differentiable
def test_gradients_pass_through_several_steps(row):
    start = double(row.device, 0.3, 2.0, -1.0)
    assert gradcheck(lambda values: distance_after_steps(row.make, values), start)
    if row.is_torchs and not row.kwargs.get("centered"):  # through whose lerp_ torch has no way
        ours, theirs = (
            torch.autograd.grad(distance_after_steps(make, start), start)
            for make in (row.make, row.make_torchs)
        )
        assert_close(ours, theirs)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@each_info
def test_gradients_pass_to_the_learning_rate(info, momentum):
    # torch has them for Adam and its like, not for its RMSprop.
    options = {"momentum": momentum, "differentiable": True}
    start = double("cpu", 0.3, 2.0, -1.0)
    lr = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda lr: distance_after_steps(info.optim_cls, start, lr=lr, **options), lr)


@each_differentiable
def test_a_differentiable_step_gives_the_same(row):
    plain, other = LeastSquares.made(row.device), LeastSquares.made(row.device)
    copies = [param.clone() for param in other.params]
    differentiable = row.make(copies)
    row_of_leaves = Row(row.info, row.device, {**row.kwargs, "differentiable": False})
    plain.train(row_of_leaves.make(plain.params), steps=1)
    other.backward()
    for copied, param in zip(copies, other.params, strict=True):
        copied.grad = param.grad
    differentiable.step()
    assert all(copied.grad_fn is not None for copied in copies)
    assert_close(copies, plain.params)


@pytest.mark.parametrize("other", ["foreach", "capturable"])
@each_info
def test_refuses_what_does_not_go_with_it(info, other):
    with pytest.raises(ValueError, match=other):
        info.optim_cls(params_of((2,)), differentiable=True, **{other: True})


@each_info
def test_a_leaf_is_refused_by_autograd(info):
    (leaf,) = params_of((2,))
    optimizer = info.optim_cls([leaf], differentiable=True)
    leaf.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        optimizer.step()
