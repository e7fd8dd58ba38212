"""What a workload is, and how it is checked."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import pytest
import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.measure.by_hand import HandRun
from hogstream.scheduler import (
    LinearDecay,
    SchedulerSettings,
    SharedParameters,
    StreamScheduler,
)
from hogstream.workloads import Target, check_workload
from hogstream.workloads.registry import WORKLOADS
from hogstream.workloads.workload import called
from tiny_workload import TINY, Counting


@pytest.mark.parametrize(
    ("higher", "reached", "missed"), [(True, (0.9, 1.0), 0.8), (False, (0.9, 0.8), 1.0)]
)
def test_a_target_is_reached_from_its_side(
    higher: bool, reached: tuple[float, ...], missed: float
) -> None:
    target = Target("accuracy", 0.9, higher_is_better=higher)
    assert all(map(target.is_reached_by, reached))
    assert not target.is_reached_by(missed)
    assert not target.is_reached_by(math.nan)


def test_a_target_is_finite() -> None:
    with pytest.raises(ValueError, match="value must be finite, got nan"):
        Target("accuracy", math.nan)


def test_workloads_are_taken_as_they_are() -> None:
    counting = Counting()
    assert check_workload(TINY) is TINY
    assert check_workload(counting) is counting
    for name, where in WORKLOADS.items():
        assert where.startswith(f"hogstream.workloads.{name}:")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"name": 3}, "name must be str, got int"),
        ({"target": 0.9}, "target must be Target, got float"),
        ({"seconds": 0}, "seconds must be a finite number > 0, got 0"),
        ({"seconds": math.inf}, "seconds must be a finite number > 0, got inf"),
        ({"settings": {}}, "settings must be SchedulerSettings, got dict"),
        ({"processes": 0}, "processes must be an integer >= 1, got 0"),
        ({"evaluate": None}, "evaluate must be a plain function, got None"),
        ({"by_hand": 3}, "by_hand must be a plain function, got 3"),
        ({"lr_schedule": 3}, "lr_schedule must be a plain function, got 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_wrong_in_a_workload_is_named(changes: dict[str, Any], said: str) -> None:
    workload = type("Wrong", (Counting,), changes)()
    with pytest.raises((TypeError, ValueError)) as refusal:
        check_workload(workload)
    assert str(refusal.value) == said


def test_what_is_no_workload_is_told_what_it_lacks() -> None:
    with pytest.raises(TypeError, match=r"must be a Workload, with name, target, .* got 3 without"):
        check_workload(3)


def test_a_method_that_fails_is_named_with_its_place() -> None:
    class Failing(Counting):
        def model(self, device: torch.device) -> torch.nn.Module:
            raise LookupError("no data")

    said = r"model of counting failed: LookupError: no data \(.*test_workload.py:\d+\)"
    with pytest.raises(MeasurementError, match=said):
        called(Failing(), "model", torch.device("cpu"))


def test_a_model_is_trained_by_hand_with_the_same_numbers() -> None:
    assert TINY.by_hand is not None
    assert TINY.by_hand.locked
    ours, theirs = TINY.settings.hyperparameters, TINY.by_hand.hyperparameters
    assert {"lr", "alpha", "eps", "weight_decay", "momentum", "centered"} == {*theirs}
    assert all(getattr(ours, name) == value for name, value in theirs.items())


def settings(**numbers: Any) -> SchedulerSettings:
    return SchedulerSettings(workers=2, hyperparameters=Hyperparameters(**numbers))


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_schedule": LinearDecay(0.1, updates=100)},
        {"settings": settings(weight_decay=0.1, decoupled_weight_decay=True)},
        {"settings": settings(momentum=0.9, lr_in_momentum=True)},
    ],
    ids=["schedule", "decoupled", "momentum"],
)
def test_what_torch_has_not_is_not_trained_by_hand(changes: dict[str, Any]) -> None:
    assert replace(TINY, **changes).by_hand is None


def test_a_model_is_evaluated_in_eval_mode_without_gradients() -> None:
    seen = []

    def metric(model: torch.nn.Module) -> float:
        seen.append((model.training, torch.is_grad_enabled()))
        return 1

    model = TINY.model(torch.device("cpu"))
    assert replace(TINY, metric=metric).evaluate(model, ()) == 1.0
    assert seen == [(False, False)]


def test_a_worker_trains_a_model_of_its_own_over_what_is_shared() -> None:
    shared = SharedParameters.from_module(TINY.model(torch.device("cpu")))
    assert TINY.worker(shared, 0) is not TINY.worker(shared, 0)


@pytest.mark.parametrize("by_hand", [False, True], ids=["worker", "by hand"])
@pytest.mark.parametrize("lasts", [False, True], ids=["iterable", "iterator"])
def test_first_batch_is_there_before_the_time_begins(by_hand: bool, lasts: bool) -> None:
    """Whatever is loaded for it; then all come in their order, and an iterable begins anew."""
    made: list[int] = []

    class Batches:
        def __iter__(self) -> Iterator[int]:
            for batch in range(3):
                made.append(batch)
                yield batch

    read: list[int] = []

    def loss(model: torch.nn.Module, batch: int) -> torch.Tensor:
        read.append(batch)
        return sum((each.sum() for each in model.parameters()), torch.zeros(()))

    def make_batches() -> Iterable[int]:
        return iter(Batches()) if lasts else Batches()

    workload = replace(TINY, loss=loss, make_batches=make_batches)
    count = 3 if lasts else 5
    if by_hand:
        assert workload.by_hand is not None
        _, batches = workload.by_hand.prepare(cast(HandRun, None))
        assert made == [0]
        read = list(batches)
        read += list(islice(batches, count - 3))
    else:
        shared = SharedParameters.from_module(workload.model(torch.device("cpu")))
        worker = workload.worker(shared, 0)
        assert made == [0]

        async def train() -> None:
            async with StreamScheduler(shared, workers=1) as scheduler:
                await scheduler.run(worker, updates=count)

        asyncio.run(train())
    assert read == [0, 1, 2, 0, 1][:count]
