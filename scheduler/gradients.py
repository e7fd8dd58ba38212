"""Checks what workers submit, and lays it out as lanes take it: without a copy."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hogstream.kernels.launch_table import GRAD, LaunchTable
from hogstream.kernels.operands import Operands, check_disjoint, check_grad
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.update import Checked
from hogstream.scheduler.update_state import UpdateState

#: A flat gradient of all parameters, or gradients of some by name.
Gradient = torch.Tensor | Mapping[str, torch.Tensor]

_KEPT_GRADIENTS = 64
_KEPT_TABLES = 64


@dataclass(slots=True, eq=False)
class _Kept:
    """A flat gradient that was checked: itself, its memory, and what came of the check."""

    reference: weakref.ref[torch.Tensor]
    plain: torch.Tensor
    address: int
    checked: Checked


@dataclass(slots=True, frozen=True)
class _Place:
    """Where a parameter lies in the flat ones, from and to an element, its shape and its size."""

    start: int
    stop: int
    shape: torch.Size
    bytes: int


class Gradients:
    """Checks a worker's gradients: a flat one once, as long as it has the same memory."""

    def __init__(
        self,
        shared: SharedParameters,
        state: UpdateState,
        *,
        whole_only: bool = False,
        rows_only: bool = False,
    ) -> None:
        """Remembers what gradients must fit.

        Args:
            shared: What they update.
            state: The worker's, of shape (elements,), as its updates have it.
            whole_only: Whether none may update some parameters only.
            rows_only: Whether there may be none, as all updates are of rows.
        """
        self._flat, self._state = shared.flat, state
        self._dtype, self._device = shared.flat.dtype, shared.flat.device
        self._whole_only, self._rows_only = whole_only, rows_only
        self._kept: dict[int, _Kept] = {}
        self._places: dict[str, _Place] = {}
        stop = 0
        for name, view in shared.views.items():
            start, stop = stop, stop + view.numel()
            self._places[name] = _Place(start, stop, view.shape, view.nbytes)
        self._written = [
            (each.data_ptr(), each.data_ptr() + each.nbytes)
            for each in Operands(shared.flat, shared.flat, *state).written
        ]
        self._first_written = min(first for first, _ in self._written)
        self._last_written = max(last for _, last in self._written)
        self._tables: dict[tuple[int, ...], LaunchTable] = {}  # by the ends of their parts

    def check(self, grad: Gradient) -> tuple[object, Checked]:
        """What to keep alive until a gradient's update has landed, and where it lies.

        Raises:
            TypeError: If it, or one by name, is of a wrong type or dtype.
            ValueError: If one does not fit its parameters, overlaps what updates write, or if
                there is none, or may be none.
        """
        kept = self._kept.get(id(grad))
        if (
            kept is None
            or kept.reference() is not grad
            or grad.data_ptr() != kept.address
            or grad.numel() != self._flat.numel()
        ):
            if self._rows_only:
                raise ValueError(
                    "grad must be of rows, by submit_rows, with policy='row-locked', which locks "
                    "nothing else"
                )
            if isinstance(grad, Mapping):
                return self._check_named(grad)
            kept = self._check_flat(grad)
        return kept.plain, kept.checked

    def _check_flat(self, grad: torch.Tensor) -> _Kept:
        plain = self._checked("grad", self._flat, grad).detach()
        operands = Operands(self._flat, plain, *self._state)
        check_disjoint([(Operands._fields, operands)])
        key = id(grad)
        reference = weakref.ref(grad, lambda _: self._kept.pop(key, None))
        kept = _Kept(reference, plain, plain.data_ptr(), Checked(LaunchTable([operands])))
        if not grad.is_neg():
            if len(self._kept) == _KEPT_GRADIENTS:
                self._kept.clear()
            self._kept[key] = kept
        return kept

    def _check_named(self, grads: Mapping[str, torch.Tensor]) -> tuple[object, Checked]:
        """Gradients by name; they are checked each time, as a backward makes new ones."""
        if self._whole_only:
            raise ValueError(
                "grad must be flat with telemetry on a GPU, which counts whole updates, "
                "got gradients by name"
            )
        if not grads:
            raise ValueError("grad must hold at least one gradient by name, got none")
        if not grads.keys() <= self._places.keys():
            unknown = sorted(map(repr, grads.keys() - self._places.keys()))
            raise ValueError(
                f"grad must name shared parameters, got {', '.join(unknown)}, which are none"
            )
        held, ends, pointers = self._laid_out(grads)
        table = self._tables.get(ends)
        if table is None:
            if len(self._tables) == _KEPT_TABLES:
                self._tables.clear()
            table = self._tables[ends] = LaunchTable(
                [self._part(*each) for each in zip(ends[::2], ends[1::2], strict=True)]
            )
        table = table.copy_to(np.empty_like(table.columns))
        table.columns[GRAD] = pointers
        return held, Checked(table)

    def _laid_out(
        self, grads: Mapping[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], tuple[int, ...], list[int]]:
        """The parts that an update consists of: neighbours whose gradients are ones too are one.

        What is done here for each parameter is paid for in each update.

        Returns:
            The gradients; where each part starts and stops in the flat parameters, one after the
            other; and where its gradient lies.
        """
        held, ends, pointers = list[torch.Tensor](), list[int](), list[int]()
        stop = end = -1  # of the part before, and of its gradient
        for name, place in self._places.items():
            if name not in grads:
                continue
            grad = grads[name]
            if (
                type(grad) is not torch.Tensor
                or grad.layout is not torch.strided
                or grad.dtype is not self._dtype
                or grad.shape != place.shape
                or grad.device != self._device
                or not grad.is_contiguous()
                or grad.is_neg()
            ):
                part = self._flat[place.start : place.stop].view(place.shape)
                grad = self._checked(f"the gradient of {name}", part, grad)
            held.append(grad)
            if not place.bytes:
                continue
            pointer = grad.data_ptr()
            if stop == place.start and end == pointer:
                ends[-1] = place.stop
            else:
                ends += place.start, place.stop
                pointers.append(pointer)
            stop, end = place.stop, pointer + place.bytes
            if pointer < self._last_written and self._first_written < end:
                self.check_apart(f"the gradient of {name}", pointer, end)
        return (held, tuple(ends), pointers) if ends else (held, (0, 0), [0])

    def check_apart(self, name: str, start: int, stop: int) -> None:
        """Checks that nothing is written from an address to another.

        Raises:
            ValueError: If updates write there; calls it by the name.
        """
        for first, last in self._written:
            if start < last and first < stop:
                raise ValueError(f"{name} must not overlap the shared parameters or their state")

    def _checked(self, name: str, param: torch.Tensor, grad: Any) -> torch.Tensor:
        """A gradient that fits its parameters, without a negative bit."""
        if not isinstance(grad, torch.Tensor):
            hint = ": rows go by submit_rows" if isinstance(grad, tuple) else ""
            raise TypeError(f"{name} must be a torch tensor, got {type(grad).__name__}{hint}")
        check_grad(param, grad, name)
        if grad.dtype != param.dtype:
            wanted, got = (str(each.dtype).removeprefix("torch.") for each in (param, grad))
            raise TypeError(f"{name} must be {wanted} as param, got {got}")
        if not grad.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {grad.stride()}")
        return grad.resolve_neg()

    def _part(self, start: int, stop: int) -> Operands:
        """An update of a part; of the gradient, its dtype alone counts."""
        param = self._flat[start:stop]
        return Operands(param, param, *self._state.map(lambda each: each[start:stop]))
