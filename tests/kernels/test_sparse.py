"""Updates of rows: the design's bits on every backend, what is refused, and what stays as it is."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogstream.kernels import rmsprop_, sparse_rmsprop_
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.race_counters import RaceCounters
from hogstream.kernels.rows import RowUpdate, check_row_operands, sort_rows
from row_testing import FIRST, Table, update_rows_, updated_rows
from update_testing import (
    ALL_VARIANTS,
    BACKENDS,
    COMPUTE,
    CPU_BACKENDS,
    DTYPES,
    bits,
    extreme,
    normal,
    special,
)

ROWS = 12
# Some of them once, some twice and more, in no order; most not at all.
TOUCHED = torch.tensor([7, 2, 7, 0, 11, 2, 7, 5, 7])

KINDS: list[dict[str, Any]] = [{}, {"rowwise": True}, {"lazy_decay": True}]
KINDS.append({"rowwise": True, "lazy_decay": True})


def _allowed(options: dict[str, Any]) -> bool:
    return not (options.get("rowwise") and options.get("centered")) and not (
        options.get("lazy_decay") and options.get("momentum")
    )


EVERY = [
    pytest.param(variant.values[0] | kind, id=f"{variant.id}-{'-'.join(kind)}".rstrip("-"))
    for variant, kind in product(ALL_VARIANTS, KINDS)
    if _allowed(variant.values[0] | kind)
]
SOME = EVERY[::5]
# Of Triton, whose code takes long to be interpreted or compiled, one dtype of each.
OF_DTYPES = [
    pytest.param(
        *(*backend.values, *dtype.values, *variant.values),
        id=f"{backend.id}-{dtype.id}-{variant.id}",
        marks=backend.marks,
    )
    for backend, (place, variant), (turn, dtype) in product(
        BACKENDS, enumerate(SOME), enumerate(DTYPES)
    )
    if backend.id != "triton" or place % len(DTYPES) == turn
]


def assert_same_table(actual: Table, expected: Table) -> None:
    """Every element is equal to the bit."""
    for name, got, want in zip(Table._fields, actual, expected, strict=True):
        assert (got is None) == (want is None)
        if got is None or want is None:
            continue
        got = got.cpu()
        same = got == want if got.dtype == torch.int64 else bits(got) == bits(want)
        assert same.all(), f"{name} differs at {(~same).nonzero()[0].tolist()}"


def check_updates(
    backend: Any, dtype: torch.dtype, options: dict[str, Any], width: int, count: int = 3
) -> None:
    """Compares some updates of a worn table."""
    expected = Table.worn(ROWS, width, dtype, seed=0, **options)
    actual = expected.copy(backend.device)
    for number in range(FIRST, FIRST + count):
        rows = (TOUCHED * number + number) % ROWS
        grads = extreme(len(rows) * width, dtype, seed=number).reshape(-1, width)
        expected = updated_rows(expected, rows, grads, number, **options)
        on_device = rows.to(backend.device), grads.to(backend.device)
        update_rows_(actual, *on_device, number, backend=backend.name, **options)
        assert_same_table(actual, expected)


@pytest.mark.parametrize("options", EVERY)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_every_variant_of_one_dtype(backend, options):
    check_updates(backend, torch.float32, options, width=37)


@pytest.mark.parametrize(("backend", "dtype", "options"), OF_DTYPES)
def test_variants_of_every_dtype(backend, dtype, options):
    check_updates(backend, dtype, options, width=20)


def test_some_variants_have_every_pair_of_options():
    def pairs(variants: list[Any]) -> set[tuple[str, str]]:
        return {
            pair
            for variant in variants
            for pair in combinations(variant.id.replace("lr-in-", "lr_in_").split("-"), 2)
        }

    assert not pairs(EVERY) - pairs(SOME)


# About vectors, lanes of sums, and what Triton takes at once.
WIDTHS = [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 63, 64, 100, 128, 129, 257]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind) or "plain")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_any_width(backend, width, kind):
    for dtype in (torch.float32, torch.float64):
        check_updates(backend, dtype, {"weight_decay": 0.1, **kind}, width, count=1)


@pytest.mark.parametrize("kind", KINDS[:2], ids=["elementwise", "rowwise"])
@pytest.mark.parametrize("grad_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_another_dtype(backend, dtype, grad_dtype, kind):
    table = Table.worn(ROWS, 21, dtype, seed=0, **kind)
    grads = normal(len(TOUCHED) * 21, grad_dtype, seed=1).reshape(-1, 21)
    actual = table.copy(backend.device)
    on_device = TOUCHED.to(backend.device), grads.to(backend.device)
    update_rows_(actual, *on_device, backend=backend.name, **kind)
    assert_same_table(actual, updated_rows(table, TOUCHED, grads, **kind))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind) or "plain")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_special_values_in_every_operand(backend, dtype, kind):
    narrow, wide = special(dtype), special(COMPUTE[dtype])
    count = len(narrow)
    of_param, of_grad = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    table = Table.worn(count, count, dtype, seed=0, **kind)
    table.param.copy_(narrow[of_param])
    table.ms.copy_(wide if kind.get("rowwise") else wide[(of_param + of_grad) % count])
    rows, grads = torch.arange(count), narrow[of_grad].clone()
    actual = table.copy(backend.device)
    on_device = rows.to(backend.device), grads.to(backend.device)
    update_rows_(actual, *on_device, backend=backend.name, **kind)
    assert_same_table(actual, updated_rows(table, rows, grads, **kind))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_row_are_added_in_their_order(backend):
    # In float32, (1e8 + 1) - 1e8 is 0, and (1e8 - 1e8) + 1 is 1. With alpha 0, ms is the square.
    rows = torch.tensor([1, 0, 1, 0, 0, 1], device=backend.device)
    grads = torch.tensor([[1e8], [1e8], [1.0], [-1e8], [1.0], [-1e8]], device=backend.device)
    param, ms = (torch.zeros(2, 1, device=backend.device) for _ in range(2))
    sparse_rmsprop_(param, rows, grads, ms, alpha=0.0, backend=backend.name)
    assert ms.flatten().tolist() == [1.0, 0.0]


@pytest.mark.parametrize("options", [{}, {"centered": True, "momentum": 0.9}], ids=["", "full"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_rows_once_are_a_dense_update(backend, options):
    table = Table.worn(ROWS, 33, torch.float32, seed=0, **options)
    grads, order = (
        normal(ROWS * 33, torch.float32, 5).reshape(ROWS, 33),
        torch.arange(ROWS) * 7 % 12,
    )
    dense = table.copy(backend.device)
    rmsprop_(
        dense.param,
        grads.to(backend.device),
        dense.ms,
        grad_avg=dense.grad_avg,
        momentum_buffer=dense.momentum_buffer,
        backend=backend.name,
        **options,
    )
    sparse = table.copy(backend.device)
    on_device = order.to(backend.device), grads[order].to(backend.device)
    update_rows_(sparse, *on_device, backend=backend.name, **options)
    assert_same_table(sparse, dense.copy())


@pytest.mark.parametrize("centered", [False, True], ids=["plain", "centered"])
def test_lazy_decay_is_what_gradients_of_zero_would_have_left(centered):
    options: dict[str, Any] = {"alpha": 0.9, "centered": centered}
    table = Table.worn(ROWS, 5, torch.float64, seed=0, lazy_decay=True, **options)
    assert table.last_update is not None
    table.last_update.zero_()
    dense = table.copy()
    rng = np.random.default_rng(0)
    for number in range(1, 30):
        rows = torch.from_numpy(rng.choice(ROWS, 3, replace=False))
        if number == 29:  # all have caught up then
            rows = torch.arange(ROWS)
        grads = torch.from_numpy(rng.standard_normal((len(rows), 5)))
        update_rows_(table, rows, grads, number, lazy_decay=True, **options)
        whole = torch.zeros(ROWS, 5, dtype=torch.float64).index_copy(0, rows, grads)
        rmsprop_(dense.param, whole, dense.ms, grad_avg=dense.grad_avg, **options)
    torch.testing.assert_close(table[:3], dense[:3])


def test_tensorflows_formula_by_hand():
    # ms = rho*ms + (1-rho)*g^2; mom = momentum*mom + lr*g/sqrt(ms + eps); var -= mom, for the rows
    # of a sparse gradient alone (ResourceSparseApplyRMSProp). Here with rho 0.5 and eps 7.
    var, ms, mom = (
        np.array([[1.0], [2.0], [3.0]]),
        np.array([[4.0], [2.0], [10.0]]),
        np.zeros((3, 1)),
    )
    mom[1] = 0.5
    options: dict[str, Any] = {"alpha": 0.5, "eps": 7.0, "momentum": 0.5, "lr_in_momentum": True}
    sparse_rmsprop_(
        var, np.array([1]), np.array([[4.0]]), ms, momentum_buffer=mom, lr=1.0, **options
    )
    # ms = 0.5*2 + 0.5*16 = 9; mom = 0.25 + 4/sqrt(16) = 1.25; var = 2 - 1.25.
    assert (var.tolist(), ms.tolist()) == ([[1.0], [0.75], [3.0]], [[4.0], [9.0], [10.0]])
    assert mom.tolist() == [[0.0], [1.25], [0.0]]


@pytest.mark.parametrize("options", [{}, {"rowwise": True}], ids=["elementwise", "rowwise"])
def test_rowwise_by_hand(options):
    # ms = 0.5*2 + 0.5*(9 + 16)/2 of a row, or of each element.
    param, grads = torch.zeros(2, 2), torch.tensor([[3.0, 4.0]])
    ms = torch.full((2,) if options else (2, 2), 2.0)
    sparse_rmsprop_(param, torch.tensor([1]), grads, ms, alpha=0.5, eps=0.0, lr=1.0, **options)
    expected = [7.25] if options else [5.5, 9.0]
    assert ms[1].flatten().tolist() == expected
    torch.testing.assert_close(param[1], -grads[0] / torch.tensor(expected).sqrt())


# What is no number, or another one, must not be touched.
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind) or "plain")
@pytest.mark.parametrize("backend", BACKENDS)
def test_other_rows_stay_as_they_are(backend, kind):
    table = Table.worn(ROWS, 35, torch.float32, seed=0, **kind)
    others = [row for row in range(ROWS) if row not in TOUCHED.tolist()]
    for each in table[:2]:
        assert each is not None
        each[others] = torch.nan
    actual = table.copy(backend.device)
    grads = torch.ones(len(TOUCHED), 35, device=backend.device)
    update_rows_(actual, TOUCHED.to(backend.device), grads, backend=backend.name, **kind)
    assert_same_table(
        Table(*(each if each is None else each[others] for each in actual)),  # type: ignore[arg-type]
        Table(*(each if each is None else each[others] for each in table)),  # type: ignore[arg-type]
    )
    assert not actual.param[TOUCHED].isnan().any()


@pytest.mark.parametrize("shape", [(5, 0), (0, 4), (5, 4)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_of_no_rows_or_no_columns_nothing_happens(backend, shape):
    table = Table.worn(shape[0], shape[1], torch.float32, lazy_decay=True).copy(backend.device)
    before = table.copy()
    count = 3 if shape == (5, 0) else 0
    rows = torch.zeros(count, dtype=torch.int64, device=backend.device)
    grads = torch.zeros(count, shape[1], device=backend.device)
    update_rows_(table, rows, grads, lazy_decay=True, backend=backend.name)
    assert_same_table(table, before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("index", [np.int32, np.int64])
def test_arrays_give_the_bits_of_tensors(dtype, index):
    table = Table.worn(ROWS, 9, getattr(torch, np.dtype(dtype).name), seed=0, lazy_decay=True)
    grads = normal(len(TOUCHED) * 9, table.param.dtype, 5).reshape(-1, 9)
    expected = updated_rows(table, TOUCHED, grads, lazy_decay=True)
    arrays: Any = Table(*(each if each is None else each.numpy() for each in table))  # type: ignore[arg-type]
    rows, of_grads = TOUCHED.numpy().astype(index), grads.numpy()
    for each in (rows, of_grads):
        each.flags.writeable = False
    update_rows_(arrays, rows, of_grads, lazy_decay=True)
    assert_same_table(table, expected)  # whose memory it is


@pytest.mark.usefixtures("several_threads")
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(kind) or "plain")
def test_several_threads_give_the_bits_of_one(kind):
    pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    # Rows of one to many gradients, at the borders of what threads take too.
    rows = torch.from_numpy(rng.zipf(1.3, 6000) % 500)
    grads = normal(6000 * 40, torch.float32, 5).reshape(-1, 40)
    table = Table.worn(500, 40, torch.float32, seed=0, **kind)
    expected = table.copy()
    update_rows_(table, rows, grads, backend="numba", **kind)
    update_rows_(expected, rows, grads, backend="numpy", **kind)
    assert_same_table(table, expected)


def test_a_table_of_more_than_2_to_the_31_elements():
    param: Any = np.zeros(((1 << 27) + 1, 17), np.float16)  # of which little has memory
    ms = np.zeros(len(param), np.float32)
    rows = np.array([0, 1 << 27], np.int64)
    sparse_rmsprop_(param, rows, np.ones((2, 17), np.float16), ms, rowwise=True, alpha=0.0)
    assert (param[rows] < 0).all()
    assert np.array_equal(param[0], param[-1])
    assert not param[[1, (1 << 27) - 1]].any()


@given(st.lists(st.integers(0, 20), max_size=60), st.sampled_from([21, 1 << 62]))
def test_rows_are_sorted_and_equal_ones_stay_in_their_order(rows, table_rows):
    found, order = sort_rows(torch.tensor(rows, dtype=torch.int32), table_rows)
    expected = sorted(range(len(rows)), key=rows.__getitem__)
    assert order.tolist() == expected
    assert found.tolist() == [rows[each] for each in expected]


def test_autograd_hears_of_the_change():
    table = Table.worn(ROWS, 3, torch.float32, 0)
    before = table.param._version
    update_rows_(table, TOUCHED, torch.ones(len(TOUCHED), 3))
    assert table.param._version > before


COUNTED = [
    pytest.param(1, {0: 1, 2: 1, 5: 1, 7: 1, 11: 1}, id="each row"),
    pytest.param(4, {0: 1, 1: 1, 2: 1}, id="blocks of rows"),
    pytest.param(100, {0: 1}, id="all rows together"),
]


@pytest.mark.parametrize(("block", "landed"), COUNTED)
def test_an_update_counts_once_in_each_block_of_rows(block, landed):
    numba_rows = pytest.importorskip("hogstream.kernels.backends.numba_rows")
    table = Table.worn(ROWS, 3, torch.float32, 0)
    grads = torch.ones(len(TOUCHED), 3)
    update = RowUpdate.of(check_row_operands(table.param, TOUCHED, grads, table.ms))
    counters = RaceCounters.zeros(ROWS, block)
    for _ in range(2):
        numba_rows.update_(update, Hyperparameters(), counters=counters)
    counts = [2 * landed.get(each, 0) for each in range(counters.blocks)]
    assert counters.counts.tolist() == [counts, counts, [0] * counters.blocks]


def test_counters_of_another_table_are_refused():
    numba_rows = pytest.importorskip("hogstream.kernels.backends.numba_rows")
    table = Table.worn(ROWS, 3, torch.float32, 0)
    update = RowUpdate.of(
        check_row_operands(table.param, TOUCHED, torch.ones(len(TOUCHED), 3), table.ms)
    )
    with pytest.raises(ValueError, match="counters must be for 12 rows, got 36"):
        numba_rows.update_(update, Hyperparameters(), counters=RaceCounters.zeros(36, 1))
