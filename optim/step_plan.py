"""What a step launches: planned once with every check, then kept while nothing else has changed."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from operator import eq, is_, itemgetter, ne
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels.backends import Backend, select_backend
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import (
    Operands,
    check_disjoint,
    check_grad,
    check_operands,
    same_layout,
)
from hogstream.optim.compiled_modules import compiled_module
from hogstream.optim.flat_buffers import FlatBuffer
from hogstream.optim.state import check_step
from hogstream.optim.step_counts import Counter, counters_of

_pointer = torch.Tensor.data_ptr
_dtype = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
Groups = list[dict[str, Any]]
State = dict[torch.Tensor, dict[str, torch.Tensor]]
Positions = npt.NDArray[np.intp] | slice
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


@dataclass(frozen=True)
class PlannedLaunch:
    """One launch of a step.

    Attributes:
        group: Index of the parameter group whose hyperparameters it takes.
        backend: What launches it.
        table: What it updates.
        positions: For each update in the table, which of the reached parameters it is; None for the
            one update of a flat buffer.
    """

    group: int
    backend: Backend
    table: LaunchTable
    positions: Positions | None

    def table_for(self, pointers: npt.NDArray[np.int64]) -> LaunchTable:
        """What it updates from gradients at such addresses, of all reached parameters."""
        if self.positions is None:
            return self.table
        return self.table.with_grads(pointers[self.positions])


class Written(NamedTuple):
    """Spans of memory that updates write, none of which overlap, in the order of addresses.

    Attributes:
        starts: int64, shape (spans + 1,); the first is an empty one at 0.
        ends: The same.
    """

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    @classmethod
    def by(cls, operands: list[Operands]) -> Written:
        """Those of some updates: their parameters and ``ms``."""
        written = [tensor for each in operands for tensor in (each.param, each.ms)]
        starts = np.array([0, *(tensor.data_ptr() for tensor in written)])
        order = np.argsort(starts)
        sizes = np.array([0, *(tensor.nbytes for tensor in written)])
        return cls(starts[order], (starts + sizes)[order])

    def overlaps(self, starts: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> bool:
        """Whether any of other spans, of so many bytes, shares memory with one of these."""
        # The span that matters is the last that starts before the other ends.
        last = np.searchsorted(self.starts, starts + sizes) - 1
        return bool((self.ends[np.maximum(last, 0)] > starts).any())


class Gradients(Protocol):
    """The gradients of a step, which live for as long as this does."""

    @property
    def pointers(self) -> npt.NDArray[np.int64]:
        """Where they are: int64, shape (gradients,)."""


class Premises(Protocol):
    """All that a plan depends on, but for where gradients are that are not in flat memory."""

    def gradients(self, groups: Groups, state: State) -> Gradients | None:
        """The gradients that there are now; None if they, or anything else, ask for a new plan."""

    def bump_versions(self) -> None:
        """Tells autograd that the parameters have changed."""


@dataclass(frozen=True)
class _Tensors:
    """``Gradients`` that Python's objects keep alive."""

    pointers: npt.NDArray[np.int64]
    kept: list[torch.Tensor]


def _pointers_of(tensors: list[torch.Tensor]) -> npt.NDArray[np.int64]:
    return np.fromiter(map(_pointer, tensors), np.int64, len(tensors))


