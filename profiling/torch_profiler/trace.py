"""A run under torch's profiler: its operators and what the scheduler did, on one clock.

torch's own labels (``record_function``) are a stack of each thread, which coroutines that take
turns would spoil. So the scheduler's labels are taken down beside the profiler, by
``time.perf_counter_ns``, and put on the profiler's clock afterwards.
"""

from __future__ import annotations

import json
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from hogstream.profiling.environment import cuda_devices
from hogstream.profiling.results.profile_schema import LabelTime, OperatorTime
from hogstream.scheduler.tracing.nvtx import shown_to

T = TypeVar("T")
Event = dict[str, Any]  # of Chrome's trace event format, times in microseconds

LANES = "hogstream lanes"
WORKERS = "hogstream workers"
_MARK = "hogstream clock"
_MARKS = 16
_ON_CPU = {"cpu_op", "user_annotation"}
_ON_GPU = {"kernel", "gpu_memcpy", "gpu_memset"}


class Label(NamedTuple):
    """A range of the scheduler, as ``hogstream.scheduler.tracing.nvtx`` lists them.

    Attributes:
        text: What it is around.
        policy: Of its scheduler.
        lane: Index of its worker and lane; None for a run.
        start_ns: When it began, by ``time.perf_counter_ns``.
        end_ns: When it ended.
    """

    text: str
    policy: str
    lane: int | None
    start_ns: int
    end_ns: int


class LabelLog:
    """Takes labels down, in the place of an NVTX tool.

    Attributes:
        labels: Those that have ended.
    """

    def __init__(self) -> None:
        self.labels: list[Label] = []

    def get_event_attributes(
        self, message: str, *, category: str, payload: int | None
    ) -> tuple[str, str, int | None]:
        """What a label is called."""
        return message, category, payload

    def start_range(self, attributes: Any) -> Any:
        """Begins a label."""
        return attributes, time.perf_counter_ns()

    def end_range(self, number: Any) -> None:
        """Ends it."""
        (text, policy, lane), start_ns = number
        self.labels.append(Label(text, policy, lane, start_ns, time.perf_counter_ns()))


@dataclass(frozen=True)
class Clock:
    """The profiler's clock.

    Attributes:
        ahead_us: How far it is ahead of ``time.perf_counter_ns``.
        error_us: By how much that may be wrong, either way.
    """

    ahead_us: float
    error_us: float

    @classmethod
    def of(cls, marks: Iterable[Event], readings_ns: Iterable[int]) -> Clock:
        """Reads it off marks in the trace, in each of which ``perf_counter_ns`` was read.

        Args:
            marks: Their events.
            readings_ns: What was read in each.
        """
        pairs = list(zip(marks, (ns / 1e3 for ns in readings_ns), strict=True))
        least = max(mark["ts"] - us for mark, us in pairs)
        most = min(mark["ts"] + mark["dur"] - us for mark, us in pairs)
        return cls((least + most) / 2, abs(most - least) / 2)

    def us(self, ns: int) -> float:
        """A time of ``perf_counter_ns``, on this clock."""
        return round(ns / 1e3 + self.ahead_us, 3)


@dataclass(frozen=True)
class Recording:
    """What was profiled: while schedulers ran, or the whole of it.

    Attributes:
        trace: For ui.perfetto.dev: operators by thread, lanes, and workers.
        operators: Most time of their own first.
        scheduler: Each label; most time first, then lanes in order.
        clock_error_us: How far lanes and workers may be displaced from the operators, either way.
    """

    trace: dict[str, Any]
    operators: list[OperatorTime]
    scheduler: list[LabelTime]
    clock_error_us: float


