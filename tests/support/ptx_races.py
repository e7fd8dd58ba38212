"""Updates that race on the machine that executes PTX, and the truth about what they lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED
from ptx_checks import options_of
from ptx_compiling import Compiled, Form
from ptx_machine import Event, Journal, Lineage, count_bits, race
from ptx_machine.scalars import Array
from ptx_updates import Device, Watch
from scheduler_testing import COUNTING
from update_testing import State, fresh_state

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


def _subtracting_1(form: Form) -> dict[str, Any]:
    """What an update is made with that subtracts 1, of a gradient of 1."""
    options = {**options_of(form), **COUNTING, "weight_decay": 0.0}
    if form.centered:  # a variance of 0
        options["eps"] = 1.0
    if form.momentum:  # which rounding makes nothing of
        options["momentum"] = 1e-45
    return options


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
        options = _subtracting_1(compiled.form)
        state = fresh_state(param, **options)._replace(param=param)
        named = zip(State._fields[1:], state[1:], strict=True)
        state = State.of(
            [param, *(each if each is None else device.put(name, each) for name, each in named)]
        )
        hyperparameters = Hyperparameters(**options)
        watch = Watch.of(compiled.form, device, hyperparameters.lr, self._blocks)
        assert watch.counts is not None
        self._param, self._counts = param, watch.counts
        self._lineages = {
            name: self._follow(name, each)
            for name, each in zip(State._fields, state, strict=True)
            if each is not None
        }
        self._counts_lineage = self._follow("counts", self._counts)
        self._journal = Journal()
        device.memory.region("counts").observers.append(self._journal)
        self._launches = [
            device.update(
                compiled, LaunchTable([Operands(param, grad, *state[1:])]), hyperparameters, watch
            )
            for _ in range(UPDATES)
        ]

    def run(self, seed: int) -> None:
        """Runs all updates."""
        self._counts.zero_()
        race(self._launches, self._device.memory, seed)

    def lost(self) -> Array:
        """For each block, how many updates the element lost that lost most: int64, (blocks,)."""
        lost = np.maximum.reduce([each.lost() for each in self._lineages.values()])
        return np.maximum.reduceat(lost, np.arange(0, len(lost), self._block))

    def check_elements(self) -> None:
        """Checks that elements are what the updates in them make."""
        held = torch.from_numpy(count_bits(self._lineages["param"].held))
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
