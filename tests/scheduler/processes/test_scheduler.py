"""Schedulers over real processes.

Each spawned one imports torch, so tests share few of them; where it makes no difference how they
are started, they are forks of a server that has imported it.
"""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import platform
import random
import select
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

from hogstream.scheduler import (
    ProcessDied,
    ProcessScheduler,
    SettingError,
    SharedParameters,
    StreamScheduler,
    WorkerError,
)
from hogstream.scheduler.context import Worker
from process_testing import LIMIT_SECONDS, ensure_server_of_forks, shared_memory, until
from process_workers import (
    count_page_faults,
    die_once,
    fail_after_submitting,
    fail_at_third,
    fail_in_making,
    fail_in_working,
    forget_to_return,
    misbehave,
    note_what_is_kept,
    submit_ones,
    submit_rows_of_ones,
    until_landed,
)
from scheduler_testing import COUNTING

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).parents[2] / "support" / "process_script.py"
FORKED: dict[str, Any] = {"start_method": "forkserver"}


@pytest.fixture(autouse=True)
def no_main_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A spawned process imports that of its parent, and pytest's may run all tests again."""
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """No process, file descriptor or segment of shared memory; threads are looked for elsewhere."""
    resource_tracker.ensure_running()  # Python's own, one for all, until Python ends
    ensure_server_of_forks()
    gc.collect()
    segments, before = shared_memory(), len(os.listdir("/proc/self/fd"))
    yield
    assert multiprocessing.active_children() == []
    gc.collect()
    assert shared_memory() <= segments
    assert len(os.listdir("/proc/self/fd")) == before


def counters(elements: int = 1 << 12) -> SharedParameters:
    return SharedParameters({"counters": torch.zeros(elements)})


async def test_processes_update_rows_and_count_stale_ones() -> None:
    """Of what all processes have changed; workers of a process wait for no more than a lock."""
    shared = SharedParameters({"first": torch.zeros(5), "table": torch.zeros(5, 200)})
    async with ProcessScheduler(
        shared, processes=2, policy="locked", telemetry=True, **FORKED, **COUNTING
    ) as scheduler:
        report = await scheduler.run(submit_rows_of_ones, updates=200)
        assert shared.row_versions is not None
        assert shared.row_versions[:5].eq(0).all()
        of_table = shared.row_versions[5:].tolist()
    assert (report.updates, shared.version) == (200, 200)
    expected = torch.tensor([-200.0, 0, -200, -100, -100])
    assert torch.equal(shared.views["table"], expected[:, None].expand(5, 200))
    assert report.rows == 600
    # Each update that was stale found its two common rows so, and nobody its own.
    assert report.stale_rows == 2 * sum(report.staleness[age] for age in report.staleness if age)
    assert of_table[0] == of_table[2] == 200 == max(of_table[3:])
    assert of_table[1] == 0 < min(of_table[3:])
    assert report.lost_block_updates == 0


