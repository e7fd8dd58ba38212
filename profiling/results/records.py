"""What all result files are made of: metrics, the machine, and what every file says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Literal, TypeVar

from msgspec import Meta, Struct
from msgspec.structs import replace

from hogstream.profiling.results.confidence import Interval, median_interval, ratio_interval

SCHEMA = 2

# Beyond these, arithmetic on a number overflows, and nothing was measured.
LEAST, MOST = 1e-18, 1e18

Number = Annotated[float, Meta(ge=0, le=MOST)]
Positive = Annotated[float, Meta(ge=LEAST, le=MOST)]
Signed = Annotated[float, Meta(ge=-MOST, le=MOST)]
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Size = Annotated[int, Meta(ge=1, lt=1 << 53)]
Bounds = tuple[Number, Number]
SomeSpread = TypeVar("SomeSpread", bound="Spread")


class Record(Struct, forbid_unknown_fields=True):
    """What all types here are: with no field but their own."""


class Spread(Record):
    """A metric that was sampled.

    Attributes:
        median: Of the samples.
        interval: The 95 % interval of the median, by bootstrap; null if too few samples bound none.
        samples: Of each round, in their order.
    """

    median: Number
    interval: Bounds | None
    samples: Annotated[list[Number], Meta(min_length=1)]

    def __post_init__(self) -> None:
        """Checks what a type cannot say; ``ValueError`` is told with the place in the file."""
        low, high = self.interval or (0.0, math.inf)
        if not low <= self.median <= high:
            raise ValueError("interval must hold the median")
        if any(0 < sample < LEAST for sample in self.samples):
            raise ValueError(f"samples must each be 0 or from {LEAST:g} on")

    @classmethod
    def of(cls: type[SomeSpread], samples: Sequence[float]) -> SomeSpread:
        """The median of samples, and how sure it is."""
        estimate = median_interval(samples)
        return cls(median=estimate.median, interval=estimate.bounds, samples=list(samples))

    @property
    def estimate(self) -> Interval:
        """The median and its interval, without bounds if there is none."""
        return _estimate(self.median, self.interval)


class PositiveSpread(Spread):
    """The same of a metric that is never 0, such as the time of a step."""

    median: Positive
    samples: Annotated[list[Positive], Meta(min_length=1)]


class SignedSpread(Record):
    """The same of a metric that may be below 0, such as a loss, or a difference.

    Attributes:
        median: Of the samples.
        interval: The 95 % interval of the median, by bootstrap; null if too few samples bound none.
        samples: Of each round, in their order.
    """

    median: Signed
    interval: tuple[Signed, Signed] | None
    samples: Annotated[list[Signed], Meta(min_length=1)]

    @classmethod
    def of(cls, samples: Sequence[float]) -> SignedSpread:
        """The median of samples, and how sure it is."""
        estimate = median_interval(samples)
        return cls(median=estimate.median, interval=estimate.bounds, samples=list(samples))

    @property
    def estimate(self) -> Interval:
        """The median and its interval, without bounds if there is none."""
        return _estimate(self.median, self.interval)


#: What a ceiling is of: of a level of memory, and of the host.
COPY, UPDATE_SHAPED = "copy", "update-shaped"
LAUNCHES, TURNS = "launches", "turns of the event loop"


class Ceiling(PositiveSpread, omit_defaults=True):
    """A rate that a machine reached, the highest that was seen of it.

    Attributes:
        measured: When, in UTC, ISO 8601; left out of a file if all were measured at once.
    """

    measured: str | None = None

    def __post_init__(self) -> None:
        """Checks what a type cannot say."""
        super().__post_init__()
        if self.measured is not None:
            datetime.fromisoformat(self.measured)


class Ratio(Record):
    """A metric over another that was measured in the same rounds.

    Attributes:
        median: The ratio of the medians.
        interval: Its 95 % interval, by bootstrap over rounds; null if too few bound none.
    """

    median: Number
    interval: Bounds | None

    @classmethod
    def of(cls, mine: Sequence[float], theirs: Sequence[float]) -> Ratio | None:
        """One over the other, paired by round; None if one of ``theirs`` is 0."""
        estimate = ratio_interval(mine, theirs, paired=True)
        return None if estimate is None else cls(median=estimate.median, interval=estimate.bounds)

    @property
    def estimate(self) -> Interval:
        """The ratio and its interval, without bounds if there is none."""
        return _estimate(self.median, self.interval)


def _estimate(median: float, interval: Bounds | None) -> Interval:
    return Interval(median, *(interval or (-math.inf, math.inf)))


class Environment(Record):
    """What a measurement was made on.

    Attributes:
        device: As torch calls it, such as ``cuda:0``.
        device_name: As its maker calls it.
        backend: Whose kernels were measured.
        cores: CPU cores that the process may run on.
        event_loop: ``asyncio`` or ``uvloop``.
        threads: Torch's intra-op threads.
        cuda_device_max_connections: The environment variable, on a GPU.
        system: Operating system and processor architecture.
        versions: Of packages, by name; null of what is not installed.
        commit: Of the source tree, ``-dirty`` if changed since; null outside git.
    """

    device: str
    device_name: str
    backend: str
    cores: Size
    event_loop: str
    threads: Size
    cuda_device_max_connections: str | None
    system: str
    versions: dict[str, str | None]
    commit: str | None


class Level(Record):
    """A level of memory and what it can move, with all cores, in 1e9 bytes/s.

    Attributes:
        level: Such as ``L2``, or ``memory``.
        bytes: Of the working set that was measured, over all threads.
        threads: How many shared it; null on a GPU.
        cache_bytes: That one of its caches holds; null for memory.
        copy_gigabytes_per_second: 8 bytes an element: one array is read, another written. Null for
            small caches where there is no Numba.
        update_shaped_gigabytes_per_second: 20 bytes an element, as an update: three arrays are
            read, and two of them written.
    """

    level: str
    bytes: Size
    threads: Size | None
    cache_bytes: Size | None
    copy_gigabytes_per_second: Ceiling | None
    update_shaped_gigabytes_per_second: Ceiling | None


class Ceilings(Record):
    """What a machine can do at most: the best that was seen of it.

    Attributes:
        measured: When all of it was measured last, in UTC, ISO 8601; each has its own date besides.
        levels: Of its memory, smallest first; the last is the memory beyond all caches.
        launches_per_second: Of updates of nothing down one lane.
        event_loop_turns_per_second: Of the event loop that would run here.
    """

    measured: str
    levels: Annotated[list[Level], Meta(min_length=1)]
    launches_per_second: Ceiling
    event_loop_turns_per_second: Ceiling

    def __post_init__(self) -> None:
        """Checks what a type cannot say."""
        datetime.fromisoformat(self.measured)
        if self.memory.cache_bytes is not None:
            raise ValueError("levels must end with memory, whose cache_bytes is null")

    @property
    def memory(self) -> Level:
        """The memory beyond all caches."""
        return self.levels[-1]

    def rates(self) -> dict[str, Ceiling]:
        """All of them that were measured, by name: such as ``launches`` or ``L2 copy``."""
        found = {LAUNCHES: self.launches_per_second, TURNS: self.event_loop_turns_per_second}
        for level in self.levels:
            for kind, rate in (
                (COPY, level.copy_gigabytes_per_second),
                (UPDATE_SHAPED, level.update_shaped_gigabytes_per_second),
            ):
                if rate is not None:
                    found[f"{level.level} {kind}"] = rate
        return found

    def with_rates(self, rates: Mapping[str, Ceiling]) -> Ceilings:
        """The same with others: by name, each that was measured."""
        return replace(
            self,
            launches_per_second=rates[LAUNCHES],
            event_loop_turns_per_second=rates[TURNS],
            levels=[
                replace(
                    level,
                    copy_gigabytes_per_second=rates.get(f"{level.level} {COPY}"),
                    update_shaped_gigabytes_per_second=rates.get(f"{level.level} {UPDATE_SHAPED}"),
                )
                for level in self.levels
            ],
        )

    def level_of(self, size: int) -> Level:
        """The smallest level of which one cache holds so many bytes."""
        return next(level for level in self.levels if (level.cache_bytes or size) >= size)


class Result(Record, kw_only=True, tag_field="kind"):
    """What every result file says.

    Attributes:
        schema: Of the result files: another number whenever a field changes.
        command: That repeats it.
    """

    schema: Literal[2] = 2
    command: str


class Measurement(Result, kw_only=True):
    """What a measurement that may be cut short says besides.

    Attributes:
        environment: What it was measured on.
        partial: Whether it was cut short: what was not measured in all its rounds is left out.
        error: Why workers failed and ended it; null if they did not.
        warnings: Why one should not conclude from it.
    """

    environment: Environment
    partial: bool
    error: str | None
    warnings: list[str]
