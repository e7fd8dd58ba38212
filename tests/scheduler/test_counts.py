"""What the scheduler costs, in numbers that no clock blurs: calls, wake-ups, system calls."""

from __future__ import annotations

import asyncio
import gc
import shutil
import subprocess
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from counting import counted_calls, hold
from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerContext
from hogstream.scheduler.lanes import native_loop, rings
from hogstream.scheduler.lanes.base import Wakeup
from hogstream.scheduler.tracing.timeline import Timeline
from hogstream.scheduler.update import Work
from lanes_by_hand import end_threads, lanes_by_hand, updates_of, written
from process_testing import LIMIT_SECONDS
from scheduler_testing import python_lanes, submit_ones

UPDATES = 256
ELEMENTS = 64


async def calls_for_each_update(
    *, fresh: bool = False, rows: bool = False, elements: int = ELEMENTS, **settings: Any
) -> Counter[str]:
    """Calls of our Python functions for one more update of one worker, to the nearest number."""
    shared = SharedParameters({"p": torch.zeros(elements)})
    kept = [torch.ones(elements) for _ in range(settings.get("depth", 1))]
    some = torch.arange(8)

    async def worker(context: WorkerContext) -> None:
        grad = kept[context.iteration % len(kept)]
        if rows:
            await context.submit_rows("p", some, grad[:8, None])
        else:
            await context.submit(grad.clone() if fresh else grad)

    counts: list[Counter[str]] = []
    async with StreamScheduler(shared, workers=1, **settings) as scheduler:
        await scheduler.run(worker, updates=UPDATES)
        for updates in (UPDATES, 2 * UPDATES):
            with counted_calls() as counted:
                await scheduler.run(worker, updates=updates)
            counts.append(counted)
    few, many = counts
    return Counter({name: n for name in many if (n := round((many[name] - few[name]) / UPDATES))})


# Settings, and calls for each update that a worker awaits: to take one of the run's updates and
# begin (4), submit and check (2), enqueue and launch (4), wait for the landing (3), deliver (9),
# go on (4), and end (4). An iteration that waits for a gate, or for a snapshot, does so besides.
CALLS: dict[str, tuple[dict[str, Any], int]] = {
    "compiled lanes": ({"backend": "numba"}, 30),
    "lanes in Python": ({"backend": "numpy"}, 30),
    "locked": ({"policy": "locked"}, 30),
    "awaited": ({"policy": "awaited"}, 40),
    "ordered": ({"policy": "ordered"}, 32),
    "bounded": ({"policy": "bounded:2"}, 47),
    "snapshot": ({"read": "snapshot"}, 54),
    # Left to compiled code:
    "watched": ({"telemetry": True, "staleness_aware": True, "on_nonfinite": "skip"}, 30),
    "deadline": ({"deadline": 60.0}, 31),
    "timeline": ({"timeline": Timeline()}, 35),
    "fresh gradients": ({"fresh": True}, 42),  # each of which is checked, and laid out for lanes
    "deep": ({"depth": 64}, 13),  # some tens are waited for and delivered together
    "rows": ({"rows": True}, 70),  # checked, sorted and laid out each time
    "rows, deep": ({"rows": True, "depth": 64}, 52),
}


@pytest.mark.parametrize("case", CALLS)
async def test_an_update_takes_few_calls(case: str) -> None:
    settings, most = CALLS[case]
    calls = await calls_for_each_update(**settings)
    assert calls.keys() & {"scheduler.dispatch.enqueue", "scheduler.dispatch.enqueue_several"}
    hold(f"{calls}\ncalls for each update, {case}", calls.total(), most)


async def test_a_batch_is_launched_at_once() -> None:
    shared = SharedParameters({"p": torch.zeros(ELEMENTS)})
    scheduler = StreamScheduler(shared, workers=1, depth=16, batch=16, backend="numba")
    async with scheduler:
        with counted_calls() as counts:
            await scheduler.run(submit_ones(shared), updates=UPDATES)
    assert counts["scheduler.lanes.compiled.enqueue"] == UPDATES
    for once in ("flush", "publish"):
        assert counts[f"scheduler.lanes.native.{once}"] == UPDATES // 16


