"""Runs under torch's profiler: what is in the trace, on which clock, and the tables of it."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from hogstream.cli.profile_torch import torch_command
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.event_loop import run
from hogstream.profiling.torch_profiler.trace import (
    LANES,
    WORKERS,
    Clock,
    Event,
    Label,
    Recording,
    count_labels,
    count_operators,
    record,
)
from hogstream.scheduler import SharedParameters, StreamScheduler, Timeline, WorkerContext

UPDATES = 12


def products_of_one_worker(lanes: Path) -> str:
    """A worker that multiplies on its thread, then submits; under two policies in turn."""
    timeline = Timeline()
    matrix, grad = torch.ones(64, 64), torch.ones(1 << 14)

    async def worker(context: WorkerContext) -> None:
        await context.run_blocking(torch.mm, matrix, matrix)
        await context.submit(grad)

    async def train(policy: str) -> None:
        shared = SharedParameters({"p": torch.zeros(1 << 14)})
        async with StreamScheduler(
            shared, workers=1, policy=policy, timeline=timeline, backend="numpy"
        ) as scheduler:
            await scheduler.run(worker, updates=UPDATES)

    torch.zeros(3).neg()  # before any scheduler runs
    for policy in ("lock-free", "awaited"):
        run(train(policy))
    timeline.write(lanes)
    return "done"


@pytest.fixture(scope="module")
def recording() -> Recording:
    result, recording = record(products_of_one_worker)
    assert result == "done"
    return recording


def slices(recording: Recording, name: str, pid: str | None = None) -> list[Event]:
    chosen = [
        event
        for event in recording.trace["traceEvents"]
        if event["ph"] == "X" and event["name"] == name and pid in (None, event["pid"])
    ]
    return sorted(chosen, key=lambda event: event["ts"])


def test_operators_updates_and_labels_are_on_one_clock(recording):
    names = ("aten::mm", "submit", "enqueue", "update", "iteration")
    each = [slices(recording, name) for name in names]
    assert [len(found) for found in each] == [2 * UPDATES] * len(names)
    slack = recording.clock_error_us
    assert slack < 1000
    for product, submit, enqueue, update, iteration in zip(*each, strict=True):
        # One clock after the other: torch's, the event loop's, the lane's.
        assert iteration["ts"] - slack <= product["ts"]
        assert product["ts"] + product["dur"] <= submit["ts"] + slack
        assert submit["ts"] <= enqueue["ts"] <= update["ts"] + 0.002
        assert update["ts"] + update["dur"] <= submit["ts"] + submit["dur"]
        assert submit["ts"] + submit["dur"] <= iteration["ts"] + iteration["dur"] + 0.002


def test_lanes_and_workers_have_tracks_of_their_own(recording):
    titles = {
        (event["pid"], event["args"]["name"])
        for event in recording.trace["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert {(LANES, "lane 0"), (WORKERS, "worker 0"), (WORKERS, "runs")} <= titles
    (lane,) = {event["tid"] for event in slices(recording, "update", LANES)}
    (worker,) = {event["tid"] for event in slices(recording, "iteration", WORKERS)}
    assert (lane, worker) == (0, 1)
    assert [event["args"]["policy"] for event in slices(recording, "run awaited")] == ["awaited"]


def test_what_happened_before_schedulers_ran_is_left_out(recording):
    assert not slices(recording, "aten::neg")
    assert "aten::neg" not in {row.name for row in recording.operators}


def test_tables_are_of_what_is_in_the_trace(recording):
    (row,) = [row for row in recording.operators if row.name == "aten::mm"]
    assert (row.where, row.count) == ("cpu", 2 * UPDATES)
    total = sum(event["dur"] for event in slices(recording, "aten::mm"))
    assert row.total_us == pytest.approx(total)
    counts = {(row.policy, row.label, row.lane): row.count for row in recording.scheduler}
    for policy in ("lock-free", "awaited"):
        assert counts[policy, "update", 0] == counts[policy, "update", None] == UPDATES
        assert counts[policy, "iteration", None] == counts[policy, "submit", None] == UPDATES
        assert counts[policy, f"run {policy}", None] == 1
    assert counts["awaited", "wait lock", None] == 2 * UPDATES
    assert ("lock-free", "wait lock", None) not in counts


def cpu_op(name: str, tid: int, ts: float, dur: float) -> Event:
    return {"ph": "X", "cat": "cpu_op", "name": name, "tid": tid, "ts": ts, "dur": dur}


def test_time_of_their_own_is_without_what_operators_call():
    events = [
        cpu_op("a", 1, 0.0, 100.0),
        cpu_op("b", 1, 10.0, 30.0),
        cpu_op("c", 1, 15.0, 5.0),
        cpu_op("b", 1, 50.0, 20.0),
        cpu_op("b", 2, 20.0, 7.0),  # on another thread, at the same time
        {**cpu_op("k", 7, 12.0, 9.0), "cat": "kernel"},
        {"ph": "i", "name": "a", "ts": 3.0},
    ]
    rows = {(row.name, row.where): row for row in count_operators(events)}
    assert list(rows) == [("b", "cpu"), ("a", "cpu"), ("k", "gpu"), ("c", "cpu")]
    times = {name: (row.count, row.self_us, row.total_us) for name, row in rows.items()}
    assert times == {
        ("a", "cpu"): (1, 50.0, 100.0),
        ("b", "cpu"): (3, 52.0, 57.0),
        ("c", "cpu"): (1, 5.0, 5.0),
        ("k", "gpu"): (1, 9.0, 9.0),
    }


def test_labels_are_added_up_by_policy_and_updates_by_lane():
    labels = [
        Label("run locked", "locked", None, 0, 1_000_000),
        Label("run ordered", "ordered", None, 2_000_000, 3_000_000),
        *(Label("submit", "locked", lane, 0, 1000 * us) for lane in (0, 1) for us in range(1, 101)),
        Label("submit", "ordered", 0, 2_000_000, 2_007_000),
    ]
    clock = Clock(ahead_us=50.0, error_us=0.0)
    timeline = [(3, 100.0, 4.0), (3, 200.0, 8.0), (5, 300.0, 6.0), (5, 2060.0, 2.0)]
    updates = [{**cpu_op("update", lane, ts, dur), "cat": "update"} for lane, ts, dur in timeline]
    rows = {
        (row.policy, row.label, row.lane): [row.count, row.total_us, row.mean_us, row.p99_us]
        for row in count_labels(labels, updates, clock)
    }
    assert rows["locked", "submit", None] == [200, 10100.0, 50.5, 99.0]
    assert rows["ordered", "submit", None] == [1, 7.0, 7.0, 7.0]
    assert rows["locked", "update", None] == [3, 18.0, 6.0, 8.0]
    assert rows["locked", "update", 3] == [2, 12.0, 6.0, 8.0]
    assert rows["ordered", "update", 5] == [1, 2.0, 2.0, 2.0]
    assert next(iter(rows)) == ("locked", "submit", None)  # most time first


def test_the_clock_is_as_sure_as_its_marks_are_short():
    marks = [{"ts": 1000.0, "dur": 30.0}, {"ts": 2000.0, "dur": 10.0}, {"ts": 3000.0, "dur": 8.0}]
    # Ahead by 0 to 30, 1 to 11, and 4 to 12.
    clock = Clock.of(marks, [1_000_000, 1_999_000, 2_996_000])
    assert (clock.ahead_us, clock.error_us) == (7.5, 3.5)
    assert clock.us(5_000) == 12.5


def profile_torch(*arguments: object) -> Any:
    return torch_command.main([*map(str, arguments)], standalone_mode=False)


TRAIN = ("--", "train", "digits", "--policy", "all", "--workers", 2)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("sklearn"), reason="no scikit-learn")
@pytest.mark.parametrize(
    ("workload", "policies"),
    [
        pytest.param((), {"lock-free"}, id="none"),
        pytest.param(TRAIN, {"lock-free", "locked", "ordered", "awaited"}, id="train"),
    ],
)
def test_writes_a_trace_and_the_metrics(tmp_path, capsys, workload, policies):
    trace, json_file = tmp_path / "trace.json", tmp_path / "result.json"
    profile_torch("--trace", trace, "--json", json_file, *workload)
    events = json.loads(trace.read_text())["traceEvents"]
    result = json.loads(json_file.read_text())
    assert (result["kind"], result["schema"]) == ("profile torch", 2)
    assert (result["partial"], result["error"]) == (False, None)
    assert result["workload"] == [*map(str, workload[1:] or ("train", "digits"))]
    assert (result["train"]["updates"], result["train"]["rounds"]) == (100, 1)  # brief
    assert result["bench"] is None
    assert {"device", "backend", "versions"} <= result["environment"].keys()
    assert {row["policy"] for row in result["scheduler"]} == policies
    backward = [each for each in events if each["name"] == "AddmmBackward0" and each["ph"] == "X"]
    iterations = [each for each in events if each["name"] == "iteration"]
    slack = result["clock_error_us"]
    assert backward
    for operator in backward:  # each is some worker's
        assert any(
            iteration["ts"] - slack <= operator["ts"]
            and operator["ts"] + operator["dur"] <= iteration["ts"] + iteration["dur"] + slack
            for iteration in iterations
        )
    out = capsys.readouterr().out
    assert f"wrote {trace}" in out
    assert f"{len(events):,} events in {trace.stat().st_size / 1e6:.1f} MB" in " ".join(out.split())
    assert "iteration" in out


@pytest.mark.parametrize(
    ("workload", "complaint"),
    [
        (("missing.py",), "there is no script 'missing.py'"),
        (("train",), "Missing argument 'WORKLOAD'"),
        (("python", "x.py"), "a Python script (.py, without python), with its arguments, got"),
        (("bench", "--json=x"), "--json must stand before --"),
        (("bench", "--trace", "x"), "--trace must stand before --"),
        (("bench", "--elements", "x"), "each must be a number of elements"),
        (("bench", "--workers", "1,2"), "one policy, one worker count and one size"),
    ],
)
def test_refuses_what_it_cannot_run(tmp_path, workload, complaint):
    trace = tmp_path / "trace.json"
    with pytest.raises(click.ClickException) as refusal:
        profile_torch("--trace", trace, "--", *workload)
    assert complaint in refusal.value.format_message()
    assert not trace.exists()


SCRIPT = """
import sys
import torch
from beside import parameter
from hogstream.optim import RMSpropAsync

