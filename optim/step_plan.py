"""What a step launches: planned once with every check, then kept while nothing else has changed."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from operator import eq, getitem, is_, itemgetter, ne
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels.backends import Backend, select_backend
from hogstream.kernels.launch_table import GRAD, Kind, LaunchTable, kind_of
from hogstream.kernels.operands import (
    Operands,
    check_disjoint,
    check_grad,
    check_operands,
    same_layout,
)
from hogstream.optim.compiled_modules import compiled_module
from hogstream.optim.flat_buffers import FlatBuffer
from hogstream.optim.parameters import (
    check_distributed_alike,
    is_distributed,
    own_part,
    own_part_of_grad,
    placement_of,
)
from hogstream.optim.row_steps import without
from hogstream.optim.state import BUFFERS, Kinds, as_real, check_step
from hogstream.optim.step_counts import Counter, counters_of

_pointer = torch.Tensor.data_ptr
_requires_grad = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_dtype = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
Groups = list[dict[str, Any]]
State = dict[torch.Tensor, dict[str, torch.Tensor]]
Int64s = npt.NDArray[np.int64]
_NO_PLACE = -1
_log = logging.getLogger(__name__)


class Reached(NamedTuple):
    """The parameters that have a gradient, in the order of their groups, and the gradients."""

    params: list[torch.Tensor]
    grads: list[torch.Tensor]

    @classmethod
    def of(cls, groups: Groups) -> Reached:
        """Those of an optimizer's parameter groups."""
        params = [param for group in groups for param in group["params"]]
        grads = [param.grad for param in params]
        reached = [grad for grad in grads if grad is not None]
        if len(reached) < len(grads):
            params = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
        return cls(params, reached)

    def own_parts(self) -> Reached:
        """The same, of distributed ones what this process has."""
        return Reached(list(map(own_part, self.params)), list(map(own_part, self.grads)))


@dataclass(frozen=True)
class PlannedLaunch:
    """One launch of a step.

    Attributes:
        group: Index of the parameter group whose hyperparameters it takes.
        backend: What launches it.
        table: What it updates.
    """

    group: int
    backend: Backend
    table: LaunchTable


class Written(NamedTuple):
    """Spans of memory that updates write, in the order of addresses.

    Attributes:
        starts: int64, shape (spans + 1,); the first is an empty one at 0.
        ends: The same; where spans overlap, of the one until then that reaches furthest.
    """

    starts: Int64s
    ends: Int64s

    @classmethod
    def by(cls, operands: list[Operands]) -> Written:
        """Those of some updates: their parameters and state."""
        written = [tensor for each in operands for tensor in each.written]
        starts = np.array([0, *(tensor.data_ptr() for tensor in written)])
        order = np.argsort(starts)
        sizes = np.array([0, *(tensor.nbytes for tensor in written)])
        return cls(starts[order], np.maximum.accumulate((starts + sizes)[order]))

    def overlaps(self, starts: Int64s, sizes: Int64s) -> bool:
        """Whether any of other spans, of so many bytes, shares memory with one of these."""
        # The span that matters is the last that starts before the other ends.
        last = np.searchsorted(self.starts, starts + sizes) - 1
        return bool((self.ends[np.maximum(last, 0)] > starts).any())


class Premises(Protocol):
    """All that a plan depends on, but for where gradients are that are not in flat memory."""

    def hold_gradients(self, groups: Groups, state: State, memory: StepMemory) -> bool:
        """Has memory hold the gradients that there are now, with their addresses in its tables.

        Returns:
            Whether the plan may be followed: not if gradients, or anything else, ask for a new one.
        """

    def let_go(self, memory: StepMemory) -> None:
        """Has it keep them alive no longer."""

    def bump_versions(self) -> None:
        """Tells autograd that the parameters have changed."""


def _pointers_of(tensors: list[torch.Tensor]) -> Int64s:
    return np.fromiter(map(_pointer, tensors), np.int64, len(tensors))


