"""Runs launches: one by itself, or several that race."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ptx_machine.memory import GlobalMemory
from ptx_machine.strands import State, Strand
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
    chosen = np.arange(launch.blocks) if blocks is None else np.asarray(blocks, np.int64)
    x, y, z = launch.block
    together = max(1, _SIDE_BY_SIDE // (x * y * z))
    with np.errstate(all="ignore"):
        for first in range(0, len(chosen), together):
            team = Team(launch, memory, chosen[first : first + together], by_warp=False)
            while not team.ended:
                for strand in team.strands:
                    strand.go_on(launch.program.steps, stop=False)
                team.wait()


def race(
    launches: Iterable[Launch],
    memory: GlobalMemory,
    seed: int,
    resident: int = 4,
) -> None:
    """Runs launches at once; after each access of a warp to global memory any other may go on.

    Warps are of different speed, so that some are overtaken often. The blocks of a launch begin in
    any order.

    Args:
        launches: What to run.
        memory: What they change.
        seed: Of who goes on when.
        resident: How many blocks of a launch run at once.

    Raises:
        ExecutionError: If a launch does what it must not.
    """
    random = np.random.default_rng(seed)
    with np.errstate(all="ignore"):
        flights = [_Flight(launch, memory, resident, random) for launch in launches]
        while flights := [flight for flight in flights if flight.strands()]:
            strands = [strand for flight in flights for strand in flight.strands()]
            weights = np.array([flight.speed[strand] for flight in flights for strand in flight.strands()])
            chosen = strands[random.choice(len(strands), p=weights / weights.sum())]
            chosen.go_on(chosen.team.launch.program.steps, stop=True)
            chosen.team.wait()


class _Flight:
    """A launch that is under way."""

    def __init__(
        self, launch: Launch, memory: GlobalMemory, resident: int, random: np.random.Generator
    ) -> None:
        self._launch = launch
        self._memory = memory
        self._resident = resident
        self._random = random
        self._to_come = [int(block) for block in random.permutation(launch.blocks)]
        self._teams: list[Team] = []
        self.speed: dict[Strand, float] = {}

    def strands(self) -> list[Strand]:
        """Those that can go on; none if all blocks have ended."""
        self._teams = [team for team in self._teams if not team.ended]
        while self._to_come and len(self._teams) < self._resident:
            blocks = np.array([self._to_come.pop()])
            team = Team(self._launch, self._memory, blocks, by_warp=True)
            self._teams.append(team)
            self.speed |= {each: 10 ** self._random.uniform(-1, 1) for each in team.strands}
        return [
            strand for team in self._teams for strand in team.strands if strand.state is State.RUNS
        ]
