from __future__ import annotations

import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from hogstream.scheduler.tracing.timeline import Timeline

START = 5_000_000_000_000  # a clock counts from when the machine started


def written(timeline: Timeline, folder: Path) -> list[dict[str, Any]]:
    path = folder / "trace.json"
    timeline.write(path)
    trace = json.loads(path.read_text("utf-8"))
    assert trace["displayTimeUnit"] == "ns"
    events: list[dict[str, Any]] = trace["traceEvents"]
    return events


def of_phase(events: list[dict[str, Any]], phase: str) -> list[dict[str, Any]]:
    return [event for event in events if event["ph"] == phase]


def tracks(events: list[dict[str, Any]]) -> dict[int, str]:
    """Names of tracks by their number, in the order in which they are shown."""
    order = {
        event["tid"]: event["args"]["sort_index"]
        for event in events
        if event["name"] == "thread_sort_index"
    }
    names = {
        event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"
    }
    assert order.keys() == names.keys()
    return {number: names[number] for number in sorted(order, key=order.__getitem__)}


def slices(events: list[dict[str, Any]]) -> dict[str, list[tuple[float, float, str]]]:
    """Start, duration and name of every slice, by the name of its track, in order of start."""
    names, found = tracks(events), defaultdict(list)
    for event in of_phase(events, "X"):
        found[names[event["tid"]]].append((event["ts"], event["dur"], event["name"]))
    return {track: sorted(each) for track, each in found.items()}


def test_says_when_its_zero_was(tmp_path):
    timeline = Timeline()
    timeline.add_wait(0, "lock", START + 40, START + 50)
    timeline.add_update(0, 0, START + 7, START + 30, START + 60, 0)
    (wait,) = [each for each in written(timeline, tmp_path) if each.get("cat") == "wait"]
    other = json.loads((tmp_path / "trace.json").read_text())["otherData"]
    assert other == {"perf_counter_ns": START + 7}
    assert wait["ts"] == pytest.approx(0.033)