class _ReadPremises(NamedTuple):
    """``Premises`` that Python reads.

    They are compared without a new object for each parameter, of which many would have the garbage
    collector go over all that a program has. Gradients have sizes and dtypes of their own: torch
    lets none be set that differs, but ``grad.data`` and ``grad_dtype`` go around that.
    """

    written: Written
    in_flat: npt.NDArray[np.intp]
    grad_pointers: npt.NDArray[np.int64]
    grad_bytes: npt.NDArray[np.int64]
    params: list[torch.Tensor]
    group_sizes: list[int]
    owners: list[torch.Tensor]  # of all states
    all_states: list[dict[str, torch.Tensor]]
    states: list[dict[str, torch.Tensor]]
    steps: list[torch.Tensor]
    squares: list[torch.Tensor]
    pointers: list[int]  # of parameters and squares; all the same, of those without elements
    # Of parameters, squares and gradients:
    sizes: list[int]
    dtypes: list[torch.dtype]
    strides: list[tuple[int, ...]]
    devices: list[int]  # of gradients

    @classmethod
    def of(
        cls,
        groups: Groups,
        state: State,
        reached: Reached,
        written: Written,
        in_flat: npt.NDArray[np.intp],
    ) -> _ReadPremises:
        states = [state[param] for param in reached.params]
        squares = [each["square_avg"] for each in states]
        tensors = [*reached.params, *squares, *reached.grads]
        return cls(
            written=written,
            in_flat=in_flat,
            grad_pointers=_pointers_of(reached.grads),
            grad_bytes=np.array([grad.nbytes for grad in reached.grads], np.int64),
            params=reached.params,
            group_sizes=[len(group["params"]) for group in groups],
            owners=list(state),
            all_states=list(state.values()),
            states=states,
            steps=[each["step"] for each in states],
            squares=squares,
            pointers=[tensor.data_ptr() for tensor in [*reached.params, *squares]],
            sizes=[tensor.numel() for tensor in tensors],
            dtypes=[tensor.dtype for tensor in tensors],
            strides=[tensor.stride() for tensor in tensors],
            devices=[grad.get_device() for grad in reached.grads],
        )

    def gradients(self, groups: Groups, state: State) -> Gradients | None:
        """As in ``Premises``."""
        reached = Reached.of(groups)
        try:
            if not self._hold(groups, state, reached):
                return None
            pointers = _pointers_of(reached.grads)
        except KeyError:  # a part of a state, which was removed: to be made
            return None
        except RuntimeError:  # a sparse gradient, which has none of these: to be refused
            return None
        if (pointers == self.grad_pointers).all():
            return _Tensors(pointers, reached.grads)
        left_flat = pointers[self.in_flat] != self.grad_pointers[self.in_flat]
        without_memory = (pointers == 0) & (self.grad_bytes > 0)  # to be refused, as is overlap
        if left_flat.any() or without_memory.any():
            return None
        if self.written.overlaps(pointers, self.grad_bytes):
            return None
        return _Tensors(pointers, reached.grads)

    def compiled(self, groups: Groups, state: State) -> Premises:
        """These, as compiled code reads them, if it can."""
        module = compiled_module("compiled_premises")
        if module is None:
            return self
        try:
            premises: Any = module.CompiledPremises(groups, state, self.written, self.in_flat)
        except (KeyError, TypeError) as error:
            _log.debug("Python reads what each step depends on: %r", error)
            return self
        reached = premises.reached  # not those of the plan, if another thread changed gradients
        if len(reached) != len(self.params) or not all(map(is_, reached, self.params)):
            return self
        return premises if premises.gradients(groups, state) else self

    def bump_versions(self) -> None:
        """As in ``Premises``."""
        torch.autograd.graph.increment_version(self.params)

    def _hold(self, groups: Groups, state: State, reached: Reached) -> bool:
        written = [*reached.params, *self.squares]
        tensors = [*written, *reached.grads]
        return (
            self.pointers == list(map(_pointer, written))
            and all(map(is_, reached.params, self.params))
            and self.sizes == list(map(torch.Tensor.numel, tensors))
            and all(map(is_, map(_dtype, tensors), self.dtypes))
            and all(map(eq, map(torch.Tensor.stride, tensors), self.strides))
            and self.devices == list(map(torch.Tensor.get_device, reached.grads))
            and self.group_sizes == [len(group["params"]) for group in groups]
            and len(state) == len(self.owners)
            and all(map(is_, state, self.owners))
            and all(map(is_, state.values(), self.all_states))
            and all(map(is_, map(itemgetter("step"), self.states), self.steps))
            and all(map(is_, map(itemgetter("square_avg"), self.states), self.squares))
            and not any(map(torch.Tensor.is_neg, reached.params))
            and not any(map(torch.Tensor.is_neg, reached.grads))
        )


@dataclass(frozen=True)
class StepPlan:
    """The launches of a step, and all that they were made for.

    Attributes:
        launches: In the order of their groups.
        counters: What counts the steps of reached parameters.
        premises: What they depend on.
        lasting: Whether it may be followed: not if it reads copies of gradients.
        followed_before: Whether it was: premises have been compiled then, if they can be.
    """

    launches: list[PlannedLaunch]
    counters: list[Counter]
    premises: Premises
    lasting: bool
    followed_before: bool = False

    def followed(self, groups: Groups, state: State) -> PlannedStep | None:
        """A step by this plan, for the gradients that there are now; None if it takes a new one."""
        gradients = self.premises.gradients(groups, state) if self.lasting else None
        if gradients is None:
            return None
        plan, pointers = self, gradients.pointers
        if not self.followed_before:
            plan = replace(self, premises=self._compiled(groups, state), followed_before=True)
        tables = [launch.table_for(pointers) for launch in self.launches]
        return PlannedStep(plan, tables, gradients)

    def _compiled(self, groups: Groups, state: State) -> Premises:
        premises = self.premises
        return premises.compiled(groups, state) if isinstance(premises, _ReadPremises) else premises