@pytest.mark.parametrize(("policy", "method"), [("locked", "spawn"), ("awaited", "forkserver")])
async def test_processes_under_a_lock_lose_no_update(policy: str, method: str) -> None:
    """Several runs of the same processes: of a number, of a time, of failures, and cancelled."""
    shared = counters(1 << 16)
    async with ProcessScheduler(
        shared,
        processes=2,
        start_method=method,
        workers=2,
        policy=policy,
        depth=2,
        **COUNTING,
    ) as scheduler:
        report = await scheduler.run(submit_ones, updates=101)
        assert shared.flat.eq(-101).all()
        assert shared.versions.tolist() == [0, 50, 51]
        assert report.workers == len(report.updates_by_worker) == 4
        assert [sum(report.updates_by_worker[:2]), sum(report.updates_by_worker[2:])] == [50, 51]
        assert sum(report.staleness.values()) == len(report.latencies) == 101
        assert (report.policy, report.partial, report.failures) == (policy, False, {})

        report = await scheduler.run(submit_ones, updates=1)  # less than processes
        assert (report.updates, report.partial, shared.version) == (1, False, 102)

        report = await scheduler.run(submit_ones, seconds=0.1)
        assert sum(report.updates_by_worker[:2]) > 0
        assert sum(report.updates_by_worker[2:]) > 0
        assert 0.1 <= report.seconds < LIMIT_SECONDS
        assert shared.version == 102 + report.updates

        with pytest.raises(WorkerError, match="workers 2, 3 failed: LookupError: no data"):
            await scheduler.run(fail_in_making, updates=10_000)
        assert scheduler.report is not None
        assert scheduler.report.partial
        with pytest.raises(WorkerError, match="worker 3 failed: RuntimeError: OfTwoParts: no data"):
            await scheduler.run(fail_in_working, updates=1_000_000)
        assert 1 <= scheduler.report.updates < 1_000_000

        before = shared.version
        run = asyncio.create_task(scheduler.run(submit_ones, updates=1_000_000))
        await until_landed(shared, before + 10)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert scheduler.report.partial
        assert scheduler.report.dead == []
        assert scheduler.report.updates == shared.version - before
        with pytest.raises(TypeError, match="make_worker must be a function of a module"):
            await scheduler.run(lambda shared, process: submit_ones(shared, process), updates=1)

        run = asyncio.create_task(scheduler.run(submit_ones, updates=1_000_000))
        await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="closed while it ran"):
        await run
    assert shared.flat.eq(-shared.version).all()  # each update that was counted, and no other


async def test_lock_free_processes_race_and_are_counted() -> None:
    shared = counters(1 << 16)
    settings = {**COUNTING, **FORKED, "alpha": 0.5, "state": "per-worker"}
    async with ProcessScheduler(shared, processes=2, telemetry=True, **settings) as scheduler:
        first = await scheduler.run(submit_ones, updates=7)
        assert shared.worker_ms is not None
        # ms = 1 - 0.5**updates: each worker has its own
        assert shared.worker_ms[:, 0].tolist() == [1 - 0.5**3, 1 - 0.5**4]
        assert shared.worker_ms.eq(shared.worker_ms[:, :1]).all()
        report = await scheduler.run(submit_ones, seconds=0.5)
    assert shared.races is not None
    blocks = shared.races.blocks
    assert first.block_updates == 7 * blocks
    assert report.block_updates == report.updates * blocks
    assert report.lost_block_updates is not None
    assert report.overwritten_block_updates is not None
    assert 0 <= report.lost_block_updates <= report.overwritten_block_updates
    assert max(report.staleness) > 0  # by updates of the other process
    assert shared.ms.eq(0).all()
    async with StreamScheduler(shared, workers=1, **COUNTING) as alone:  # still of use here
        assert (await alone.run(submit_ones(shared, 0), updates=3)).updates == 3
    assert shared.version == 7 + report.updates + 3


@pytest.mark.parametrize("error", [LookupError("no data"), SystemExit(3)], ids=["error", "exit"])
def test_processes_give_back_what_is_shared_before_they_end(
    tmp_path: Path, error: BaseException
) -> None:
    """Else the memory of a GPU is never free again; also when an error has kept hold of it."""
    shared = counters()
    settings = {"workers": 2, "telemetry": True, "state": "per-worker", **COUNTING}

    async def run() -> None:
        async with ProcessScheduler(shared, processes=2, **settings) as scheduler:
            await scheduler.run(partial(note_what_is_kept, tmp_path, error), updates=1_000_000)

    with pytest.raises(WorkerError, match="3 failed"):
        asyncio.run(run())
    kept = {each.name: each.read_text() for each in tmp_path.iterdir()}
    assert kept == {"0": "", "1": ""}


async def test_others_go_on_when_processes_die_or_hang() -> None:
    """One is killed while it holds the lock that others need; another blocks its event loop."""
    shared = counters()
    fates = {1: "killed with the lock", 2: "blocked"}
    async with ProcessScheduler(
        shared, processes=3, policy="locked", on_error="continue", deadline=4.0, **COUNTING
    ) as scheduler:
        report = await scheduler.run(partial(misbehave, fates), updates=300)
        assert report.updates_by_worker == [100, 3, 3]
        assert report.partial
        died, hung = report.failures[1], report.failures[2]
        assert isinstance(died, ProcessDied)
        assert str(died) == f"process 1 (pid {died.pid}) was killed by SIGKILL"
        assert isinstance(hung, TimeoutError)
        assert "process 2 (pid" in str(hung)
        assert "showed no sign of life for deadline=4 s" in str(hung)
        assert len(report.dead) == 2
        assert report.dead[0] == died.pid
        assert shared.flat.eq(-106).all()


