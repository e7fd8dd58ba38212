"""A process that runs workers of its own, and how its parent starts it, hears of it and ends it."""

from __future__ import annotations

import asyncio
import atexit
import gc
import os
import pickle
import random
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import (
    connection,
    current_process,
    resource_tracker,
    spawn,
)
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.multiprocessing

from hogstream.scheduler.budget import Budget
from hogstream.scheduler.cancellation import uncancelled
from hogstream.scheduler.checks import check_async_callable, error_text
from hogstream.scheduler.context import WorkerError
from hogstream.scheduler.forks import cut_off, let_go_in_forks
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.processes.channel import Channel, ChannelClosed
from hogstream.scheduler.processes.malloc import keep_freed_memory
from hogstream.scheduler.processes.orphans import end_with_parent
from hogstream.scheduler.processes.outbox import Outbox
from hogstream.scheduler.report import RunReport
from hogstream.scheduler.scheduler import StreamScheduler
from hogstream.scheduler.schedules import LrSchedule, Progress
from hogstream.scheduler.settings import SchedulerSettings
from hogstream.scheduler.tracing.timeline import Timeline
from hogstream.scheduler.worker_thread import WorkerThread

# A process at work shows a sign of life so many times in a deadline.
_SIGNS = 4
# How long a process may take to end that has nothing left to do.
_GRACE_SECONDS = 10.0
_REAPING_SECONDS = 1e-3
# What a process returns that would start others while it is itself being started.
_UNGUARDED = 78
# What multiprocessing is told of a process that is no child of this one, or no longer; of those
# that are, none returns so much.
_NOT_OURS = 1 << 16


class ProcessDied(Exception):
    """A process ended before it had done what it was asked for.

    Attributes:
        pid: Its process id.
        exitcode: What it returned; minus the number of the signal, if one killed it. None if
            something else in this process has taken it: a wait for any child, or SIGCHLD ignored.
    """

    def __init__(self, text: str, pid: int, exitcode: int | None) -> None:
        super().__init__(text, pid, exitcode)
        self.pid, self.exitcode = pid, exitcode

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True)
class Setup:
    """What a process is to be, besides what it shares.

    Attributes:
        index: Its number, from 0.
        settings: Of its ``StreamScheduler``.
        seed: Of its random numbers: torch's, Python's and NumPy's.
        torch_threads: How many threads torch may use for each of its workers.
        timed: Whether updates and waits are taken down.
    """

    index: int
    settings: SchedulerSettings
    seed: int
    torch_threads: int
    timed: bool


@dataclass(frozen=True)
class Job:
    """What the workers of a process are to do in a run.

    Attributes:
        make_worker: Pickled.
        lr_schedule: Pickled; None if there is none.
        losses: Whether the parent wants to know of losses.
        results: Whether it wants to know of what workers send.
    """

    make_worker: bytes
    lr_schedule: bytes | None
    losses: bool
    results: bool


class Start(NamedTuple):
    """What a process is told when all are ready.

    Attributes:
        updates: How many it is to make; None if there is no limit.
        seconds: How long it may begin iterations; None if there is no limit.
        began: When the run began, by ``time.perf_counter``: one clock for all processes.
    """

    updates: int | None
    seconds: float | None
    began: float


class Done(NamedTuple):
    """What a process reports of a run.

    Attributes:
        report: Of its own workers.
        end: When it was done, by ``time.perf_counter``.
        timeline: What was taken down, if it was.
    """

    report: RunReport
    end: float
    timeline: Timeline | None


