"""Reading exports of Nsight Systems: metrics worked out by hand, and files that are not whole."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from nsight_testing import KERNEL, PROCESS, PUSH_POP, domain, write_export

Command = Callable[..., tuple[int, str, str]]
Row = dict[str, Any]

OTHER_PROCESS = PROCESS + (1 << 24)


def spans(of: Iterable[tuple[float, float]], **columns: Any) -> list[Row]:
    """Rows with starts and ends in microseconds."""
    return [{"start": round(1e3 * a), "end": round(1e3 * b), **columns} for a, b in of]


def kernel(start: float, end: float, stream: int = 7, **columns: Any) -> Row:
    return spans([(start, end)], streamId=stream, **columns)[0]


def call(start: float, end: float, correlation: int, **columns: Any) -> Row:
    return spans([(start, end)], correlationId=correlation, **columns)[0]


def nvtx(text: str, start: float, end: float, **columns: Any) -> Row:
    return spans([(start, end)], text=text, **columns)[0]


# Lock-free runs twice, on two streams at once; locked once.
KERNELS = [
    kernel(10, 20, correlationId=1),
    kernel(25, 35, correlationId=2),
    kernel(15, 30, stream=8, correlationId=3),
    kernel(210, 220, correlationId=4),
    kernel(240, 250, correlationId=5),
    kernel(410, 420, correlationId=6),
]
CALLS = [
    call(2, 4, 1),
    call(6, 9, 2),
    call(10, 12, 3),
    call(205, 206, 4),
    call(230, 232, 5),
    call(230.5, 231.5, 55, eventClass=1),  # the driver's call within the runtime's
    call(401, 409, 6),
    call(450, 453, 66, globalTid=PROCESS + 2),  # another thread looks whether it has landed
]
RANGES = [
    domain(),
    nvtx("run locked", 200, 300, category=2),
    nvtx("run lock-free", 0, 100, category=1),
    nvtx("run lock-free", 400, 500, category=1),
    nvtx("submit", 1, 5, int64Value=0),
    nvtx("submit", 5, 10, int64Value=1),
    nvtx("wait lock", 206, 230, int64Value=0),
]


@pytest.fixture
def read(hogstream: Command, tmp_path: Path) -> Callable[..., tuple[dict[str, Any], str]]:
    """Writes an export, reads it, and returns the JSON and what was printed."""

    def run(**parts: Any) -> tuple[dict[str, Any], str]:
        export, json_file = tmp_path / "export.sqlite", tmp_path / "out.json"
        export.unlink(missing_ok=True)
        write_export(export, **parts)
        before = sorted(tmp_path.iterdir())
        status, out, err = hogstream("profile", "read", export, "--json", json_file)
        assert (status, err) == (0, "")
        assert set(tmp_path.iterdir()) - set(before) <= {json_file}  # no journal
        return json.loads(json_file.read_text()), out

    return run


Read = Callable[..., tuple[dict[str, Any], str]]


def test_policies_are_told_apart_and_metrics_are_right(read: Read) -> None:
    result, out = read(kernels=KERNELS, calls=CALLS, ranges=RANGES)
    assert (result["kind"], result["schema"], result["profiler_version"]) == (
        "profile nsys",
        2,
        None,
    )
    assert result["command"].startswith("hogstream profile read")
    assert result["environment"] is None  # it may have been profiled elsewhere
    assert result["devices"] == ["NVIDIA H200"]
    assert (result["kernels_outside_runs"], result["kernels_untimed"]) == (0, 0)
    free, locked = result["results"]
    assert (free["policy"], free["runs"], free["kernels"]) == ("lock-free", 2, 4)
    assert free["busy_ms"] == pytest.approx(0.035)  # 10 to 35, and 10 of the second run
    assert free["span_ms"] == pytest.approx(0.035)
    assert free["kernels_per_second"] == pytest.approx(4 / 35e-6)
    assert free["overlap"] == pytest.approx(10 / 35)  # 15 to 20 and 25 to 30
    assert free["kernel_us"] == pytest.approx({"mean": 11.25, "p50": 10, "p90": 13.5, "p99": 14.85})
    # From the first run to the second there is no gap.
    assert free["gap_us"] == pytest.approx({"mean": 5, "p50": 5, "p90": 5, "p99": 5})
    # 8, 19, 5 and 9.
    assert free["launch_latency_us"]["mean"] == pytest.approx(10.25)
    assert free["launch_latency_us"]["p50"] == pytest.approx(8.5)
    assert free["api_us_per_kernel"] == pytest.approx((2 + 3 + 2 + 8 + 3) / 4)
    assert free["api_us_per_kernel_on_event_loop"] == pytest.approx((2 + 3 + 2 + 8) / 4)
    assert free["api_calls"] == [{"name": "cudaLaunchKernel_v7000", "count": 5, "total_ms": 0.018}]
    assert free["ranges"].keys() == {"submit"}
    assert free["ranges"]["submit"]["count"] == 2
    assert free["ranges"]["submit"]["us"]["mean"] == pytest.approx(4.5)
    assert free["streams"] == [
        {"device": 0, "stream": 7, "kernels": 3, "busy_ms": pytest.approx(0.03)},
        {"device": 0, "stream": 8, "kernels": 1, "busy_ms": pytest.approx(0.015)},
    ]
    assert (locked["policy"], locked["runs"], locked["kernels"]) == ("locked", 1, 2)
    assert (locked["overlap"], locked["gap_us"]["p50"]) == (0, pytest.approx(20))
    assert locked["span_ms"] == pytest.approx(0.04)
    assert locked["launch_latency_us"]["mean"] == pytest.approx(7.5)
    assert locked["api_us_per_kernel"] == pytest.approx(1.5)  # a call within a call counts once
    assert locked["ranges"]["wait lock"]["us"]["p50"] == pytest.approx(24)
    assert result["kernels"] == [{"name": "rmsprop_kernel", "count": 6, "total_ms": 0.065}]
    table = out.split("Kernels")[0]
    assert [line.split() for line in table.splitlines() if "overlap" in line] == [
        ["overlap,", "%", "28.6", "0.0"]
    ]
    assert "NVTX wait lock, us p50/p99" in table
    assert "28.6 % of the time with lock-free, 0.0 % of the time with locked" in " ".join(
        out.split()
    )


def test_without_runs_the_whole_file_is_one_column(read: Read) -> None:
    result, out = read(kernels=KERNELS, calls=CALLS)
    (whole,) = result["results"]
    assert (whole["policy"], whole["runs"], whole["kernels"]) == ("all", None, 6)
    assert whole["api_us_per_kernel_on_event_loop"] is None
    assert whole["overlap"] == pytest.approx(10 / 55)
    assert whole["gap_us"]["mean"] == pytest.approx((5 + 175 + 20 + 160) / 4)
    assert whole["span_ms"] == pytest.approx(0.41)
    assert "There are no runs of hogstream's scheduler in the profile" in " ".join(out.split())


def test_only_ranges_of_our_domain_and_kind_count(read: Read) -> None:
    others = [
        domain("theirs", 4),
        nvtx("run theirs", 0, 500, domainId=4),
        nvtx("run stacked", 0, 500, eventType=PUSH_POP),
        # In another process the same number is another domain.
        nvtx("run elsewhere", 0, 500, globalTid=OTHER_PROCESS + 1),
        nvtx("something else", 0, 500),
    ]
    result, _ = read(kernels=KERNELS, ranges=RANGES + others)
    assert [entry["policy"] for entry in result["results"]] == ["lock-free", "locked"]
    assert all(text != "something else" for entry in result["results"] for text in entry["ranges"])


def test_ranges_are_found_without_their_domain_and_by_registered_texts(read: Read) -> None:
    texts = {1: "rmsprop_kernel", 2: "cudaLaunchKernel", 9: "run ordered"}
    result, _ = read(
        kernels=KERNELS, ranges=[{"textId": 9, "start": 0, "end": 500_000}], strings=texts
    )
    assert [(e["policy"], e["kernels"]) for e in result["results"]] == [("ordered", 6)]


def test_kernels_outside_runs_are_left_out_and_said(read: Read) -> None:
    result, out = read(kernels=[*KERNELS, kernel(350, 360)], ranges=RANGES)
    assert result["kernels_outside_runs"] == 1
    assert sum(entry["kernels"] for entry in result["results"]) == 6
    assert "1 kernel ran outside all runs" in out


@pytest.mark.parametrize("others", [[], [nvtx("update", 409, 600)]])
def test_a_run_without_an_end_lasts_to_the_end(read: Read, others: list[Row]) -> None:
    open_run = {"text": "run ordered", "start": 350_000, "end": None}
    open_update = {"text": "update", "start": 500_000, "end": None}
    result, _ = read(kernels=KERNELS, ranges=[domain(), open_run, open_update, *others])
    (ordered,) = result["results"]
    assert (ordered["policy"], ordered["kernels"]) == ("ordered", 1)
    assert [each["count"] for each in ordered["ranges"].values()] == [1] * len(others)


def test_calls_that_did_not_end_are_left_out(read: Read) -> None:
    calls = [*CALLS, {"start": 50_000, "end": None}]
    (whole,) = read(kernels=KERNELS, calls=calls)[0]["results"]
    assert whole["api_calls"][0]["count"] == len(CALLS)


def test_calls_and_streams_are_those_of_the_same_process(read: Read) -> None:
    kernels = [kernel(10, 20, correlationId=1), kernel(30, 40, correlationId=1)]
    kernels[1]["globalPid"] = OTHER_PROCESS
    calls = [call(9, 9.5, 1), call(25, 26, 1, globalTid=OTHER_PROCESS + 1)]
    (whole,) = read(kernels=kernels, calls=calls)[0]["results"]
    assert whole["launch_latency_us"]["mean"] == pytest.approx(3)  # 1 and 5
    assert [stream["kernels"] for stream in whole["streams"]] == [1, 1]
    assert whole["gap_us"] is None


def test_kernels_of_different_devices_do_not_overlap(read: Read) -> None:
    kernels = [kernel(0, 10), kernel(0, 10, deviceId=1), kernel(5, 10, stream=9, deviceId=1)]
    (whole,) = read(kernels=kernels)[0]["results"]
    assert whole["busy_ms"] == pytest.approx(0.02)
    assert whole["overlap"] == pytest.approx(5 / 20)


def test_all_kernels_of_a_graph_were_launched_by_its_call(read: Read) -> None:
    kernels = [kernel(10, 12, correlationId=5), kernel(12, 14, correlationId=5)]
    (whole,) = read(kernels=kernels, calls=[call(1, 3, 5)])[0]["results"]
    assert whole["launch_latency_us"]["mean"] == pytest.approx(10)
    assert whole["api_us_per_kernel"] == pytest.approx(1)


def test_kernels_without_times_are_left_out_and_said(read: Read) -> None:
    result, out = read(kernels=[kernel(10, 20), kernel(20, 10)])
    assert (result["kernels_untimed"], result["results"][0]["kernels"]) == (1, 1)
    assert "1 kernel had no times" in out


@pytest.mark.parametrize("empty", [None, []], ids=["missing", "empty"])
@pytest.mark.parametrize(
    ("table", "null"),
    [
        ("kernels", ["overlap", "kernel_us", "gap_us", "launch_latency_us", "api_us_per_kernel"]),
        ("calls", ["launch_latency_us", "api_us_per_kernel"]),
        ("ranges", ["runs"]),
    ],
)
def test_tables_may_be_missing_or_empty(
    read: Read, table: str, null: list[str], empty: list[Row] | None
) -> None:
    parts = {"kernels": KERNELS, "calls": CALLS, "ranges": RANGES} | {table: empty}
    result, out = read(**parts)
    for entry in result["results"]:
        assert [name for name, value in entry.items() if value is None and name in null] == [
            name for name in entry if name in null
        ]
    assert ("No kernel ran" in out) == (table == "kernels")


@pytest.mark.parametrize(
    "column",
    [
        *("deviceId", "contextId", "globalPid", "correlationId", "shortName", "demangledName"),
        *("globalTid", "nameId", "text", "textId", "domainId", "category", "int64Value", "name"),
    ],
)
def test_optional_columns_may_be_missing(read: Read, column: str) -> None:
    # With no text the ranges say nothing, and there is one column.
    ranges = [RANGES[0], *(row | {"textId": 5} for row in RANGES[1:2])]
    result, _ = read(kernels=KERNELS, calls=CALLS, ranges=ranges, without=[column])
    entry = result["results"][0]
    assert entry["kernels"] == (6 if column == "text" else 2)
    assert entry["busy_ms"] > 0
    assert (entry["launch_latency_us"] is None) == (column == "correlationId")


def test_more_columns_do_no_harm(read: Read) -> None:
    result, _ = read(kernels=KERNELS, calls=CALLS, ranges=RANGES, more=["new", "select"])
    assert [entry["kernels"] for entry in result["results"]] == [4, 2]


def test_names_without_a_text_are_said_to_be_unnamed(read: Read) -> None:
    result, out = read(kernels=KERNELS, calls=CALLS, strings={77: "other"})
    assert result["kernels"][0]["name"] == "(unnamed)"
    assert "(unnamed)" in out


def test_names_are_printed_as_they_are(read: Read) -> None:
    odd = "void k<[bold red]x[/]>\x1b[31m(\n)"
    result, out = read(kernels=KERNELS, strings={1: odd, 2: "c"}, ranges=[nvtx("run [x]", 0, 999)])
    assert result["kernels"][0]["name"] == odd
    assert "void k<[bold red]x[/]>?[31m(?)" in out
    assert "\x1b" not in out
    assert "[x]" in out


def refused(hogstream: Command, file: Path) -> str:
    status, out, err = hogstream("profile", "read", file)
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert str(file) in err
    return err


def test_damaged_files_are_refused_in_one_line(hogstream: Command, tmp_path: Path) -> None:
    whole = write_export(
        tmp_path / "whole", kernels=KERNELS * 400, calls=CALLS * 100, ranges=RANGES
    ).read_bytes()
    torn = tmp_path / "torn.sqlite"
    for size in (1, 15, 16, 50, 100, 4095, 4096, 20_000, len(whole) // 2, len(whole) - 1):
        torn.write_bytes(whole[:size])
        assert "is cut short" in refused(hogstream, torn)
    torn.write_bytes(whole[:4096] + bytes(len(whole) - 4096))
    assert "is damaged" in refused(hogstream, torn)
    torn.write_bytes(whole[:100] + b"\xff" * (len(whole) - 100))
    assert "is damaged" in refused(hogstream, torn)
    torn.write_bytes(b"")
    assert "is empty" in refused(hogstream, torn)
    torn.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "is damaged, or no CSV" in refused(hogstream, torn)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({}, "holds no kernels, no CUDA calls and no ranges"),
        ({"kernels": [], "calls": [], "ranges": []}, "holds no kernels"),
        ({"kernels": KERNELS, "without": ["streamId"]}, f"{KERNEL} has no column streamId"),
        ({"kernels": KERNELS, "without": ["end"]}, f"{KERNEL} has no column end"),
        ({"kernels": KERNELS, "calls": CALLS, "without": ["start"]}, "has no column start"),
        ({"kernels": [kernel(0, 1) | {"streamId": "seven"}]}, "is damaged"),
        ({"kernels": [kernel(0, 1) | {"end": b"\0"}]}, "is damaged"),
    ],
)
def test_files_without_what_is_needed_are_refused(
    hogstream: Command, tmp_path: Path, parts: dict[str, Any], said: str
) -> None:
    assert said in refused(hogstream, write_export(tmp_path / "export.sqlite", **parts))


def test_a_database_of_something_else_is_refused(hogstream: Command, tmp_path: Path) -> None:
    file = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("CREATE TABLE bookmarks (url TEXT)")
    assert "is no export of Nsight Systems" in refused(hogstream, file)


def test_a_run_without_an_end_lasts_to_the_next_on_its_thread(read: Read) -> None:
    ranges = [domain(), nvtx("run locked", 5, 0) | {"end": None}, nvtx("run lock-free", 30, 50)]
    result, _ = read(kernels=[kernel(10, 20), kernel(40, 45)], ranges=ranges)
    assert {entry["policy"]: entry["kernels"] for entry in result["results"]} == {
        "locked": 1,
        "lock-free": 1,
    }


def test_host_time_is_told_for_each_update_where_updates_are_marked(read: Read) -> None:
    ranges = [
        domain(),
        nvtx("run locked", 0, 100),
        nvtx("update", 10, 12),
        nvtx("update", 20, 22),
    ]
    calls = [call(10, 12, 1), call(20, 22, 2), call(30, 34, 3)]
    result, _ = read(kernels=[kernel(40, 50)], calls=calls, ranges=ranges)
    assert result["results"][0]["api_us_per_update"] == pytest.approx(8 / 2)
    result, _ = read(kernels=[kernel(40, 50)], calls=calls, ranges=ranges[:2])
    assert result["results"][0]["api_us_per_update"] is None