@pytest.mark.parametrize("on_error", ["continue", "restart"])
@pytest.mark.parametrize("over", ["threads", "processes"])
async def test_a_run_that_all_workers_have_left_is_an_error(over: str, on_error: str) -> None:
    """If it was to go on: not if it was stopped, nor if one of them has done its part."""
    shared = counters()
    settings: dict[str, Any] = {"policy": "locked", "on_error": on_error, **COUNTING}

    losses = Counter[int]()

    def prepared(make: Callable[[SharedParameters, int], Worker]) -> Any:
        return make(shared, 0) if over == "threads" else make

    def stop(worker: int, loss: float) -> None:
        losses[worker] += 1
        if min(losses[0], losses[1]) > 1:  # both were started again
            scheduler.stop()

    scheduler: StreamScheduler | ProcessScheduler = (
        StreamScheduler(shared, workers=2, **settings)
        if over == "threads"
        else ProcessScheduler(shared, processes=2, **FORKED, **settings)
    )
    async with scheduler:
        with pytest.raises(WorkerError, match="workers 0, 1 failed: LookupError: no more data"):
            await scheduler.run(prepared(partial(fail_at_third, {0, 1})), updates=20)
        assert scheduler.report is not None
        assert (scheduler.report.updates_by_worker, scheduler.report.partial) == ([2, 2], True)
        report = await scheduler.run(prepared(partial(fail_at_third, {1})), updates=20)
        assert set(report.failures) <= {1}  # over threads the other may have made all before
        assert report.partial == (over == "processes")  # where each has a share of its own
        if on_error == "restart":
            stopped = await scheduler.run(
                prepared(fail_after_submitting),
                updates=1_000_000,
                on_loss=stop,
            )
            assert sorted(stopped.failures) == [0, 1]
            assert stopped.partial


async def test_new_process_makes_the_rest_of_a_share(tmp_path: Path) -> None:
    shared = counters(1 << 20)
    async with ProcessScheduler(
        shared, processes=2, on_error="restart", **FORKED, **COUNTING
    ) as scheduler:
        report = await scheduler.run(partial(die_once, tmp_path / "died"), updates=40)
    assert shared.versions.tolist() == [0, 20, 20]
    assert report.updates_by_worker == [20, 20]
    assert report.restarts == [0, 1]
    assert isinstance(report.failures[1], ProcessDied)
    assert len(report.dead) == 1
    assert not report.partial
    # Races lose updates, and the one in which it died counts for none; but each is whole.
    assert shared.flat.eq(shared.flat.round()).all()
    assert -41 <= shared.flat.min() <= shared.flat.max() < 0


async def test_stopped_process_is_killed_and_ends_the_run() -> None:
    shared = counters()
    async with ProcessScheduler(
        shared, processes=2, policy="locked", deadline=4.0, **FORKED, **COUNTING
    ) as scheduler:
        with pytest.raises(WorkerError, match="worker 0 failed: TimeoutError: process 0"):
            await scheduler.run(partial(misbehave, {0: "stopped"}), updates=2_000_000)
        assert scheduler.report is not None
        assert scheduler.report.partial
        assert scheduler.report.updates_by_worker[0] == 3
        assert 0 < scheduler.report.updates_by_worker[1] < 1_000_000
    assert shared.flat.eq(-shared.version).all()


async def test_second_cancellation_does_not_wait_for_a_process_that_hangs() -> None:
    shared = counters()
    async with ProcessScheduler(shared, processes=1, backend="numpy") as scheduler:
        run = asyncio.create_task(
            scheduler.run(partial(misbehave, {0: "stopped"}), updates=1_000_000)
        )
        await until_landed(shared, 3)
        run.cancel()
        await asyncio.sleep(0.3)  # what comes sooner is the same cancellation
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asyncio.shield(run), LIMIT_SECONDS)
        assert scheduler.report is not None
        assert len(scheduler.report.dead) == 1
        report = await scheduler.run(submit_ones, updates=30)  # by a new one in its place
        assert (report.updates, report.dead, report.partial) == (30, [], False)