class WorkerProcess:
    """A process with a ``StreamScheduler`` of its own, as its parent sees it.

    Messages to it are ``make`` a worker, ``go``, ``stop`` to begin iterations, ``cancel`` all that
    is under way, and new ``hyperparameters``; from it, that it is ``open``, that it has ``made``
    the worker, what workers have ``reported``, what it ``failed`` with, and its ``report``.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, index: int, process: Any, channel: Channel) -> None:
        """Made by ``start``."""
        self.pid: int = process.pid
        self._name = f"process {index} (pid {self.pid})"
        self._process = process
        self._channel = channel
        self._ended = asyncio.Event()
        self._exitcode: int | None = None
        self._overdue: float | None = None
        self._opened = False
        self._end = _open_end(process)
        asyncio.get_running_loop().add_reader(self._end, self._note_end)
        atexit.register(self.kill)  # should the event loop never come to end it
        let_go_in_forks(self)

    @classmethod
    async def start(
        cls, setup: Setup, method: str, shared: SharedParameters, lock: ProcessLock | None
    ) -> WorkerProcess:
        """Starts it; it says when it is ``open``.

        Args:
            setup: What it is to be.
            method: How it is started: ``"spawn"``, ``"forkserver"`` or ``"fork"``.
            shared: In memory that it can reach.
            lock: Held for each update, if there is one.

        Raises:
            OSError: If there is no more room for a process, or it died at once.
        """
        mine, its = socket.socketpair()
        # Before it starts: a fork lets go of it, and so sees when it is closed here.
        channel = await Channel.open(mine)
        name = f"hogstream-process-{setup.index}"
        arguments = setup, its, [shared], lock
        context: Any = torch.multiprocessing.get_context(method)
        process = context.Process(target=_serve, args=arguments, name=name)
        # On a thread: it may write more than a pipe holds, which is read after torch's import.
        thread = WorkerThread(f"hogstream-start-{setup.index}")
        try:
            started = thread.call(partial(_start, process), lambda: None)
            started.add_done_callback(_note_failure)
            await uncancelled(lambda: asyncio.wait({started}))
            started.result()
            return cls(setup.index, process, channel)
        except BaseException:
            channel.hang_up()
            if process.pid is not None:
                process.kill()
                process.join()
                _reap(process)
                process.close()
            raise
        finally:
            its.close()
            thread.close()

    def send(self, kind: str, content: Any = None) -> None:
        """Sends it a message, without waiting."""
        self._channel.send(kind, content)

    async def receive(self, kind: str, reported: Callable[[Any], object] | None = None) -> Any:
        """Waits for its next message; a wait that is cancelled loses none.

        Args:
            kind: What it is to be.
            reported: Called with all that its workers report before.

        Returns:
            What came with it.

        Raises:
            ProcessDied: If the process ends instead.
            TimeoutError: If it was killed because it showed no sign of life.
            Exception: Whatever it failed with instead.
        """
        received = "reported"
        while received == "reported":
            try:
                received, content = await self._channel.receive()
            except ChannelClosed:
                await self.end()
                raise self._why_ended() from None
            if received == "reported" and reported is not None:
                reported(content)
        if received == "failed":
            raise content
        assert received == kind
        self._opened = True
        return content

    @contextmanager
    def watched(self, deadline: float | None) -> Iterator[None]:
        """Kills the process, while in here, if it shows no sign of life for a deadline.

        It is timed in turns of the parent's own loop, so a parent that hangs blames no child.
        """
        if deadline is None:
            yield
            return
        watching = asyncio.ensure_future(self._watch(deadline))
        try:
            yield
        finally:
            watching.cancel()

    @property
    def has_ended(self) -> bool:
        """Whether it is no more."""
        return self._ended.is_set()

    def kill(self) -> None:
        """Ends it at once."""
        # Not one that the loop has yet to note the end of: its number may be another's by now.
        if not self.has_ended and not connection.wait([self._end], 0):
            self._process.kill()

    def let_go(self) -> None:
        """Leaves it, in a child of ``os.fork``, to the parent."""
        if not self.has_ended:
            self._process._popen.returncode = _NOT_OURS
            cut_off(self._end)
            self._ended.set()

    async def end(self) -> None:
        """Lets it end, or kills it if it does not; may be begun again."""
        self._channel.hang_up()
        try:
            await asyncio.wait_for(self._ended.wait(), _GRACE_SECONDS)
        except asyncio.TimeoutError:
            self.kill()
            await self._ended.wait()
        await self._channel.close()
        while not _reap(self._process):  # noqa: ASYNC110 (no event tells; it is about to be there)
            await asyncio.sleep(_REAPING_SECONDS)
        if self._process._popen is not None:  # and it was not closed before
            self._exitcode = self._process.exitcode
            self._process.close()
        atexit.unregister(self.kill)

    async def _watch(self, deadline: float) -> None:
        self._channel.silence = 0
        while self._channel.silence <= _SIGNS:
            await asyncio.sleep(deadline / _SIGNS)
            self._channel.silence += 1
        self._overdue = deadline
        self.kill()

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._end)
        os.close(self._end)
        self._ended.set()

    def _why_ended(self) -> Exception:
        code = self._exitcode
        if self._overdue is not None:
            return TimeoutError(
                f"{self._name} showed no sign of life for deadline={self._overdue:g} s, "
                f"and was killed"
            )
        if code == _NOT_OURS:
            fate = "ended; its exit code was taken by something else here, or SIGCHLD is ignored"
            return ProcessDied(f"{self._name} {fate}", self.pid, None)
        assert code is not None
        signals = {each.value: each.name for each in signal.Signals}
        if code < 0:
            fate = f"was killed by {signals.get(-code, f'signal {-code}')}"
        elif self._opened:
            fate = f"ended with exit code {code}"
        elif code == _UNGUARDED:
            fate = (
                "came to start processes of its own when it imported __main__: "
                'a script starts them under `if __name__ == "__main__":`'
            )
        else:
            fate = f"ended with exit code {code} as it started, or imported __main__: see above"
        return ProcessDied(f"{self._name} {fate}", self.pid, code)


def check_main_module(method: str = "spawn") -> None:
    """Checks that a process may be started: it begins by importing ``__main__`` as this one did.

    Args:
        method: How it is started; a fork imports nothing.

    A process that does so now ends here.

    Raises:
        RuntimeError: If ``__main__`` cannot be imported.
    """
    if getattr(current_process(), "_inheriting", False):  # as multiprocessing itself finds out
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_UNGUARDED)  # a server of forks would make another code of SystemExit
    if method == "fork":
        return
    path = spawn.get_preparation_data("").get("init_main_from_path")
    if path is not None and not os.path.isfile(path):
        raise RuntimeError(f"__main__ must be a file that other processes can read, got {path}")


def check_portable(name: str, value: Any, pickled: bytes) -> None:
    """Checks that another process can unpickle a function.

    Args:
        name: Of the argument that it is.
        value: It.
        pickled: The same.

    Raises:
        TypeError: If it is of a ``__main__`` that only this process has.
    """
    importable = {"init_main_from_path", "init_main_from_name"}
    if b"__main__" in pickled and importable.isdisjoint(spawn.get_preparation_data("")):
        raise TypeError(
            f"{name} must be a function of a module that other processes can import, got "
            f"{value!r} of __main__, which has no file"
        )


def _open_end(process: Any) -> int:
    """A file descriptor that can be read once a process has ended.

    Its sentinel is closed only when no process has it open any more that it has forked.
    """
    if hasattr(os, "pidfd_open"):
        with suppress(OSError):  # where that is not allowed, or it has ended and was waited for
            return os.pidfd_open(process.pid)
    return os.dup(process.sentinel)


def _reap(process: Any) -> bool:
    """Takes the exit code of a process that has ended; False if there is none yet.

    If something else has taken it, multiprocessing would wait for it for ever.
    """
    popen = process._popen
    if popen is None or popen.poll() is not None:
        return True
    if popen.method == "forkserver":
        return False  # it is the server's child, who is about to tell
    try:
        ended, status = os.waitpid(popen.pid, os.WNOHANG)
    except ChildProcessError:
        popen.returncode = _NOT_OURS
        return True
    if ended:
        popen.returncode = os.waitstatus_to_exitcode(status)
    return bool(ended)


def _note_failure(started: asyncio.Future[None]) -> None:
    """Has asyncio not tell of a failure that nobody waits to hear of."""
    if not started.cancelled():
        started.exception()


def _start(process: Any) -> None:
    """Starts a process on a thread of its own, with SIGINT held back until it can ignore it."""
    resource_tracker.ensure_running()  # first, or its start would let SIGINT through again
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    process.start()


def _serve(
    setup: Setup, end: socket.socket, given: list[SharedParameters], lock: ProcessLock | None
) -> None:
    """The process, from its start to its end.

    The shared parameters are taken out of a list, as multiprocessing keeps arguments until Python
    ends: too late for memory of a GPU to be given back, and its owner would keep it for ever.
    """
    shared = given.pop()
    signal.set_wakeup_fd(-1)  # a fork has that of its parent's event loop
    # Ctrl-C goes to the whole process group, but it is for the parent to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    end_with_parent()
    keep_freed_memory()
    torch.set_num_threads(setup.torch_threads)  # of this thread, and of those that are new to torch
    if shared.flat.is_cuda:
        torch.cuda.set_device(shared.flat.device)
    shared.enter_process(setup.index)
    _seed(setup.seed)
    try:
        asyncio.run(_take_orders(setup, end, shared, lock))
    except SystemExit as error:  # of a worker
        traceback.clear_frames(error.__traceback__)
        raise SystemExit(error.code) from None
    finally:
        del shared
        gc.collect()  # what workers and errors have left in cycles


def _seed(seed: int) -> None:
    """Seeds what workers draw random numbers from."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (it is what users' code draws from)


