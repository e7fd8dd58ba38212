"""A trace of a run, for ui.perfetto.dev: what each lane did and what workers waited for."""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hogstream.scheduler.files import replace_file

Rows = npt.NDArray[np.int64]

# A thread whose number is its process's would pass for the main thread, so tracks start above it.
_PROCESS = 1


class Timeline:
    """Takes down updates and waits, and writes them as JSON that Perfetto and Chrome open.

    There is a track for each lane, on which an update is a slice from its start to its landing,
    and one for each worker, on which its waits are slices; waits of one worker that overlap go
    onto further tracks of its own. The time that an update spent in the queue, from submission to
    start, is an asynchronous slice by the name of its worker.

    Times are of ``time.perf_counter_ns``. To be used from one thread. An update takes 56 bytes of
    memory and about 350 of the file; a wait 32 and 100.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets all that was taken down."""
        self._updates = array("q")  # worker, lane, submitted, started, landed, staleness, name
        self._waits = array("q")  # worker, name, start, end
        self._texts: dict[
            str, int
        ] = {}  # names of slices, to the numbers that stand for them above

    def add_update(
        self,
        worker: int,
        lane: int,
        submitted_ns: int,
        started_ns: int,
        landed_ns: int,
        staleness: int,
        outcome: str = "landed",
    ) -> None:
        """Takes down an update.

        Args:
            worker: Index of the worker that submitted it.
            lane: Index of its lane.
            submitted_ns: When it was submitted.
            started_ns: When its lane began with it. A lane is in order, so one that began while
                another was under way is shown to start when that landed.
            landed_ns: When it landed, or failed.
            staleness: Its staleness.
            outcome: What became of it; a slice is named by it unless it landed.

        Raises:
            TypeError: If something is no integer, or ``outcome`` no string.
            ValueError: If the times are not in this order.
        """
        if not submitted_ns <= started_ns <= landed_ns:
            raise ValueError(
                f"submitted_ns, started_ns and landed_ns must be in this order, "
                f"got {submitted_ns}, {started_ns}, {landed_ns}"
            )
        name = self._number("update" if outcome == "landed" else outcome)
        row = (worker, lane, submitted_ns, started_ns, landed_ns, staleness, name)
        self._updates.extend(array("q", row))  # whole rows only, whatever is in them

    def add_wait(self, worker: int, reason: str, start_ns: int, end_ns: int) -> None:
        """Takes down that a worker waited.

        Args:
            worker: Its index.
            reason: What for, such as ``"lock"``: the name of the slice.
            start_ns: When it began to wait.
            end_ns: When it went on.

        Raises:
            TypeError: If something is no integer, or ``reason`` no string.
            ValueError: If it ended before it began.
        """
        if end_ns < start_ns:
            raise ValueError(f"end_ns must be >= start_ns, {start_ns}, got {end_ns}")
        self._waits.extend(array("q", (worker, self._number(reason), start_ns, end_ns)))

    def add_workers(self, other: Timeline, first: int) -> None:
        """Takes down all that another has, of the same clock.

        Args:
            other: Its workers, and their lanes, are numbered from 0.
            first: The number that its first worker, and lane, has here.
        """
        numbers = np.array([self._number(text) for text in other._texts], dtype=np.int64)
        updates, waits = other._rows()
        updates[:, :2] += first
        waits[:, 0] += first
        updates[:, 6], waits[:, 1] = numbers[updates[:, 6]], numbers[waits[:, 1]]
        self._updates.frombytes(updates.tobytes())
        self._waits.frombytes(waits.tobytes())

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the trace, in the place of an old file once it is whole.

        Args:
            path: The file: JSON in Chrome's trace event format, times in microseconds from the
                first submission or wait, whose own time is ``otherData.perf_counter_ns``.

        Raises:
            OSError: If it cannot be written; an old file stays as it was.
        """
        updates, waits = self._rows()
        starts = np.concatenate([updates[:, 2], waits[:, 2]])
        origin = int(starts.min()) if len(starts) else 0
        updates[:, 2:5] -= origin
        waits[:, 2:4] -= origin
        head = (
            f'{{"displayTimeUnit":"ns","otherData":{{"perf_counter_ns":{origin}}},"traceEvents":['
        )
        with replace_file(path) as file:
            file.write(head.encode("ascii"))
            separator = "\n"
            for event in self._events(updates, waits):
                file.write((separator + event).encode("ascii"))
                separator = ",\n"
            file.write(b"\n]}\n")

    def _rows(self) -> tuple[Rows, Rows]:
        """Copies of the updates and the waits, one a row."""
        updates = np.array(self._updates, dtype=np.int64).reshape(-1, 7)
        return updates, np.array(self._waits, dtype=np.int64).reshape(-1, 4)

    def _number(self, text: str) -> int:
        if not isinstance(text, str):
            raise TypeError(f"outcome and reason must be strings, got {text!r}")
        return self._texts.setdefault(text, len(self._texts))

    def _events(self, updates: Rows, waits: Rows) -> Iterator[str]:
        """Every event as JSON: the names of the tracks, then waits, then updates."""
        updates, waits = _in_lane_order(updates), waits[np.argsort(waits[:, 2], kind="stable")]
        places, names = _places(waits), [json.dumps(text) for text in self._texts]
        tracks = _tracks(updates, waits, places)
        yield _metadata("process_name", None, {"name": "hogstream"})
        for (kind, index, place), track in tracks.items():
            title = f"{kind} {index}" + (f" ({place + 1})" if place else "")
            yield _metadata("thread_name", track, {"name": title})
            yield _metadata("thread_sort_index", track, {"sort_index": track})
        for place, (worker, name, start, end) in zip(places, _lists(waits), strict=True):
            track = tracks["worker", worker, place]
            yield _slice(names[name], "wait", track, start, end, "{}")
        for number, row in enumerate(_lists(updates)):
            worker, lane, submitted, started, landed, staleness, name = row
            if submitted < started:
                track = tracks["worker", worker, 0]
                yield _queued(number, worker, track, "b", submitted)
                yield _queued(number, worker, track, "e", started)
            args = (
                f'{{"worker":{worker},"staleness":{staleness},'
                f'"submitted_us":{_us(submitted)},"waited_us":{_us(started - submitted)}}}'
            )
            yield _slice(names[name], "update", tracks["lane", lane, 0], started, landed, args)


def _in_lane_order(updates: Rows) -> Rows:
    """By lane, then by landing, each starting no sooner than the one before it on its lane ends."""
    updates = updates[np.lexsort((updates[:, 4], updates[:, 1]))]
    lane, started, landed = updates[:, 1], updates[:, 3], updates[:, 4]
    after = np.flatnonzero(lane[1:] == lane[:-1])
    started[after + 1] = np.maximum(started[after + 1], landed[after])
    return updates


def _places(waits: Rows) -> list[int]:
    """For each wait, the first of its worker's tracks that is free by then: 0 unless they overlap.

    Slices of one track may not overlap; viewers drop or distort those that do.
    """
    places = []
    free_from: dict[int, list[int]] = {}
    for worker, _, start, end in _lists(waits):
        ends = free_from.setdefault(worker, [])
        place = next((i for i, last in enumerate(ends) if last <= start), len(ends))
        ends[place : place + 1] = [end]
        places.append(place)
    return places


def _tracks(updates: Rows, waits: Rows, places: list[int]) -> dict[tuple[str, int, int], int]:
    """Numbers of all tracks, in the order to be shown, by lane or worker, its index, and place."""
    lanes = {("lane", lane, 0) for lane in updates[:, 1].tolist()}
    workers = {("worker", worker, 0) for worker in updates[:, 0].tolist()}
    workers |= {("worker", *each) for each in zip(waits[:, 0].tolist(), places, strict=True)}
    return {track: _PROCESS + 1 + n for n, track in enumerate([*sorted(lanes), *sorted(workers)])}


def _lists(rows: Rows) -> Iterator[list[int]]:
    """Rows as lists, one at a time: all at once would need ten times their memory."""
    return map(np.ndarray.tolist, rows)


def _us(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03d}"


def _metadata(name: str, track: int | None, args: dict[str, Any]) -> str:
    thread = {} if track is None else {"tid": track}
    return json.dumps({"ph": "M", "name": name, "pid": _PROCESS, **thread, "args": args})


def _slice(name: str, category: str, track: int, start: int, end: int, args: str) -> str:
    return (
        f'{{"ph":"X","name":{name},"cat":"{category}","pid":{_PROCESS},"tid":{track},'
        f'"ts":{_us(start)},"dur":{_us(end - start)},"args":{args}}}'
    )


def _queued(number: int, worker: int, track: int, phase: str, at: int) -> str:
    return (
        f'{{"ph":"{phase}","name":"queue of worker {worker}","cat":"queue","id":{number},'
        f'"pid":{_PROCESS},"tid":{track},"ts":{_us(at)}}}'
    )