class _ReadPremises(NamedTuple):
    """``Premises`` that Python reads.

    They are compared without a new object for each parameter, of which many would have the garbage
    collector go over all that a program has. Gradients have sizes and dtypes of their own: torch
    lets none be set that differs, but ``grad.data`` and ``grad_dtype`` go around that.
    """

    written: Written
    places: Int64s  # of the addresses of gradients in a step's columns
    in_flat: Int64s  # gradients that must stay where they are
    grad_pointers: Int64s
    grad_bytes: Int64s
    params: list[torch.Tensor]
    group_sizes: list[int]
    owners: list[torch.Tensor]  # of all states
    all_states: list[dict[str, torch.Tensor]]
    states: list[dict[str, torch.Tensor]]
    steps: list[torch.Tensor]
    buffers: list[torch.Tensor]  # of all states, and which they are of, by which names
    of_states: list[dict[str, torch.Tensor]]
    names: list[str]
    names_of_reached: list[tuple[str, ...]]  # the same, for each parameter
    pointers: list[int]  # of parameters and buffers; all the same, of those without elements
    # Of parameters, buffers and gradients:
    sizes: list[int]
    dtypes: list[torch.dtype]
    strides: list[tuple[int, ...]]
    devices: list[int]  # of gradients
    flat: list[torch.Tensor]  # parameters whose gradients are in flat memory: all require them
    placements: list[Any] | None  # of gradients; None if nothing is distributed

    @classmethod
    def of(
        cls,
        groups: Groups,
        state: State,
        reached: Reached,
        written: Written,
        places: Int64s,
        in_flat: Int64s,
        kinds: list[Kinds],
    ) -> _ReadPremises:
        states = [state[param] for param in reached.params]
        pairs = [
            (each, name)
            for param, each, kind in zip(reached.params, states, kinds, strict=True)
            for name in kind.buffers(param)
        ]
        buffers = [each[name] for each, name in pairs]
        is_any_distributed = any(map(is_distributed, reached.params))
        placements = list(map(placement_of, reached.grads)) if is_any_distributed else None
        params, grads = reached.own_parts()
        written_here = [*params, *map(own_part, buffers)]
        tensors = [*written_here, *grads]
        flat = [param for index in in_flat if (param := reached.params[index]).numel()]
        return cls(
            written=written,
            places=places,
            in_flat=in_flat,
            grad_pointers=_pointers_of(grads),
            grad_bytes=np.array([grad.nbytes for grad in grads], np.int64),
            params=reached.params,
            group_sizes=[len(group["params"]) for group in groups],
            owners=list(state),
            all_states=list(state.values()),
            states=states,
            steps=[each["step"] for each in states],
            buffers=buffers,
            of_states=[each for each, _ in pairs],
            names=[name for _, name in pairs],
            names_of_reached=list(map(Kinds.buffers, kinds, reached.params)),
            pointers=[tensor.data_ptr() for tensor in written_here],
            sizes=[tensor.numel() for tensor in tensors],
            dtypes=[tensor.dtype for tensor in tensors],
            strides=[tensor.stride() for tensor in tensors],
            devices=[grad.get_device() for grad in grads],
            flat=flat,
            placements=placements,
        )

    def hold_gradients(self, groups: Groups, state: State, memory: StepMemory) -> bool:
        """As in ``Premises``."""
        reached = Reached.of(groups)
        parts, buffers = reached, self.buffers
        if self.placements is not None:
            parts, buffers = reached.own_parts(), list(map(own_part, buffers))
        try:
            if not self._hold(groups, state, reached, parts, buffers):
                return False
            pointers = _pointers_of(parts.grads)
        except KeyError:  # a part of a state, which was removed: to be made
            return False
        except RuntimeError:  # a sparse gradient, which has none of these: to be refused
            return False
        if (pointers != self.grad_pointers).any() and not self._may_be_read(pointers):
            return False
        memory.columns[self.places] = pointers
        memory.held = reached.grads
        return True

    def let_go(self, memory: StepMemory) -> None:
        """As in ``Premises``."""
        memory.held = None

    def compiled(self, groups: Groups, state: State, memory: StepMemory) -> Premises:
        """These, as compiled code reads them, if it can; it tries with memory that holds none."""
        module = compiled_module("compiled_premises")
        if module is None:
            return self
        try:
            premises: Any = module.CompiledPremises(
                groups, state, self.written, self.places, self.in_flat, self.names_of_reached
            )
        except (KeyError, TypeError) as error:
            _log.debug("Python reads what each step depends on: %r", error)
            return self
        reached = premises.reached  # not those of the plan, if another thread changed gradients
        if len(reached) != len(self.params) or not all(map(is_, reached, self.params)):
            return self
        return premises if premises.hold_gradients(groups, state, memory) else self

    def bump_versions(self) -> None:
        """As in ``Premises``."""
        torch.autograd.graph.increment_version(self.params)

    def _may_be_read(self, pointers: Int64s) -> bool:
        """Whether gradients at other addresses than before need not be refused."""
        left_flat = pointers[self.in_flat] != self.grad_pointers[self.in_flat]
        without_memory = (pointers == 0) & (self.grad_bytes > 0)
        if left_flat.any() or without_memory.any():
            return False
        return not self.written.overlaps(pointers, self.grad_bytes)

    def _hold(
        self,
        groups: Groups,
        state: State,
        reached: Reached,
        parts: Reached,
        buffers: list[torch.Tensor],
    ) -> bool:
        written = [*parts.params, *buffers]
        tensors = [*written, *parts.grads]
        return (
            (self.placements is None or self.placements == list(map(placement_of, reached.grads)))
            and self.pointers == list(map(_pointer, written))
            and all(map(is_, reached.params, self.params))
            and self.sizes == list(map(torch.Tensor.numel, tensors))
            and all(map(is_, map(_dtype, tensors), self.dtypes))
            and all(map(eq, map(torch.Tensor.stride, tensors), self.strides))
            and self.devices == list(map(torch.Tensor.get_device, parts.grads))
            and all(map(_requires_grad, self.flat))
            and self.group_sizes == [len(group["params"]) for group in groups]
            and len(state) == len(self.owners)
            and all(map(is_, state, self.owners))
            and all(map(is_, state.values(), self.all_states))
            and all(map(is_, map(itemgetter("step"), self.states), self.steps))
            and all(map(is_, map(getitem, self.of_states, self.names), self.buffers))
            and not any(map(torch.Tensor.is_neg, parts.params))
            and not any(map(torch.Tensor.is_neg, parts.grads))
            and not any(map(torch.Tensor.is_conj, parts.params))
            and not any(map(torch.Tensor.is_conj, parts.grads))
        )