async def _take_orders(
    setup: Setup, end: socket.socket, shared: SharedParameters, lock: ProcessLock | None
) -> None:
    """Opens a scheduler, and runs workers with it as often as the parent asks for it."""
    channel = await Channel.open(end)
    timeline = Timeline() if setup.timed else None
    try:
        async with StreamScheduler(
            shared, setup.settings, timeline=timeline, process_lock=lock, own_process=True
        ) as scheduler:
            channel.send("open")
            while True:
                job = await _heed(channel, scheduler, "make")
                await _take_part(setup.index, channel, scheduler, timeline, job)
    except ChannelClosed:
        pass  # the parent wants nothing more
    except Exception as error:
        channel.send("failed", _portable(error))
    finally:
        await channel.close()


async def _heed(channel: Channel, scheduler: StreamScheduler, *kinds: str) -> Any:
    """Does what the parent says until it says one of some things; others may come too late.

    Returns:
        What came with that.
    """
    while True:
        kind, content = await channel.receive()
        if kind == "hyperparameters":
            scheduler.hyperparameters = content
        elif kind == "stop":
            scheduler.stop()
        if kind in kinds:
            return content


async def _take_part(
    index: int, channel: Channel, scheduler: StreamScheduler, timeline: Timeline | None, job: Job
) -> None:
    """Makes a worker, and runs it when all are ready, until it is done or told to end."""
    try:
        worker = _unpickled("make_worker", job.make_worker)(scheduler.shared, index)
        check_async_callable("make_worker", worker, verb="return")
        schedule = None if job.lr_schedule is None else _unpickled("lr_schedule", job.lr_schedule)
    except Exception as error:
        channel.send("failed", _portable(error))
        return
    channel.send("made")
    start = await _heed(channel, scheduler, "go", "cancel")
    if start is None:
        return
    outbox = Outbox(channel, losses=job.losses, results=job.results)
    if schedule is not None:
        schedule = partial(_since, start.began, schedule)
    signs = asyncio.ensure_future(_show_signs_of_life(channel, scheduler.settings.deadline))
    budget = Budget(start.updates, start.seconds)
    run = asyncio.ensure_future(scheduler._run(worker, budget, None, outbox, schedule))
    told = asyncio.ensure_future(_heed(channel, scheduler, "cancel"))
    await asyncio.wait({run, told}, return_when=asyncio.FIRST_COMPLETED)
    run.cancel()
    await asyncio.wait({run})
    signs.cancel()
    told.cancel()
    if told.done():
        await told  # the channel may be closed
    outbox.send()
    failure = None if run.cancelled() else run.exception()
    if failure is None or isinstance(failure, WorkerError):
        assert scheduler.report is not None
        report = _portable_report(scheduler.report)
        channel.send("report", Done(report, time.perf_counter(), timeline))
    else:
        channel.send("failed", _portable(failure))
    if timeline is not None:
        timeline.clear()


