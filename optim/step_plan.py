"""What a step launches: planned once with every check, then kept while nothing else has changed."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from operator import eq, is_, itemgetter, ne
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from hogstream.kernels.backends import Backend, select_backend
from hogstream.kernels.backends.select import check_backend
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import (
    Operands,
    check_disjoint,
    check_grad,
    check_operands,
    same_layout,
)
from hogstream.optim.flat_buffers import FlatBuffer
from hogstream.optim.state import check_step
from hogstream.optim.step_counts import Counter, counters_of

_pointer = torch.Tensor.data_ptr
_dtype = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
Groups = list[dict[str, Any]]
State = dict[torch.Tensor, dict[str, torch.Tensor]]
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
    positions: npt.NDArray[np.intp] | None

    def with_grads(self, pointers: npt.NDArray[np.int64]) -> PlannedLaunch:
        """This launch for gradients at such addresses, of all reached parameters."""
        if self.positions is None:
            return self
        table = self.table.with_grads(pointers[self.positions])
        return PlannedLaunch(self.group, self.backend, table, self.positions)


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
        compiler = _compiler()
        if compiler is None:
            return self
        try:
            premises: Any = compiler(groups, state, self.written, self.in_flat)
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


@cache
def _compiler() -> Callable[..., Premises] | None:
    """What makes premises of which compiled code takes account; None if there is none here."""
    try:
        check_backend("numba")
        module = importlib.import_module("hogstream.optim.compiled_premises")
    except Exception as error:  # each of Numba, CPython and torch may be other than is expected
        _log.debug("Python reads what each step depends on, as it can't be compiled: %r", error)
        return None
    compiler: Callable[..., Premises] = module.CompiledPremises
    return compiler


@dataclass(frozen=True)
class StepPlan:
    """The launches of a step, and all that they were made for.

    Attributes:
        launches: In the order of their groups.
        counters: What counts the steps of reached parameters.
        grad_pointers: int64: where the gradients were.
        premises: What else they depend on.
        lasting: Whether it may be followed: not if it reads copies of gradients.
        followed_before: Whether it was: premises have been compiled then, if they can be.
    """

    launches: list[PlannedLaunch]
    counters: list[Counter]
    grad_pointers: npt.NDArray[np.int64]
    premises: Premises
    lasting: bool
    followed_before: bool = False

    def followed(self, groups: Groups, state: State) -> tuple[StepPlan, Gradients] | None:
        """This plan for the gradients that there are now, and those; None if it takes a new one."""
        gradients = self.premises.gradients(groups, state) if self.lasting else None
        if gradients is None:
            return None
        premises = self.premises
        if isinstance(premises, _ReadPremises) and not self.followed_before:
            premises = premises.compiled(groups, state)
        pointers = gradients.pointers
        if self.followed_before and (pointers == self.grad_pointers).all():
            return self, gradients
        launches = [launch.with_grads(pointers) for launch in self.launches]
        return StepPlan(launches, self.counters, pointers, premises, True, True), gradients


@torch.no_grad()
def make_plan(
    groups: Groups,
    state: State,
    counts: list[torch.Tensor],
    flat_buffers: list[list[FlatBuffer]],
    backend: str | None,
) -> tuple[StepPlan, list[Operands]]:
    """Checks the reached parameters and their gradients, and plans their update.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state.
        counts: From ``new_counts``: where the state's steps are.
        flat_buffers: Those of each group.
        backend: Which kernels to use; None picks by device.

    Returns:
        The plan, and what it updates, which must live until that is launched: gradients that were
        not laid out as their parameters are copies.

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
    through_tables = [each.positions for each in launches if each.positions is not None]
    in_flat = np.setdiff1d(np.arange(len(operands)), np.concatenate([[], *through_tables]))
    premises = _ReadPremises.of(groups, state, reached, Written.by(operands), in_flat)
    copied = any(map(ne, (each.grad.data_ptr() for each in operands), premises.grad_pointers))
    plan = StepPlan(launches, counters, premises.grad_pointers, premises, lasting=not copied)
    return plan, operands


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
) -> list[tuple[LaunchTable, npt.NDArray[np.intp] | None]]:
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
    tables: list[tuple[LaunchTable, npt.NDArray[np.intp] | None]] = []
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
        (LaunchTable([operands[i] for i in kind]), np.array(kind, np.intp))
        for kind in kinds.values()
    ]