@dataclass(frozen=True)
class StepPlan:
    """The launches of a step, and all that they were made for.

    Attributes:
        launches: In the order of their groups.
        kinds: What state the updates of each group take.
        counters: What counts the steps of reached parameters.
        premises: What they depend on.
        lasting: Whether it may be followed: not if it reads copies of gradients.
        followed_before: Whether it was: premises have been compiled then, if they can be.
        ended: Memory of steps that have ended, which the next one takes. After a backward, which
            has freed much of many sizes, C's allocator first puts all of that in order: 0.2 ms for
            1,000 gradients.
    """

    launches: list[PlannedLaunch]
    kinds: list[Kinds]
    counters: list[Counter]
    premises: Premises
    lasting: bool
    followed_before: bool = False
    ended: list[StepMemory] = field(default_factory=list, init=False)

    def followed(self, groups: Groups, state: State, kinds: list[Kinds]) -> PlannedStep | None:
        """A step by this plan, for the gradients that there are now; None if it takes a new one."""
        if not self.lasting or kinds != self.kinds:
            return None
        if not self.followed_before:
            plan = self._compiled(groups, state)
            return None if plan is None else plan.followed(groups, state, kinds)
        try:
            memory = self.ended.pop()
        except IndexError:  # it is the first, or another thread's has not ended
            memory = StepMemory(self.launches)
        held = self.premises.hold_gradients(groups, state, memory)
        return PlannedStep(self, memory) if held else None

    def _compiled(self, groups: Groups, state: State) -> StepPlan | None:
        """The same plan with premises that are read by compiled code, if they still hold."""
        premises, memory = self.premises, StepMemory(self.launches)
        if not premises.hold_gradients(groups, state, memory):
            return None
        premises.let_go(memory)
        if isinstance(premises, _ReadPremises):
            premises = premises.compiled(groups, state, memory)
        return replace(self, premises=premises, followed_before=True)


