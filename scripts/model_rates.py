"""Measures asynchronous training of small models against the same by hand: ``make models``.

Each model is trained over threads and over processes in three ways, which take turns: by
``ModelWorker``; by the same with torch's intra-op threads set by hand where it computes; and in a
plain loop with our optimizer, on threads or by ``torch.multiprocessing``.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import sys
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from hogstream.optim import RMSpropAsync
from hogstream.profiling.environment import describe_environment
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.profiling.measure.by_hand import ByHand, HandRun
from hogstream.profiling.results.confidence import spread_warnings
from hogstream.profiling.results.files import write_result
from hogstream.profiling.results.records import PositiveSpread, Ratio
from hogstream.profiling.results.schema import ModelRate, ModelRates
from hogstream.profiling.turns import in_turn
from hogstream.scheduler import ModelWorker, ProcessScheduler, SharedParameters, StreamScheduler

BATCH, LEARNING_RATE = 32, 1e-3
OURS, BY_HAND, PLAIN = "hogstream", "threads set by hand", "plain loop"
WAYS = (OURS, BY_HAND, PLAIN)
SETUPS: tuple[tuple[Literal["threads", "processes"], int], ...] = (
    ("threads", 1),
    ("threads", 2),
    ("processes", 1),
    ("processes", 2),
)

Batch = tuple[torch.Tensor, torch.Tensor]
#: Trains for so many seconds, and says how many updates/s that were.
Measure = Callable[[float], Awaitable[float]]


class Recurrent(nn.Module):
    """An LSTM, and a layer over its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 64, batch_first=True)
        self.last = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits, shape (batch, 10), of inputs of shape (batch, time, 16)."""
        outputs: torch.Tensor = self.lstm(x)[0]
        logits: torch.Tensor = self.last(outputs[:, -1])
        return logits


def _conv() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(32 * 7 * 7, 10)),
    )


def _mlp() -> nn.Module:
    return nn.Sequential(
        *(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    )


def _tanh() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))


@dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        make: The network, whose logits are of 10 classes.
        shape: Of an input.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def batches(self, seed: int) -> Iterator[Batch]:
        """Yields the same few batches for ever: data is not what is measured."""
        generator = torch.Generator().manual_seed(seed)
        ready = [
            (
                torch.randn(BATCH, *self.shape, generator=generator),
                torch.randint(10, (BATCH,), generator=generator),
            )
            for _ in range(8)
        ]
        while True:
            yield from ready


MODELS = {
    "conv": Model(_conv, (1, 28, 28)),
    "MLP with ReLU": Model(_mlp, (784,)),
    "LSTM": Model(Recurrent, (12, 16)),
    "Linear-Tanh-Linear": Model(_tanh, (64,)),
}


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])


class LossByHand:
    """The same, with a single intra-op thread set by hand on each thread that computes it."""

    def __init__(self) -> None:
        self._local = threading.local()

    def __call__(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        """Cross entropy."""
        if not hasattr(self._local, "set"):
            torch.set_num_threads(1)
            self._local.set = True
        return loss_of(model, batch)


def make_worker(name: str, by_hand: bool, shared: SharedParameters, process: int) -> ModelWorker:
    """What trains in each process, or on all threads of this one.

    Args:
        name: Of the model.
        by_hand: Whether torch's intra-op threads are set by hand.
        shared: The parameters.
        process: Its number.
    """
    model = MODELS[name]
    loss = LossByHand() if by_hand else loss_of
    return ModelWorker(shared, model.make(), loss, model.batches(process))


def train_plainly(model: nn.Module, batches: Iterator[Batch], going: Callable[[], bool]) -> int:
    """Trains with our optimizer, as one would without a scheduler; how many updates it made."""
    optimizer = RMSpropAsync(model.parameters(), lr=LEARNING_RATE)
    made = 0
    while going():
        optimizer.zero_grad()
        loss = loss_of(model, next(batches))
        loss.backward()
        optimizer.step()
        loss.item()
        made += 1
    return made


def plain_process(name: str, run: HandRun) -> None:
    """The same in a process."""
    torch.set_num_threads(1)
    batches = MODELS[name].batches(run.process)
    optimizer = RMSpropAsync(run.model.parameters(), lr=LEARNING_RATE)
    while run.going():
        optimizer.zero_grad()
        loss = loss_of(run.model, next(batches))
        loss.backward()
        optimizer.step()
        run.landed(loss.item())


async def measured_plainly(name: str, workers: int, seconds: float) -> float:
    """Updates/s of plain loops, one a thread, each with a replica over the same parameters."""
    model = MODELS[name]
    trained = model.make()
    shared = SharedParameters.from_module(trained)
    replicas = [model.make() for _ in range(workers)]
    for replica in replicas:
        shared.attach(replica)
    made = [0] * workers
    begin = time.perf_counter()

    def work(worker: int) -> None:
        torch.set_num_threads(1)
        made[worker] = train_plainly(
            replicas[worker], model.batches(worker), lambda: time.perf_counter() < begin + seconds
        )

    working = [threading.Thread(target=work, args=(each,)) for each in range(workers)]
    for thread in working:
        thread.start()
    for thread in working:
        await asyncio.to_thread(thread.join)
    return sum(made) / (time.perf_counter() - begin)


async def measured(scheduler: Any, worker: Any, seconds: float) -> float:
    """Updates/s of a scheduler of ours, or of plain processes."""
    report = await scheduler.run(*worker, seconds=seconds)
    return float(report.updates_per_second)


async def prepare(
    name: str, workers: int, spread_over: str, stack: AsyncExitStack
) -> dict[str, Measure]:
    """Each way to train a model, ready until the stack is left."""
    ways: dict[str, Measure] = {}
    for way, by_hand in ((OURS, False), (BY_HAND, True)):
        model = MODELS[name].make()
        shared = SharedParameters.from_module(model)
        if spread_over == "processes":
            processes = ProcessScheduler(shared, processes=workers, lr=LEARNING_RATE)
            scheduler: Any = await stack.enter_async_context(processes)
            worker: Any = partial(make_worker, name, by_hand)
        else:
            streams = StreamScheduler(shared, workers=workers, lr=LEARNING_RATE)
            scheduler = await stack.enter_async_context(streams)
            worker = make_worker(name, by_hand, shared, 0)
        ways[way] = partial(measured, scheduler, [worker])
    if spread_over == "processes":
        work = partial(plain_process, name)
        plain = await stack.enter_async_context(ByHand(work, MODELS[name].make(), workers))
        ways[PLAIN] = partial(measured, plain, [])
    else:
        ways[PLAIN] = partial(measured_plainly, name, workers)
    return ways


async def measure(names: list[str], rounds: int, seconds: float) -> AsyncIterator[list[ModelRate]]:
    """Yields the rates of each model and setup, in all ways."""
    for name in names:
        for spread_over, workers in SETUPS:
            rates: dict[str, list[float]] = {way: [] for way in WAYS}
            async with AsyncExitStack() as stack:
                ways = await prepare(name, workers, spread_over, stack)
                for index in range(-1, rounds):  # one before that warms up
                    for way in in_turn(WAYS, max(index, 0)):
                        rate = await ways[way](seconds)
                        if index >= 0:
                            rates[way].append(rate)
            print(name, spread_over, workers, {way: max(each) for way, each in rates.items()})
            yield [
                ModelRate(
                    model=name,
                    spread_over=spread_over,
                    workers=workers,
                    way=way,
                    updates_per_second=PositiveSpread.of(rates[way]),
                    hogstream_ratio=None if way == OURS else Ratio.of(rates[OURS], rates[way]),
                )
                for way in WAYS
            ]


def main() -> None:
    """Measures, and writes a result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each way, in each round")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    gathered, end = gather_until_interrupted(
        measure(asked.models.split(","), asked.rounds, asked.seconds)
    )
    results = [rate for each in gathered for rate in each]
    write_result(
        ModelRates(
            command=shlex.join(["python", *sys.argv]),
            environment=describe_environment(torch.device("cpu"), "numba"),
            partial=end.partial,
            error=end.error,
            warnings=spread_warnings(
                {
                    f"{each.model} over {each.workers} {each.spread_over}, {each.way}": (
                        each.updates_per_second.estimate
                    )
                    for each in results
                }
            ),
            rounds=asked.rounds,
            seconds=asked.seconds,
            results=results,
        ),
        asked.json,
    )


if __name__ == "__main__":
    main()