def record(workload: Callable[[Path], T], *, whole: bool = False) -> tuple[T, Recording]:
    """Runs something under torch's profiler, and joins what it saw with the scheduler's labels.

    Args:
        workload: Called with the file that it must write a ``Timeline`` of its updates to.
        whole: Whether what happens when no scheduler runs is told too.

    Returns:
        What it returned, and the recording.
    """
    log, activities = LabelLog(), [ProfilerActivity.CPU]
    if cuda_devices():
        activities.append(ProfilerActivity.CUDA)
    # Threads that were there before, and those that are not the profiler's own.
    every_thread = torch.profiler._ExperimentalConfig(  # type: ignore[attr-defined]
        profile_all_threads=True
    )
    with TemporaryDirectory() as folder:
        lanes_file, file = Path(folder, "lanes.json"), Path(folder, "torch.json")
        with profile(
            activities=activities,
            experimental_config=every_thread,
            acc_events=True,  # else torch 2.11 and later warn, once a process
        ) as profiler:
            readings_ns = [_mark() for _ in range(_MARKS)]
            with shown_to(log):
                result = workload(lanes_file)
        profiler.export_chrome_trace(str(file))
        trace, lanes = (json.loads(each.read_bytes()) for each in (file, lanes_file))
    marks = [event for event in trace["traceEvents"] if event.get("name") == _MARK]
    clock = Clock.of(marks, readings_ns)
    trace["traceEvents"] = [event for event in trace["traceEvents"] if event.get("name") != _MARK]
    return result, join(trace, lanes, log.labels, clock, whole=whole)


def _mark() -> int:
    with record_function(_MARK):
        return time.perf_counter_ns()


def join(
    trace: dict[str, Any],
    lanes: dict[str, Any],
    labels: list[Label],
    clock: Clock,
    *,
    whole: bool = False,
) -> Recording:
    """Puts all on the profiler's clock, and leaves out what it saw when no scheduler ran.

    Args:
        trace: Of torch's profiler.
        lanes: Of a ``Timeline``.
        labels: What the scheduler did.
        clock: The profiler's.
        whole: Whether to leave out nothing.
    """
    runs = [label for label in labels if label.text.startswith("run ") and not whole]
    operators = [event for event in trace["traceEvents"] if _within(event, runs, clock)]
    updates = list(_lane_events(lanes, clock))
    events = [*operators, *updates, *_worker_events(labels, clock)]
    return Recording(
        {**trace, "traceEvents": events},
        count_operators(operators),
        count_labels(labels, updates, clock),
        clock.error_us,
    )


def count_operators(events: Iterable[Event]) -> list[OperatorTime]:
    """Adds up operators by name, as in ``Recording.operators``."""
    rows: dict[tuple[str, str], OperatorTime] = {}

    def row_of(event: Event, where: Literal["cpu", "gpu"]) -> OperatorTime:
        new = OperatorTime(event["name"], where, count=0, self_us=0.0, total_us=0.0)
        row = rows.setdefault((event["name"], where), new)
        row.count += 1
        row.self_us += event["dur"]
        row.total_us += event["dur"]
        return row

    slices = [event for event in events if event["ph"] == "X"]
    for event in slices:
        if event.get("cat") in _ON_GPU:
            row_of(event, "gpu")
    on_cpu = [event for event in slices if event.get("cat") in _ON_CPU]
    on_cpu.sort(key=lambda event: (event["tid"], event["ts"], -event["dur"]))
    for _, thread in groupby(on_cpu, lambda event: event["tid"]):
        around: list[tuple[float, OperatorTime]] = []  # when each ends, and its row
        for event in thread:
            while around and around[-1][0] <= event["ts"]:
                around.pop()
            if around:
                around[-1][1].self_us -= event["dur"]
            around.append((event["ts"] + event["dur"], row_of(event, "cpu")))
    return sorted(rows.values(), key=lambda row: -row.self_us)


