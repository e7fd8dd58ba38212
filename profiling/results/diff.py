"""A result file against an earlier one of the same command: what has changed beyond noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from hogstream.profiling.results.confidence import FEWEST, LEVEL, Interval, ratio_interval
from hogstream.profiling.results.files import Reported, ResultFile
from hogstream.profiling.results.records import PositiveSpread
from hogstream.profiling.results.schema import Bench, Compare, PeerTime
from hogstream.profiling.wording import counted, rounded_text, size_name

FASTER, SLOWER, SAME, UNKNOWN = "faster", "slower", "no change beyond noise", "cannot be told"


@dataclass(frozen=True)
class Measured:
    """A configuration in one run.

    Attributes:
        value: A median, in ``unit``.
        unit: What it counts.
        faster: Samples of which more is faster.
    """

    value: float
    unit: str
    faster: tuple[float, ...]


@dataclass(frozen=True)
class Change:
    """A configuration that both runs measured.

    Attributes:
        name: What was measured.
        first: In the first run.
        second: In the second.
        speed: The second's speed over the first's, with its interval if there are samples enough.
    """

    name: str
    first: Measured
    second: Measured
    speed: Interval | None

    @property
    def verdict(self) -> str:
        """Whether the second is faster or slower beyond noise."""
        if self.speed is None or not math.isfinite(self.speed.high - self.speed.low):
            return UNKNOWN
        if not self.speed.excludes(1):
            return SAME
        return FASTER if self.speed.median > 1 else SLOWER


@dataclass(frozen=True)
class Diff:
    """Two runs, one against the other.

    Attributes:
        kind: Of the command.
        first: Name of the first file.
        second: Name of the second.
        changes: From the greatest effect to the least; what cannot be told comes last.
        only_first: What only the first measured.
        only_second: What only the second measured.
        differences: Name, first and second value of what differs in environment and settings.
        ceilings: Name, first, second and ratio of what the machine could do.
    """

    kind: str
    first: str
    second: str
    changes: tuple[Change, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    differences: tuple[tuple[str, str, str], ...]
    ceilings: tuple[tuple[str, str, str, str], ...]


def diff_runs(first: ResultFile, second: ResultFile) -> Diff:
    """Sets two results of one command against each other.

    Each configuration's speed in the second run is set against that in the first, with a 95 %
    bootstrap interval of the ratio of medians over the raw rounds.

    Args:
        first: The earlier one.
        second: The later one.
    """
    mine, theirs = dict(_measured(second)), dict(_measured(first))
    changes = [
        Change(name, theirs[name], mine[name], _speed(mine[name], theirs[name]))
        for name in theirs
        if name in mine
    ]
    changes.sort(key=_effect, reverse=True)
    return Diff(
        first.kind,
        first.name,
        second.name,
        tuple(changes),
        tuple(name for name in theirs if name not in mine),
        tuple(name for name in mine if name not in theirs),
        tuple(_differences(first.result, second.result)),
        tuple(_ceilings(first.result, second.result)),
    )


def false_alarms(count: int) -> int:
    """How many of ``count`` true null results may seem changed by chance: no more, 95 times in 100.

    The verdicts are taken as independent, each wrong once in twenty.
    """
    wrong, total = 1 - LEVEL, 0.0
    for number in range(count + 1):
        total += math.comb(count, number) * wrong**number * LEVEL ** (count - number)
        if total >= LEVEL:
            return number
    return count


def _effect(change: Change) -> tuple[bool, float]:
    if change.speed is None or change.speed.median <= 0:
        return False, 0.0
    return change.verdict != UNKNOWN, abs(math.log(change.speed.median))


def _speed(mine: Measured, theirs: Measured) -> Interval | None:
    if min(len(mine.faster), len(theirs.faster)) < FEWEST:
        return None
    return ratio_interval(mine.faster, theirs.faster, paired=False)


def _measured(file: ResultFile) -> Iterator[tuple[str, Measured]]:
    """Each configuration of a run by name."""
    if isinstance(file.result, Compare):
        for time in file.result.results:
            if not _is_of_memory(time):
                yield f"{time.peer}, {time.shape}", _time(time.milliseconds)
        return
    for run in file.result.results:
        workers, size = counted(run.workers, "worker"), size_name(run.elements)
        speed = run.updates_per_second
        name = f"{run.policy}, {workers}, {size} elements"
        yield name, Measured(speed.median, "updates/s", tuple(speed.samples))
    if isinstance(file.result, Bench):
        for each in file.result.today or ():
            workers, size = counted(each.workers, "worker"), size_name(each.elements)
            speed = each.updates_per_second
            name = f"{each.name}, {workers}, {size} elements"
            yield name, Measured(speed.median, "updates/s", tuple(speed.samples))
        for kernel in file.result.kernels:
            name = f"{kernel.name}, {size_name(kernel.elements)} elements, alone"
            yield name, _time(kernel.milliseconds)


def _is_of_memory(time: PeerTime) -> bool:
    """Whether it is what memory can do: no optimizer, with no iteration of its own."""
    return time.iteration_milliseconds is None


def _time(milliseconds: PositiveSpread) -> Measured:
    faster = tuple(1 / sample for sample in milliseconds.samples)
    return Measured(milliseconds.median, "ms", faster)


def _differences(first: Reported, second: Reported) -> Iterator[tuple[str, str, str]]:
    mine, theirs = described(second), described(first)
    for name in dict.fromkeys([*theirs, *mine]):
        before, after = theirs.get(name, "not told"), mine.get(name, "not told")
        if before != after:
            yield name, before, after


def described(result: Reported) -> dict[str, str]:
    """Environment and settings as text by name, nested entries under their own names."""
    entries: dict[str, Any] = msgspec.to_builtins(result.environment)
    entries |= msgspec.to_builtins(result.settings)
    if not isinstance(result, Compare):
        entries["dtype"] = ", ".join(dict.fromkeys(run.dtype for run in result.results))
    told = {}
    for name, value in entries.items():
        for key, each in value.items() if isinstance(value, dict) else [(name, value)]:
            told[key] = as_text(each)
    return told


def as_text(value: Any) -> str:
    """A value of the environment or the settings."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(as_text, value))
    return str(value)


def _ceilings(first: Reported, second: Reported) -> Iterator[tuple[str, str, str, str]]:
    mine, theirs = dict(ceiling_medians(second)), dict(ceiling_medians(first))
    for name, before in theirs.items():
        if name in mine:
            after = mine[name]
            yield name, rounded_text(before), rounded_text(after), f"{after / before:.2f}x"


def ceiling_medians(result: Reported) -> Iterator[tuple[str, float]]:
    """What the machine can do, by name with its unit."""
    if isinstance(result, Compare):
        for time in filter(_is_of_memory, result.results):
            yield f"{time.peer}, {time.shape} (GB/s)", time.gigabytes_per_second
        return
    ceilings = result.ceilings
    for level in ceilings.levels:
        for name, rate in (
            ("copy", level.copy_gigabytes_per_second),
            ("update-shaped", level.update_shaped_gigabytes_per_second),
        ):
            if rate is not None:
                yield f"{level.level}, {name} (GB/s)", rate.median
    yield "launches (per s)", ceilings.launches_per_second.median
    yield "event loop turns (per s)", ceilings.event_loop_turns_per_second.median
