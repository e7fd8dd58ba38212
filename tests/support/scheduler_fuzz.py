"""Random runs of ``StreamScheduler``: workers fail and give up, and programs interrupt."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fuzzing import LOOPS, Chance, hogstream_threads, run_in_loop
from hogstream.kernels import rmsprop_
from hogstream.scheduler import (
    RunReport,
    SharedParameters,
    StreamScheduler,
    Timeline,
    WorkerContext,
    WorkerError,
)
from hogstream.scheduler.update_state import kinds_of
from update_testing import COMPUTE, State, assert_same_bits

GRAD = 0.25
SHORT_DEADLINE = 0.02


@dataclass(frozen=True)
class Habits:
    """What workers do in an iteration, with which probability.

    Attributes:
        think: Sleep on the event loop.
        block: Block their thread for a while.
        walk_away: Stop waiting for a blocking call before it has ended.
        hang: Block their thread for good; only where a deadline has them left behind.
        assign: Assign hyperparameters to the scheduler.
        fail: Fail, before or after they submit.
        spoil: Submit a gradient with a NaN.
        compute: Leave it to their thread to submit what it computes.
        rows: Submit all rows, each an element, in the place of a gradient that has no rows.
        give_up: Stop waiting for ``submit``, or for that.
    """

    think: float
    block: float
    walk_away: float
    hang: float
    assign: float
    fail: float
    spoil: float
    compute: float
    rows: float
    give_up: float


@dataclass(frozen=True)
class Run:
    """One run of a scheduler, and how it ends.

    Attributes:
        updates: How many it is asked for.
        seconds: How long it may take; None for as long as it likes.
        begins: After how many turns of the event loop it begins.
        end: A name in ``ENDS``, or one of ``LEAVES``.
        turns: After how many turns that comes.
    """

    updates: int
    seconds: float | None
    begins: int
    end: str
    turns: int


@dataclass(frozen=True)
class SchedulerCase:
    """What is run.

    Attributes:
        seed: Of this, and of what workers do.
        loop: Kind of the event loop.
        settings: Of the scheduler.
        numbers: Its hyperparameters.
        other_numbers: Whether workers that assign hyperparameters assign other ones.
        timeline: Whether one is taken down.
        dtype: Of the parameters.
        elements: How many there are.
        own_process: Whether a worker alone has the event loop's thread.
        habits: Of the workers.
        runs: One after the other.
    """

    seed: int
    loop: str
    settings: dict[str, Any]
    numbers: dict[str, Any]
    other_numbers: bool
    timeline: bool
    dtype: torch.dtype
    elements: int
    own_process: bool
    habits: Habits
    runs: list[Run]

    def run(self) -> None:
        """Runs it, and checks what came of it."""
        program = _Program(self)
        run_in_loop(self.loop, program.main())
        program.check_parameters()


# Of gradients that do not change nothing is left around their mean but rounding: by a smaller
# epsilon float16 would soon be infinite.
FORMS: list[dict[str, Any]] = [
    {},
    {},
    {"momentum": 0.9},
    {"centered": True, "eps": 0.1},
    {"centered": True, "eps": 0.1, "momentum": 0.5, "lr_in_momentum": True},
]


def draw(seed: int) -> SchedulerCase:
    """The case of a seed."""
    chance = Chance(seed)
    settings = _draw_settings(chance)
    return SchedulerCase(
        seed=seed,
        loop=chance.choice(LOOPS),
        settings=settings,
        numbers={
            "lr": chance.choice([0.01, 0.1]),
            "alpha": chance.choice([0.9, 0.99]),
            "weight_decay": chance.choice([0, 0.01]),
            "eps_inside_sqrt": chance.some(0.5),
            **chance.choice(FORMS),
        },
        other_numbers=chance.some(0.3),
        timeline=chance.some(0.2),
        own_process=chance.some(0.2),
        dtype=chance.choice([torch.float32, *COMPUTE]),
        elements=chance.choice([1, 2, 7, 64, 1000, 5000]),
        habits=Habits(
            think=chance.choice([0, 0, 0.3]),
            block=chance.choice([0, 0, 0.3]),
            walk_away=chance.choice([0, 0, 0.1]),
            hang=0.01 if settings["deadline"] == SHORT_DEADLINE else 0,
            assign=chance.choice([0, 0, 0.1]),
            fail=chance.choice([0, 0, 0.03, 0.2]),
            spoil=chance.choice([0, 0, 0.1]),
            compute=chance.choice([0, 0.5, 1]),
            rows=1 if settings["policy"] == "row-locked" else chance.choice([0, 0, 0.5]),
            give_up=chance.choice([0, 0, 0.2]),
        ),
        runs=[
            Run(
                updates=chance.choice([1, 2, 7, 50, 200]),
                seconds=chance.choice([None, None, 0.02]),
                begins=chance.choice([0, 0, 0, 1, 2, 5]),
                end=chance.choice(["itself"] * 8 + [*ENDS, *LEAVES]),
                turns=chance.choice([0, 1, 2, 5, 30, 200]),
            )
            for _ in range(chance.randrange(1, 4))
        ],
    )


def _draw_settings(chance: Chance) -> dict[str, Any]:
    bound = chance.choice([0, 1, 2, 5])
    policy = chance.choice(["lock-free", "locked", "ordered", "awaited", f"bounded:{bound}"])
    workers, depth = chance.randrange(1, 7), chance.choice([1, 1, 2, 3, 8])
    backend = chance.choice(["numba", "numba", "numpy"])
    batch_of = chance.choice(["lane", "lanes"])
    most = depth * (workers if batch_of == "lanes" else 1)
    batches = policy in ("lock-free", "locked", "ordered") and chance.some(0.5)
    if backend == "numba" and chance.some(0.15):
        policy = "row-locked"
    return {
        "backend": backend,
        "policy": policy,
        "workers": workers,
        "depth": depth,
        "batch": chance.randrange(1, most + 1) if batches else 1,
        "batch_of": batch_of,
        "state": chance.choice(["shared", "shared", "per-worker"]),
        "read": chance.choice(["live", "live", "snapshot"]),
        "telemetry": backend == "numba" and chance.some(0.3),
        "staleness_aware": chance.some(0.2),
        "on_error": chance.choice(["stop", "continue", "restart"]),
        "on_nonfinite": chance.choice(["apply", "skip", "raise"]),
        "deadline": chance.choice([None, None, None, 5.0, SHORT_DEADLINE]),
    }


# How a run ends


async def _by_itself(run: asyncio.Task[RunReport]) -> None:
    pass


async def _cancelled(run: asyncio.Task[RunReport]) -> None:
    run.cancel()


async def _cancelled_twice(run: asyncio.Task[RunReport]) -> None:
    run.cancel()
    await asyncio.sleep(0)
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
#: The scope is left while the run goes on, or before it begins.
LEAVES = ["scope left", "body fails"]


# How a worker fails


class Broken(Exception):
    """What workers fail with."""


class Unprintable(Broken):
    """Fails itself when it is to be told."""

    def __str__(self) -> str:
        raise LookupError("no text")


class _Computed:
    """What a worker's thread calls for a gradient; one of its calls may fail."""

    def __init__(self, grad: torch.Tensor, fails: int) -> None:
        self._grad = grad
        self._fails = fails
        self._calls = 0

    def __call__(self) -> tuple[torch.Tensor, float]:
        self._calls += 1
        if self._calls == self._fails:
            raise Broken("within")
        return self._grad, 1.0