def count_labels(
    labels: Iterable[Label], updates: Iterable[Event], clock: Clock
) -> list[LabelTime]:
    """Adds up labels by policy, and updates on each lane too, as in ``Recording.scheduler``.

    Args:
        labels: What the scheduler did.
        updates: Events of lanes, on the profiler's clock; what is no update is left out.
        clock: The profiler's.
    """
    times: dict[tuple[str, str, int | None], list[float]] = {}
    runs = [label for label in labels if label.text.startswith("run ")]
    runs.sort(key=lambda run: run.start_ns)
    for label in labels:
        key = label.policy, _title(label), None
        times.setdefault(key, []).append((label.end_ns - label.start_ns) / 1e3)
    for event in updates:
        if event.get("cat") == "update":
            begun = bisect_right(runs, event["ts"], key=lambda run: clock.us(run.start_ns))
            policy = runs[begun - 1].policy
            for lane in (None, event["tid"]):
                times.setdefault((policy, event["name"], lane), []).append(event["dur"])
    rows = [
        LabelTime(
            policy=policy,
            label=label,
            lane=lane,
            count=len(each),
            total_us=sum(each),
            mean_us=sum(each) / len(each),
            p99_us=float(np.percentile(each, 99, method="inverted_cdf")),
        )
        for (policy, label, lane), each in times.items()
    ]
    policies = [run.policy for run in runs]
    rows.sort(
        key=lambda row: (
            policies.index(row.policy) if row.policy in policies else len(policies),
            -1 if row.lane is None else row.lane,
            -row.total_us,
        )
    )
    return rows


def _within(event: Event, runs: list[Label], clock: Clock) -> bool:
    """Whether an event names something, or happened while schedulers ran."""
    if event["ph"] == "M" or not runs:
        return True
    begin = clock.us(min(run.start_ns for run in runs))
    end = clock.us(max(run.end_ns for run in runs))
    return bool(begin <= event["ts"] + event.get("dur", 0) and event["ts"] <= end)


def _lane_events(lanes: dict[str, Any], clock: Clock) -> Iterator[Event]:
    """Names and updates of lanes, each a track by its own number, and the queues before them."""
    origin = clock.us(lanes["otherData"]["perf_counter_ns"])
    tracks = {
        event["tid"]: int(event["args"]["name"].removeprefix("lane "))
        for event in lanes["traceEvents"]
        if event["name"] == "thread_name" and event["args"]["name"].startswith("lane ")
    }
    yield _name("process_name", LANES, None, LANES)
    for lane in sorted(tracks.values()):
        yield _name("thread_name", LANES, lane, f"lane {lane}")
    for event in lanes["traceEvents"]:
        if event.get("cat") in ("update", "queue"):
            track = {"tid": tracks[event["tid"]]} if event["cat"] == "update" else {}
            yield {**event, **track, "pid": LANES, "ts": round(event["ts"] + origin, 3)}


def _worker_events(labels: Iterable[Label], clock: Clock) -> Iterator[Event]:
    """What workers did, each on a track of its own, and runs on one above them."""
    labels = sorted(labels, key=lambda label: (label.start_ns, -label.end_ns))
    yield _name("process_name", WORKERS, None, WORKERS)
    for lane in sorted({-1 if label.lane is None else label.lane for label in labels}):
        yield _name("thread_name", WORKERS, lane + 1, "runs" if lane < 0 else f"worker {lane}")
    for label in labels:
        start, end = clock.us(label.start_ns), clock.us(label.end_ns)
        yield {
            "ph": "X",
            "name": _title(label),
            "cat": "hogstream",
            "pid": WORKERS,
            "tid": 0 if label.lane is None else label.lane + 1,
            "ts": start,
            "dur": round(end - start, 3),
            "args": {"policy": label.policy},
        }


def _title(label: Label) -> str:
    """What to call a label: that of an update is of its way to the lane, whose own is shown too."""
    return "enqueue" if label.text == "update" else label.text


def _name(kind: str, process: str, track: int | None, name: str) -> Event:
    thread = {} if track is None else {"tid": track}
    return {"ph": "M", "name": kind, "pid": process, **thread, "args": {"name": name}}
