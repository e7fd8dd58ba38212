"""Ways to train a problem: a plain loop, the scheduler over threads or processes, and by hand.

Each is a scope, in which turns are taken. A turn trains from the first parameters for some seconds.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch

from hogstream.optim import RMSprop
from hogstream.profiling.measure.by_hand import ByHand, Hogwild
from hogstream.profiling.measure.problem import (
    Make,
    Problem,
    Start,
    make_by_hand,
    make_worker,
)
from hogstream.profiling.results.schema import RunBy, way_name
from hogstream.scheduler import (
    ModelWorker,
    ProcessScheduler,
    RunReport,
    SharedParameters,
    StreamScheduler,
)

THREAD_POLICIES = ("locked", "ordered", "lock-free")
PROCESS_POLICIES = ("locked", "lock-free")
_TRIAL_SECONDS = 0.1


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Has torch use so many threads for an operation of this thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class Turn:
    """What a way did in its turn.

    Attributes:
        updates_per_second: Of all workers.
        losses: One of each update, in the order in which they landed.
        torch_threads: How many torch had for each worker.
        latency_us: From submission to landing, on average; None without a scheduler.
        staleness: On average; None without a scheduler.
        most_staleness: The largest.
    """

    updates_per_second: float
    losses: Sequence[float]
    torch_threads: int
    latency_us: float | None = None
    staleness: float | None = None
    most_staleness: int | None = None


class Kind(NamedTuple):
    """What a way is; as in ``Way``."""

    run_by: RunBy
    policy: str | None
    workers: int

    @property
    def name(self) -> str:
        """In words."""
        return way_name(*self)


class OpenWay(Protocol):
    """A way to take turns, in a scope.

    Attributes:
        kind: What it is.
    """

    kind: Kind

    async def __aenter__(self) -> Any:
        """Makes it ready to take turns."""

    async def __aexit__(self, *ended: Any) -> None:
        """Leaves nothing behind."""

    async def turn(self, seconds: float) -> Turn:
        """Trains from the first parameters."""


class PlainLoop:
    """What one writes without a scheduler, with our optimizer.

    Torch has all cores for it, or one thread: whichever is faster, as small operations are slower
    for being shared out.
    """

    kind = Kind("loop", None, 1)

    def __init__(self, problem: Problem, lr: float) -> None:
        """Starts nothing."""
        self._problem, self._lr = problem.copied(), lr
        self._start = Start(self._problem.model)
        self._threads = torch.get_num_threads()

    async def __aenter__(self) -> PlainLoop:
        """Finds out how many threads are faster."""
        speeds = {}
        for threads in {self._threads, 1}:
            self._threads = threads
            speeds[threads] = (await self.turn(_TRIAL_SECONDS)).updates_per_second
        self._threads = max(speeds, key=speeds.__getitem__)
        return self

    async def __aexit__(self, *ended: Any) -> None:
        pass

    async def turn(self, seconds: float) -> Turn:
        """Trains on this thread."""
        self._start.restore()
        trained = [each for each in self._problem.model.parameters() if each.requires_grad]
        optimizer = RMSprop(trained, lr=self._lr)
        losses: list[float] = []
        with torch_threads(self._threads):
            self._problem.backward()  # which gets them ready
            began = now = time.perf_counter()
            while now < began + seconds:
                losses.append(self._problem.backward())
                optimizer.step()
                now = time.perf_counter()
        return Turn(len(losses) / (now - began), losses, self._threads)


class Scheduled:
    """Workers of the scheduler."""

    def __init__(self, kind: Kind, problem: Problem, make: Make, lr: float) -> None:
        """Starts nothing.

        Args:
            kind: Over threads or processes, which policy, and how many workers.
            problem: What is trained.
            make: What makes it in each process.
            lr: Learning rate.
        """
        self.kind = kind
        mine = problem.copied()
        self._start = Start(mine.model)
        self._shared = SharedParameters.from_module(mine.model)
        # Updates as torch's, so that all ways make the same.
        settings: dict[str, Any] = {"policy": kind.policy, "lr": lr, "eps_inside_sqrt": False}
        self._scheduler: Any
        self._work: Any
        if kind.run_by == "threads":
            self._work = ModelWorker(self._shared, mine.model, mine.loss, mine.batches)
            self._scheduler = StreamScheduler(self._shared, workers=kind.workers, **settings)
        else:
            self._work = partial(make_worker, pickle.dumps(make))
            self._scheduler = ProcessScheduler(
                self._shared, workers=1, processes=kind.workers, **settings
            )

    async def __aenter__(self) -> Scheduled:
        await self._scheduler.__aenter__()
        return self

    async def __aexit__(self, *ended: Any) -> None:
        await self._scheduler.__aexit__(*ended)

    async def turn(self, seconds: float) -> Turn:
        """Runs the workers."""
        self._start.restore()
        self._shared.ms.zero_()
        losses: list[float] = []
        run = partial(self._scheduler.run, self._work, on_loss=lambda _, loss: losses.append(loss))
        report: RunReport = await run(seconds=seconds)
        if not report.updates:  # the machine had other things to do
            report = await run(updates=self.kind.workers)
        staleness = report.to_dict()["staleness"]
        return Turn(
            report.updates_per_second,
            losses,
            report.torch_threads,
            report.latencies.mean_us(),
            staleness["mean"],
            int(staleness["max"]),
        )


class Hand:
    """What people write by hand: processes with torch's RMSprop, under a lock."""

    def __init__(self, kind: Kind, problem: Problem, make: Make, lr: float) -> None:
        """Starts nothing; the arguments are as for ``Scheduled``."""
        self.kind = kind
        model = problem.copied().model
        self._start = Start(model)
        work = Hogwild(partial(make_by_hand, pickle.dumps(make)), {"lr": lr})
        self._by_hand = ByHand(work, model, processes=kind.workers)

    async def __aenter__(self) -> Hand:
        await self._by_hand.__aenter__()
        return self

    async def __aexit__(self, *ended: Any) -> None:
        await self._by_hand.__aexit__(*ended)

    async def turn(self, seconds: float) -> Turn:
        """Has the processes work."""
        self._start.restore()
        losses: list[float] = []
        run = partial(self._by_hand.run, on_loss=lambda _, loss: losses.append(loss))
        report = await run(seconds=seconds)
        if not report.updates:
            report = await run(updates=self.kind.workers)
        return Turn(report.updates_per_second, losses, report.torch_threads)


def kinds_of(counts: Sequence[int], *, processes: bool) -> list[Kind]:
    """Every way, from the simplest on.

    Args:
        counts: Of workers.
        processes: Whether there are to be any.
    """
    several = [count for count in counts if count > 1]
    spread: list[tuple[RunBy, tuple[str, ...]]] = [("threads", THREAD_POLICIES)]
    spread += [("processes", PROCESS_POLICIES)] if processes else []
    kinds = [PlainLoop.kind]
    for run_by, policies in spread:
        kinds.append(Kind(run_by, "lock-free", 1))
        kinds += [Kind(run_by, policy, count) for policy in policies for count in several]
    return kinds + [Kind("hand", "locked", count) for count in several if processes]


def way_of(kind: Kind, problem: Problem, make: Make, lr: float) -> OpenWay:
    """A way.

    Args:
        kind: Which.
        problem: What is trained.
        make: What makes it in each process.
        lr: Learning rate.
    """
    if kind == PlainLoop.kind:
        return PlainLoop(problem, lr)
    if kind.run_by == "hand":
        return Hand(kind, problem, make, lr)
    return Scheduled(kind, problem, make, lr)