async def _raise(error: BaseException) -> None:
    raise error


async def _submit_twice(context: WorkerContext, grad: torch.Tensor) -> None:
    await context.submit(grad)
    await context.submit(grad)


FAILURES: list[Callable[[WorkerContext, torch.Tensor], Awaitable[Any]]] = [
    lambda context, grad: _raise(Broken("before")),
    lambda context, grad: _raise(Unprintable()),
    lambda context, grad: _raise(asyncio.CancelledError()),
    lambda context, grad: context.run_blocking(next, iter(())),
    lambda context, grad: context.submit(grad.clone().resize_(len(grad) + 1)),
    lambda context, grad: asyncio.sleep(0),  # returns, and has submitted nothing
    _submit_twice,
]
REPORTED = (Broken, RuntimeError, ValueError, FloatingPointError, TimeoutError)


class _BodyFailed(Exception):
    pass


class _Program:
    """A case while it runs."""

    def __init__(self, case: SchedulerCase) -> None:
        self._case = case
        self._start = torch.linspace(-1, 1, case.elements).to(case.dtype)
        self._shared = SharedParameters({"w": self._start.clone()})
        self._chances = [Chance(f"{case.seed}/{index}") for index in range(self._workers)]
        grad = torch.full_like(self._start, GRAD)
        spares = case.settings["depth"] + 2
        self._grads = [[grad.clone() for _ in range(spares)] for _ in range(self._workers)]
        self._rows = torch.arange(len(grad))
        self._spoiled = grad.clone()
        self._spoiled[Chance(case.seed).randrange(len(grad))] = float("nan")
        self._timeline = Timeline() if case.timeline else None
        self._scheduler = StreamScheduler(
            self._shared,
            timeline=self._timeline,
            own_process=case.own_process,
            **case.settings,
            **case.numbers,
        )
        self._contexts: dict[int, WorkerContext] = {}
        self._released = threading.Event()  # whoever hangs
        self._landed = self._delivered = 0

    @property
    def _workers(self) -> int:
        workers: int = self._case.settings["workers"]
        return workers

    async def main(self) -> None:
        """All runs, and what is refused after them."""
        try:
            with suppress(_BodyFailed):
                async with self._scheduler:
                    for run in self._case.runs:
                        before = self._shared.version
                        self._scheduler.report = None
                        task = asyncio.ensure_future(self._begin(run))
                        await _turn(run.turns)
                        if run.end == "body fails":
                            raise _BodyFailed
                        if run.end == "scope left":
                            break
                        await ENDS[run.end](task)
                        await self._check_end(run, task, before)
            if run.end in LEAVES:
                await self._check_end(run, task, before)
            await self._check_refusals()
        finally:
            self._released.set()
        for thread in hogstream_threads():  # that were left behind, and end now
            thread.join()
        await asyncio.sleep(0)

    async def _begin(self, run: Run) -> RunReport:
        await _turn(run.begins)
        return await self._scheduler.run(self._work, updates=run.updates, seconds=run.seconds)

    async def _work(self, context: WorkerContext) -> None:
        """A worker's iteration."""
        self._contexts[context.index] = context
        chance, habits = self._chances[context.index], self._case.habits
        grad = self._choose_grad(context, chance)
        if chance.some(habits.think):
            await asyncio.sleep(chance.choice([0, 0, 0.001]))
        if chance.some(habits.block):
            await context.run_blocking(time.sleep, chance.choice([0, 0.001]))
        if chance.some(habits.walk_away):
            await _walk_away(context.run_blocking(time.sleep, 0.002), chance)
        if chance.some(habits.hang):
            await context.run_blocking(self._released.wait)
        if chance.some(habits.assign):
            self._assign(chance)
        if chance.some(habits.fail):
            await chance.choice(FAILURES)(context, grad)
            return
        if chance.some(habits.rows):
            submits = context.submit_rows("w", self._rows, grad.resolve_neg()[:, None])
        elif chance.some(habits.compute):
            fails = chance.choice([1, 2, 5]) if chance.some(habits.fail) else 0
            submits = context.compute(_Computed(grad, fails))
        else:
            submits = context.submit(grad)
        if chance.some(habits.give_up):
            await _walk_away(submits, chance)
        else:
            await submits
        if chance.some(habits.fail / 2):
            raise Broken("after")

    def _choose_grad(self, context: WorkerContext, chance: Chance) -> torch.Tensor:
        if chance.some(self._case.habits.spoil):
            return self._spoiled
        mine = self._grads[context.index]
        grad = mine[context.iteration % len(mine)]
        kind = chance.choice(["same"] * 5 + ["elsewhere", "new", "negated"])
        if kind == "elsewhere":
            grad.data = grad.clone()
        elif kind == "new":
            grad = grad.clone()
        elif kind == "negated":
            grad = torch._neg_view(-grad)
        return grad

    def _assign(self, chance: Chance) -> None:
        now = self._scheduler.hyperparameters
        lr = chance.choice([0.01, 0.001]) if self._case.other_numbers else now.lr
        self._scheduler.hyperparameters = replace(now, lr=lr)

    # What must hold

    async def _check_end(self, run: Run, task: asyncio.Task[RunReport], before: int) -> None:
        await asyncio.wait({task})
        report, interrupted = self._scheduler.report, run.end != "itself"
        if task.cancelled():
            assert run.end.startswith("cancelled"), "it was cancelled by itself"
        elif isinstance(error := task.exception(), RuntimeError):
            assert run.end in LEAVES, error
        else:
            assert isinstance(error, WorkerError | None), error
        if report is None:
            assert interrupted  # before it began
            return
        self._check_counts(report, run, self._shared.version - before)
        self._check_staleness(report)
        if report.partial:
            assert report.failures or interrupted
        for failure in report.failures.values():
            assert isinstance(failure, REPORTED), failure
        json.dumps(report.to_dict())
        self._landed += report.updates

    def _check_counts(self, report: RunReport, run: Run, landed: int) -> None:
        assert report.updates == landed, f"{report.updates} in the report, {landed} landed"
        assert sum(report.dropped) == 0
        done = report.updates + sum(report.nonfinite)
        self._delivered += done
        assert done <= run.updates
        if not report.partial and run.seconds is None:
            assert done == run.updates, f"asked for {run.updates}, did {done}: {report.failures}"

    def _check_staleness(self, report: RunReport) -> None:
        assert sum(report.staleness.values()) == report.updates
        assert min(report.staleness, default=0) >= 0
        policy = self._case.settings["policy"]
        if policy.startswith("bounded:"):
            assert max(report.staleness, default=0) <= int(policy.removeprefix("bounded:"))
        if policy in ("locked", "ordered", "awaited", "row-locked"):
            assert not report.lost_block_updates

    async def _check_refusals(self) -> None:
        """After the end a context does nothing any more."""
        for context in self._contexts.values():
            for use in (context.submit(self._grads[0][0]), context.run_blocking(sum, ())):
                with suppress(RuntimeError):
                    await use
                    raise AssertionError("it was used after the end")

    def check_parameters(self) -> None:
        """Held to as many updates in a row, where they were made so."""
        assert self._shared.version == self._landed
        if self._timeline is not None:
            assert _slices(self._timeline) == self._delivered
        case, settings = self._case, self._case.settings
        spoiled = case.habits.spoil and settings["on_nonfinite"] == "apply"
        changed = case.habits.assign and case.other_numbers
        serial = settings["policy"] in ("locked", "ordered", "awaited", "row-locked", "bounded:0")
        serial = serial and settings["state"] == "shared"
        if spoiled:
            return
        if (serial or self._workers == 1) and not settings["staleness_aware"] and not changed:
            expected = SharedParameters({"w": self._start})
            state = expected.make_state(kinds_of(self._scheduler.hyperparameters.switches))
            options: dict[str, Any] = {**case.numbers, **state.named(), "backend": "numpy"}
            for _ in range(self._landed):
                rmsprop_(expected.flat, self._grads[0][0], **options)
            actual = self._shared.flat
            assert_same_bits(State(actual, state.ms), State(expected.flat, state.ms))
        else:
            assert self._shared.flat.isfinite().all()


async def _turn(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def _walk_away(wait: Awaitable[object], chance: Chance) -> None:
    with suppress(asyncio.TimeoutError):
        await asyncio.wait_for(wait, chance.choice([0, 1e-6, 1e-4]))


def _slices(timeline: Timeline) -> int:
    """How many updates a timeline shows."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        timeline.write(path)
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    return sum(event.get("cat") == "update" for event in events)
