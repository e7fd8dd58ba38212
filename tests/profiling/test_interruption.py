"""Ctrl-C: what was measured so far is written, and said to be partial."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from process_testing import interrupt_hogstream

pytestmark = pytest.mark.slow
INTERRUPTED = "Interrupted: these are only the results that there were by then."


def check_interrupted(outcome: tuple[int, str, str], *written: Path) -> dict[str, Any]:
    """Checks how the command ended; returns the JSON, which is the first file written."""
    status, out, err = outcome
    assert status == 130, err
    assert err.endswith("\nhogstream: interrupted\n")
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
        *("bench", "--device", "cpu", "--elements", "1000,2000,3000", "--workers", "1,2,3,4"),
        *("--policies", "lock-free,locked", "--seconds", "0.5"),
        *("--json", json_file, "--report", report, "--plot", plot),
    )
    bench = check_interrupted(outcome, json_file, report, plot)
    measured = [(result["workers"], result["policy"]) for result in bench["results"]]
    assert measured[:2] == [(1, "lock-free"), (1, "locked")]
    assert len(measured) % 2 == 0
    assert len(measured) < 2 * 12
    for result in bench["results"]:
        assert len(result["updates_per_second"]["samples"]) == 7
    assert INTERRUPTED in report.read_text("utf-8")
    assert "<svg" in plot.read_text("utf-8")


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
        "locked, round 1, epoch 4",
        *("train", "digits", "--device", "cpu", "--workers", "3", "--policy", "locked"),
        *("--epochs", "100000", "--json", json_file, "--plot", plot, "--trace", trace),
    )
    (result,) = check_interrupted(outcome, json_file, plot, trace)["results"]
    assert (result["policy"], result["partial"]) == ("locked", True)
    assert 0 <= result["updates"] - len(result["losses"]) <= 3  # landed, but not told any more
    assert result["updates"] >= 3 * 45  # three epochs are over
    assert result["epochs"]["median"] == result["updates"] / 45
    assert result["seconds"] >= result["losses"][-1][0] > 0
    assert result["updates_per_second"]["median"] == result["updates"] / result["seconds"]
    assert result["losses"][0][1] > result["final_loss"]["median"]
    assert result["test_accuracy"]["median"] > 0.5
    assert 0 < result["latency_us"]["p50"] <= result["latency_us"]["p99"]
    assert sum(result["staleness"]["histogram"].values()) == result["updates"]
    events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    assert sum(event.get("cat") == "update" for event in events) == result["updates"]
    accuracy = f"{100 * result['test_accuracy']['median']:.1f} %"
    assert f"{accuracy} test accuracy" in plot.read_text("utf-8")


def test_training_that_was_cut_short_does_not_spoil_whole_ones(tmp_path: Path) -> None:
    json_file = tmp_path / "train.json"
    outcome = interrupt_hogstream(
        "locked, round 2, epoch 2",
        *("train", "digits", "--device", "cpu", "--workers", "1", "--policy", "locked"),
        *("--epochs", "20", "--rounds", "1000", "--json", json_file),
    )
    (result,) = check_interrupted(outcome, json_file)["results"]
    assert set(result["epochs"]["samples"]) == {20}
    assert len(result["training_seconds"]["samples"]) == len(result["epochs"]["samples"])


def test_nothing_is_written_before_the_first_result(tmp_path: Path) -> None:
    json_file = tmp_path / "bench.json"
    status, out, err = interrupt_hogstream(
        "ceilings of this machine",
        *("bench", "--device", "cpu", "--elements", "10", "--json", json_file),
    )
    assert (status, out) == (130, "")
    assert err.endswith("\nhogstream: interrupted\n")
    assert not json_file.exists()
