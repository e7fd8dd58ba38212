"""What must hold of the kernel of rows, as PTX: each function looks at one form, or raises."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from hogstream.kernels.backends.numpy_rows import update_ as update_by_numpy_
from hogstream.kernels.backends.triton_rows import row_words
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED
from hogstream.kernels.rows import RowOperands, RowUpdate
from ptx_checks import all_options_of, check_left_out, unchanged
from ptx_compiling import Compiled, Form
from ptx_machine import Launch, execute, race
from ptx_updates import GRAD_FACTOR, KEY, Device, Watch
from row_making import NUMBER, assert_same_rows, each_of, row_operands
from update_testing import COMPUTE, extreme, normal, special

Made = TypeVar("Made")


class Case(NamedTuple):
    """Rows that are updated.

    Attributes:
        operands: Before the update.
        offsets: By how many elements each of them lies off its alignment.
    """

    operands: RowOperands
    offsets: tuple[int, ...]


class RowLaunch(NamedTuple):
    """An update that is ready to be launched.

    Attributes:
        update: Of tensors on the device.
        launch: It.
        verdict: Where it says whether all rows are in the table.
        watch: What it takes besides.
    """

    update: RowUpdate
    launch: Launch
    verdict: torch.Tensor
    watch: Watch


def check_row_form(compiled: Compiled) -> int:
    """Runs all checks of the kernel of rows, and returns how many elements were compared."""
    cases, compared = _cases(compiled), 0
    for case, options in product(cases, all_options_of(compiled.form)):
        compared += _check_bits(compiled, case, Hyperparameters(**options))
    _check_outside(compiled, cases[0])
    _check_alone(compiled, cases[-1])
    return compared


def _check_bits(compiled: Compiled, case: Case, hyperparameters: Hyperparameters) -> int:
    """Compares an update with the NumPy backend's."""
    device = Device()
    on = _on_device(device, compiled, case, hyperparameters)
    if on.watch.verdict is not None:
        check_left_out(device, on.launch, on.watch, list(on.update.operands))
    counts = None if on.watch.counts is None else on.watch.counts.clone()
    execute(on.launch, device.memory)
    assert on.verdict.item() == 0, "rows that are in the table"
    assert_same_rows(on.update.operands, _by_numpy(compiled.form, case, hyperparameters))
    assert on.watch.locks is None or not on.watch.locks.any(), "a lock is held still"
    if on.watch.counts is not None and counts is not None:
        _check_counted(on.watch.counts - counts, case.operands.rows)
    return case.operands.grads.numel()


def _check_counted(counted: torch.Tensor, rows: torch.Tensor) -> None:
    """Checks that each row was counted once, however often it is there."""
    expected = torch.zeros_like(counted)
    expected[:, rows.unique()] = torch.tensor([[1], [1], [0]])
    assert [LANDED, SURVIVED, OVERWRITTEN] == [0, 1, 2]
    assert torch.equal(counted, expected), counted