async def test_endless_cancellation_kills_no_process_that_answers() -> None:
    shared = counters()
    async with ProcessScheduler(shared, processes=2, backend="numpy", **FORKED) as scheduler:
        run = asyncio.create_task(scheduler.run(submit_ones, updates=100_000_000))
        await until_landed(shared, 3)
        while not run.done():  # as a scope of anyio does whose deadline has passed
            run.cancel()
            await asyncio.sleep(0)
        assert run.cancelled()
        assert scheduler.report is not None
        assert (scheduler.report.dead, scheduler.report.partial) == ([], True)
        assert scheduler.report.updates == shared.version
        report = await scheduler.run(submit_ones, updates=30)  # by the same processes
        assert (report.updates, report.dead, report.partial) == (30, [], False)


@pytest.mark.parametrize("after_turns", [0, 5])
async def test_endless_cancellation_while_processes_start_leaves_none(after_turns: int) -> None:
    """Nor what was made for them."""
    shared = counters()
    settings: dict[str, Any] = {"state": "per-worker", "buffers": "worker", "telemetry": True}
    entering = asyncio.ensure_future(ProcessScheduler(shared, processes=1, **settings).__aenter__())
    for _ in range(1 + after_turns):
        await asyncio.sleep(0)
    while not entering.done():
        entering.cancel()
        await asyncio.sleep(0)
    assert entering.cancelled()  # nothing_left_behind looks for the rest
    assert (shared.worker_state, shared.worker_buffers, shared.races) == (None, None, None)


@pytest.mark.parametrize("leave", [False, True])
def test_another_event_loop_is_refused(leave: bool) -> None:
    scheduler = ProcessScheduler(counters(), processes=1, backend="numpy", **FORKED)
    loop, other = asyncio.new_event_loop(), asyncio.new_event_loop()
    try:
        loop.run_until_complete(scheduler.__aenter__())
        use = (
            scheduler.__aexit__(None, None, None)
            if leave
            else scheduler.run(submit_ones, updates=1)
        )
        with pytest.raises(RuntimeError, match="in the event loop that it was opened in"):
            other.run_until_complete(use)
        loop.run_until_complete(scheduler.__aexit__(None, None, None))
    finally:
        loop.close()
        other.close()


@pytest.fixture
def restore_sigchld() -> Iterator[None]:
    before = signal.getsignal(signal.SIGCHLD)
    yield
    signal.signal(signal.SIGCHLD, before)


async def test_exit_code_that_something_else_takes_is_unknown(restore_sigchld: None) -> None:
    """A wait for any child takes one, and the kernel that of the other."""
    shared = counters()
    async with ProcessScheduler(shared, processes=2, on_error="continue", **COUNTING) as scheduler:
        run = asyncio.create_task(
            scheduler.run(partial(misbehave, {0: "stopped"}), updates=1_000_000)
        )
        await until_landed(shared, 10)
        (pid,) = (
            each.pid
            for each in multiprocessing.active_children()
            if each.name == "hogstream-process-0"
        )
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)  # noqa: ASYNC222 (ahead of the scheduler, which needs the loop)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert scheduler.report is not None
        died = scheduler.report.failures[0]
        assert isinstance(died, ProcessDied)
        assert (died.pid, died.exitcode) == (pid, None)
        assert "its exit code was taken by something else" in str(died)
        assert scheduler.report.dead == [pid]
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)


async def test_second_scheduler_of_processes_is_refused_and_the_first_goes_on() -> None:
    shared = counters()
    async with ProcessScheduler(shared, processes=1, policy="locked", **COUNTING) as scheduler:
        with pytest.raises(RuntimeError, match="must not move while a scheduler is open over it"):
            await ProcessScheduler(shared, processes=3).__aenter__()
        assert (await scheduler.run(submit_ones, updates=20)).updates == 20
        async with StreamScheduler(shared, workers=1, **COUNTING) as beside:
            assert (await beside.run(submit_ones(shared, 0), updates=5)).updates == 5
        assert shared.versions.tolist() == [5, 20]
    assert shared.users == 0
    shared.share_memory_(2)
    assert shared.versions.tolist() == [25, 0, 0]


