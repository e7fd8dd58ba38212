"""What is heard of a run over processes while it goes on, and how it is steered and stopped."""

from __future__ import annotations

import asyncio
import io
import json
import os
import random
import select
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hogstream.scheduler import (
    ProcessScheduler,
    SharedParameters,
    StreamScheduler,
    Timeline,
    WorkerError,
)
from process_testing import LIMIT_SECONDS, ensure_server_of_forks
from process_workers import (
    Explosive,
    Unpicklable,
    cancel_itself,
    die_once,
    fail_after_submitting,
    follow,
    report_all,
    send,
    send_random_numbers,
    step_until,
    wait_for_leave,
)
from scheduler_testing import COUNTING, small

Heard = list[tuple[int, Any]]


def of(heard: Heard, worker: int) -> list[Any]:
    return [value for index, value in heard if index == worker]


async def test_a_run_is_heard_and_steered(tmp_path: Path) -> None:
    """All with the same two processes, of two workers each, as it takes seconds to start them."""
    shared = small()
    timeline = Timeline()
    settings: dict[str, Any] = {"workers": 2, "policy": "locked", "on_error": "stop", **COUNTING}
    async with ProcessScheduler(shared, processes=2, timeline=timeline, **settings) as scheduler:
        await check_reports_come_in_order(scheduler)
        check_timeline(timeline, tmp_path / "trace.json")
        await check_results_that_cannot_be_sent(scheduler)
        await check_errors_of_callbacks(scheduler)
        await check_stop(scheduler)
        await check_schedules(scheduler, shared)
        await check_hyperparameters(scheduler, shared)


