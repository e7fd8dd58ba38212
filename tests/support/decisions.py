"""Decisions to test with: ways whose rounds are known."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hogstream.profiling.environment import describe_environment
from hogstream.profiling.results.records import PositiveSpread, SignedSpread, Spread
from hogstream.profiling.results.schema import DecideSettings, Decision, RunBy, UnderLock, Way
from hogstream.profiling.results.verdict import answer, decided

CALM = (0.98, 0.99, 1.0, 1.01, 1.02)
WILD = (0.5, 1.6, 1.0, 0.7, 1.4)
Kind = tuple[RunBy, str | None, int]
LOOP: Kind = "loop", None, 1
THREADS: Kind = "threads", "locked", 2
LOCK_FREE: Kind = "threads", "lock-free", 2
PROCESSES: Kind = "processes", "locked", 2
HAND: Kind = "hand", "locked", 2


def way(
    run_by: RunBy,
    policy: str | None,
    workers: int,
    speed: float,
    *,
    rounds: tuple[float, ...] = CALM,
    in_time: tuple[float, ...] | None = None,
    diverged: bool = False,
) -> Way:
    """A way that makes so many updates/s in its median round."""
    differences = None if in_time is None else SignedSpread.of(in_time)
    return Way(
        run_by=run_by,
        policy=policy,
        workers=workers,
        torch_threads=2 // workers,
        updates_per_second=PositiveSpread.of([speed * each for each in rounds]),
        latency_us=None,
        lock_wait_us=None,
        staleness=None if run_by in ("loop", "hand") else Spread.of([1.0] * len(rounds)),
        most_staleness=None if run_by in ("loop", "hand") else 3,
        updates_compared=1234,
        loss=None if diverged else SignedSpread.of([0.5] * len(rounds)),
        loss_over_loop=differences,
        loss_over_loop_in_time=differences,
    )


def decision(ways: Sequence[Way], *, partial: bool = False) -> Decision:
    """What is decided of them, on this machine."""
    verdict = decided(ways)
    gradient, update, gain = (
        PositiveSpread.of([median * each for each in CALM]) for median in (0.9, 0.1, 1.1)
    )
    return Decision(
        command="hogstream decide my_module:make",
        environment=describe_environment(torch.device("cpu"), "numpy"),
        partial=partial,
        error=None,
        warnings=["Without a plain loop, which failed: LookupError."],
        settings=DecideSettings("my_module:make", [2], True, 5, 60.0, 1e-3),
        elements=1234,
        answer=answer(verdict),
        use=[*ways].index(verdict.use),
        next_best=None if verdict.next_best is None else [*ways].index(verdict.next_best),
        gain=verdict.gain,
        under_lock=[UnderLock(2, 1, gradient, update, gain)],
        results=[*ways],
    )
