"""Rates: how often a second something can be done, from samples in turn, with their spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from hogstream.profiling.results.confidence import median_interval

#: Rates of a machine, by their names in JSON output.
COPY, UPDATE_SHAPED = "copy_gigabytes_per_second", "update_shaped_gigabytes_per_second"
LAUNCHES, TURNS = "launches_per_second", "event_loop_turns_per_second"

_SAMPLE_SECONDS = 0.02

Name = TypeVar("Name")


@dataclass(frozen=True)
class Rate:
    """Something to be done again and again.

    Attributes:
        seconds_of: Does it so many times, and says how long that took.
        amount: How much is done each time, in the unit of the rate.
    """

    seconds_of: Callable[[int], float]
    amount: float


def sample_in_turn(rates: Mapping[Name, Rate], repeats: int) -> dict[Name, list[float]]:
    """Measures rates a second, in turn, so that drift of the machine strikes them alike.

    Args:
        rates: By name. Each is warmed up by finding how many times take 20 ms.
        repeats: How many samples to take of each.

    Returns:
        The samples of each, by name.
    """
    times = {name: _times_to_sample(rate) for name, rate in rates.items()}
    samples: dict[Name, list[float]] = {name: [] for name in rates}
    for _ in range(repeats):
        for name, rate in rates.items():
            samples[name].append(rate.amount * times[name] / rate.seconds_of(times[name]))
    return samples


def describe(samples: list[float]) -> dict[str, Any]:
    """The samples of a rate in the JSON output, with their median and its 95 % interval."""
    interval = median_interval(samples)
    return {
        "median": interval.median,
        "interval": interval.bounds,
        "samples": samples,
    }


def _times_to_sample(rate: Rate) -> int:
    """How many times take long enough; of two tries, as one may compile or be disturbed."""
    times = 1
    while min(rate.seconds_of(times) for _ in range(2)) < _SAMPLE_SECONDS:
        times *= 2
    return times
