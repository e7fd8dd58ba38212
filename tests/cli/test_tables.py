"""Tables on the console: they fit a terminal, and lose nothing where they can't."""

from __future__ import annotations

import pytest

from hogstream.cli.console import new_table, print_table
from hogstream.cli.tables import console_table
from hogstream.profiling.report import rows
from hogstream.profiling.results.gains import BASELINES
from hogstream.profiling.results.schema import Bench
from report_testing import committed, with_today

TERMINAL = 84


def test_tables_of_a_bench_fit_a_terminal_on_a_slow_machine_as_on_a_fast_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    bench = committed("bench", Bench)
    for run in bench.results:
        run.updates_per_second.median = 1234567.0
        run.gigabytes_per_second = 1402.7
        run.latency_us.p50, run.latency_us.p99 = 1234567.0, 7654321.0
        run.staleness.mean, run.staleness.max = 123.4, 5678
        run.staleness.p50, run.staleness.p99 = 123.0, 4567.0
        run.lost_updates_fraction, run.overwrites_per_update = 1e-7, 12.3456
        for name in BASELINES:
            if name in run.gains:
                run.gains[name].median = 123.45
    for table in rows.results(with_today(bench)):
        print_table(console_table(table))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= TERMINAL
    (first, *_) = [line.split() for line in lines if "lock-free" in line]
    assert first[-7:-2] == ["1,234,567", "1,403", "1,235", "7,654", "123/5,678"]


def test_nothing_is_cut_from_a_table_that_is_too_wide(capsys: pytest.CaptureFixture[str]) -> None:
    table = new_table("Wide", "what", "value")
    table.add_row("x" * TERMINAL, "9" * TERMINAL)
    print_table(table)
    assert f"{'x' * TERMINAL} {'9' * TERMINAL}" in capsys.readouterr().out