class StepMemory:
    """What a step takes of memory: one after the other may take it.

    Attributes:
        columns: int64: those of all tables, one after the other, and a word for addresses that no
            table takes.
        address: Of the columns.
        tables: What each launch updates.
        held: What keeps gradients alive until all are launched, and belongs to the plan's premises.
    """

    def __init__(self, launches: list[PlannedLaunch], held: Any = None) -> None:
        """Has tables as they were planned."""
        self.held = held
        sizes = [launch.table.columns.size for launch in launches]
        self.columns = np.zeros(sum(sizes) + 1, np.int64)
        self.address = self.columns.ctypes.data
        parts = np.split(self.columns, np.cumsum(sizes))
        self.tables = [
            launch.table.copy_to(part.reshape(launch.table.columns.shape))
            for launch, part in zip(launches, parts[:-1], strict=True)
        ]


class PlannedStep(NamedTuple):
    """One step by a plan.

    Attributes:
        plan: Of its launches.
        memory: What they read.
    """

    plan: StepPlan
    memory: StepMemory

    def end(self) -> None:
        """Leaves its memory to the next step, when all is launched."""
        self.plan.premises.let_go(self.memory)
        self.plan.ended.append(self.memory)


@torch.no_grad()
def make_plan(
    groups: Groups,
    state: State,
    kinds: list[Kinds],
    counts: list[torch.Tensor],
    flat_buffers: list[list[FlatBuffer]],
    backend: str | None,
    by_rows: Collection[int] = (),
) -> PlannedStep:
    """Checks the reached parameters and their gradients, and plans their update.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state.
        kinds: What state the updates of each group take.
        counts: From ``new_counts``: where the state's steps are.
        flat_buffers: Those of each group.
        backend: Which kernels to use; None picks by device.
        by_rows: The ids of parameters that are not planned for.

    Returns:
        The first step by the plan: gradients that were not laid out as their parameters are copies.

    Raises:
        TypeError: If a gradient is not of a dtype that can be read, or a step cannot count.
        ValueError: If a gradient is sparse or of another shape or device, if a parameter's strides
            are no longer those of its state, or if two tensors overlap.
    """
    planned = without(groups, by_rows)
    reached = Reached.of(planned)
    named = [
        _checked(f"param {index} in group {group_index}", param, state[param], kinds[group_index])
        for group_index, group in enumerate(groups)
        for index, param in enumerate(group["params"])
        if param.grad is not None and id(param) not in by_rows
    ]
    check_disjoint(named, in_turn=True)
    operands = [each for _, each in named]
    launches: list[PlannedLaunch] = []
    counters: list[Counter] = []
    places = np.full(len(operands), _NO_PLACE)
    first = words = 0
    for index, group in enumerate(planned):
        here = [param for param in group["params"] if param.grad is not None]
        positions = range(first, first + len(here))
        for table, of in _tables_of(positions, reached, operands, flat_buffers[index]):
            chosen = select_backend(backend, table.device.type)
            launches.append(PlannedLaunch(index, chosen, table))
            if of is not None:
                places[of] = words + GRAD * table.updates + np.arange(table.updates)
            words += table.columns.size
        counters += counters_of((state[param]["step"] for param in here), counts)
        first += len(here)
    in_flat = np.flatnonzero(places == _NO_PLACE)
    places[in_flat] = words  # which no table reads
    of_reached = [
        kind
        for group, kind in zip(planned, kinds, strict=True)
        for param in group["params"]
        if param.grad is not None
    ]
    written = Written.by(operands)
    premises = _ReadPremises.of(planned, state, reached, written, places, in_flat, of_reached)
    copied = any(map(ne, (each.grad.data_ptr() for each in operands), premises.grad_pointers))
    plan = StepPlan(launches, kinds, counters, premises, lasting=not copied)
    return PlannedStep(plan, StepMemory(launches, operands))