param = torch.nn.Parameter(parameter)
optimizer = RMSpropAsync([param])
for _ in range(int(sys.argv[1])):
    param.grad = torch.ones(5)
    optimizer.step()
assert __name__ == "__main__"
sys.exit({status})
"""


def write_script(folder: Path, status: int) -> Path:
    (folder / "beside.py").write_text("import torch\nparameter = torch.ones(5)\n")
    script = folder / "script.py"
    script.write_text(SCRIPT.format(status=status))
    return script


def test_runs_a_script_and_shows_the_steps_of_its_optimizer(tmp_path, monkeypatch):
    script, trace, json_file = (
        write_script(tmp_path, 0),
        tmp_path / "trace.json",
        tmp_path / "result.json",
    )
    before = list(sys.path), list(sys.argv)
    profile_torch("--trace", trace, "--json", json_file, "--", script, 3)
    monkeypatch.delitem(sys.modules, "beside")
    assert (sys.path, sys.argv) == before
    result = json.loads(json_file.read_text())
    assert result["workload"] == [str(script), "3"]
    assert result["bench"] is result["train"] is None
    assert result["scheduler"] == []
    (steps,) = [row for row in result["operators"] if row["name"].startswith("Optimizer.step#")]
    assert (steps["name"], steps["count"]) == ("Optimizer.step#RMSpropAsync.step", 3)
    assert steps["total_us"] > 0


def test_a_script_that_fails_leaves_no_trace(tmp_path, monkeypatch):
    script, trace = write_script(tmp_path, 3), tmp_path / "trace.json"
    with pytest.raises(MeasurementError, match=r"script\.py ended with exit status 3"):
        profile_torch("--trace", trace, "--", script, 1)
    monkeypatch.delitem(sys.modules, "beside")
    assert not trace.exists()


def test_help_of_what_it_runs_shows_its_brief_defaults(tmp_path, capsys):
    assert profile_torch("--trace", tmp_path / "trace.json", "--", "bench", "--help") == 0
    out = capsys.readouterr().out
    assert "hogstream profile torch -- bench" in out
    assert "[default: 0.1]" in " ".join(out.split())
    assert not list(tmp_path.iterdir())