def _unpickled(name: str, pickled: bytes) -> Any:
    """A function of the parent's.

    Raises:
        TypeError: If it is of a module that has no such thing here.
    """
    try:
        return pickle.loads(pickled)
    except AttributeError as error:
        raise TypeError(
            f"{name} must be a function of a module, and made of what modules have, not defined "
            f"under `if __name__ == ...`: {error}"
        ) from None


def _since(began: float, schedule: LrSchedule, progress: Progress) -> float:
    """The learning rate by the clock of the run, which may have begun before this process."""
    return schedule(progress._replace(seconds=time.perf_counter() - began))


async def _show_signs_of_life(channel: Channel, deadline: float | None) -> None:
    while deadline is not None:
        channel.send_sign_of_life()
        await asyncio.sleep(deadline / _SIGNS)


def _portable_report(report: RunReport) -> RunReport:
    failures = {worker: _portable(error) for worker, error in report.failures.items()}
    return replace(report, failures=failures)


def _portable(error: BaseException) -> BaseException:
    """The error with its traceback as a note, or if it cannot be sent one of the same text."""
    note = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    portable = error
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        portable = RuntimeError(error_text(error))
    if hasattr(portable, "add_note"):  # from Python 3.11 on
        portable.add_note(f"In another process:\n{note}")
    return portable
