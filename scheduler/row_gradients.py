"""Checks gradients of rows that workers submit, and lays them out as lanes take them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch

from hogstream.kernels.operands import ArrayLike, short
from hogstream.kernels.row_table import (
    BEFORE,
    COUNTS,
    ROW_VERSIONS,
    SLOTS,
    VERSIONS,
    RowTable,
)
from hogstream.kernels.rows import RowOperands, RowUpdate, check_row_numbers, check_rows
from hogstream.scheduler.gradients import Gradients
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.update import Checked
from hogstream.scheduler.update_state import UpdateState

#: Enters a context in which device work goes down a lane.
Computing = Callable[[], AbstractContextManager[object]]

#: Rows of a table, and a gradient of each.
RowGradient = tuple[ArrayLike, ArrayLike]


class _Table(NamedTuple):
    """A shared parameter as rows.

    Attributes:
        param: Shape (N, D).
        state: The worker's for it: of the same shape.
        before: How many elements of the shared parameters come before it.
        row_versions: The address of those of its rows, or 0.
        counts: The address of its race counters, by row, or 0.
    """

    param: torch.Tensor
    state: UpdateState
    before: int
    row_versions: int
    counts: int


class RowGradients:
    """Checks gradients of rows of a worker's."""

    def __init__(
        self,
        shared: SharedParameters,
        state: UpdateState,
        gradients: Gradients,
        *,
        counts_races: bool,
        continuing: Computing,
    ) -> None:
        """Remembers what they must fit.

        Args:
            shared: What they update.
            state: The worker's, of shape (elements,), as its updates have it.
            gradients: Those of the same worker, which know the memory that updates write.
            counts_races: Whether the races of each row are counted apart, as on a GPU.
            continuing: Of the worker's lane: rows may be what was computed there.
        """
        self._shared, self._state = shared, state
        self._counts_races, self._continuing = counts_races, continuing
        self._check_apart = gradients.check_apart
        self._tables: dict[str, _Table] = {}

    def check(
        self,
        name: str | Mapping[str, RowGradient],
        rows: ArrayLike | None,
        grads: ArrayLike | None,
    ) -> tuple[object, Checked]:
        """What to keep alive until an update of rows has landed, and where it lies.

        Args:
            name: Of the table; or rows and gradients by name of several, and nothing else.
            rows: Of one table: int32 or int64, shape (k,). They are copied, on a GPU by its stream.
            grads: Their gradients: shape (k, D).

        Raises:
            TypeError: If something is of a wrong type or dtype.
            ValueError: If a table is unknown, or gradients do not fit it or overlap what updates
                write, or there is no table.
            IndexError: If a row is not in its table; on a GPU, the kernel finds that.
        """
        given = _by_name(name, rows, grads)
        tables = [self._table(each) for each, _ in given]
        operands = [
            self._operands(each, table, *pair)
            for (each, pair), table in zip(given, tables, strict=True)
        ]
        with self._continuing():
            parts = [RowUpdate.of(each) for each in operands]
        laid_out = RowTable(parts)
        versions, fields = self._shared.versions, laid_out.fields
        fields[:, BEFORE] = [table.before for table in tables]
        fields[:, ROW_VERSIONS] = [table.row_versions for table in tables]
        fields[:, COUNTS] = [table.counts for table in tables]
        fields[:, VERSIONS], fields[:, SLOTS] = versions.data_ptr(), len(versions)
        return laid_out, Checked(laid_out)

    def lay_out_copy(self, name: str, rows: ArrayLike) -> tuple[torch.Tensor, RowTable]:
        """Where a copy of rows goes, shape (k, D), and what a lane makes it from.

        Args:
            name: Of the table.
            rows: int32 or int64, shape (k,). They are copied, on a GPU by its stream.

        Raises:
            Exception: As ``check``.
        """
        table = self._table(name)
        rows = check_row_numbers(table.param, rows, f"the rows of {name}")
        target = table.param.new_empty(len(rows), table.param.shape[1])
        with self._continuing():
            copied = rows.to(torch.int64, copy=True)
        operands = RowOperands(table.param, target, table.param, None, None, None, None, rows)
        laid_out = RowTable([RowUpdate(operands, copied, copied, 1)])
        laid_out.fields[:, BEFORE] = table.before
        return target, laid_out

    def _operands(self, name: str, table: _Table, rows: ArrayLike, grads: ArrayLike) -> RowOperands:
        """Those of the update of one table."""
        called = f"the gradients of {name}"
        rows, grads = check_rows(table.param, rows, grads, names=(f"the rows of {name}", called))
        if grads.dtype != table.param.dtype:
            wanted, got = short(table.param.dtype), short(grads.dtype)
            raise TypeError(f"{called} must be {wanted} as the table, got {got}")
        self._check_apart(called, grads.data_ptr(), grads.data_ptr() + grads.nbytes)
        return RowOperands(table.param, grads, *table.state, None, None, rows)

    def _table(self, name: Any) -> _Table:
        """A parameter as a table; made once."""
        shared, rows_before = self._shared, 0
        if not isinstance(name, str) or name not in shared.views:
            raise ValueError(f"name must be that of a shared parameter, got {name!r}")
        if name in self._tables:
            return self._tables[name]
        for each, view in shared.views.items():
            if each == name:
                break
            rows_before += view.shape[0] if view.dim() else 0
        if not view.dim():
            raise ValueError(f"name must be that of a parameter of an axis or more, got {name!r}")
        shape = view.shape[0], math.prod(view.shape[1:])
        before = int(view.storage_offset() - shared.flat.storage_offset())
        part = slice(before, before + view.numel())
        versions = shared.row_versions
        races = shared.count_races_of_rows(name) if self._counts_races else None
        table = self._tables[name] = _Table(
            shared.flat[part].view(shape),
            self._state.map(lambda each: each[part].view(shape)),
            before,
            0 if versions is None else versions.data_ptr() + versions.itemsize * rows_before,
            0 if races is None else races.counts.data_ptr(),
        )
        return table


def _by_name(
    name: str | Mapping[str, RowGradient], rows: ArrayLike | None, grads: ArrayLike | None
) -> Collection[tuple[str, RowGradient]]:
    """Names, and rows and gradients, of one table too."""
    if not isinstance(name, Mapping):
        return [(name, (rows, grads))]  # type: ignore[list-item]  # the check finds None
    if rows is not None or grads is not None:
        raise TypeError("rows and grads must be left out where name maps tables to theirs")
    if not name:
        raise ValueError("name must map at least one table to its rows and gradients, got none")
    for table, pair in name.items():
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(f"name must map {table} to a tuple of rows and gradients, got {pair!r}")
    return name.items()
