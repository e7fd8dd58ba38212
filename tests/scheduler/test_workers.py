from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hogstream.kernels import rmsprop_
from hogstream.scheduler import (
    ModelWorker,
    SharedParameters,
    SimulatedWorker,
    StreamScheduler,
    WorkerError,
)

Batch = tuple[torch.Tensor, torch.Tensor]
#: With these and float64, an update subtracts its gradient: ms stays near 0, as gradients weigh
#: 1 - alpha = 2**-53, that the divisor is sqrt(eps) = 1.
SUBTRACTING: dict[str, Any] = {"lr": 1.0, "alpha": 1 - 2**-53, "eps": 1.0}
OPTIONS: dict[str, Any] = {"lr": 0.01, "eps": 0.01}


def make_model() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


def make_batches(seed: int = 1) -> Iterator[Batch]:
    """A linear function to learn."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(16, 4, generator=generator)
        yield x, x.sum(dim=1, keepdim=True)


def squared_error(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    x, y = batch
    error: torch.Tensor = model(x) - y
    return (error**2).mean()


@pytest.mark.parametrize("depth", [1, 2])
async def test_one_model_worker_trains_like_a_plain_loop(depth: int) -> None:
    """With depth 2 an iteration reads parameters that may lack the update in flight."""
    model, plain = make_model(), make_model()
    shared = SharedParameters.from_module(model)
    losses: list[float] = []
    worker = ModelWorker(
        shared, model, squared_error, make_batches(), lambda _index, loss: losses.append(loss)
    )
    async with StreamScheduler(shared, workers=1, depth=depth, **OPTIONS) as scheduler:
        await scheduler.run(worker, updates=100)

    batches = make_batches()
    mss = [torch.zeros_like(parameter) for parameter in plain.parameters()]
    plain_losses = []
    for _ in range(100):
        plain.zero_grad()
        loss = squared_error(plain, next(batches))
        loss.backward()
        plain_losses.append(loss.item())
        for parameter, ms in zip(plain.parameters(), mss, strict=True):
            assert parameter.grad is not None
            rmsprop_(parameter, parameter.grad, ms, **OPTIONS)
    if depth == 1:
        assert losses == plain_losses
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    else:
        assert losses[-1] == pytest.approx(plain_losses[-1], rel=0.5)


async def test_gradient_in_flight_is_not_made_anew() -> None:
    """The first update is held back until the worker is at its second gradient."""
    second = threading.Event()

    def loss(model: torch.nn.Module, x: float) -> torch.Tensor:
        if x == 2.0:
            second.set()
        return x * model.weight.sum()  # type: ignore[operator]

    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    shared = SharedParameters.from_module(model)
    async with StreamScheduler(shared, workers=1, depth=2, **SUBTRACTING) as scheduler:
        kernel = scheduler.backend.kernel

        def hold(*operands: Any) -> None:
            assert second.wait(timeout=60)
            kernel(*operands)

        scheduler.backend = replace(scheduler.backend, kernel=hold)
        await scheduler.run(ModelWorker(shared, model, loss, iter([1.0, 2.0])), updates=2)
    assert shared.flat.tolist() == pytest.approx([-(1.0 + 2.0)])


@pytest.mark.parametrize("policy", ["lock-free", "locked", "ordered"])
async def test_many_model_workers_learn(policy: str) -> None:
    model = make_model()
    shared = SharedParameters.from_module(model)
    losses: list[float] = []
    worker = ModelWorker(
        shared, model, squared_error, make_batches(), lambda worker, loss: losses.append(loss)
    )
    before = squared_error(model, next(make_batches(seed=2))).item()
    async with StreamScheduler(shared, workers=4, depth=2, policy=policy, **OPTIONS) as scheduler:
        report = await scheduler.run(worker, updates=400)
    assert report.updates == len(losses) == 400
    # Not the last one: a lock-free update that is held up puts back what was learned meanwhile.
    assert np.median(losses[200:]) < before / 5


async def test_batches_that_run_out_are_an_error() -> None:
    model = make_model()
    shared = SharedParameters.from_module(model)
    worker = ModelWorker(shared, model, squared_error, iter([next(make_batches())]))
    async with StreamScheduler(shared, workers=2) as scheduler:
        with pytest.raises(WorkerError, match="batches must last for every update"):
            await scheduler.run(worker, updates=3)


async def test_reading_a_batch_leaves_the_event_loop_free() -> None:
    """The first batch is not there until the loop, turning, says so."""
    turned = threading.Event()

    def batches() -> Iterator[Batch]:
        assert turned.wait(timeout=60)
        yield from make_batches()

    model = make_model()
    shared = SharedParameters.from_module(model)
    async with StreamScheduler(shared, workers=2) as scheduler:
        run = asyncio.create_task(
            scheduler.run(ModelWorker(shared, model, squared_error, batches()), updates=2)
        )
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.001, turned.set)
        assert (await run).updates == 2


async def test_simulated_workers_rotate_their_own_gradients() -> None:
    """Gradients are powers of ten, and each update subtracts its gradient: digits count uses."""
    gradients = [torch.full((8,), 10.0**power, dtype=torch.float64) for power in range(4)]
    shared = SharedParameters({"p": torch.zeros(8, dtype=torch.float64)})
    async with StreamScheduler(shared, workers=2, policy="locked", **SUBTRACTING) as scheduler:
        report = await scheduler.run(SimulatedWorker(gradients, workers=2), updates=8)
    uses = [round(-shared.flat[0].item() / 10**power) % 10 for power in range(4)]
    by_worker = report.updates_by_worker
    assert [uses[0] + uses[2], uses[1] + uses[3]] == by_worker
    assert abs(uses[0] - uses[2]) <= 1
    assert abs(uses[1] - uses[3]) <= 1


async def test_thinking_takes_time() -> None:
    shared = SharedParameters({"p": torch.zeros(8)})
    worker = SimulatedWorker([torch.ones(8)], workers=1, think_time=0.01, think_spread=0.5, seed=3)
    async with StreamScheduler(shared, workers=1) as scheduler:
        report = await scheduler.run(worker, updates=5)
    draws = random.Random("3/0")
    thought = sum(0.01 * draws.lognormvariate(0, 0.5) for _ in range(5))
    assert report.seconds >= thought


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be an integer >= 1 and <= 2, got 0"),
        ({"workers": 3}, "workers must be an integer >= 1 and <= 2, got 3"),
        ({"think_time": -1.0}, "think_time must be a finite number >= 0, got -1.0"),
        ({"think_time": float("nan")}, "think_time must be a finite number >= 0, got nan"),
        ({"think_spread": float("inf")}, "think_spread must be a finite number >= 0, got inf"),
    ],
)
def test_bad_simulation_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedWorker([torch.ones(1)] * 2, **{"workers": 1, **arguments})
