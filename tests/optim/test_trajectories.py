"""Where the optimizer goes: by hand, beside torch's own, and to a known optimum."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR, StepLR

from hogstream.optim import RMSpropAsync
from optim_testing import parameters, step_along
from update_testing import BACKENDS, DTYPES, VARIANTS, State, assert_same_bits, formula, fresh_state


@pytest.mark.parametrize(
    ("options", "trajectory"),
    [
        ({}, [0.90000005, 0.82911195, 0.77108705]),
        ({"lr": 7e-4, "eps": 0.1}, [0.99788942, 0.99586785, 0.99392416]),
    ],
    ids=["defaults", "a3c"],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_worked_by_hand(backend, options, trajectory):
    # p = g = 1: ms is .01, .0199, .029701, and each step lr / sqrt(ms + eps).
    param = torch.nn.Parameter(torch.ones((), device=backend.device))
    optimizer = RMSpropAsync([param], **options, backend=backend.name)
    visited = []
    for _ in trajectory:
        param.grad = torch.ones_like(param)
        optimizer.step()
        visited.append(param.item())
    assert visited == torch.tensor(trajectory).tolist()  # the float32 nearest to each


@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_give_the_bits_of_the_formula(backend, dtype, options):
    (param,) = parameters((40, 25), dtype=dtype)
    param.data = param.data.to(backend.device)
    expected = fresh_state(param.detach().to("cpu", copy=True), **options)
    optimizer = RMSpropAsync([param], **options, backend=backend.name)
    for step in range(3):
        step_along(optimizer, first_seed=step)
        assert param.grad is not None
        expected = formula(expected, param.grad.cpu(), **options)
    state = optimizer.state[param]
    kept = (state.get(name) for name in ("square_avg", "grad_avg", "momentum_buffer"))
    actual = State(param.detach(), *kept).map(torch.Tensor.cpu)
    assert_same_bits(actual, expected)


SHAPES = [(), (1,), (7,), (3, 5), (2, 3, 4, 5), (0,)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight_decay": 0.1},
        {"maximize": True},
        {"weight_decay": 0.1, "maximize": True},
        {"lr": 7e-4, "alpha": 0.9, "eps": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_follows_torch_with_eps_outside(dtype, rtol, options):
    ours, theirs = parameters(*SHAPES, dtype=dtype), parameters(*SHAPES, dtype=dtype)
    step_along(RMSpropAsync(ours, **options, eps_inside_sqrt=False), first_seed=0, steps=10)
    step_along(torch.optim.RMSprop(theirs, **options), first_seed=0, steps=10)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol)


def test_decoupled_weight_decay_by_hand():
    # With eps far above ms the step is lr * g: 2 * (1 - .5 * .2) - .5 * 1 / 1e4, twice.
    param = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    optimizer = RMSpropAsync(
        [param], lr=0.5, alpha=0.0, eps=1e8, weight_decay=0.2, decoupled_weight_decay=True
    )
    for expected in (1.79995, 1.619905):
        param.grad = torch.ones_like(param)
        optimizer.step()
        assert param.item() == pytest.approx(expected, abs=1e-12)


SCHEDULERS = {
    "step": lambda optimizer: StepLR(optimizer, step_size=3, gamma=0.5),
    "lambda": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "one_cycle": lambda optimizer: OneCycleLR(
        optimizer, max_lr=0.1, total_steps=12, cycle_momentum=False
    ),
}


@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float_lr", "tensor_lr"])
@pytest.mark.parametrize("make_scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_follows_a_schedule_as_torch_does(make_scheduler, tensor_lr):
    ours, theirs = parameters(*SHAPES), parameters(*SHAPES)
    lr: Any = torch.tensor(0.02, dtype=torch.float64) if tensor_lr else 0.02
    optimizers = [
        RMSpropAsync(ours, lr=lr, eps_inside_sqrt=False),
        torch.optim.RMSprop(theirs, lr=0.02),
    ]
    schedulers: list[LRScheduler] = [make_scheduler(optimizer) for optimizer in optimizers]
    for step in range(10):
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            step_along(optimizer, first_seed=step)
            scheduler.step()
    assert schedulers[0].get_last_lr() == pytest.approx(schedulers[1].get_last_lr())
    torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=2e-6)


def test_converges_to_the_least_squares_solution():
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((64, 4))
    targets = inputs @ [1.0, -2.0, 3.0, 0.5] + 0.1 * rng.standard_normal(64)
    solution, *_ = np.linalg.lstsq(inputs, targets, rcond=None)

    weights = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = RMSpropAsync([weights], lr=0.1)
    scheduler = LambdaLR(optimizer, lambda step: 0.98**step)
    x, y = torch.from_numpy(inputs), torch.from_numpy(targets)
    for _ in range(600):
        optimizer.zero_grad()
        torch.nn.functional.mse_loss(x @ weights, y).backward()
        optimizer.step()
        scheduler.step()
    assert weights.detach().numpy() == pytest.approx(solution, abs=1e-5)