UNGUARDED = """
import asyncio
import torch
from hogstream.scheduler import ProcessScheduler, SharedParameters

def make(shared, process):
    raise LookupError

async def main():
    async with ProcessScheduler(SharedParameters({"p": torch.zeros(8)}), processes=1) as scheduler:
        await scheduler.run(make, updates=1)
"""
RUN = "asyncio.run(main())\n"
GUARDED_RUN = 'if __name__ == "__main__":\n    asyncio.run(main())\n'
GUARDED_MAKE = """
if __name__ == "__main__":
    def make_here(shared, process):
        raise LookupError

    make = make_here
    asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("run", "option", "last_line"),
    [
        (RUN, "file", 'a script starts them under `if __name__ == "__main__":`'),
        (GUARDED_RUN, "-", "RuntimeError: __main__ must be a file that other processes can read"),
        (GUARDED_RUN, "-c", "TypeError: make_worker must be a function of a module that other"),
        (
            GUARDED_MAKE,
            "file",
            "TypeError: make_worker must be a function of a module, and made of",
        ),
        ("import sys\n" + RUN, "file that ends", "ended with exit code 5 as it started, or"),
    ],
)
def test_script_that_processes_cannot_import_is_told_so(
    run: str, option: str, last_line: str, tmp_path: Path
) -> None:
    """In the last line, of few: two tracebacks here and one in the process at most."""
    script = UNGUARDED + run
    if option == "file that ends":
        script = f'import sys\nif __name__ != "__main__":\n    sys.exit(5)\n{script}'
    path = tmp_path / "script.py"
    path.write_text(script, "utf-8")
    arguments = {"-c": ["-c", script], "-": ["-"]}.get(option, [str(path)])
    ended = subprocess.run(
        [sys.executable, *arguments],
        input=script if option == "-" else "",
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    lines = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert last_line in lines[-1], ended.stderr
    assert len(lines) < 45


@contextmanager
def running_script(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A script whose run goes on, and the ids of its processes."""
    with subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as script:
        try:
            assert script.stdout is not None
            yield script, [int(pid) for pid in script.stdout.readline().split()]
        finally:
            script.kill()
            with suppress(ProcessLookupError):  # where none of its processes is left
                os.killpg(script.pid, signal.SIGKILL)


def test_interrupt_of_the_process_group_ends_it_in_order() -> None:
    with running_script() as (script, pids):
        os.killpg(script.pid, signal.SIGINT)
        out, err = script.communicate(timeout=LIMIT_SECONDS)
    assert out.split() == ["partial", "whole", "dead=[]"], err
    assert "spawn_main" not in err  # no traceback but the parent's own
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize(
    ("fate", "method"),
    [
        ("blocked", "spawn"),
        ("outlived", "spawn"),
        ("outlived", "forkserver"),
        ("blocked", "fork"),
        ("outlived", "fork"),
    ],
)
def test_processes_end_with_a_parent_that_is_killed(fate: str, method: str) -> None:
    """Also one that blocks its event loop, or that a process outlives which it has forked."""
    with running_script(fate, method) as (script, pids):
        ends = [os.pidfd_open(pid) for pid in pids]
        script.kill()
        script.wait(LIMIT_SECONDS)
        for end in ends:
            assert select.select([end], [], [], LIMIT_SECONDS)[0]
            os.close(end)


