"""What ``bench --rows`` measures: rows as a Zipf distribution has them, its passes, its step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hogstream.profiling.measure.zipf import ZipfRows
from hogstream.profiling.turns import Rate


def zipf(rows: int, exponent: float, seed: int = 0) -> ZipfRows:
    return ZipfRows(rows, exponent, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("exponent", "expected"),
    [
        (0, [1 / 4, 1 / 4, 1 / 4, 1 / 4]),
        (1, [12 / 25, 6 / 25, 4 / 25, 3 / 25]),  # of 1, 1/2, 1/3, 1/4: 25/12 in all
        (2, [144 / 205, 36 / 205, 16 / 205, 9 / 205]),
    ],
)
def test_rows_are_drawn_with_the_probabilities_of_their_ranks(exponent, expected):
    drawing, draws = zipf(4, exponent), 40_000
    drawn = drawing.draw((draws // 2, 2))
    assert drawn.shape == (draws // 2, 2)
    assert drawn.dtype == np.int64
    counts = np.bincount(drawn.ravel(), minlength=4)[drawing.row_of_rank]
    likely = draws * np.array(expected)
    # Chi-square with three degrees of freedom: beyond this once in 10,000 seeds.
    assert (np.square(counts - likely) / likely).sum() < 21.1
    assert drawing.same_row == pytest.approx(np.square(expected).sum())


def test_ranks_are_spread_over_the_table():
    drawing = zipf(1000, 1)
    assert sorted(drawing.row_of_rank) == list(range(1000))
    # Of neighbours by rank one in 500 would be neighbours in the table.
    assert (np.abs(np.diff(drawing.row_of_rank)) == 1).mean() < 0.02


def test_the_greatest_number_that_is_drawn_is_the_last_rank():
    class Greatest:
        def random(self, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
            return np.full(shape, np.nextafter(1, 0))

        def permutation(self, rows: int) -> np.ndarray[Any, Any]:
            return np.arange(rows)

    for rows in (1, 3, 10_000):
        drawing = ZipfRows(rows, 1.0, Greatest())  # type: ignore[arg-type]
        assert drawing.draw((1,)).tolist() == [rows - 1]


def test_the_greater_the_exponent_the_more_often_rows_meet():
    met, chances = [], []
    for exponent in (0, 0.5, 1, 1.5):
        drawing = zipf(200, exponent)
        one, other = drawing.draw((2, 20_000))
        met.append((one == other).mean())
        chances.append(drawing.same_row)
    assert chances[0] == pytest.approx(1 / 200)
    assert chances == sorted(chances)
    assert met == pytest.approx(chances, rel=0.15, abs=0.002)


def test_the_step_pulls_rows_to_the_target_of_its_sample():
    pytest.importorskip("numba")
    from hogstream.profiling.measure.rows import _pull_drawn_rows
    from hogstream.scheduler.workers.native_steps import NativeState

    table = np.arange(6, dtype=np.float32).reshape(3, 2)
    samples = np.array([[0, 0], [2, 1]]), np.array([9, 0.5], np.float32)
    rows, grads = np.full(2, -1), np.zeros((2, 2), np.float32)
    _pull_drawn_rows((table,), samples, NativeState(1, (rows,), (grads,)))
    assert rows.tolist() == [2, 1]
    assert grads.tolist() == [[3.5, 4.5], [1.5, 2.5]]


@pytest.mark.parametrize(
    ("rows", "needed"),
    [
        # Workers: 12 bytes an element of the larger; and 48 bytes a row.
        ((1000, 4000), 4000 * 10 * 12 + 4000 * 48),
        # Kernels: 8 bytes an element of both.
        ((3000, 4000), 7000 * 10 * 8 + 4000 * 48),
    ],
)
def test_tables_that_do_not_fit_are_refused(monkeypatch, rows, needed):
    pytest.importorskip("numba")
    from hogstream.profiling.measure import rows as job

    task = job.Task(rows, 10, 1.0, 2, (1,), ("locked",), 1.0, 0)
    monkeypatch.setattr(job, "free_memory", lambda device: needed)
    job.check_memory(task)
    monkeypatch.setattr(job, "free_memory", lambda device: needed - 1)
    with pytest.raises(ValueError, match=r"must fit memory, .* got .,000, 4,000, .* 10 columns"):
        job.check_memory(task)


def test_one_worker_alone_is_measured_beside_several():
    pytest.importorskip("numba")
    from hogstream.profiling.measure.rows import Task

    task = Task((10,), 2, 1.0, 1, (1, 3), ("lock-free", "row-locked"), 1.0, 0)
    assert list(task.variants(1)) == ["lock-free", "row-locked"]
    several = task.variants(3)
    found = {name: (each.policy, each.workers) for name, each in several.items()}
    assert found == {
        "lock-free": ("lock-free", 3),
        "row-locked": ("row-locked", 3),
        "one alone": ("lock-free", 1),
    }


def test_kernels_are_set_against_the_smallest_table_and_the_faster_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("numba")
    from hogstream.profiling.measure import row_kernels

    # Of an update, and of passes without prefetches and with.
    seconds = {None: 2e-3, 0: 1e-3, 8: 4e-3}

    def pretend(rates: dict[Any, Rate], rounds: int) -> dict[Any, list[float]]:
        for rate in rates.values():
            assert rate.seconds_of(2) > 0
        return {
            place: [rate.amount / seconds[place.ahead]] * rounds for place, rate in rates.items()
        }

    monkeypatch.setattr(row_kernels, "sample_in_turn", pretend)
    kernels = row_kernels.measure_row_kernels((5000, 64), 10, seed=0, rounds=5)
    threads = sorted({1, torch.get_num_threads()})
    assert [(each.rows, each.threads, each.same_rows) for each in kernels] == [
        (rows, count, same) for rows in (5000, 64) for count in threads for same in (True, False)
    ]
    for kernel in kernels:
        updated = {5000: 4096, 64: 64}[kernel.rows]
        assert kernel.updated_rows == updated
        assert kernel.milliseconds.samples == pytest.approx([2.0] * 5)
        assert kernel.gigabytes_per_second.median == pytest.approx(20 * 10 * updated / 2e-3 / 1e9)
        assert kernel.share_of_ceiling.median == pytest.approx(1 / 2)
        if kernel.rows == 5000:  # in as long it updates 64 times as many rows
            assert kernel.over_smallest is not None
            assert kernel.over_smallest.median == pytest.approx(1 / 64)
        else:
            assert kernel.over_smallest is None


def test_updates_of_other_rows_have_none_in_common():
    pytest.importorskip("numba")
    from hogstream.profiling.measure.row_kernels import _make_updates

    updates = _make_updates(3 * 4096 + 5, 1, seed=0)
    assert [len(update.rows) for update in updates] == [4096] * 3
    assert len(torch.cat([update.rows for update in updates]).unique()) == 3 * 4096
    assert updates[0].rows.tolist() != list(range(4096))