async def check_reports_come_in_order(scheduler: ProcessScheduler) -> None:
    """In order for each worker, and all of them; workers are numbered through."""
    losses: Heard = []
    results: Heard = []
    report = await scheduler.run(
        report_all,
        updates=400,
        on_loss=lambda worker, loss: losses.append((worker, loss)),
        on_result=lambda worker, value: results.append((worker, value)),
    )
    for worker, updates in enumerate(report.updates_by_worker):
        assert of(losses, worker) == list(range(updates))
        assert of(results, worker) == [[worker // 2, worker % 2, each] for each in range(updates)]
    assert len(losses) == report.updates == 400


def check_timeline(timeline: Timeline, path: Path) -> None:
    """Updates of all processes, by one clock."""
    timeline.write(path)
    events = json.loads(path.read_text())["traceEvents"]
    updates = [event for event in events if event.get("cat") == "update"]
    assert len(updates) == 400
    assert {event["args"]["worker"] for event in updates} == {0, 1, 2, 3}
    tracks = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert {f"{kind} {each}" for kind in ("lane", "worker") for each in range(4)} <= tracks
    by_start = sorted(updates, key=lambda event: event["ts"])
    lanes = [event["tid"] for event in by_start]
    assert lanes != sorted(lanes)  # they ran beside each other
    for lane in set(lanes):
        ends = 0.0
        for event in by_start:
            if event["tid"] == lane:
                assert event["ts"] >= ends - 1e-6
                ends = event["ts"] + event["dur"]


async def check_results_that_cannot_be_sent(scheduler: ProcessScheduler) -> None:
    """One that cannot be pickled fails its worker; nobody minds who wants no results."""
    heard: Heard = []
    with pytest.raises(WorkerError, match="TypeError: value must be something that can be pickled"):
        await scheduler.run(
            partial(send, Unpicklable), updates=40, on_result=lambda *each: heard.append(each)
        )
    assert not heard
    assert (await scheduler.run(partial(send, Unpicklable), updates=40)).updates == 40


async def check_errors_of_callbacks(scheduler: ProcessScheduler) -> None:
    """They end the run, what a worker has sent too if it cannot be unpickled here."""
    calls = []

    def fail(worker: int, value: Any) -> None:
        calls.append(value)
        raise LookupError("nobody listens")

    for make_worker, callbacks, text in (
        (report_all, {"on_loss": fail}, "nobody listens"),
        (report_all, {"on_result": fail}, "nobody listens"),
        (partial(send, Explosive), {"on_result": fail}, "no way to receive it"),
    ):
        with pytest.raises(LookupError, match=text):
            await scheduler.run(make_worker, seconds=600, **callbacks)  # type: ignore[arg-type]
        assert scheduler.report is not None
        assert scheduler.report.partial
        assert not scheduler.report.failures
    assert len(calls) == 2


async def check_stop(scheduler: ProcessScheduler) -> None:
    """From a callback, before processes are ready, and with nothing to stop."""
    losses: list[float] = []

    def stop(worker: int, loss: float) -> None:
        losses.append(loss)
        scheduler.stop()

    scheduler.stop()
    report = await scheduler.run(report_all, seconds=600, on_loss=stop)
    assert report.partial
    assert not report.failures
    assert report.updates == len(losses) > 0
    run = asyncio.ensure_future(scheduler.run(report_all, updates=10))
    await asyncio.sleep(0)
    scheduler.stop()
    report = await run
    assert report.updates == 0
    assert report.partial


async def check_schedules(scheduler: ProcessScheduler, shared: SharedParameters) -> None:
    """They go by the version of all, from whatever process; one that cannot be sent is refused."""
    with pytest.raises(TypeError, match="lr_schedule must be a function of a module"):
        await scheduler.run(report_all, updates=1, lr_schedule=lambda progress: 1.0)
    with pytest.raises(TypeError, match="lr_schedule must be a plain function, got 3"):
        await scheduler.run(report_all, updates=1, lr_schedule=3)  # type: ignore[arg-type]
    shared.flat.zero_()
    version = shared.version
    await scheduler.run(report_all, updates=40, lr_schedule=partial(step_until, version + 10))
    assert -13 <= shared.flat[0] <= -10  # as each of four may have asked before the tenth landed


async def check_hyperparameters(scheduler: ProcessScheduler, shared: SharedParameters) -> None:
    """They hold from the message on, and in the next run; they are checked before."""
    before = scheduler.hyperparameters
    with pytest.raises(ValueError, match="momentum must be 0 in a scheduler that was opened"):
        scheduler.hyperparameters = replace(before, momentum=0.5)
    with pytest.raises(TypeError, match="hyperparameters must be Hyperparameters"):
        scheduler.hyperparameters = 0.1  # type: ignore[assignment]
    assert scheduler.hyperparameters is before
    shared.flat.zero_()
    heard: list[float] = []

    def steer(worker: int, loss: float) -> None:
        heard.append(loss)
        if len(heard) == 1:
            scheduler.hyperparameters = replace(before, lr=0.0)
        elif shared.version > version + 1000 and not frozen:
            frozen.append(shared.flat[0].item())
        elif frozen and len(heard) > 3000:
            scheduler.stop()

    version = shared.version
    frozen: list[float] = []
    await scheduler.run(report_all, seconds=600, on_loss=steer)
    assert shared.flat[0].item() == frozen[0] < 0
    await scheduler.run(report_all, updates=8)
    assert shared.flat[0].item() == frozen[0]
    scheduler.hyperparameters = before
    await scheduler.run(report_all, updates=8)
    assert shared.flat[0].item() == frozen[0] - 8


async def test_a_new_process_has_what_is_new(tmp_path: Path) -> None:
    """Random numbers of its own, by the parent's seed, and the hyperparameters of now."""
    torch.manual_seed(7)
    base = int(torch.empty((), dtype=torch.int64).random_())
    expected = [first_numbers(base + each) for each in range(3)]
    torch.manual_seed(7)
    shared = small()
    heard: Heard = []
    callbacks: dict[str, Any] = {"on_result": lambda *each: heard.append(each)}
    settings: dict[str, Any] = {"on_error": "restart", **COUNTING}
    with torch.device("meta"):  # where nothing can be drawn
        async with ProcessScheduler(shared, processes=2, **settings) as scheduler:
            await scheduler.run(send_random_numbers, updates=2, **callbacks)
            assert sorted(heard) == [(0, expected[0]), (1, expected[1])]
            scheduler.hyperparameters = replace(scheduler.hyperparameters, lr=0.0)
            shared.flat.zero_()
            report = await scheduler.run(partial(die_once, tmp_path / "marker"), updates=20)
            assert len(report.dead) == 1
            assert not shared.flat.any()
            await scheduler.run(send_random_numbers, updates=2, **callbacks)
    assert of(heard, 1) == [expected[1], expected[2]]


async def test_a_worker_alone_computes_and_updates_on_one_thread() -> None:
    """With the bits of one on threads; what the parent says is heard though it never waits."""
    settings: dict[str, Any] = {"backend": "numba", "on_error": "restart", "momentum": 0.5}
    settings |= {"policy": "locked", "read": "snapshot", "lr": 0.01}
    threads: Heard = []
    shared, expected = small(), small()
    async with StreamScheduler(expected, workers=1, **settings) as one:
        await one.run(follow(expected, 0), updates=100)
    async with ProcessScheduler(shared, processes=1, **settings) as scheduler:
        await scheduler.run(follow, updates=100, on_result=lambda *each: threads.append(each))
        assert torch.equal(shared.flat, expected.flat)
        names = {name for _, each in threads for name in each}
        assert not any(name.startswith(("hogstream-lane", "hogstream-worker")) for name in names)
        report = await scheduler.run(
            fail_after_submitting, updates=200_000, on_loss=lambda *_: scheduler.stop()
        )
        assert report.partial
        report = await scheduler.run(cancel_itself, updates=10)
    assert (report.updates, report.restarts) == (10, [1])
    assert "cancelled, but not by the scheduler" in str(report.failures[0])


@pytest.mark.parametrize("end", ["stop", "cancel"])
async def test_messages_pass_between_two_long_iterations(end: str, tmp_path: Path) -> None:
    """What an iteration has reported is heard while the next one blocks, which a message ends."""
    ensure_server_of_forks()
    settings: dict[str, Any] = {"start_method": "forkserver", **COUNTING}
    heard: asyncio.Queue[tuple[str, float]] = asyncio.Queue()
    with named_pipe(tmp_path / "begun") as begun:
        async with ProcessScheduler(small(), processes=1, **settings) as scheduler:
            with named_pipe(tmp_path / "leave") as leave:  # who waits for it when it closes fails
                run = asyncio.ensure_future(
                    scheduler.run(
                        partial(wait_for_leave, tmp_path),
                        updates=10,
                        on_loss=lambda _, loss: heard.put_nowait(("loss", loss)),
                        on_result=lambda _, value: heard.put_nowait(("result", value)),
                    )
                )
                for each in range(3):
                    leave.write(b"x")
                    for kind in ("result", "loss"):
                        assert await asyncio.wait_for(heard.get(), LIMIT_SECONDS) == (kind, each)
                for _ in range(4):
                    assert select.select([begun], [], [], LIMIT_SECONDS)[0]
                    begun.read(1)
                if end == "stop":
                    scheduler.stop()
                else:
                    run.cancel()
                    while not scheduler._stopping:  # noqa: ASYNC110 (then it has told the process)
                        await asyncio.sleep(0)
                leave.write(b"x")
                await asyncio.wait_for(asyncio.wait({run}), LIMIT_SECONDS)
    assert run.cancelled() == (end == "cancel")
    assert scheduler.report is not None
    assert (scheduler.report.updates, scheduler.report.dead) == (4, [])
    assert scheduler.report.partial
    assert not scheduler.report.failures


def named_pipe(path: Path) -> io.FileIO:
    """One that is open at both ends, so that nobody waits for another to open it."""
    os.mkfifo(path)
    return io.FileIO(path, "r+")


def first_numbers(seed: int) -> list[float]:
    """Those that a process of this seed draws first: of torch, of Python and of NumPy."""
    numpy = np.random.RandomState(seed % 2**32)
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((), generator=generator).item(), random.Random(seed).random(), numpy.rand()]