def _checked(
    name: str, param: torch.Tensor, state: dict[str, torch.Tensor], kinds: Kinds
) -> tuple[list[str], Operands]:
    grad = param.grad
    check_step(f"step of {name}", state["step"])
    assert grad is not None
    names = [name, f"grad of {name}", *(f"{buffer} of {name}" for buffer in BUFFERS)]
    if grad.is_complex() != param.is_complex():
        raise TypeError(f"{names[1]} must be complex just as its param is, got {grad.dtype}")
    check_distributed_alike(grad, param, names[1])
    grad, param = own_part_of_grad(grad, param), own_part(param)
    if param.is_conj():
        raise ValueError(f"{name} must be memory as it is, got a lazily conjugated view of it")
    grad = grad.resolve_conj()
    check_grad(as_real(param), as_real(grad), names[1], "its param")
    if not same_layout(grad, param):
        grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    wanted = kinds.buffers(param)
    buffers = [own_part(state[each]) if each in wanted else None for each in BUFFERS]
    ms, ga, buf, comp = (each if each is None else as_real(each) for each in buffers)
    assert ms is not None
    return names, check_operands(as_real(param), as_real(grad), ms, ga, buf, comp, names)


def _tables_of(
    positions: range,
    reached: Reached,
    operands: list[Operands],
    flat_buffers: list[FlatBuffer],
) -> list[tuple[LaunchTable, list[int] | None]]:
    """The tables of one group: one for each flat buffer that is whole, the rest by dtype, device.

    Args:
        positions: Of the group's parameters among all that are reached.
        reached: All parameters that have a gradient.
        operands: Of each of them.
        flat_buffers: Those of the group.

    Returns:
        Each table, in the order in which they are launched, and for each of its updates which of
        the reached parameters it is; None for the one update of a flat buffer.
    """
    where = {id(reached.params[position]): position for position in positions}
    left = set(positions)
    tables: list[tuple[LaunchTable, list[int] | None]] = []
    for buffer in flat_buffers:
        members = [where.get(id(param)) for param in buffer.params]
        if buffer.holds([None if i is None else operands[i] for i in members]):
            tables.append((LaunchTable([buffer.operands]), None))
            left.difference_update(members)
    alike: dict[tuple[int, Kind], list[int]] = {}
    in_order = sorted(left)
    turns = _turns([operands[position].written for position in in_order])
    for turn, position in sorted(zip(turns, in_order, strict=True)):
        alike.setdefault((turn, kind_of(operands[position])), []).append(position)
    return tables + [(LaunchTable([operands[i] for i in each]), each) for each in alike.values()]


def _turns(written: list[list[torch.Tensor]]) -> list[int]:
    """In which launch each update is, so that no two of a launch write the same memory.

    Those that do, as of duplicates and of parameters that are tied, come in their order.

    Args:
        written: What each writes.
    """
    owners = [index for index, one in enumerate(written) for _ in one]
    tensors = [each for one in written for each in one]
    starts = np.array([each.data_ptr() for each in tensors], np.int64)
    ends = starts + np.array([each.nbytes for each in tensors], np.int64)
    order = np.argsort(starts)
    furthest = np.maximum.accumulate(ends[order])
    turns = [0] * len(written)
    if (furthest[:-1] <= starts[order][1:]).all():
        return turns
    owner = np.array(owners, np.int64)
    for index in range(1, len(written)):
        own, before = owner == index, owner < index
        shared = (starts[before, None] < ends[own]) & (starts[own] < ends[before, None])
        those = np.unique(owner[before][shared.any(axis=1)])
        turns[index] = 1 + max((turns[each] for each in those), default=-1)
    return turns