def _check_outside(compiled: Compiled, case: Case) -> None:
    """Checks that nothing is changed if a row is not in the table."""
    table_rows = len(case.operands.param)
    hyperparameters = Hyperparameters(**all_options_of(compiled.form)[0])
    for outside in (-1, table_rows, -(1 << 62), 1 << 62):
        rows = case.operands.rows.clone()
        rows[len(rows) // 2] = outside
        device = Device()
        changed = case._replace(operands=case.operands._replace(rows=rows))
        on = _on_device(device, compiled, changed, hyperparameters)
        kept = unchanged([*on.update.operands, on.watch.counts])
        execute(on.launch, device.memory)
        assert on.verdict.item() == 1, f"row {outside} of a table of {table_rows}"
        kept()


def _check_alone(compiled: Compiled, case: Case) -> None:
    """Checks that the warps of a launch do not race with each other."""
    form = compiled.form
    hyperparameters = Hyperparameters(**all_options_of(form)[0])
    for seed in range(3):
        device = Device()
        on = _on_device(device, compiled, case, hyperparameters)
        race([on.launch], device.memory, seed)
        assert_same_rows(on.update.operands, _by_numpy(form, case, hyperparameters))


def _by_numpy(form: Form, case: Case, hyperparameters: Hyperparameters) -> RowOperands:
    expected = each_of(torch.clone, case.operands)
    scaled = hyperparameters.with_grad_factor(GRAD_FACTOR) if form.scaled else hyperparameters
    update_by_numpy_(RowUpdate.of(expected, NUMBER), scaled, KEY % 2**64)
    return expected


def _on_device(
    device: Device, compiled: Compiled, case: Case, hyperparameters: Hyperparameters
) -> RowLaunch:
    put = zip(RowOperands._fields, case.operands, case.offsets, strict=True)
    tensors: list[Any] = [
        each if each is None else device.put(name, each, offset) for name, each, offset in put
    ]
    table_rows = len(case.operands.param)
    watch = Watch.of(compiled.form, device, hyperparameters.lr, table_rows)
    return launch_of(device, compiled, RowOperands(*tensors), hyperparameters, watch)


def launch_of(
    device: Device,
    compiled: Compiled,
    operands: RowOperands,
    hyperparameters: Hyperparameters,
    watch: Watch,
) -> RowLaunch:
    """The launch of an update of a table that is on the device."""
    ascending = torch.sort(operands.rows, stable=True)  # as on a GPU, where any rows are taken
    rows, order = map(device.put, ("sorted rows", "order"), ascending)
    update = RowUpdate(operands, rows, order, NUMBER)
    verdict = device.put("verdict of rows", torch.full((1,), 7, dtype=torch.int32))
    words = row_words(update, compiled.form.unit)
    launch = device.update_rows(compiled, words, hyperparameters, verdict, watch)
    return RowLaunch(update, launch, verdict, watch)


def table_of(
    form: Form,
    shape: tuple[int, int],
    make: Callable[[tuple[int, ...], torch.dtype, str], Made],
) -> dict[str, Made]:
    """What a form has of a table of a shape, each made of its own shape, dtype and name."""
    dtype = getattr(torch, form.dtype)
    compute = COMPUTE[dtype]
    made = {"param": make(shape, dtype, "param")}
    made["ms"] = make(shape[:1] if form.rowwise else shape, compute, "ms")
    if form.centered:
        made["grad_avg"] = make(shape, compute, "grad_avg")
    if form.momentum:
        made["momentum_buffer"] = make(shape, compute, "momentum_buffer")
    if form.compensated:
        made["kahan_comp"] = make(shape, dtype, "kahan_comp")
    if form.lazy:
        made["last_update"] = make(shape[:1], torch.int64, "last_update")
    return made


def operands_of(
    table: dict[str, torch.Tensor], grads: torch.Tensor, rows: torch.Tensor
) -> RowOperands:
    """Some of a table's operands, with gradients of some of its rows."""
    tensors: dict[str, Any] = dict.fromkeys(RowOperands._fields)
    return RowOperands(**tensors | table | {"grads": grads, "rows": rows})


def _cases(compiled: Compiled) -> list[Case]:
    """Of ordinary values, then of extremes, then with special ones, and the smallest there are."""
    form, block = compiled.form, compiled.block
    widths, aligned = _widths(form), (0,) * 8
    unaligned = aligned if form.unit > 1 else (1, 2, 3, 1, 2, 3, 1, 1)
    layouts = [
        (widths[0], 2 * block + 1, normal, aligned),
        (widths[-1], block + 17, extreme, unaligned),
        (widths[-2 % len(widths)], 3 * block, _odd, unaligned),
        *((width, min(block, 9), normal, aligned) for width in widths),
        (widths[0], 1, normal, aligned),
        (widths[-1], min(3 * block, 40), normal, unaligned),
    ]
    return [
        Case(
            row_operands(
                getattr(torch, form.dtype), getattr(torch, form.grad_dtype or form.dtype),
                (min(positions, 60) + 2, width), positions, rowwise=form.rowwise, lazy=form.lazy,
                values=values, centered=form.centered, momentum=form.momentum,
                kahan_sum=form.compensated,
            ),
            offsets,
        )
        for width, positions, values, offsets in layouts
    ]  # fmt: skip


def _widths(form: Form) -> list[int]:
    """How many elements rows may have in a form, some of these: the most, and the least."""
    columns, unit = form.columns, form.unit
    fit = {columns, columns // 2 + unit if columns > unit else columns}
    if columns == (32 if form.rowwise else 128):
        fit |= {columns + unit, 2 * columns + 3 * unit}
    return sorted(fit)


def _odd(size: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Ordinary values, among them special ones, not so many that none of a row is ordinary."""
    random, values = np.random.default_rng(seed), normal(size, dtype, seed)
    places = torch.from_numpy(random.random(size) < 0.05)
    chosen = torch.from_numpy(random.integers(0, len(special(dtype)), size))
    return torch.where(places, special(dtype)[chosen], values)
