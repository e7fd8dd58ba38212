"""Taking turns: what is set against each other is measured in the same rounds.

So drift of the machine strikes all alike; and each goes first in its turn, as whoever comes first
in a round may find another machine than the last.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

_SAMPLE_SECONDS = 0.02
# Of what a GPU is to do one call alone would tell how long the host takes to begin it.
_CALLS_ON_GPU = 50

Name = TypeVar("Name")


def in_turn(names: Sequence[Name], index: int) -> list[Name]:
    """The order of a round: each goes first in its turn.

    Args:
        names: Of those who take turns.
        index: Of the round, from 0.
    """
    first = index % len(names)
    return [*names[first:], *names[:first]]


@dataclass(frozen=True)
class Rate:
    """Something to be done again and again.

    Attributes:
        seconds_of: Does it so many times, and says how long that took.
        amount: How much is done each time, in the unit of the rate.
    """

    seconds_of: Callable[[int], float]
    amount: float


def sample_in_turn(rates: Mapping[Name, Rate], rounds: int) -> dict[Name, list[float]]:
    """Measures how much is done a second, in turn.

    Args:
        rates: By name. Each is warmed up by finding how many times take 20 ms.
        rounds: How many samples to take of each.

    Returns:
        The samples of each, by name.
    """
    times = {name: _times_to_sample(rate) for name, rate in rates.items()}

    def sample(name: Name) -> float:
        rate = rates[name]
        return rate.amount * times[name] / rate.seconds_of(times[name])

    return _take_turns({name: partial(sample, name) for name in rates}, rounds)


def interleave(
    calls: Mapping[str, Callable[[], object]], device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Times several calls in turn.

    Args:
        calls: By name; each is called once beforehand to warm up.
        device: On a GPU a sample is of 50 calls, one after the other, and synchronised around.
        rounds: How many samples of each are taken.

    Returns:
        Seconds of a call, ``rounds`` for each name.
    """
    on_gpu = device.type == "cuda"
    synchronize: Callable[[], None] = (
        partial(torch.cuda.synchronize, device) if on_gpu else lambda: None
    )
    times = _CALLS_ON_GPU if on_gpu else 1
    for call in calls.values():
        call()

    def seconds_of(call: Callable[[], object]) -> float:
        synchronize()
        start = time.perf_counter()
        for _ in range(times):
            call()
        synchronize()
        return (time.perf_counter() - start) / times

    return _take_turns({name: partial(seconds_of, call) for name, call in calls.items()}, rounds)


def _take_turns(
    samples: Mapping[Name, Callable[[], float]], rounds: int
) -> dict[Name, list[float]]:
    taken: dict[Name, list[float]] = {name: [] for name in samples}
    for index in range(rounds):
        for name in in_turn(list(samples), index):
            taken[name].append(samples[name]())
    return taken


def _times_to_sample(rate: Rate) -> int:
    """How many times take long enough; of two tries, as one may compile or be disturbed."""
    times = 1
    while min(rate.seconds_of(times) for _ in range(2)) < _SAMPLE_SECONDS:
        times *= 2
    return times
