"""What a step launches: planned once with every check, then kept while nothing else has changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import eq, is_, itemgetter
from typing import Any, NamedTuple

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
from hogstream.optim.flat_buffers import FlatBuffer
from hogstream.optim.state import check_step
from hogstream.optim.step_counts import Counter, counters_of

_pointer = torch.Tensor.data_ptr
_dtype = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]
Groups = list[dict[str, Any]]
State = dict[torch.Tensor, dict[str, torch.Tensor]]


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
    positions: list[int] | None


class _Written(NamedTuple):
    """Spans of memory that updates write, none of which overlap, and the sizes of the gradients."""

    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    grad_bytes: npt.NDArray[np.int64]

    @classmethod
    def by(cls, operands: list[Operands]) -> _Written:
        written = [tensor for each in operands for tensor in (each.param, each.ms)]
        starts = np.array([0, *(tensor.data_ptr() for tensor in written)])
        order = np.argsort(starts)
        sizes = np.array([0, *(tensor.nbytes for tensor in written)])
        return cls(
            starts[order],
            (starts + sizes)[order],
            np.array([each.grad.nbytes for each in operands], np.int64),
        )

    def overlaps(self, pointers: npt.NDArray[np.int64]) -> bool:
        """Whether a gradient at its pointer shares memory with a parameter or ``ms``."""
        # The span that matters is the last that starts before the gradient ends.
        last = np.searchsorted(self.starts, pointers + self.grad_bytes) - 1
        return bool((self.ends[np.maximum(last, 0)] > pointers).any())


class _Premises(NamedTuple):
    """All that a plan depends on but for where gradients are.

    It is compared without a new object for each parameter, of which many would have the garbage
    collector go over all that a program has. Gradients have sizes and dtypes of their own: torch
    lets none be set that differs, but ``grad.data`` and ``grad_dtype`` go around that.
    """

    group_sizes: list[int]
    all_states: list[dict[str, torch.Tensor]]
    states: list[dict[str, torch.Tensor]]
    steps: list[torch.Tensor]
    squares: list[torch.Tensor]
    params: list[torch.Tensor]
    pointers: list[int]  # all the same, of those without elements
    sizes: list[int]
    mss: list[int]
    dtypes: list[torch.dtype]
    strides: list[tuple[int, ...]]
    grad_strides: list[tuple[int, ...]]

    @classmethod
    def of(cls, groups: Groups, state: State, reached: Reached) -> _Premises:
        states = [state[param] for param in reached.params]
        return cls(
            group_sizes=[len(group["params"]) for group in groups],
            all_states=list(state.values()),
            states=states,
            steps=[each["step"] for each in states],
            squares=[each["square_avg"] for each in states],
            params=reached.params,
            pointers=[param.data_ptr() for param in reached.params],
            sizes=[param.numel() for param in reached.params],
            mss=[each["square_avg"].data_ptr() for each in states],
            dtypes=[param.dtype for param in reached.params],
            strides=[param.stride() for param in reached.params],
            grad_strides=[grad.stride() for grad in reached.grads],
        )

    def hold(self, groups: Groups, state: State, reached: Reached) -> bool:
        params, grads = reached
        return (
            self.pointers == list(map(_pointer, params))
            and all(map(is_, params, self.params))
            and self.sizes == list(map(torch.Tensor.numel, params))
            and self.sizes == list(map(torch.Tensor.numel, grads))
            and all(map(is_, map(_dtype, params), self.dtypes))
            and all(map(is_, map(_dtype, grads), self.dtypes))
            and all(map(eq, map(torch.Tensor.stride, params), self.strides))
            and self.group_sizes == [len(group["params"]) for group in groups]
            and len(state) == len(self.all_states)
            and all(map(is_, state.values(), self.all_states))
            and all(map(is_, map(itemgetter("step"), self.states), self.steps))
            and all(map(is_, map(itemgetter("square_avg"), self.states), self.squares))
            and self.mss == list(map(_pointer, self.squares))
            and all(map(eq, map(torch.Tensor.stride, grads), self.grad_strides))
            and not any(map(torch.Tensor.is_neg, grads))
        )


@dataclass(frozen=True)
class StepPlan:
    """The launches of a step, and all that they were made for.

    Attributes:
        launches: In the order of their groups.
        counters: What counts the steps of reached parameters.
        grad_pointers: Where the gradients were.
        written: The memory of parameters and ``ms``, where no gradient may be.
        premises: What else they depend on; None if they hold for one step only.
    """

    launches: list[PlannedLaunch]
    counters: list[Counter]
    grad_pointers: list[int]
    written: _Written
    premises: _Premises | None

    def followed(self, groups: Groups, state: State, reached: Reached) -> StepPlan | None:
        """This plan, for the gradients that there are now; None if it takes a new one."""
        try:
            if self.premises is None or not self.premises.hold(groups, state, reached):
                return None
            pointers = list(map(_pointer, reached.grads))
        except KeyError:  # a part of a state, which was removed: to be made
            return None
        except RuntimeError:  # a sparse gradient, which has none of these: to be refused
            return None
        if pointers == self.grad_pointers:
            return self
        if pointers.count(0) != self.grad_pointers.count(0):
            return None  # one has no memory: to be refused
        if self.written.overlaps(np.array(pointers, np.int64)):
            return None  # to be refused
        launches = []
        for launch in self.launches:
            if launch.positions is None:
                return None  # a gradient may have left its flat buffer
            table = launch.table.with_grads([pointers[i] for i in launch.positions])
            launches.append(replace(launch, table=table))
        return replace(self, launches=launches, grad_pointers=pointers)


@torch.no_grad()
def make_plan(
    groups: Groups,
    state: State,
    counts: list[torch.Tensor],
    flat_buffers: list[list[FlatBuffer]],
    reached: Reached,
    backend: str | None,
) -> tuple[StepPlan, list[torch.Tensor]]:
    """Checks the reached parameters and their gradients, and plans their update.

    Args:
        groups: The optimizer's parameter groups.
        state: Its state.
        counts: From ``new_counts``: where the state's steps are.
        flat_buffers: Those of each group.
        reached: What ``groups`` hold.
        backend: Which kernels to use; None picks by device.

    Returns:
        The plan, and copies of gradients that it reads, if they were not laid out as parameters.

    Raises:
        TypeError: If a gradient has another dtype than its parameter, or a step cannot count.
        ValueError: If a gradient is sparse or of another shape or device, if a parameter's strides
            are no longer those of its state, or if two tensors overlap.
    """
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
    pointers = [grad.data_ptr() for grad in reached.grads]
    copies = [
        each.grad
        for each, pointer in zip(operands, pointers, strict=True)
        if each.grad.data_ptr() != pointer
    ]
    premises = None if copies else _Premises.of(groups, state, reached)
    return StepPlan(launches, counters, pointers, _Written.by(operands), premises), copies


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
) -> list[tuple[LaunchTable, list[int] | None]]:
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
    tables: list[tuple[LaunchTable, list[int] | None]] = []
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
    return tables + [(LaunchTable([operands[i] for i in kind]), kind) for kind in kinds.values()]
