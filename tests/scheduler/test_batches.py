"""Where a model's workers have their batches from."""

from __future__ import annotations

import multiprocessing
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from hogstream.scheduler import ModelWorker, SharedParameters, StreamScheduler, WorkerError
from hogstream.scheduler.workers.batches import moved

Pair = namedtuple("Pair", ["x", "y"])
GOES_ALONG: dict[str, Any] = {"lr": 1e-3}


def make_worker(batches: Any) -> tuple[SharedParameters, ModelWorker, list[float]]:
    """A worker that notes the mean of each batch."""
    seen: list[float] = []

    def loss(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        x = batch[0] if isinstance(batch, list) else torch.as_tensor(batch, dtype=torch.float32)
        seen.append(x.mean().item())
        value: torch.Tensor = model(x.reshape(-1, 1)).sum()
        return value

    model = torch.nn.Linear(1, 1)
    shared = SharedParameters.from_module(model)
    return shared, ModelWorker(shared, model, loss, batches), seen


class Twice:
    """Can be begun twice, and is read by ``__getitem__``."""

    def __getitem__(self, index: int) -> float:
        if index == 2:
            raise IndexError
        return float(index)


@pytest.mark.parametrize(
    "batches", [[0.0, 1.0], (0.0, 1.0), Twice(), range(2)], ids=lambda each: type(each).__name__
)
async def test_iterable_is_begun_anew_when_it_ends(batches: Any) -> None:
    """And in each scope."""
    shared, worker, seen = make_worker(batches)
    for updates in (3, 2):
        async with StreamScheduler(shared, workers=1, **GOES_ALONG) as scheduler:
            await scheduler.run(worker, updates=updates)
    assert seen == [0.0, 1.0, 0.0, 0.0, 1.0]


class Ending:
    """Is another iterator each time, over what has ended then."""

    def __init__(self) -> None:
        self._once = iter([0.0, 1.0])

    def __iter__(self) -> Iterator[float]:
        yield from self._once


@pytest.mark.parametrize(
    ("batches", "updates", "message"),
    [
        (lambda: iter([0.0, 1.0]), 2, "batches must last for every update, but ran out"),
        (Ending, 2, "batches must last for every update, but ran out"),
        (list, 0, "batches must hold at least one batch, got none"),
        (lambda: iter([]), 0, "batches must hold at least one batch, got none"),
    ],
)
async def test_batches_that_run_out_are_an_error(batches: Any, updates: int, message: str) -> None:
    shared, worker, _ = make_worker(batches())
    async with StreamScheduler(shared, workers=1, **GOES_ALONG) as scheduler:
        with pytest.raises(WorkerError, match=message):
            await scheduler.run(worker, updates=5)
    assert shared.version == updates


async def test_loader_with_processes_ends_with_the_scope() -> None:
    """It is read by two workers, ends and begins anew, and leaves no process."""
    data = TensorDataset(torch.arange(8.0).reshape(8, 1))
    loader = DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork")
    before = multiprocessing.active_children()
    shared, worker, seen = make_worker(loader)
    async with StreamScheduler(shared, workers=2, **GOES_ALONG) as scheduler:
        await scheduler.run(worker, updates=6)
        assert len(multiprocessing.active_children()) > len(before)
    assert multiprocessing.active_children() == before
    for thread in threading.enumerate():
        if thread.name == "QueueFeederThread":  # the loader's, which it ends but does not wait for
            thread.join()
    assert sorted(seen[:4]) == [0.5, 2.5, 4.5, 6.5]
    assert len(seen) == 6


@pytest.mark.parametrize(
    "batch",
    [
        torch.ones(1),
        [torch.ones(1), (torch.ones(2), "label")],
        Pair(torch.ones(1), {"deep": [torch.ones(1)], "number": 3}),
        OrderedDict(a=torch.ones(1), b=None),
        torch.nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)]),
    ],
    ids=lambda batch: type(batch).__name__,
)
def test_batch_is_moved_as_it_is_made(batch: Any) -> None:
    there = moved(batch, torch.device("meta"))
    assert devices(there) == {"meta"}
    assert devices(batch) == {"cpu"}
    assert structure(there) == structure(batch)


def parts(batch: Any) -> Iterator[Any]:
    yield batch
    if isinstance(batch, torch.nn.utils.rnn.PackedSequence):
        yield batch.data
    elif isinstance(batch, (tuple, list, dict)):
        for each in batch.values() if isinstance(batch, dict) else batch:
            yield from parts(each)


def devices(batch: Any) -> set[str]:
    return {each.device.type for each in parts(batch) if isinstance(each, torch.Tensor)}


def structure(batch: Any) -> list[Any]:
    return [
        type(each) if isinstance(each, (torch.Tensor, tuple, list, dict)) else each
        for each in parts(batch)
    ]
