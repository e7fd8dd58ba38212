"""Nsight Systems: what a timeline says of lock-free, locked and ordered updates.

Reads the SQLite export (``nsys export --type sqlite``). Its tables are made only when there is
something in them, and columns come and go with the version, so whatever is not there is left out.
Metrics, for the time in which a policy ran:

- overlap: the time with two or more kernels, of the time with at least one, on each device;
- gap: the time from the end of a kernel to the start of the next on its stream, in one run;
- launch latency: from the start of the call that launched a kernel to the start of the kernel, so
  the call's own time and the wait for the stream are in it. All kernels of a graph have one call;
- API time: what threads spent in CUDA's runtime and driver, calls within calls counted once. The
  event loop's is what submitting costs; a thread that watches for the end of updates adds to it.

A run of the scheduler carries an NVTX range named after its policy. Without any, the whole file
is one column.
"""

from __future__ import annotations

import re
import sqlite3
import struct
from array import array
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.nsight.time_spans import (
    Ints,
    apart,
    busy,
    extents,
    gaps,
    merge,
    time_at_least,
    window_of,
)
from hogstream.profiling.nsight.tools import FoundTool, Program
from hogstream.profiling.results.profile_schema import (
    NamedTime,
    NsysProfile,
    Percentiles,
    PolicyTimeline,
    RangeTimes,
    StreamTime,
)
from hogstream.profiling.results.records import Environment
from hogstream.scheduler.tracing.nvtx import DOMAIN

# Texts of hogstream's ranges.
_OURS = re.compile(r"run \S+|iteration|submit|update|snapshot|wait \S.*")

#: The name of the one column if no run of the scheduler is in the file.
WHOLE = "all"

SQLITE_MAGIC = b"SQLite format 3\0"
# Kinds of rows in NVTX_EVENTS: those of a domain's name, and of a range with two ends.
_DOMAIN_CREATE, _START_END = 75, 60
# The lower bits of an identifier of a thread, above which is that of its process.
_THREAD_BITS = 24
_FOREVER = np.int64(1 << 62)
_TOP = 20

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Spans:
    """Intervals with some numbers for each.

    Attributes:
        starts: In nanoseconds, of shape (n,).
        ends: Likewise.
        columns: Numbers by name, each of shape (n,); -1 where the export has none.
    """

    starts: Ints
    ends: Ints
    columns: dict[str, Ints]

    def __getitem__(self, column: str) -> Ints:
        return self.columns[column]

    def __len__(self) -> int:
        return len(self.starts)

    def where(self, chosen: Bools) -> Spans:
        """Some of them."""
        columns = {name: column[chosen] for name, column in self.columns.items()}
        return Spans(self.starts[chosen], self.ends[chosen], columns)


@dataclass(frozen=True)
class Trace:
    """What an export holds.

    Attributes:
        kernels: With the columns ``device``, ``stream``, ``name`` and ``launched``: when the call
            began that launched it.
        calls: CUDA API calls, with ``name`` and ``thread``.
        ranges: hogstream's NVTX ranges by their text, with ``thread``.
        names: Texts of ``name``.
        devices: Names of GPUs.
        untimed: Kernels that were left out because they have no times.
    """

    kernels: Spans
    calls: Spans
    ranges: dict[str, Spans]
    names: dict[int, str]
    devices: list[str]
    untimed: int


