"""Updates that race on the machine that executes PTX, and the truth about what they lost."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED
from ptx_checks import options_of
from ptx_compiling import Compiled, Form
from ptx_machine import Event, Journal, Launch, Lineage, count_bits, race
from ptx_machine.scalars import Array
from ptx_rows import launch_of, operands_of, table_of
from ptx_updates import Device, Watch
from scheduler_testing import COUNTING
from update_testing import State, fresh_state

#: How many race in one.
UPDATES = 5


def check_race(compiled: Compiled, seed: int) -> int:
    """Races updates of one parameter, or of rows, and holds what they counted against the truth.

    Args:
        compiled: A form that counts.
        seed: Of the race, and of what is raced for.

    Returns:
        How many updates an element of a block has lost, at most, summed over blocks.

    Raises:
        AssertionError: If the counts say other than they promise.
    """
    prepare = _of_rows if compiled.form.of_rows else _of_elements
    run = prepare(compiled, np.random.default_rng(seed))
    run.run(seed)
    run.check_elements()
    run.check_counts()
    if compiled.form.locked:
        run.check_none_overlapped()
    return int(run.lost().sum())


def check_locks(compiled: Compiled, seed: int) -> None:
    """Races updates of rows under locks, of a form that does not count: all of them are there.

    Raises:
        AssertionError: If one is lost.
    """
    rows = _racing_rows(compiled, np.random.default_rng(seed))
    race(rows.launches, rows.device.memory, seed)
    landed = torch.from_numpy(rows.landing).double()
    kept = -rows.changed["param"].double()
    assert torch.equal(kept, landed[:, None].expand_as(kept)), f"{landed} have landed, not {kept}"


def _subtracting_1(form: Form) -> dict[str, Any]:
    """What an update is made with that subtracts 1, of a gradient of 1, or a sum of these."""
    options = {**options_of(form), **COUNTING, "weight_decay": 0.0}
    if form.centered:  # a variance of 0
        options["eps"] = 1.0
    if form.momentum:  # which rounding makes nothing of
        options["momentum"] = 1e-45
    return options


def _of_elements(compiled: Compiled, random: np.random.Generator) -> _Race:
    """Updates of all elements of a parameter, which are counted in blocks."""
    elements = int(random.integers(1, 3)) * compiled.block + int(random.integers(0, 3)) * 9
    blocks = -(-elements // compiled.block)
    dtype = getattr(torch, compiled.form.dtype)
    device = Device()
    param = device.put("param", torch.zeros(elements, dtype=dtype), int(random.integers(0, 2)))
    grad = device.put("grad", torch.ones(elements, dtype=dtype))
    options = _subtracting_1(compiled.form)
    state = fresh_state(param, **options)._replace(param=param)
    named = zip(State._fields[1:], state[1:], strict=True)
    state = State.of(
        [param, *(each if each is None else device.put(name, each) for name, each in named)]
    )
    hyperparameters = Hyperparameters(**options)
    watch = Watch.of(compiled.form, device, hyperparameters.lr, blocks)
    table = LaunchTable([Operands(param, grad, *state[1:])])
    launches = [device.update(compiled, table, hyperparameters, watch) for _ in range(UPDATES)]
    changed = {
        name: each for name, each in zip(State._fields, state, strict=True) if each is not None
    }
    return _Race(device, changed, watch, compiled.block, launches, np.full(blocks, UPDATES))


class _RacingRows(NamedTuple):
    """Updates of some rows of a table each.

    Attributes:
        device: Where all is.
        changed: What they change, ``param`` among it.
        watch: What watches them.
        launches: The updates.
        landing: How many of them there are of each row: int64, (table_rows,).
    """

    device: Device
    changed: dict[str, torch.Tensor]
    watch: Watch
    launches: list[Launch]
    landing: Array


def _of_rows(compiled: Compiled, random: np.random.Generator) -> _Race:
    """Updates of some rows of a table each, which are counted by row."""
    device, changed, watch, launches, landing = _racing_rows(compiled, random)
    return _Race(device, changed, watch, changed["param"].shape[1], launches, landing)


def _racing_rows(compiled: Compiled, random: np.random.Generator) -> _RacingRows:
    form, device = compiled.form, Device()
    table_rows = int(random.integers(1, 6))
    width = form.columns + int(random.integers(0, 2)) * form.columns
    zeros = table_of(
        form, (table_rows, width), lambda shape, dtype, _: torch.zeros(shape, dtype=dtype)
    )
    changed = {name: device.put(name, each) for name, each in zeros.items()}
    hyperparameters = Hyperparameters(**_subtracting_1(form))
    watch = Watch.of(form, device, hyperparameters.lr, table_rows)
    landing, launches = np.zeros(table_rows, np.int64), []
    for _ in range(UPDATES):
        rows = torch.from_numpy(random.integers(0, table_rows, int(random.integers(1, 9))))
        grads = torch.zeros(len(rows), width, dtype=getattr(torch, form.grad_dtype or form.dtype))
        touched, first = np.unique(rows.numpy(), return_index=True)
        grads[first] = 1  # of each row's, which are summed
        landing[touched] += 1
        operands = operands_of(changed, device.put("grads", grads), rows)
        launches.append(launch_of(device, compiled, operands, hyperparameters, watch).launch)
    return _RacingRows(device, changed, watch, launches, landing)


class _Race:
    """Updates that each subtract 1: so an element says itself how many are in it."""

    def __init__(
        self,
        device: Device,
        changed: dict[str, torch.Tensor],
        watch: Watch,
        block: int,
        launches: list[Launch],
        landing: Array,
    ) -> None:
        """Follows what updates change.

        Args:
            device: Where all is.
            changed: What they change, ``param`` among it.
            watch: What counts them.
            block: How many elements of the parameter are counted together.
            launches: The updates.
            landing: How many of them there are of each block: int64, (blocks,).
        """
        assert watch.counts is not None
        self._device, self._launches, self._landing = device, launches, landing
        self._param, self._counts, self._block = changed["param"], watch.counts, block
        self._blocks = len(landing)
        self._lineages = {name: self._follow(name, each) for name, each in changed.items()}
        self._counts_lineage = self._follow("counts", self._counts)
        self._journal = Journal()
        device.memory.region("counts").observers.append(self._journal)

    def run(self, seed: int) -> None:
        """Runs all updates."""
        self._counts.zero_()
        race(self._launches, self._device.memory, seed)

    def lost(self) -> Array:
        """For each block, how many updates the element lost that lost most: int64, (blocks,)."""
        lost: Array = np.maximum.reduce([self._lost_of(each) for each in self._lineages.values()])
        return lost

    def _lost_of(self, lineage: Lineage) -> Array:
        """The same of what is one for each element, or one for each block."""
        lost = lineage.lost()
        starts = np.arange(0, len(lost), 1 if len(lost) == self._blocks else self._block)
        of_blocks: Array = np.maximum.reduceat(lost, starts)
        return of_blocks

    def check_elements(self) -> None:
        """Checks that elements are what the updates in them make."""
        held = torch.from_numpy(count_bits(self._lineages["param"].held))
        assert torch.equal(-self._param.flatten().double(), held.double())

    def check_counts(self) -> None:
        """Checks what ``RaceCounters`` promises."""
        landed, survived, overwritten = (
            self._counts[row].numpy() for row in (LANDED, SURVIVED, OVERWRITTEN)
        )
        assert (landed == self._landing).all(), f"{landed} have landed, not {self._landing}"
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

    def check_none_overlapped(self) -> None:
        """Checks that of no row two updates were under way at once."""
        overlapped = self._counts[OVERWRITTEN]
        assert not overlapped.any(), f"{overlapped} overlapped under their locks"
        assert not self.lost().any(), "elements lost updates under their locks"

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