def test_hand_worked_trace(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.add_wait(7, "landing", START + 1_000, START + 4_500)
    timeline.add_update(7, 1, START + 1_000, START + 2_500, START + 4_001, staleness=3)
    timeline.add_update(2, 0, START, START, START + 2_000_000, staleness=0, outcome="skipped")
    events = written(timeline, tmp_path)

    assert list(tracks(events).values()) == ["lane 0", "lane 1", "worker 2", "worker 7"]
    assert slices(events) == {
        "lane 0": [(0, 2000, "skipped")],
        "lane 1": [(2.5, 1.501, "update")],
        "worker 7": [(1, 3.5, "landing")],
    }
    (update,) = (event for event in events if event["name"] == "update")
    assert update["args"] == {"worker": 7, "staleness": 3, "submitted_us": 1, "waited_us": 1.5}
    queued = [(e["ph"], e["name"], e["ts"]) for e in events if e.get("cat") == "queue"]
    assert queued == [("b", "queue of worker 7", 1), ("e", "queue of worker 7", 2.5)]


def test_every_event_has_what_its_phase_asks_for(tmp_path: Path) -> None:
    timeline = Timeline()
    for n in range(20):
        timeline.add_update(n % 3, n % 2, START + n, START + 2 * n, START + 5 * n, staleness=n)
        timeline.add_wait(n % 4, "lock", START + n, START + 2 * n)
    events = written(timeline, tmp_path)
    needed = {
        "M": {"name", "args"},
        "X": {"name", "cat", "tid", "ts", "dur", "args"},
        "b": {"name", "cat", "id", "tid", "ts"},
        "e": {"name", "cat", "id", "tid", "ts"},
    }
    for event in events:
        assert needed[event["ph"]] | {"ph", "pid"} <= event.keys()
        assert event.get("ts", 0) >= 0
        assert event.get("dur", 0) >= 0
    assert len({event["pid"] for event in events}) == 1
    assert {event["tid"] for event in events if "tid" in event} == tracks(events).keys()
    begun = {event["id"]: event["ts"] for event in of_phase(events, "b")}
    ended = {event["id"]: event["ts"] for event in of_phase(events, "e")}
    assert len(begun) == len(of_phase(events, "b")) == 19  # the first did not wait
    assert begun.keys() == ended.keys()
    assert all(begun[number] < ended[number] for number in begun)


def test_slices_of_one_track_never_overlap(tmp_path: Path) -> None:
    rng = random.Random(0)
    timeline = Timeline()
    longest = 50_000
    for _ in range(1000):
        first, second, third, fourth = sorted(START + rng.randrange(longest) for _ in range(4))
        timeline.add_update(rng.randrange(5), rng.randrange(4), first, second, third, staleness=0)
        timeline.add_wait(rng.randrange(5), rng.choice("abc"), third, fourth)
    found = slices(written(timeline, tmp_path))
    assert sum(len(each) for each in found.values()) == 2000
    for each in found.values():
        ends = [round(1000 * (start + duration)) for start, duration, _ in each]
        starts = [round(1000 * start) for start, _, _ in each]
        assert all(end <= start for end, start in zip(ends[:-1], starts[1:], strict=True))


def test_an_update_launched_behind_another_starts_when_that_has_landed(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.add_update(1, 0, START + 100, START + 200, START + 9_000, staleness=0)
    timeline.add_update(0, 0, START, START + 100, START + 5_000, staleness=0)
    timeline.add_update(0, 3, START, START + 100, START + 9_000, staleness=0)  # beside them
    events = written(timeline, tmp_path)
    assert slices(events) == {
        "lane 0": [(0.1, 4.9, "update"), (5, 4, "update")],
        "lane 3": [(0.1, 8.9, "update")],
    }
    waited = {
        (event["args"]["worker"], event["tid"]): event["args"]["waited_us"]
        for event in of_phase(events, "X")
    }
    assert sorted(waited.values()) == [0.1, 0.1, 4.9]


def test_waits_at_once_go_onto_tracks_beside_each_other(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.add_wait(4, "second", START + 1_000, START + 3_000)
    timeline.add_wait(4, "first", START, START + 2_000)
    timeline.add_wait(4, "third", START + 2_000, START + 4_000)
    timeline.add_wait(5, "other", START, START + 4_000)
    events = written(timeline, tmp_path)
    assert list(tracks(events).values()) == ["worker 4", "worker 4 (2)", "worker 5"]
    assert slices(events) == {
        "worker 4": [(0, 2, "first"), (2, 2, "third")],
        "worker 4 (2)": [(1, 2, "second")],
        "worker 5": [(0, 4, "other")],
    }


def test_an_empty_timeline_is_a_valid_file(tmp_path: Path) -> None:
    events = written(Timeline(), tmp_path)
    assert [event["name"] for event in events] == ["process_name"]


def test_names_are_escaped(tmp_path: Path) -> None:
    reason = 'a "quoted" \\ line\nand {a} ünïcode 🐗 one'
    timeline = Timeline()
    timeline.add_wait(0, reason, START, START + 1)
    timeline.add_update(0, 0, START, START, START, staleness=0, outcome=reason)
    assert [event["name"] for event in of_phase(written(timeline, tmp_path), "X")] == [reason] * 2


def test_a_timeline_can_go_on_after_it_was_written(tmp_path: Path) -> None:
    timeline = Timeline()
    for n in range(3):
        timeline.add_update(0, 0, START + n, START + n, START + n + 1, staleness=0)
        timeline.add_wait(0, "landing", START + n, START + n + 1)
        assert slices(written(timeline, tmp_path)) == {
            "lane 0": [(at / 1000, 0.001, "update") for at in range(n + 1)],
            "worker 0": [(at / 1000, 0.001, "landing") for at in range(n + 1)],
        }


@pytest.mark.parametrize("times", [(2, 1, 3), (1, 3, 2), (3, 2, 1)])
def test_update_that_goes_back_in_time_is_refused(
    times: tuple[int, int, int], tmp_path: Path
) -> None:
    timeline = Timeline()
    with pytest.raises(ValueError, match=r"must be in this order, got \d, \d, \d"):
        timeline.add_update(0, 0, *times, staleness=0)
    with pytest.raises(ValueError, match="end_ns must be >= start_ns, 2, got 1"):
        timeline.add_wait(0, "lock", 2, 1)
    assert not of_phase(written(timeline, tmp_path), "X")


def test_what_is_no_integer_is_refused_whole(tmp_path: Path) -> None:
    timeline = Timeline()
    with pytest.raises(TypeError):
        timeline.add_update(0, 0, START, START, START, staleness=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="must be strings, got None"):
        timeline.add_wait(0, None, START, START)  # type: ignore[arg-type]
    timeline.add_update(1, 2, START, START, START + 1, staleness=0)
    assert slices(written(timeline, tmp_path)) == {"lane 2": [(0, 0.001, "update")]}


@pytest.mark.slow
def test_a_hundred_thousand_updates_are_all_written(tmp_path: Path) -> None:
    timeline = Timeline()
    for n in range(100_000):
        at = START + 1_000 * n
        timeline.add_update(n % 16, n % 16, at, at + 300, at + 14_000, staleness=15)
    events = written(timeline, tmp_path)
    updates = of_phase(events, "X")
    assert len(updates) == len(of_phase(events, "b")) == 100_000
    assert max(event["ts"] + event["dur"] for event in updates) == pytest.approx(99_999 + 14)
