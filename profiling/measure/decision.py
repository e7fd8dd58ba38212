"""For whom must decide: every way to train their own model, side by side, and which to use."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import torch

from hogstream.kernels.backends.select import select_backend
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import COMPUTE_DTYPES, check_operands
from hogstream.profiling.environment import describe_environment, usable_cores
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.profiling.measure.problem import Make, Problem, checked_problem
from hogstream.profiling.measure.ways import (
    Kind,
    OpenWay,
    PlainLoop,
    Turn,
    kinds_of,
    torch_threads,
    way_of,
)
from hogstream.profiling.results.confidence import FEWEST, spread_warnings
from hogstream.profiling.results.records import MOST, PositiveSpread, SignedSpread, Spread
from hogstream.profiling.results.schema import DecideSettings, Decision, UnderLock, Way
from hogstream.profiling.results.verdict import answer, decided, most_gain, simplicity
from hogstream.profiling.turns import in_turn
from hogstream.scheduler.checks import check_integer, check_number, error_text

ROUNDS = FEWEST
SECONDS = 60.0
LR = 1e-3
#: More workers than this are measured if they are asked for.
MOST_WORKERS = 16
# Turns before the first round, in which what is needed once is made.
_WARM_UP_SECONDS = 0.2
# Of the updates of a turn, those over whose batches a loss is the mean.
_LAST = 0.2


def default_workers() -> tuple[int, ...]:
    """Worker counts if none are given: as many as there are cores, from 2 to 16."""
    return (max(2, min(usable_cores(), MOST_WORKERS)),)


def decide(
    make: Make,
    *,
    workers: Sequence[int] | None = None,
    seconds: float = SECONDS,
    lr: float = LR,
    processes: bool = True,
    command: str | None = None,
    on_step: Callable[[str], object] = str,
) -> Decision:
    """Measures every way to train a model, and says which to use.

    In rounds in which all take turns: a plain loop with ``hogstream.optim.RMSprop``; one worker,
    and several under ``locked``, ``ordered`` and ``lock-free``, over threads; the same but for
    ``ordered`` over processes; and processes with ``torch.optim.RMSprop`` under a lock, as people
    write them by hand. Each turn begins with the parameters that ``make`` has made. Runs an event
    loop of its own. Other processes import ``__main__``, so a script calls this under
    ``if __name__ == "__main__":``.

    Args:
        make: A function of a module; returns a ``torch.nn.Module``, a loss that maps a model and a
            batch to a scalar tensor, and batches: any iterable, which is begun anew when it ends.
            It is called once in this process and in each other; what draws from torch's, NumPy's
            or Python's random numbers draws other batches in each.
        workers: Worker counts, each at least 1; None for as many as there are cores, from 2 to 16.
        seconds: How long to measure, besides the start of processes; > 0.
        lr: Learning rate of all; what else they are made with is as in ``torch.optim.RMSprop``.
        processes: Whether to measure other processes as well.
        command: What repeats it, for the result.
        on_step: Called with what is to be done next.

    Returns:
        The result; interrupted, of the rounds until then.

    Raises:
        TypeError: If a number is of a wrong type.
        ValueError: If a number is out of range, or ``make`` makes nothing that can be trained.
        KeyboardInterrupt: If interrupted before the end of a round.
        MeasurementError: If workers failed before the end of a round.
    """
    counts = tuple(
        check_integer(f"workers[{index}]", count, at_least=1)
        for index, count in enumerate(workers or default_workers())
    )
    lr, seconds = check_number("lr", lr), check_number("seconds", seconds, above=0)
    problem = checked_problem(make)
    kinds = kinds_of(counts, processes=processes)
    left_out: list[str] = []
    costs = [_Costs(problem.copied(), count) for count in counts]
    each = seconds / (ROUNDS * (len(kinds) + 1))
    rounds, end = gather_until_interrupted(
        _take_turns(
            {kind: partial(way_of, kind, problem, make, lr) for kind in kinds},
            costs,
            each,
            left_out,
            on_step,
        )
    )
    results = _results(rounds)
    verdict = decided(results)
    settings = DecideSettings(
        make=f"{make.__module__}:{make.__qualname__}" if hasattr(make, "__qualname__") else "",
        workers=list(counts),
        processes=processes,
        rounds=ROUNDS,
        seconds=seconds,
        lr=lr,
    )
    return Decision(
        command=command or f"hogstream.profiling.decide({settings.make})",
        environment=describe_environment(
            problem.device, select_backend(None, problem.device.type).name
        ),
        partial=end.partial,
        error=end.error,
        warnings=left_out
        + spread_warnings({way.name: way.updates_per_second.estimate for way in results}),
        settings=settings,
        elements=problem.elements,
        answer=answer(verdict),
        use=results.index(verdict.use),
        next_best=None if verdict.next_best is None else results.index(verdict.next_best),
        gain=verdict.gain,
        under_lock=[
            cost.summary(measured)
            for cost, *measured in zip(costs, *(each.costs for each in rounds), strict=True)
        ],
        results=results,
    )


@dataclass(frozen=True)
class _Round:
    """What was measured in a round: turns, and for each worker count gradients and updates."""

    turns: dict[Kind, Turn]
    costs: list[tuple[float, float]]


async def _take_turns(
    ways: Mapping[Kind, Callable[[], OpenWay]],
    costs: Sequence[_Costs],
    seconds: float,
    left_out: list[str],
    on_step: Callable[[str], object],
) -> AsyncIterator[_Round]:
    """Yields rounds, in which each has so many seconds; tells of ways that had to be left out."""
    async with AsyncExitStack() as stack:
        opened = []
        for kind, make_way in ways.items():
            on_step(f"start: {kind.name}")
            try:
                way = await stack.enter_async_context(make_way())
                await way.turn(min(seconds, _WARM_UP_SECONDS))
            except Exception as error:
                left_out.append(f"Without {kind.name}, which failed: {error_text(error)}.")
            else:
                opened.append(way)
        if not opened:
            raise MeasurementError(left_out[0])
        for index in range(ROUNDS):
            measured = [each.measure(seconds / len(costs)) for each in costs]
            turns = {}
            for way in in_turn(opened, index):
                on_step(f"round {index + 1}: {way.kind.name}")
                turns[way.kind] = await way.turn(seconds)
            yield _Round(turns, measured)


class _Costs:
    """Gradients and updates with nothing beside them, as one of some workers makes them."""

    def __init__(self, problem: Problem, workers: int) -> None:
        """Warms up.

        Args:
            problem: With a model of its own.
            workers: How many share the cores.
        """
        self._problem, self._workers = problem, workers
        self._threads = max(1, usable_cores() // workers)
        flat = torch.cat(
            [each.detach().reshape(-1) for each in problem.model.parameters() if each.requires_grad]
        )
        grad, ms = torch.ones_like(flat), torch.zeros_like(flat, dtype=COMPUTE_DTYPES[flat.dtype])
        self._operands = check_operands(flat, grad, ms)  # kept, as the table does not hold them
        kernel = select_backend(None, flat.device.type).kernel
        self._update = partial(kernel, LaunchTable([self._operands]), Hyperparameters(lr=0.0))
        self.measure(0.0)

    def measure(self, seconds: float) -> tuple[float, float]:
        """Milliseconds of a gradient and of an update, each the mean over half of the time."""
        with torch_threads(self._threads):
            gradient = self._milliseconds(self._problem.backward, seconds / 2)
            return gradient, self._milliseconds(self._update, seconds / 2)

    def summary(self, measured: Sequence[tuple[float, float]]) -> UnderLock:
        """What the rounds come to.

        Args:
            measured: Milliseconds of a gradient and of an update, a pair of each round.
        """
        gradients, updates = zip(*measured, strict=True)
        return UnderLock(
            workers=self._workers,
            torch_threads=self._threads,
            gradient_ms=PositiveSpread.of(gradients),
            update_ms=PositiveSpread.of(updates),
            most_gain=PositiveSpread.of(
                [
                    most_gain(self._workers, update / (gradient + update))
                    for gradient, update in measured
                ]
            ),
        )

    def _milliseconds(self, call: Callable[[], object], seconds: float) -> float:
        device, calls = self._problem.device, 0
        began = now = time.perf_counter()
        while calls == 0 or now < began + seconds:
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            calls += 1
            now = time.perf_counter()
        return 1e3 * (now - began) / calls


def _results(rounds: Sequence[_Round]) -> list[Way]:
    """What the turns of each way come to, the simplest way first."""
    turns = {kind: [each.turns[kind] for each in rounds] for kind in rounds[0].turns}
    return sorted((_way(kind, turns) for kind in turns), key=simplicity)


def _way(kind: Kind, turns: Mapping[Kind, Sequence[Turn]]) -> Way:
    mine, loops = turns[kind], turns.get(PlainLoop.kind)
    compared = min(len(turn.losses) for turn in [*mine, *(loops or ())])
    losses, in_time = _losses(mine, compared), _losses(mine)
    stalest = [turn.most_staleness for turn in mine if turn.most_staleness is not None]
    return Way(
        run_by=kind.run_by,
        policy=kind.policy,
        workers=kind.workers,
        torch_threads=mine[0].torch_threads,
        updates_per_second=PositiveSpread.of([turn.updates_per_second for turn in mine]),
        latency_us=_spread([turn.latency_us for turn in mine]),
        lock_wait_us=_lock_wait(kind, turns),
        staleness=_spread([turn.staleness for turn in mine]),
        most_staleness=max(stalest, default=None),
        updates_compared=compared,
        loss=None if losses is None or in_time is None else SignedSpread.of(losses),
        loss_over_loop=_over_loop(losses, loops, compared) if kind != PlainLoop.kind else None,
        loss_over_loop_in_time=_over_loop(in_time, loops) if kind != PlainLoop.kind else None,
    )


def _losses(turns: Sequence[Turn], updates: int | None = None) -> list[float] | None:
    """The loss at the end of each turn, or after so many updates; None if one is not finite."""
    losses = []
    for turn in turns:
        until = turn.losses[:updates]
        last = until[-math.ceil(_LAST * len(until)) :]
        losses.append(sum(last) / len(last))
    return losses if all(abs(loss) <= MOST for loss in losses) else None


def _over_loop(
    losses: Sequence[float] | None, loops: Sequence[Turn] | None, updates: int | None = None
) -> SignedSpread | None:
    """How much higher losses are than a plain loop's, round by round."""
    theirs = None if loops is None else _losses(loops, updates)
    if losses is None or theirs is None:
        return None
    return SignedSpread.of([mine - other for mine, other in zip(losses, theirs, strict=True)])


def _lock_wait(kind: Kind, turns: Mapping[Kind, Sequence[Turn]]) -> SignedSpread | None:
    """How much longer updates take under a lock than without one."""
    without = turns.get(kind._replace(policy="lock-free"))
    if kind.policy != "locked" or without is None:
        return None
    waits = [
        mine.latency_us - other.latency_us
        for mine, other in zip(turns[kind], without, strict=True)
        if mine.latency_us is not None and other.latency_us is not None
    ]
    return SignedSpread.of(waits) if waits else None


def _spread(samples: Sequence[float | None]) -> Spread | None:
    told = [sample for sample in samples if sample is not None]
    return Spread.of(told) if told else None
