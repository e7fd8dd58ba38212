"""Ctrl-C: what was measured so far is written, and said to be partial."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from process_testing import interrupt_hogstream, run_python

pytestmark = pytest.mark.slow
INTERRUPTED = "Interrupted: these are only the results that there were by then."


#: How a command ends by each signal.
ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}


def check_interrupted(
    outcome: tuple[int, str, str], *written: Path, number: signal.Signals = signal.SIGINT
) -> dict[str, Any]:
    """Checks how the command ended; returns the JSON, which is the first file written."""
    status, out, err = outcome
    assert status == ENDS[number][0], err
    assert err.endswith(f"\nhogstream: {ENDS[number][1]}\n")
    assert "Traceback" not in err
    assert INTERRUPTED in " ".join(out.split())
    for path in written:
        assert f"wrote {path}" in out
    result: dict[str, Any] = json.loads(written[0].read_text("utf-8"))
    assert result["partial"] is True
    assert result["command"].startswith("hogstream ")
    return result


def test_bench_leaves_out_what_has_not_had_all_rounds(tmp_path: Path) -> None:
    json_file, report = tmp_path / "bench.json", tmp_path / "report.html"
    plot = tmp_path / "gain.svg"
    outcome = interrupt_hogstream(
        "2 workers, round 2",
        *("bench", "--device", "cpu", "--elements", "1000,2000", "--workers", "1,2,3,4"),
        *("--policies", "lock-free,locked", "--seconds", "0.35"),
        *("--json", json_file, "--report", report, "--plot", plot),
    )
    bench = check_interrupted(outcome, json_file, report, plot)
    measured = [(result["workers"], result["policy"]) for result in bench["results"]]
    assert measured[:2] == [(1, "lock-free"), (1, "locked")]
    assert len(measured) % 2 == 0
    assert len(measured) < 2 * 8
    for result in bench["results"]:
        assert len(result["updates_per_second"]["samples"]) == 7
    assert INTERRUPTED in report.read_text("utf-8")
    assert "<svg" in plot.read_text("utf-8")


def test_processes_of_today_end_with_an_interrupted_bench(tmp_path: Path) -> None:
    """Or the command's standard error, which they have open, would not end."""
    json_file, report = tmp_path / "bench.json", tmp_path / "report.html"
    plot = tmp_path / "gain.svg"
    outcome = interrupt_hogstream(
        "2 workers, round 2",
        *("bench", "--device", "cpu", "--elements", "64", "--workers", "1,2", "--today"),
        *("--policies", "lock-free,locked", "--seconds", "0.35"),
        *("--json", json_file, "--report", report, "--plot", plot),
        number=signal.SIGTERM,
    )
    bench = check_interrupted(outcome, json_file, report, plot, number=signal.SIGTERM)
    assert {run["workers"] for run in bench["today"]} == {1}


def test_compare_leaves_out_the_shape_under_way(tmp_path: Path) -> None:
    json_file, plot = tmp_path / "compare.json", tmp_path / "compare.svg"
    outcome = interrupt_hogstream(
        "5x2: making parameters",
        *("compare", "--device", "cpu", "--shapes", "16,5x2,3,4,5,6,7,8"),
        *("--peers", "hogstream,torch-loop", "--seconds", "0.01"),
        *("--json", json_file, "--plot", plot),
    )
    compare = check_interrupted(outcome, json_file, plot)
    measured = defaultdict(set)
    for result in compare["results"]:
        measured[result["shape"]].add(result["peer"])
    assert "16" in measured
    assert len(measured) < 8
    for peers in measured.values():
        assert peers == {"hogstream", "torch-loop", "memory-copy", "memory-ceiling"}


def test_training_is_told_as_far_as_it_went(tmp_path: Path) -> None:
    json_file, plot = tmp_path / "train.json", tmp_path / "loss.svg"
    trace = tmp_path / "trace.json"
    outcome = interrupt_hogstream(
        "round 2: locked",
        *("train", "digits", "--device", "cpu", "--workers", "3", "--policy", "locked"),
        *("--no-beside", "--updates", "100", "--rounds", "1000"),
        *("--json", json_file, "--plot", plot, "--trace", trace),
    )
    (result,) = check_interrupted(outcome, json_file, plot, trace)["results"]
    assert (result["policy"], result["partial"]) == ("locked", False)  # of whole ones alone
    rounds = len(result["reached"])
    assert result["updates"] == rounds * 100
    assert len(result["seconds_to_target"]["samples"]) == rounds
    assert 0 < result["latency_us"]["p50"] <= result["latency_us"]["p99"]
    assert sum(result["staleness"]["histogram"].values()) == result["updates"]
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    assert sum(event.get("cat") == "update" for event in events) >= result["updates"]
    assert "locked: " in plot.read_text("utf-8")


def test_nothing_is_written_before_the_first_result(tmp_path: Path) -> None:
    json_file = tmp_path / "bench.json"
    status, out, err = interrupt_hogstream(
        "ceilings of this machine",
        *("bench", "--device", "cpu", "--elements", "10", "--json", json_file),
    )
    assert (status, out) == (130, "")
    assert err.endswith("\nhogstream: interrupted\n")
    assert not json_file.exists()


# An import may make something else of an exception that strikes in it.
ENDED_IN_AN_IMPORT = """
import os
try:
    os.kill(os.getpid(), {number:d})
    for _ in range(100_000):
        pass
except BaseException as error:
    raise ImportError("half of it is there") from error
"""


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
@pytest.mark.parametrize("module", ["click", "torch"])
def test_imports_are_ended_in_a_line(tmp_path: Path, module: str, number: signal.Signals) -> None:
    (tmp_path / f"{module}.py").write_text(ENDED_IN_AN_IMPORT.format(number=number))
    ended = subprocess.run(
        [sys.executable, "-m", "hogstream.cli.main", "bench", "--help"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    status, said = ENDS[number]
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", f"hogstream: {said}\n")


IGNORES_SIGINT = """
import os, signal, sys
from hogstream.cli.signals import Termination
signal.signal(signal.SIGINT, signal.SIG_IGN)
with Termination() as termination:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except KeyboardInterrupt:
        print(termination.signal == signal.SIGTERM)
"""


def test_sigterm_ends_what_a_shell_has_ignore_sigint() -> None:
    assert run_python("-c", IGNORES_SIGINT) == "True\n"