def test_what_a_process_has_started_ends_with_its_parent_too() -> None:
    with running_script("a parent itself") as (script, [pid]):
        process = psutil.Process(pid)
        until(lambda: bool(process.children()))
        ends = [os.pidfd_open(each.pid) for each in (process, *process.children())]
        script.kill()
        for end in ends:
            assert select.select([end], [], [], LIMIT_SECONDS)[0]
            os.close(end)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"processes": 0}, ValueError, "processes must be an integer >= 1, got 0"),
        ({"workers": 0}, ValueError, "workers must be an integer >= 1, got 0"),
        (
            {"policy": "ordered"},
            ValueError,
            "policy must be one of lock-free, locked, awaited, got 'ordered'",
        ),
        (
            {"policy": "row-locked"},
            SettingError,
            "policy must be one of lock-free, locked, awaited, got 'row-locked'",
        ),
        (
            {"policy": "bounded:3"},
            ValueError,
            "policy must be one of lock-free, locked, awaited, got 'bounded:3'",
        ),
        ({"timeline": object()}, TypeError, "timeline must be a Timeline or None"),
        ({"on_error": "ignore"}, ValueError, "on_error must be one of stop, continue, restart"),
        ({"deadline": 0}, ValueError, "deadline must be a finite number > 0, got 0"),
        ({"nesterov": True}, TypeError, "hyperparameters must be among lr"),
        ({"shared": torch.zeros(3)}, TypeError, "shared must be SharedParameters, got Tensor"),
    ],
)
def test_bad_settings_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ProcessScheduler(**{"shared": counters(), "processes": 1, **arguments})


def test_what_other_processes_cannot_have_may_be_none() -> None:
    scheduler = ProcessScheduler(
        counters(), processes=1, timeline=None, process_lock=None, policy="locked"
    )
    assert scheduler.settings.policy == "locked"


async def test_scheduler_used_out_of_its_scope_is_an_error() -> None:
    scheduler = ProcessScheduler(counters(), processes=1)
    with pytest.raises(RuntimeError, match="not open"):
        await scheduler.run(submit_ones, updates=1)
    with pytest.raises(ValueError, match="updates or seconds must be given"):
        await scheduler.run(submit_ones)


async def test_what_makes_no_worker_is_refused_by_its_name() -> None:
    async with ProcessScheduler(counters(), processes=1, **FORKED) as scheduler:
        with pytest.raises(TypeError, match="make_worker must be a plain function, got None"):
            await scheduler.run(None, updates=1)  # type: ignore[arg-type]
        text = "failed: TypeError: make_worker must return an async callable, got None"
        with pytest.raises(WorkerError, match=text):
            await scheduler.run(forget_to_return, updates=1)


async def test_process_may_be_killed_at_any_moment_again_and_again() -> None:
    """Under one lock nothing is lost: a kill leaves one update half done at most."""
    chance = random.Random(0)
    shared = counters(1 << 18)
    async with ProcessScheduler(
        shared, processes=2, policy="locked", on_error="restart", **FORKED, **COUNTING
    ) as scheduler:
        run = asyncio.create_task(scheduler.run(submit_ones, updates=10**9))
        for _ in range(3):
            await until_updates(shared, chance.randrange(50, 500))
            (victim,) = (
                each.pid
                for each in multiprocessing.active_children()
                if each.name == "hogstream-process-0"
            )
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
        await until_updates(shared, 50)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        report = scheduler.report
    assert report is not None
    assert len(report.dead) == 3
    assert report.updates == shared.version >= 500
    assert shared.flat.eq(shared.flat.round()).all()
    assert -report.updates - 3 <= shared.flat.min() <= shared.flat.max() <= -report.updates


async def until_updates(shared: SharedParameters, updates: int) -> None:
    """Waits until process 0 has made so many from now on."""
    end = shared.versions[1] + updates
    while shared.versions[1] < end:  # noqa: ASYNC110, another process counts them
        await asyncio.sleep(0.001)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="as another C library likes")
@pytest.mark.parametrize("told", [False, True])
async def test_a_process_keeps_the_memory_of_an_iteration_for_the_next(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless whoever has started it has told the C library something else."""
    faults: list[int] = []
    if told:
        monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(1 << 20))
    method = "spawn" if told else "forkserver"
    shared = SharedParameters({"p": torch.zeros(64)})
    async with ProcessScheduler(shared, processes=1, start_method=method) as scheduler:
        await scheduler.run(
            count_page_faults, updates=10, on_result=lambda _, count: faults.append(count)
        )
    assert faults[0] > 1000  # of 4 KiB each
    assert (faults[-1] > 1000) == told
