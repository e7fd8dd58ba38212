"""Rows of a table in Triton, on a GPU or interpreted, against NumPy: bits, counts and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from hogstream.kernels import sparse_rmsprop_
from hogstream.kernels.backends import numpy_rows, triton_rows
from hogstream.kernels.backends.select import select_row_backend
from hogstream.kernels.backends.triton_rows import update_
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.race_counters import RaceCounters
from hogstream.kernels.rows import RowOperands, RowUpdate
from hogstream.kernels.sparse import _update_on_device
from row_making import NUMBER, assert_same_rows, each_of, row_operands
from triton_testing import DEVICE, on_tritons_device
from update_testing import FULL, extreme, normal

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
KEY = 0xFEDC_BA98_7654_3210
LAZY, ROWWISE = {"lazy": True}, {"rowwise": True}

#: Dtypes of the table and of gradients, width of a row, and how it is updated.
CASES: list[tuple[torch.dtype, torch.dtype, int, dict[str, Any]]] = [
    (F32, F32, 128, {}),
    (F32, F32, 257, {"maximize": True, "weight_decay": 0.1, **FULL}),
    (F32, F16, 3, {"weight_decay": 0.1, "decoupled_weight_decay": True, "momentum": 0.9}),
    (F32, F64, 32, {"centered": True, "eps_inside_sqrt": False, **LAZY}),
    (F32, F32, 100, {"weight_decay": 0.1, **ROWWISE, **LAZY}),
    (F32, BF16, 1, {**ROWWISE}),
    (F64, F64, 33, {"lr_in_momentum": True, **FULL}),
    (F64, F32, 31, {"momentum": 0.9, "maximize": True, **ROWWISE}),
    (F64, F64, 7, {**LAZY}),
    (F16, F16, 100, {"stochastic_rounding": True}),
    (F16, F32, 31, {"kahan_sum": True, "weight_decay": 0.1, **ROWWISE}),
    (BF16, BF16, 64, {"kahan_sum": True, "weight_decay": 0.1}),
    (BF16, F32, 257, {"stochastic_rounding": True, **ROWWISE, **LAZY}),
    (BF16, BF16, 3, {"centered": True, **LAZY}),
]


def on_device(operands: RowOperands) -> RowOperands:
    return each_of(lambda each: each.to(DEVICE, copy=True), operands)


def by_numpy(given: RowOperands, hyperparameters: Hyperparameters) -> RowOperands:
    expected = each_of(torch.clone, given)
    numpy_rows.update_(RowUpdate.of(expected, NUMBER), hyperparameters, KEY)
    return expected


def hyperparameters_of(options: dict[str, Any]) -> Hyperparameters:
    return Hyperparameters(**{k: v for k, v in options.items() if k not in ("lazy", "rowwise")})


@on_tritons_device
@pytest.mark.parametrize("values", [normal, extreme])
@pytest.mark.parametrize(("dtype", "grad_dtype", "width", "options"), CASES)
def test_bits_are_those_of_numpy(dtype, grad_dtype, width, options, values):
    given = row_operands(dtype, grad_dtype, (40, width), 70, **options, values=values)
    h = hyperparameters_of(options)
    updated = on_device(given)
    update_(RowUpdate.of(updated, NUMBER), h, KEY)
    assert_same_rows(each_of(torch.Tensor.cpu, updated), by_numpy(given, h))


@on_tritons_device
def test_many_tiles_give_the_bits_of_one(monkeypatch):
    given = row_operands(F32, F32, (50, 40), 300, lazy=True, centered=True)
    h, updated = Hyperparameters(centered=True), on_device(given)
    monkeypatch.setattr(triton_rows, "INTERPRETED_BLOCK", 128)
    update_(RowUpdate.of(updated, NUMBER), h, KEY)
    assert_same_rows(each_of(torch.Tensor.cpu, updated), by_numpy(given, h))


@on_tritons_device
def test_a_gradient_of_minus_0_stays_beside_rows_of_several():
    given = row_operands(F32, F32, (2, 1), 3)._replace(rows=torch.tensor([0, 1, 1]))
    given.param[0], given.grads[0] = -0.0, -0.0  # of which 0 comes, and of a gradient of 0 -0
    updated = on_device(given)
    update_(RowUpdate.of(updated, NUMBER), Hyperparameters(), KEY)
    assert_same_rows(each_of(torch.Tensor.cpu, updated), by_numpy(given, Hyperparameters()))


@on_tritons_device
@pytest.mark.parametrize("factor", [0.3, torch.inf])
def test_a_factor_and_lr_may_be_in_memory(factor):
    given = row_operands(F32, F32, (40, 31), 70, rowwise=True)
    updated = on_device(given)
    lr, of_grads = (torch.tensor(each, dtype=F64, device=DEVICE) for each in (0.5, factor))
    update_(
        RowUpdate.of(updated, NUMBER),
        Hyperparameters(lr=0.1),
        lr_on_device=lr,
        grad_factor=of_grads,
    )
    expected = by_numpy(given, Hyperparameters(lr=0.5).with_grad_factor(factor))
    assert_same_rows(each_of(torch.Tensor.cpu, updated), expected)


@on_tritons_device
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_what_was_found_may_forbid_the_update(found):
    given = row_operands(F32, F32, (40, 8), 70, lazy=True)
    updated, verdict = on_device(given), torch.full((1,), 7, dtype=torch.int32, device=DEVICE)
    found_inf = torch.tensor([found], device=DEVICE)
    h = Hyperparameters()
    update_(RowUpdate.of(updated, NUMBER), h, verdict=verdict, found_inf=found_inf)
    assert verdict.item() == 0
    expected = given if found else by_numpy(given, h)
    assert_same_rows(each_of(torch.Tensor.cpu, updated), expected)


@on_tritons_device
@pytest.mark.parametrize("width", [8, 0])
@pytest.mark.parametrize("row", [-1, 40, 39])
def test_the_verdict_is_on_rows_outside_of_the_table(row, width):
    given = row_operands(F32, F32, (40, width), 70)
    given.rows[3] = row
    updated, verdict = on_device(given), torch.full((1,), 7, dtype=torch.int32, device=DEVICE)
    ascending = torch.sort(updated.rows, stable=True)
    update_(RowUpdate(updated, *ascending, NUMBER), Hyperparameters(), verdict=verdict)
    assert verdict.item() == (row != 39)
    changed = not torch.equal(updated.param.cpu(), given.param)
    assert changed == (row == 39 and width > 0)


@on_tritons_device
@pytest.mark.parametrize("row", [-1, 40])
def test_who_gives_no_verdict_is_told_of_rows_outside(row):
    given = row_operands(F32, F32, (40, 8), 70)
    given.rows[3] = row
    updated, backend = on_device(given), select_row_backend("triton", DEVICE.type)
    update = RowUpdate(updated, *torch.sort(updated.rows, stable=True), NUMBER)
    with pytest.raises(IndexError, match="rows must be >= 0 and < 40, the rows of the table"):
        _update_on_device(backend, update, Hyperparameters(), None)
    verdict = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    _update_on_device(backend, update, Hyperparameters(), verdict)
    assert verdict.item() == 1
    assert torch.equal(updated.param.cpu(), given.param)


@pytest.mark.gpu
def test_rows_on_a_gpu_are_found_by_the_kernel():
    table = {name: torch.ones(4, 2, device="cuda") for name in ("param", "ms")}
    grads = torch.ones(2, 2, device="cuda")
    for rows in (torch.tensor([3, 4]), torch.tensor([-1, 0], dtype=torch.int32)):
        with pytest.raises(IndexError, match="rows must be >= 0 and < 4"):
            sparse_rmsprop_(table["param"], rows.cuda(), grads, table["ms"])
        assert torch.all(table["param"] == 1)
    verdict = torch.full((1,), 7, dtype=torch.int32, device="cuda")
    rows = torch.tensor([3, 0], device="cuda")
    sparse_rmsprop_(table["param"], rows, grads, table["ms"], verdict=verdict)
    assert verdict.item() == 0
    assert (table["param"] < 1).all(dim=1).tolist() == [True, False, False, True]


@on_tritons_device
def test_each_row_is_counted_once():
    given = row_operands(F32, F32, (40, 8), 30)
    update = RowUpdate.of(on_device(given), NUMBER)
    counters = RaceCounters.zeros(40, 1, DEVICE)
    for _ in range(2):
        update_(update, Hyperparameters(), counters=counters)
    counted = torch.zeros(40, dtype=torch.int64)
    counted[given.rows] = 2
    assert counters.counts.tolist() == [counted.tolist(), counted.tolist(), [0] * 40]


@on_tritons_device
@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"counters": RaceCounters.zeros(40, 2)}, ValueError, "40 rows in blocks of 1 .* of 2 on"),
        ({"counters": RaceCounters.zeros(320, 1)}, ValueError, "for 40 rows .* got 320 in blocks"),
        ({"verdict": torch.zeros(1)}, TypeError, "verdict must be int32, got torch.float32"),
        (
            {"verdict": torch.zeros(2, dtype=torch.int32)},
            ValueError,
            r"verdict must be of shape \(1,\)",
        ),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(given, error, message):
    update = RowUpdate.of(on_device(row_operands(F32, F32, (40, 8), 30)), NUMBER)
    before = update.operands.param.clone()
    with pytest.raises(error, match=message):
        update_(update, Hyperparameters(), **given)
    assert torch.equal(update.operands.param, before)


ALIGNED = [
    pytest.param(F32, F32, 32, 4, id="float32"),
    pytest.param(F32, F32, 30, 1, id="float32 whose rows are not aligned"),
    pytest.param(F32, BF16, 8, 8, id="float32 by bfloat16"),
    pytest.param(F32, BF16, 4, 1, id="float32 by bfloat16 whose rows are not aligned"),
    pytest.param(F64, F64, 2, 2, id="float64"),
]


@pytest.mark.parametrize(("dtype", "grad_dtype", "width", "unit"), ALIGNED)
def test_aligned_rows_are_known_to_be(dtype, grad_dtype, width, unit):
    given = row_operands(dtype, grad_dtype, (40, width), 9, momentum=0.9)
    assert triton_rows.tile_constants(given)["UNIT"] == unit
    assert given.momentum_buffer is not None
    off = torch.empty(40 * width + 1, dtype=dtype)[1:].view(40, width)
    assert triton_rows.tile_constants(given._replace(momentum_buffer=off))["UNIT"] == 1


@pytest.mark.parametrize(
    ("width", "rowwise", "columns"),
    [
        (1, False, 1),
        (3, False, 4),
        (100, False, 128),
        (300, False, 128),
        (5, True, 8),
        (99, True, 32),
    ],
)
def test_tiles_are_as_wide_as_rows_up_to_a_limit(width, rowwise, columns):
    given = row_operands(F32, F32, (40, width), 9, rowwise=rowwise)
    assert triton_rows.tile_constants(given)["COLUMNS"] == columns
