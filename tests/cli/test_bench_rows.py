"""``hogstream bench --rows``: what it writes and says, and what does not go with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba")

from hogstream.profiling.measure import rows as job
from hogstream.profiling.results.files import decoded
from hogstream.profiling.results.rows_schema import RowBench
from hogstream.scheduler.policies import COMPILED_POLICIES

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_rows_are_measured_by_themselves_and_by_workers(hogstream: Command, tmp_path: Path) -> None:
    json_file = tmp_path / "rows.json"
    status, out, err = hogstream(
        *("bench", "--rows", "50,2^10", "--width", "16", "--zipf", "1.5", "--workers", "2"),
        *("--rows-per-update", "3", "--seconds", "0.05", "--device", "cpu", "--json", json_file),
    )
    assert status == 0, err
    assert err.count("\n") == 1 + 2 * (1 + 8)  # a line a step
    result = decoded(json_file.read_bytes(), RowBench)
    assert result.command.startswith("hogstream bench --rows '50,2^10' --width 16")
    settings = result.settings
    assert (settings.width, settings.zipf, settings.rows_per_update) == (16, 1.5, 3)
    assert len(result.kernels) == 2 * 2 * len({1, torch.get_num_threads()})
    names = [*COMPILED_POLICIES, "one alone"]
    assert [(run.rows, run.workers, run.policy) for run in result.results] == [
        (rows, 2, name) for rows in (50, 1024) for name in names
    ]
    for run in result.results:
        assert len(run.updates_per_second.samples) == job.ROUNDS
        assert min(run.updates_per_second.samples) > 0
        assert run.gains.keys() == {*names} - {run.policy}
        assert (run.overlaps is None) == (run.policy == "one alone")
        if run.policy in ("locked", "row-locked", "ordered"):
            assert run.lost_updates_fraction == 0
    check_words(" ".join(out.split()))


def check_words(said: str) -> None:
    assert "An update of 1,024 rows, or of all that there are" in said
    assert "times as long in 2^10 as in 50 (95 %: " in said
    assert "In 50 rows with 2 workers lock-free is " in said
    assert "tables of 16 columns in float32; workers' updates are of 3 rows, drawn by Zipf" in said


def test_rows_take_the_policies_of_compiled_steps(hogstream: Command) -> None:
    status, _, err = hogstream("bench", "--rows", "100", "--policies", "lock-free,awaited")
    assert status == 2
    expected = "one of lock-free, locked, row-locked, ordered with --rows, got 'awaited'"
    assert f"'--policies': each must be {expected}" in err


BAD: list[tuple[list[str], str]] = [
    (["--rows", "10^x"], "'--rows': each must be a number of rows below 2^40"),
    (["--rows", "10", "--zipf", "-1"], "'--zipf': must be a finite number >= 0, got '-1'"),
    (["--rows", "10", "--width", "0"], "'--width': 0 is not in the range"),
    (["--rows", "2^39"], "'--rows': must fit memory, of which "),
    (["--rows", "10", "--elements", "2^16"], "--elements does not go with --rows"),
    (["--rows", "10", "--think-time", "1"], "--think-time does not go with --rows"),
    (["--rows", "10", "--sweep"], "--sweep does not go with --rows"),
    (["--rows", "10", "--today"], "--today does not go with --rows"),
    (["--rows", "10", "--plot", "x.png"], "--plot does not go with --rows"),
    (["--rows", "10", "--report", "x.html"], "--report does not go with --rows"),
    (["--rows", "10", "--telemetry"], "--telemetry does not go with --rows"),
    (["--rows", "10", "--batch", "1"], "--batch does not go with --rows"),
    (["--rows", "10", "--dtype", "float64"], "--dtype must be float32 with --rows, got float64"),
    (["--rows", "10", "--backend", "numpy"], "--backend must be numba with --rows, got numpy"),
    (["--rows", "10", "--processes", "2"], "--processes must be 1 with --rows, got 2"),
    (["--width", "8"], "--width needs --rows"),
    (["--zipf", "0"], "--zipf needs --rows"),
    (["--rows-per-update", "1"], "--rows-per-update needs --rows"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_does_not_go_together_is_refused(
    hogstream: Command, options: list[str], message: str
) -> None:
    status, _, err = hogstream("bench", *options)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err