@pytest.mark.parametrize(("depth", "landings"), [(1, 1), (2, 1), (8, 4), (9, 5)])
async def test_a_worker_that_fills_its_lane_goes_on_when_half_is_free(
    depth: int, landings: int
) -> None:
    """And is not woken for each landing: updates land one by one here, when the test says so."""
    may_land = threading.Semaphore(0)
    shared = SharedParameters({"p": torch.zeros(ELEMENTS)})
    ones = torch.ones(ELEMENTS)
    submitted = 0

    def kernel(update: Callable[..., Any], *operands: Any) -> None:
        assert may_land.acquire(timeout=LIMIT_SECONDS)
        update(*operands)

    async def worker(context: WorkerContext) -> None:
        nonlocal submitted
        submitted += 1
        await context.submit(ones)

    async with python_lanes(shared, kernel, workers=1, depth=depth) as scheduler:
        lanes: Any = scheduler._dispatch.lanes
        (lane,) = lanes.lanes
        run = asyncio.create_task(scheduler.run(worker, updates=depth + 3 * landings))
        seen = []
        for landed in range(1, 3 * landings + 1):
            may_land.release()
            while lane._queue.delivered < landed:  # noqa: ASYNC110 (turns are what is counted)
                await asyncio.sleep(0)
            for _ in range(10):  # turns, in which the worker may go on
                await asyncio.sleep(0)
            seen.append(submitted)
        may_land.release(depth)
        await run
    assert seen == [depth + landed // landings * landings for landed in range(1, 3 * landings + 1)]


async def test_a_lane_that_runs_through_wakes_the_loop_once() -> None:
    async with lanes_by_hand(depth=8, low_water=4) as lanes:
        (lane,) = lanes.lanes
        for _ in range(3):
            for update in updates_of(lanes, 8):
                lane.launch(update)
            lanes.threads[0].run()
            assert written(lanes._event.reader) == 1
            lanes._deliver_landed()


async def test_a_delivery_that_fails_keeps_none_from_another_lane() -> None:
    delivered: list[int] = []

    def deliver(lane: int, landed: Sequence[Work]) -> None:
        delivered.append(lane)
        if lane == 0:
            raise SystemExit  # as ``on_loss`` may

    async with lanes_by_hand(2, depth=1) as lanes:
        for lane, update in zip(lanes.lanes, updates_of(lanes, 2), strict=True):
            lane._deliver = deliver
            lane.launch(update)
        for thread in lanes.threads:
            thread.run()
        with pytest.raises(SystemExit):
            lanes._deliver_landed()
        await asyncio.sleep(0)
    assert delivered == [0, 1]


# How many of 8 landings wake a loop that listens again after each: when half are left or fewer;
# all, where updates wait for their batch.
@pytest.mark.parametrize(
    ("settings", "wakes"),
    [({"depth": 8}, 5), ({"depth": 1}, 1), ({"depth": 8, "batch": 4}, 8)],
    ids=str,
)
async def test_a_lane_wakes_the_loop_when_few_enough_are_left(
    settings: dict[str, Any], wakes: int
) -> None:
    shared = SharedParameters({"p": torch.zeros(ELEMENTS)})
    async with StreamScheduler(shared, workers=1, backend="numba", **settings) as scheduler:
        lanes: Any = scheduler._dispatch.lanes
        end_threads(lanes)
        (lane,) = lanes.lanes
        native_loop.launch(lane.address, 8)
        seen = []
        for done in range(1, 9):
            native_loop.listen(lanes.settings.address)
            lane.words[rings.LANDED] = done
            rings.wake_loop(lane.address, lanes.settings.address)
            seen.append(written(lanes._event.reader))
        assert seen == [max(0, wakes + done - 8) for done in range(1, 9)]


async def test_a_lane_lives_as_long_as_its_thread_though_all_let_go_of_it() -> None:
    async with lanes_by_hand(depth=8) as lanes:
        lane = weakref.ref(lanes.lanes.pop())
        gc.collect()
        assert lane() is not None
        lanes.threads[0].run()


@pytest.mark.parametrize("asleep", [False, True])
async def test_a_lane_is_woken_only_if_it_sleeps(asleep: bool) -> None:
    async with lanes_by_hand(depth=8) as lanes:
        (lane,) = lanes.lanes
        (thread,) = lanes.threads
        thread.words[rings.ASLEEP] = asleep
        for update in updates_of(lanes, 8):
            lane.launch(update)
        assert written(thread.words[rings.THREAD_EVENT]) == asleep


@pytest.mark.parametrize("asleep", [False, True])
async def test_a_landing_wakes_the_next_lane_in_order_only_if_it_sleeps(asleep: bool) -> None:
    async with lanes_by_hand(3, depth=8, ordered=True) as lanes:
        first, second, third = lanes.lanes
        for lane, update in zip([first, first, second, third], updates_of(lanes, 4), strict=True):
            lane.launch(update)
        for thread in lanes.threads:
            thread.words[rings.ASLEEP] = asleep
        at_work = lanes.threads[0]
        at_work.words[rings.ASLEEP] = 0
        at_work.run()
        sent = [written(thread.words[rings.THREAD_EVENT]) for thread in lanes.threads]
        assert sent == [0, asleep, 0]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_updates_on_a_lane_that_is_busy_take_no_system_call(tmp_path: Path) -> None:
    """Launched, applied and timed, all but the one that wakes the event loop."""
    script = Path(__file__).parents[1] / "support" / "lanes_by_hand.py"
    log = tmp_path / "log"
    # What Python does with files and memory, and a clock that some machines have to ask.
    left_out = "%file,%memory,newfstatat,fstat,lseek,close,ioctl,getdents64,fcntl,clock_gettime"
    options = ["-f", "--seccomp-bpf", "-e", f"trace=!{left_out}", "-o", str(log)]
    if (probe := _run("strace", *options, "true")).returncode:
        pytest.skip(f"strace may not trace here: {probe.stderr}")
    traced = _run("strace", *options, sys.executable, str(script), "1", "16", "1024")
    assert traced.returncode == 0, traced.stderr
    lines = [line.split(None, 1) for line in log.read_text("utf-8").splitlines()]
    marks = [index for index, (_, call) in enumerate(lines) if call.startswith("getppid")]
    thread = lines[marks[0]][0]
    for start, end in zip(marks[2::2], marks[3::2], strict=True):  # after a first, to warm up
        calls = [call for each, call in lines[start + 1 : end] if each == thread]
        hold(f"system calls, {calls[:20]}", len(calls), 1)


async def test_many_requests_cost_one_call_on_the_loop() -> None:
    calls: list[int] = []
    wakeup = Wakeup(lambda: calls.append(1))
    for turn in range(1, 4):
        for _ in range(1000):
            wakeup.request()
        for _ in range(3):
            await asyncio.sleep(0)
        assert len(calls) == turn


@pytest.mark.parametrize("depth", [1, 64])
async def test_updates_leave_nothing_behind(depth: int, backend: str) -> None:
    shared = SharedParameters({"p": torch.zeros(ELEMENTS)})
    worker = submit_ones(shared)
    async with StreamScheduler(shared, workers=2, depth=depth, backend=backend) as scheduler:
        await scheduler.run(worker, updates=1000)  # until lists of free objects are full
        gc.collect()
        gc.disable()
        try:
            before = sys.getallocatedblocks()
            await scheduler.run(worker, updates=1000)
            cycles = gc.collect()
            grown = sys.getallocatedblocks() - before
        finally:
            gc.enable()
    hold("blocks of memory that 1000 updates leave", grown, 500)
    hold("objects in cycles that 1000 updates leave", cycles, 200)
