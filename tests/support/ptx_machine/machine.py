"""Runs launches: one by itself, or several that race."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ptx_machine.memory import GlobalMemory
from ptx_machine.ports import AnyOrder, InOrder
from ptx_machine.strands import Port, State, Strand
from ptx_machine.teams import Launch, Team

#: How many threads go in step where nothing races.
_SIDE_BY_SIDE = 8192


def execute(launch: Launch, memory: GlobalMemory, blocks: Sequence[int] | None = None) -> None:
    """Runs a launch by itself, many blocks at a time.

    Args:
        launch: What to run.
        memory: What it changes.
        blocks: Which blocks of the grid to run; None for all.

    Raises:
        ExecutionError: If it does what it must not.
    """
    chosen = np.arange(launch.blocks) if blocks is None else np.array(blocks, np.int64)
    x, y, z = launch.block
    together = max(1, _SIDE_BY_SIDE // (x * y * z))
    with np.errstate(all="ignore"):
        for first in range(0, len(chosen), together):
            team = Team(launch, InOrder(memory), chosen[first : first + together], by_warp=False)
            (strand,) = team.strands
            while not team.ended:
                team.go_on(strand, stop=False)


def race(launches: Iterable[Launch], memory: GlobalMemory, seed: int) -> None:
    """Runs launches at once: after each access of a warp to memory any other may go on.

    So a race between warps, of one launch or of several, can end in every way in which a device
    could interleave them; accesses take effect as ``AnyOrder`` says. Launches begin one after the
    other, a few blocks of each run at a time, and some warps and launches are slower than others:
    these are overtaken often.

    Args:
        launches: What to run, with numbers of their own.
        memory: What they change.
        seed: Of who goes on when.

    Raises:
        ExecutionError: If a launch does what it must not.
    """
    random = np.random.default_rng(seed)
    port = AnyOrder(memory, random)
    waiting = [_Flight(each, port, random) for each in launches if each.blocks]
    flights: list[_Flight] = []
    pause = random.uniform(0, 200)  # between launches, in accesses
    settling = 10 ** random.uniform(-2.5, 0)  # how soon stores take effect
    with np.errstate(all="ignore"):
        while flights or waiting or port.pending:
            if port.pending and (random.random() < settling or not (flights or waiting)):
                port.settle_one()
                continue
            if waiting and (not flights or random.random() * pause < 1):
                flights.append(waiting.pop(0))
            chosen = _pick([each for flight in flights for each in flight.able()], random)
            chosen.team.go_on(chosen.strand, stop=True)
            flights = [each for each in flights if not each.ended]


class _Runner(NamedTuple):
    """A warp that runs.

    Attributes:
        team: Its block.
        strand: It.
        speed: How often it is chosen, beside others.
    """

    team: Team
    strand: Strand
    speed: float


def _pick(runners: list[_Runner], random: np.random.Generator) -> _Runner:
    """One of them, by their speeds."""
    ends = np.cumsum([each.speed for each in runners])
    return runners[int(np.searchsorted(ends, random.random() * ends[-1], "right"))]


class _Flight:
    """A launch that is under way."""

    def __init__(self, launch: Launch, memory: Port, random: np.random.Generator) -> None:
        self._launch = launch
        self._memory = memory
        self._random = random
        self._resident = int(random.integers(1, 5))  # how many blocks run at once
        self._speed = 10 ** random.uniform(-1, 1)
        self._to_come = [int(block) for block in random.permutation(launch.blocks)]
        self._runners: list[list[_Runner]] = []  # of each block

    @property
    def ended(self) -> bool:
        """Whether all blocks have."""
        return not self._to_come and all(block[0].team.ended for block in self._runners)

    def able(self) -> list[_Runner]:
        """Those that can go on."""
        self._runners = [block for block in self._runners if not block[0].team.ended]
        while self._to_come and len(self._runners) < self._resident:
            team = Team(self._launch, self._memory, np.array([self._to_come.pop()]), by_warp=True)
            speeds = self._speed * 10 ** self._random.uniform(-1, 1, len(team.strands))
            self._runners.append(
                [_Runner(team, *each) for each in zip(team.strands, speeds, strict=True)]
            )
        return [
            each for block in self._runners for each in block if each.strand.state is State.RUNS
        ]