class PlannedStep(NamedTuple):
    """One step by a plan.

    Attributes:
        plan: Of the launches.
        tables: What each launch updates.
        kept: What must live until all are launched.
    """

    plan: StepPlan
    tables: list[LaunchTable]
    kept: object


@torch.no_grad()
def make_plan(
    groups: Groups,
    state: State,
    counts: list[torch.Tensor],
    flat_buffers: list[list[FlatBuffer]],
    backend: str | None,
) -> PlannedStep:
    """Checks the reached parameters and their gradients, and plans their update.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state.
        counts: From ``new_counts``: where the state's steps are.
        flat_buffers: Those of each group.
        backend: Which kernels to use; None picks by device.

    Returns:
        The first step by the plan: gradients that were not laid out as their parameters are copies.

    Raises:
        TypeError: If a gradient has another dtype than its parameter, or a step cannot count.
        ValueError: If a gradient is sparse or of another shape or device, if a parameter's strides
            are no longer those of its state, or if two tensors overlap.
    """
    reached = Reached.of(groups)
    named = [
        _checked(f"param {index} in group {group_index}", param, state[param])
        for group_index, group in enumerate(groups)
        for index, param in enumerate(group["params"])
        if param.grad is not None
    ]
    check_disjoint(named)
    operands = [each for _, each in named]
    launches: list[PlannedLaunch] = []
    counters: list[Counter] = []
    first = 0
    for index, group in enumerate(groups):
        here = [param for param in group["params"] if param.grad is not None]
        positions = range(first, first + len(here))
        for table, of in _tables_of(positions, reached, operands, flat_buffers[index]):
            chosen = select_backend(backend, table.device.type)
            launches.append(PlannedLaunch(index, chosen, table, of))
        counters += counters_of((state[param]["step"] for param in here), counts)
        first += len(here)
    every = np.arange(len(operands))
    through_tables = [every[each.positions] for each in launches if each.positions is not None]
    in_flat = np.setdiff1d(every, np.concatenate([[], *through_tables]))
    premises = _ReadPremises.of(groups, state, reached, Written.by(operands), in_flat)
    copied = any(map(ne, (each.grad.data_ptr() for each in operands), premises.grad_pointers))
    plan = StepPlan(launches, counters, premises, lasting=not copied)
    return PlannedStep(plan, [launch.table for launch in launches], operands)


def _checked(
    name: str, param: torch.Tensor, state: dict[str, torch.Tensor]
) -> tuple[tuple[str, str, str], Operands]:
    grad, ms = param.grad, state["square_avg"]
    check_step(f"step of {name}", state["step"])
    assert grad is not None
    names = (name, f"grad of {name}", f"square_avg of {name}")
    check_grad(param, grad, names[1], "its param")
    if not same_layout(grad, param):
        grad = torch.empty_like(param).copy_(grad)
    if not same_layout(ms, param):
        raise ValueError(
            f"{name} must keep the strides that the optimizer was made with, {ms.stride()}, "
            f"got {param.stride()}"
        )
    return names, check_operands(param, grad, ms, names)


def _tables_of(
    positions: range,
    reached: Reached,
    operands: list[Operands],
    flat_buffers: list[FlatBuffer],
) -> list[tuple[LaunchTable, Positions | None]]:
    """The tables of one group: one for each flat buffer that is whole, the rest by dtype, device.

    Args:
        positions: Of the group's parameters among all that are reached.
        reached: All parameters that have a gradient.
        operands: Of each of them.
        flat_buffers: Those of the group.

    Returns:
        Each table, with its ``PlannedLaunch.positions``.
    """
    where = {id(reached.params[position]): position for position in positions}
    tables: list[tuple[LaunchTable, Positions | None]] = []
    for buffer in flat_buffers:
        members = [where.get(id(param)) for param in buffer.params]
        if buffer.holds([None if i is None else operands[i] for i in members]):
            tables.append((LaunchTable([buffer.operands]), None))
            for param in buffer.params:
                del where[id(param)]
    kinds: dict[tuple[torch.dtype, torch.device], list[int]] = {}
    for position in where.values():
        param = operands[position].param
        kinds.setdefault((param.dtype, param.device), []).append(position)
    return tables + [
        (LaunchTable([operands[i] for i in kind]), _positions(kind)) for kind in kinds.values()
    ]


def _positions(kind: list[int]) -> Positions:
    """Rising positions, as a slice if none is left out: that copies nothing."""
    rising = slice(kind[0], kind[-1] + 1)
    return rising if len(kind) == rising.stop - rising.start else np.array(kind, np.intp)
