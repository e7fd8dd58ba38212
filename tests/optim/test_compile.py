"""``torch.compile`` around a training step, or around ``step`` itself, changes no bit of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn import Linear, ReLU, Sequential
from torch.optim.lr_scheduler import ExponentialLR

from hogstream.optim import RMSpropAsync

dynamo = pytest.importorskip("torch._dynamo")

Loss = Callable[[], torch.Tensor]
Compile = Callable[[Any], Any]
Step = Callable[[], object]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch, that it leaves out its own profiler's marks
        yield
    dynamo.reset()


def whole_step(optimizer: RMSpropAsync, loss: Loss, compiled: Compile) -> Step:
    def train() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    step: Step = compiled(train)
    return step


def step_alone(optimizer: RMSpropAsync, loss: Loss, compiled: Compile) -> Step:
    step = compiled(optimizer.step)

    def train() -> None:
        optimizer.zero_grad()
        loss().backward()
        step()

    return train


def zero_grad_and_loss(optimizer: RMSpropAsync, loss: Loss, compiled: Compile) -> Step:
    zero_grad, compiled_loss = compiled(optimizer.zero_grad), compiled(loss)

    def train() -> None:
        zero_grad()
        compiled_loss().backward()
        optimizer.step()

    return train


def with_closure(optimizer: RMSpropAsync, loss: Loss, compiled: Compile) -> Step:
    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    step: Step = compiled(lambda: optimizer.step(closure))
    return step


WAYS = [whole_step, step_alone, zero_grad_and_loss, with_closure]


def eager(function: Any) -> Any:
    return function


def by_dynamo(function: Any) -> Any:
    return torch.compile(function, backend="eager")


def train(way: Callable[..., Any], compiled: Compile, flat: bool, schedule: bool) -> torch.Tensor:
    torch.manual_seed(0)
    model = Sequential(Linear(8, 8), ReLU(), Linear(8, 1))
    x = torch.randn(16, 8)
    optimizer = RMSpropAsync(model.parameters(), flat=flat)
    scheduler = ExponentialLR(optimizer, gamma=0.5) if schedule else None
    seen: list[float] = []
    optimizer.register_step_post_hook(lambda o, *_: seen.append(o.param_groups[0]["lr"]))
    step = way(optimizer, lambda: model(x).square().mean(), compiled)
    for index in range(6):
        if scheduler is not None:
            scheduler.step()
        elif index == 3:
            optimizer.param_groups[0]["lr"] = 0.001
        # Once for the first step, which has no gradients yet, and once for those that follow.
        with dynamo.config.patch(error_on_recompile=index > 2):
            step()
    assert len(seen) == 6
    return torch.cat([param.detach().flatten() for param in model.parameters()])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("schedule", [False, True], ids=["by_hand", "scheduler"])
@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize("way", WAYS)
def test_gives_the_bits_of_eager_and_compiles_once(way, flat, schedule):
    expected = train(way, eager, flat, schedule)
    assert torch.equal(train(way, by_dynamo, flat, schedule), expected)
