"""Updates that race on the machine that executes PTX, and the truth about what they lost."""

from __future__ import annotations

import numpy as np
import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import COMPUTE_DTYPES, Operands
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED
from ptx_compiling import Compiled
from ptx_machine import Event, Journal, Lineage, count_bits, race
from ptx_machine.scalars import Array
from ptx_updates import Device, Watch
from scheduler_testing import COUNTING

#: How many race in one.
UPDATES = 5


def check_race(compiled: Compiled, seed: int) -> int:
    """Races updates of one parameter, and holds what they counted against the truth.

    Args:
        compiled: A form that counts.
        seed: Of the race, and of what is raced for.

    Returns:
        How many updates an element of a block has lost, at most, summed over blocks.

    Raises:
        AssertionError: If the counts say other than they promise.
    """
    run = _Race(compiled, seed)
    run.run(seed)
    run.check_elements()
    run.check_counts()
    return int(run.lost().sum())


class _Race:
    """Updates that each subtract 1: so an element says itself how many are in it."""

    def __init__(self, compiled: Compiled, seed: int) -> None:
        random = np.random.default_rng(seed)
        self._block = compiled.block
        elements = int(random.integers(1, 3)) * self._block + int(random.integers(0, 3)) * 9
        self._blocks = -(-elements // self._block)
        dtype = getattr(torch, compiled.form.dtype)
        self._device = device = Device()
        param = device.put("param", torch.zeros(elements, dtype=dtype), int(random.integers(0, 2)))
        grad = device.put("grad", torch.ones(elements, dtype=dtype))
        ms = device.put("ms", torch.zeros(elements, dtype=COMPUTE_DTYPES[dtype]))
        hyperparameters = Hyperparameters(**COUNTING, eps_inside_sqrt=compiled.form.eps_inside_sqrt)
        watch = Watch.of(compiled.form, device, hyperparameters.lr, self._blocks)
        assert watch.counts is not None
        self._param, self._counts = param, watch.counts
        self._param_lineage = self._follow("param", param)
        self._ms_lineage = self._follow("ms", ms)
        self._counts_lineage = self._follow("counts", self._counts)
        self._journal = Journal()
        device.memory.region("counts").observers.append(self._journal)
        self._launches = [
            device.update(
                compiled, LaunchTable([Operands(param, grad, ms)]), hyperparameters, watch
            )
            for _ in range(UPDATES)
        ]

    def run(self, seed: int) -> None:
        """Runs all updates."""
        self._counts.zero_()
        race(self._launches, self._device.memory, seed)

    def lost(self) -> Array:
        """For each block, how many updates the element lost that lost most: int64, (blocks,)."""
        lost = np.maximum(self._param_lineage.lost(), self._ms_lineage.lost())
        return np.maximum.reduceat(lost, np.arange(0, len(lost), self._block))

    def check_elements(self) -> None:
        """Checks that elements are what the updates in them make."""
        held = torch.from_numpy(count_bits(self._param_lineage.held))
        assert torch.equal(-self._param.double(), held.double())

    def check_counts(self) -> None:
        """Checks what ``RaceCounters`` promises."""
        landed, survived, overwritten = (
            self._counts[row].numpy() for row in (LANDED, SURVIVED, OVERWRITTEN)
        )
        assert (landed == UPDATES).all(), f"{landed} have landed, not {UPDATES}"
        held = count_bits(self._counts_lineage.held).reshape(3, self._blocks)[SURVIVED]
        assert (survived == held).all(), f"{survived} survived, not {held}"
        overlapping = _overlapping(self._journal.events, self._blocks)
        assert (overwritten == overlapping).all(), f"{overwritten} overlapped, not {overlapping}"
        assert (landed - survived <= overwritten).all(), "more were lost than overlapped"
        lost = self.lost()
        assert (lost <= overwritten).all(), (
            f"elements lost {lost}, of {overwritten} that overlapped"
        )
        unseen = (lost > 0) & (landed == survived)
        assert not unseen.any(), f"elements lost {lost}, and the witness knows of none"

    def _follow(self, name: str, tensor: torch.Tensor) -> Lineage:
        lineage = Lineage(tensor.numel(), tensor.element_size())
        self._device.memory.region(name).observers.append(lineage)
        return lineage


def _overlapping(events: list[Event], blocks: int) -> Array:
    """For each block, how many updates landed while another was under way: int64, (blocks,)."""
    pairs = np.zeros(blocks, np.int64)
    for block in range(blocks):
        here = [each for each in events if each.offset == 8 * (LANDED * blocks + block)]
        landed = {each.launch: each.after for each in here if each.writes}
        began: dict[int, int] = {}
        for each in here:
            began.setdefault(each.launch, each.after)
        for launch, end in landed.items():
            pairs[block] += sum(began[launch] <= other < end for other in landed.values())
    return pairs