def profile_command(tool: FoundTool, report: Path, target: Program) -> list[str]:
    """The command that profiles a program."""
    command = [
        *(tool.path, "profile", "--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none"),
        "--cuda-graph-trace=node",  # the kernels of a graph, and not the graph as one
    ]
    # Newer versions time events on the device, which may make streams wait for each other.
    if tool.offers("--cuda-event-trace", "profile"):
        command.append("--cuda-event-trace=false")
    if target.marked:
        # Not the default stop-shutdown, which kills the program.
        command += ["--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
    return [*command, "--force-overwrite=true", f"--output={report}", *target.command]


def export_arguments(report: Path, export: Path) -> list[str]:
    """What makes nsys write a report as SQLite."""
    return ["export", "--type=sqlite", "--force-overwrite=true", f"--output={export}", str(report)]


def read_trace(path: Path) -> Trace:
    """Reads an SQLite export.

    Raises:
        MeasurementError: If it is damaged, or holds nothing that we look for; names the file.
    """
    with _opened(path) as export:
        names = {number: str(text) for number, text in export.rows("StringIds", ("id", "value"))}
        kernels, calls = _read_kernels(export), _read_calls(export)
        ranges = _read_ranges(export, names)
        devices = [str(name) for (name,) in export.rows("TARGET_INFO_GPU", ("name",)) if name]
    if not (len(kernels) or len(calls) or ranges):
        raise MeasurementError(
            f"{path} holds no kernels, no CUDA calls and no ranges of hogstream: nothing was "
            "captured, or it is no export of Nsight Systems"
        )
    timed = (kernels.starts >= 0) & (kernels.ends >= kernels.starts)
    untimed = len(kernels) - int(timed.sum())
    calls = calls.where(calls.ends >= calls.starts)
    return Trace(_link(kernels.where(timed), calls), calls, ranges, names, devices, untimed)


def analyse(
    trace: Trace, command: str, environment: Environment | None, version: str | None
) -> NsysProfile:
    """Metrics for each policy that ran, in the order of their first runs; see the module's top.

    Args:
        trace: What an export holds.
        command: The command line that repeats this.
        environment: What was profiled on; None if a file was only read.
        version: Of Nsight Systems; None likewise.
    """
    runs = {
        text.removeprefix("run "): merge(spans.starts, spans.ends)
        for text, spans in trace.ranges.items()
        if text.startswith("run ")
    }
    order = sorted(runs, key=lambda policy: int(runs[policy][0][0]))
    windows = {policy: runs[policy] for policy in order} or {WHOLE: _whole(trace)}
    everywhere = merge(*map(np.concatenate, zip(*windows.values(), strict=True)))
    outside = window_of(trace.kernels.starts, *everywhere) < 0
    return NsysProfile(
        command=command,
        environment=environment,
        profiler_version=version,
        devices=trace.devices,
        results=[_timeline(trace, *policy_windows) for policy_windows in windows.items()],
        kernels=_totals(trace.kernels, trace.names),
        kernels_outside_runs=int(outside.sum()),
        kernels_untimed=trace.untimed,
    )


class _Export:
    """An SQLite export, of which any table and any column may be missing."""

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self._path = path
        self._database = database
        database.text_factory = lambda text: text.decode("utf-8", "replace")

    def rows(
        self, table: str, columns: Sequence[str], default: str = "NULL"
    ) -> Iterator[tuple[Any, ...]]:
        """Rows of a table, ``default`` where a column or a value is missing; none of no table."""
        present = self._columns(table)
        if present:
            chosen = (
                f'COALESCE("{name}", {default})' if name in present else default for name in columns
            )
            yield from self._database.execute(f'SELECT {", ".join(chosen)} FROM "{table}"')

    def spans(self, table: str, required: Sequence[str], optional: Sequence[str]) -> Spans:
        """Intervals of a table, with columns of integers.

        Raises:
            MeasurementError: If a required column is missing, or holds something else.
        """
        required = ("start", "end", *required)
        present = self._columns(table)
        missing = [name for name in required if present and name not in present]
        if missing:
            raise MeasurementError(
                f"{self._path}: {table} has no column {missing[0]}; export it with another "
                "version of Nsight Systems"
            )
        columns = (*required, *optional)
        numbers = np.fromiter(
            chain.from_iterable(self.rows(table, columns, default="-1")), np.int64
        )
        starts, ends, *others = numbers.reshape(-1, len(columns)).T
        return Spans(starts, ends, dict(zip(columns[2:], others, strict=True)))

    def _columns(self, table: str) -> set[str]:
        return {row[1] for row in self._database.execute(f'PRAGMA table_info("{table}")')}


@contextmanager
def _opened(path: Path) -> Iterator[_Export]:
    """Opens an export to read, and tells damage in one line."""
    _check_whole(path)
    try:
        uri = f"file:{quote(str(path.absolute()))}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True)) as database:
            yield _Export(path, database)
    except (sqlite3.Error, ValueError, TypeError, OverflowError) as error:
        said = f"{path} is damaged, or no export of Nsight Systems: {error}"
        raise MeasurementError(said) from error


def _check_whole(path: Path) -> None:
    """Checks that a database is as long as its header says: SQLite reads what is left of one.

    Raises:
        MeasurementError: If it is not.
    """
    with path.open("rb") as file:
        header = file.read(100)
    if len(header) == 100:
        (page,), (pages,) = (
            struct.unpack_from(">H", header, 16),
            struct.unpack_from(">I", header, 28),
        )
        if path.stat().st_size >= pages * (1 << 16 if page == 1 else page):
            return
    raise MeasurementError(f"{path} is cut short")


def _read_kernels(export: _Export) -> Spans:
    read = export.spans(
        "CUPTI_ACTIVITY_KIND_KERNEL",
        ("streamId",),
        ("deviceId", "contextId", "globalPid", "correlationId", "shortName", "demangledName"),
    )
    name = np.where(read["shortName"] < 0, read["demangledName"], read["shortName"])
    # A stream's number is its own within its context only.
    stream = _identify(
        *(read[column] for column in ("globalPid", "deviceId", "contextId", "streamId"))
    )
    return Spans(
        read.starts,
        read.ends,
        {
            "device": _identify(read["deviceId"]),
            "stream": stream,
            "stream_number": read["streamId"],
            "device_number": read["deviceId"],
            "name": name,
            "process": read["globalPid"],
            "correlation": read["correlationId"],
        },
    )


def _read_calls(export: _Export) -> Spans:
    read = export.spans("CUPTI_ACTIVITY_KIND_RUNTIME", (), ("globalTid", "correlationId", "nameId"))
    columns = {
        "thread": read["globalTid"],
        "name": read["nameId"],
        "process": read["globalTid"] >> _THREAD_BITS << _THREAD_BITS,
        "correlation": read["correlationId"],
    }
    return Spans(read.starts, read.ends, columns)


def _read_ranges(export: _Export, names: dict[int, str]) -> dict[str, Spans]:
    """The ranges of our domain by text; of any domain, if none is named as ours is.

    A run without an end lasts until the next one on its thread; other ranges without one are left
    out.
    """
    columns = ("start", "end", "eventType", "domainId", "globalTid", "text", "textId")
    alike: dict[tuple[Any, ...], array[int]] = defaultdict(partial(array, "q"))
    for row in export.rows("NVTX_EVENTS", columns, default="-1"):
        alike[row[2:]].extend(row[:2])
    domains, found = set(), []
    for (kind, domain, thread, text, number), times in alike.items():
        text = names.get(number, "") if text == -1 else str(text)
        process_domain = domain, thread >> _THREAD_BITS
        if (kind, text) == (_DOMAIN_CREATE, DOMAIN):
            domains.add(process_domain)
        elif kind == _START_END and _OURS.fullmatch(text):
            both = np.array(times, np.int64).reshape(-1, 2)
            found.append((process_domain, text, np.insert(both, 2, thread, axis=1)))
    ours = [(text, times) for place, text, times in found if not domains or place in domains]
    ranges = {}
    for name in dict.fromkeys(text for text, _ in ours):
        starts, ends, threads = np.concatenate([times for text, times in ours if text == name]).T
        if name.startswith("run "):
            ends = np.where(ends < 0, _next_runs(ours, starts, threads), ends)
        ranges[name] = Spans(starts, ends, {"thread": threads}).where(ends >= 0)
    return ranges


def _next_runs(ours: list[tuple[str, Ints]], starts: Ints, threads: Ints) -> Ints:
    """When the next run begins on each thread after each start, or never."""
    runs = np.concatenate([times for text, times in ours if text.startswith("run ")])
    later = [
        runs[(runs[:, 2] == thread) & (runs[:, 0] > start), 0].min(initial=_FOREVER)
        for start, thread in zip(starts, threads, strict=True)
    ]
    return np.array(later, np.int64)


def _identify(*columns: Ints) -> Ints:
    """Numbers from 0 on for the different rows of some columns."""
    numbers = np.zeros(len(columns[0]), np.int64)
    for column in columns:
        values, index = np.unique(column, return_inverse=True)
        # Counted anew each time, lest the products overflow.
        numbers = np.unique(numbers * len(values) + index, return_inverse=True)[1]
    return numbers


def _link(kernels: Spans, calls: Spans) -> Spans:
    """Adds ``launched``, when the call began that launched each kernel, or -1."""
    both = [
        np.concatenate([kernels[column], calls[column]]) for column in ("process", "correlation")
    ]
    if (both[0] < 0).any():  # not exported: all are of one process
        both = both[1:]
    keys = _identify(*both)
    mine, theirs = keys[: len(kernels)], keys[len(kernels) :]
    order = np.lexsort((calls.starts, theirs))
    first = np.searchsorted(theirs[order], mine)
    launched = np.append(calls.starts[order], -1)[first]
    matches = (np.append(theirs[order], -1)[first] == mine) & (kernels["correlation"] > 0)
    columns = {**kernels.columns, "launched": np.where(matches, launched, -1)}
    return Spans(kernels.starts, kernels.ends, columns)


def _whole(trace: Trace) -> tuple[Ints, Ints]:
    """One window around everything."""
    all_spans = [trace.kernels, trace.calls, *trace.ranges.values()]
    starts = np.concatenate([spans.starts for spans in all_spans])
    ends = np.concatenate([spans.ends for spans in all_spans])
    return np.array([starts.min()]), np.array([max(ends.max(), starts.max()) + 1])


def _timeline(trace: Trace, policy: str, windows: tuple[Ints, Ints]) -> PolicyTimeline:
    """What a policy did in its windows of time."""
    run = window_of(trace.kernels.starts, *windows)
    kernels = trace.kernels.where(run >= 0)
    run = run[run >= 0]
    calls = _within(trace.calls, windows)
    count = len(kernels)
    span = int(extents(run, kernels.starts, kernels.ends).sum())
    placed = apart(kernels["device"], kernels.starts, kernels.ends)
    busy_time, overlap = time_at_least(1, *placed), time_at_least(2, *placed)
    loops = trace.ranges[f"run {policy}"]["thread"] if policy != WHOLE else np.empty(0, np.int64)
    on_loops = calls.where(np.isin(calls["thread"], loops))
    updates = len(_within(trace.ranges["update"], windows)) if "update" in trace.ranges else 0
    latency = (kernels.starts - kernels["launched"])[kernels["launched"] >= 0]
    idle = gaps(_identify(kernels["stream"], run), kernels.starts, kernels.ends)
    return PolicyTimeline(
        policy=policy,
        runs=len(windows[0]) if policy != WHOLE else None,
        kernels=count,
        span_ms=span / 1e6,
        kernels_per_second=count / span * 1e9 if span else None,
        busy_ms=busy_time / 1e6,
        overlap=overlap / busy_time if busy_time else None,
        kernel_us=_percentiles(kernels.ends - kernels.starts),
        gap_us=_percentiles(idle),
        launch_latency_us=_percentiles(latency),
        api_us_per_kernel=_api_us(calls) / count if count and len(calls) else None,
        api_us_per_kernel_on_event_loop=_api_us(on_loops) / count
        if count and len(on_loops)
        else None,
        api_us_per_update=_api_us(calls) / updates if updates and len(calls) else None,
        api_calls=_totals(calls, trace.names),
        ranges={
            text: times
            for text, every in trace.ranges.items()
            if not text.startswith("run ") and (times := _range_times(_within(every, windows)))
        },
        streams=_streams(kernels),
    )


def _api_us(calls: Spans) -> float:
    """Microseconds that threads spent in calls."""
    return int(busy(_identify(calls["thread"]), calls.starts, calls.ends).sum()) / 1e3


def _within(spans: Spans, windows: tuple[Ints, Ints]) -> Spans:
    return spans.where(window_of(spans.starts, *windows) >= 0)


def _streams(kernels: Spans) -> list[StreamTime]:
    """What each stream did, in the order of devices and of streams."""
    _, first, stream = np.unique(kernels["stream"], return_index=True, return_inverse=True)
    counts = np.bincount(stream)
    busy_times = busy(stream, kernels.starts, kernels.ends)
    return [
        StreamTime(
            device=int(kernels["device_number"][first[each]]),
            stream=int(kernels["stream_number"][first[each]]),
            kernels=int(counts[each]),
            busy_ms=int(busy_times[each]) / 1e6,
        )
        for each in range(len(first))
    ]


def _range_times(spans: Spans) -> RangeTimes | None:
    """Those of a range; None if it was never entered."""
    durations = spans.ends - spans.starts
    each = _percentiles(durations)
    return None if each is None else RangeTimes(len(spans), int(durations.sum()) / 1e6, each)


def _percentiles(nanoseconds: Ints) -> Percentiles | None:
    """Of some times, in microseconds; None of none."""
    if not len(nanoseconds):
        return None
    p50, p90, p99 = (float(each) for each in np.percentile(nanoseconds, [50, 90, 99]) / 1e3)
    return Percentiles(mean=float(nanoseconds.mean()) / 1e3, p50=p50, p90=p90, p99=p99)


def _totals(spans: Spans, names: dict[int, str]) -> list[NamedTime]:
    """Calls and time by name, of those that took most."""
    numbers, index, counts = np.unique(spans["name"], return_inverse=True, return_counts=True)
    times = np.bincount(index, weights=spans.ends - spans.starts, minlength=len(numbers))
    return [
        NamedTime(
            name=names.get(int(numbers[each]), "(unnamed)"),
            count=int(counts[each]),
            total_ms=float(times[each]) / 1e6,
        )
        for each in np.argsort(-times, kind="stable")[:_TOP]
    ]
