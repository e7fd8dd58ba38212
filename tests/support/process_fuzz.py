"""Random runs of ``ProcessScheduler``: processes are killed and stopped, runs are interrupted."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import resource_tracker
from typing import Any

import psutil
import torch

from fuzzing import LOOPS, Chance, run_in_loop
from hogstream.scheduler import (
    ProcessScheduler,
    RunReport,
    SharedParameters,
    WorkerContext,
    WorkerError,
)
from hogstream.scheduler.context import Worker


@dataclass(frozen=True)
class Habits:
    """What workers do in an iteration, with which probability.

    Attributes:
        think: Sleep on the event loop.
        fail: Fail before they submit.
        spoil: Submit a gradient with a NaN.
    """

    think: float
    fail: float
    spoil: float


@dataclass(frozen=True)
class Run:
    """One run, and what befalls it, in this order.

    Attributes:
        updates: How many it is asked for.
        signals: What is sent to one of the processes, each after a pause in seconds.
        end: A name in ``ENDS``, or one of ``LEAVES``.
        pause: Seconds before that.
    """

    updates: int
    signals: list[tuple[float, signal.Signals]]
    end: str
    pause: float


@dataclass(frozen=True)
class ProcessCase:
    """What is run.

    Attributes:
        seed: Of this, and of what workers do.
        loop: Kind of the event loop.
        processes: How many.
        settings: Of the scheduler of each, and hyperparameters.
        elements: How many parameters there are.
        habits: Of the workers.
        runs: One after the other.
    """

    seed: int
    loop: str
    processes: int
    settings: dict[str, Any]
    elements: int
    habits: Habits
    runs: list[Run]

    def run(self) -> None:
        """Runs it, and checks what came of it."""
        shared = SharedParameters({"w": torch.zeros(self.elements)})
        resource_tracker.ensure_running()  # Python's own, until Python ends
        run_in_loop(self.loop, _Program(self, shared).main())
        assert not (left := _children()), f"processes left: {left}"
        assert shared.flat.isfinite().all()


def draw(seed: int) -> ProcessCase:
    """The case of a seed."""
    chance = Chance(seed)
    deadline = chance.choice([None, None, 3.0])
    # A process that is stopped is found out by a deadline, and by nothing else: while it works.
    first = [signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP if deadline else signal.SIGKILL]
    return ProcessCase(
        seed=seed,
        loop=chance.choice(LOOPS),
        processes=chance.randrange(1, 4),
        settings={
            "workers": chance.randrange(1, 3),
            "policy": chance.choice(["lock-free", "locked", "awaited"]),
            "depth": chance.choice([1, 4]),
            "backend": chance.choice(["numba", "numpy"]),
            "state": chance.choice(["shared", "per-worker"]),
            "read": chance.choice(["live", "snapshot"]),
            "on_error": chance.choice(["stop", "continue", "restart"]),
            "on_nonfinite": chance.choice(["skip", "raise"]),
            "deadline": deadline,
            "centered": chance.some(0.3),
            "momentum": chance.choice([0, 0, 0.9]),
        },
        elements=chance.choice([1, 100, 20_000]),
        habits=Habits(
            think=chance.choice([0, 0.5]),
            fail=chance.choice([0, 0, 0.02]),
            spoil=chance.choice([0, 0.05]),
        ),
        runs=[
            Run(
                updates=chance.choice([3, 40, 400]),
                signals=[
                    (chance.uniform(0, 0.2), signal.SIGKILL if later else chance.choice(first))
                    for later in range(chance.choice([0, 0, 1, 2]))
                ],
                end=chance.choice(["itself"] * 5 + [*ENDS, *LEAVES]),
                pause=chance.choice([0, 0.01, 0.1]),
            )
            for _ in range(chance.randrange(1, 3))
        ],
    )


class Broken(Exception):
    """What workers fail with."""


def make_worker(
    seed: int, habits: dict[str, float], shared: SharedParameters, process: int
) -> Worker:
    """Makes a worker with habits, in a process of its own."""
    chance = Chance(f"{seed}/{process}")
    grad = torch.full_like(shared.flat, 0.5)
    spoiled = torch.full_like(shared.flat, torch.nan)

    async def worker(context: WorkerContext) -> None:
        if chance.some(habits["think"]):
            await asyncio.sleep(0.002)
        if chance.some(habits["fail"]):
            raise Broken
        await context.submit(spoiled if chance.some(habits["spoil"]) else grad)

    return worker


# How a run ends


async def _by_itself(run: asyncio.Task[RunReport]) -> None:
    pass


async def _cancelled(run: asyncio.Task[RunReport]) -> None:
    run.cancel()


async def _cancelled_twice(run: asyncio.Task[RunReport]) -> None:
    run.cancel()
    await asyncio.sleep(0.001)
    run.cancel()


async def _cancelled_at_every_turn(run: asyncio.Task[RunReport]) -> None:
    """As a scope does whose deadline has passed."""
    while not run.done():
        run.cancel()
        await asyncio.sleep(0)


ENDS: dict[str, Callable[[asyncio.Task[RunReport]], Awaitable[None]]] = {
    "itself": _by_itself,
    "cancelled": _cancelled,
    "cancelled twice": _cancelled_twice,
    "cancelled at every turn": _cancelled_at_every_turn,
}
#: The scope is left while the run goes on.
LEAVES = ["scope left", "body fails"]


class _BodyFailed(Exception):
    pass


class _Program:
    """A case while it runs."""

    def __init__(self, case: ProcessCase, shared: SharedParameters) -> None:
        self._case = case
        self._shared = shared
        self._chance = Chance(case.seed)
        self._scheduler = ProcessScheduler(shared, processes=case.processes, **case.settings)

    async def main(self) -> None:
        """All runs."""
        make = partial(make_worker, self._case.seed, asdict(self._case.habits))
        with suppress(_BodyFailed):
            async with self._scheduler:
                for run in self._case.runs:
                    self._scheduler.report, before = None, self._shared.version
                    task = asyncio.ensure_future(self._scheduler.run(make, updates=run.updates))
                    for pause, number in run.signals:
                        await asyncio.sleep(pause)
                        if number == signal.SIGKILL or self._shared.version > before:
                            self._send(number)
                    await asyncio.sleep(run.pause)
                    if run.end == "body fails":
                        raise _BodyFailed
                    if run.end == "scope left":
                        break
                    await ENDS[run.end](task)
                    await self._check_end(run, task, before)
        if run.end in LEAVES:
            await self._check_end(run, task, before)

    def _send(self, number: signal.Signals) -> None:
        if children := _children():
            with suppress(psutil.NoSuchProcess):
                self._chance.choice(children).send_signal(number)

    async def _check_end(self, run: Run, task: asyncio.Task[RunReport], before: int) -> None:
        await asyncio.wait({task})
        report, interrupted = self._scheduler.report, run.end != "itself"
        if task.cancelled():
            assert run.end.startswith("cancelled"), "it was cancelled by itself"
        elif isinstance(error := task.exception(), RuntimeError):
            assert run.end in LEAVES, error
        else:
            assert isinstance(error, WorkerError | OSError | None), error
        if report is None:
            assert interrupted  # before it began
            return
        landed = self._shared.version - before
        assert report.updates == landed, f"{report.updates} in the report, {landed} landed"
        # What a process left out before it died, nobody knows.
        done = landed + sum(report.nonfinite)
        assert done <= run.updates, f"asked for {run.updates}, did {done}"
        if not report.partial and not report.dead:
            assert done == run.updates, f"asked for {run.updates}, did {done}: {report.failures}"
        if report.partial:
            assert report.failures or interrupted
        json.dumps(report.to_dict())


def _children() -> list[psutil.Process]:
    """Those that live and are workers' processes, not Python's own that tracks resources."""
    children = []
    for each in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if each.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(each.cmdline()):
                children.append(each)
    return children
