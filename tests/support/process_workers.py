"""Workers for processes: functions of a module, which a spawned process can import."""

from __future__ import annotations

import asyncio
import atexit
import ctypes
import io
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from hogstream.scheduler import Progress, SharedParameters, WorkerContext
from hogstream.scheduler.context import Worker


class Unpicklable:
    """Not to be sent."""

    def __reduce__(self) -> str:
        raise LookupError("no way to send it")


def explode() -> None:
    """What a value becomes that is pickled and cannot be unpickled."""
    raise LookupError("no way to receive it")


class Explosive:
    """Can be sent, but not received."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return explode, ()


class OfTwoParts(Exception):
    """Cannot be unpickled: it is made from two arguments, and remembers one."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(f"{first} and {second}")


def submit_ones(shared: SharedParameters, process: int) -> Worker:
    """Makes a worker whose gradients are 1."""
    grad = torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad)

    return worker


def submit_rows_of_ones(shared: SharedParameters, process: int) -> Worker:
    """Makes one that updates rows 0 and 2 of ``table``, and that of its process from 3 on."""
    grads = torch.ones(3, shared.views["table"].shape[1])
    rows = torch.tensor([2, 3 + process, 0])

    async def worker(context: WorkerContext) -> None:
        await context.submit_rows("table", rows, grads)

    return worker


def note_what_is_kept(
    folder: Path, error: BaseException, shared: SharedParameters, process: int
) -> Worker:
    """Makes one of a process that writes which shared tensors it still has as Python ends.

    In process 1 it raises an error, after an update.
    """
    assert shared.worker_ms is not None
    assert shared.races is not None
    tensors = {
        "flat": shared.flat,
        "ms": shared.ms,
        "worker_ms": shared.worker_ms,
        "races": shared.races.counts,
    }
    storages = {name: StorageWeakRef(each.untyped_storage()) for name, each in tensors.items()}

    def note() -> None:
        kept = [name for name, storage in storages.items() if not storage.expired()]
        (folder / str(process)).write_text(" ".join(kept))

    atexit.register(note)
    submit = submit_ones(shared, process)

    async def worker(context: WorkerContext) -> None:
        if (process, context.index, context.iteration) == (1, 1, 1):
            raise error
        await submit(context)

    return worker


def fail_in_making(shared: SharedParameters, process: int) -> Worker:
    """Makes none in process 1."""
    if process == 1:
        raise LookupError("no data")
    return submit_ones(shared, process)


def forget_to_return(shared: SharedParameters, process: int) -> Any:
    """Makes none."""


def fail_in_working(shared: SharedParameters, process: int) -> Worker:
    """Makes one that fails in process 1, as its second, after an update."""
    submit = submit_ones(shared, process)

    async def worker(context: WorkerContext) -> None:
        if (process, context.index, context.iteration) == (1, 1, 1):
            raise OfTwoParts("no data", "no disk")
        await submit(context)

    return worker


def fail_at_third(failing: Collection[int], shared: SharedParameters, process: int) -> Worker:
    """Makes one that fails whenever it begins its third iteration, if its number is among some.

    Of several processes each has one worker.
    """
    submit = submit_ones(shared, process)

    async def worker(context: WorkerContext) -> None:
        if process + context.index in failing and context.iteration == 2:
            raise LookupError("no more data")
        await submit(context)

    return worker


def misbehave(fates: Mapping[int, str], shared: SharedParameters, process: int) -> Worker:
    """Makes one that meets a fate in some processes, after three updates."""
    submit = submit_ones(shared, process)

    async def worker(context: WorkerContext) -> None:
        if process in fates and context.iteration == 3:
            await meet(fates[process], context)
        await submit(context)

    return worker


def die_once(marker: Path, shared: SharedParameters, process: int) -> Worker:
    """Makes one whose process 1 dies in its fourth update, unless the marker is there already."""
    submit = submit_ones(shared, process)

    async def worker(context: WorkerContext) -> None:
        if process == 1 and context.iteration == 3 and is_first(marker):
            await meet("killed in an update", context)
        await submit(context)

    return worker


async def meet(fate: str, context: WorkerContext) -> None:
    """What may befall a process."""
    if fate == "killed with the lock":
        lock = context._dispatch.process_lock
        assert lock is not None
        assert lock.acquire(60)
        os.kill(os.getpid(), signal.SIGKILL)
    elif fate == "killed in an update":
        update = asyncio.ensure_future(context.submit(torch.ones_like(context.flat)))
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGKILL)
        await update
    elif fate == "blocked":
        block()
    elif fate == "outlived":
        pass  # it is the parent's
    elif fate == "a parent itself":
        multiprocessing.get_context("fork").Process(target=block, daemon=True).start()
    elif fate == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        raise ValueError(fate)


def block() -> None:
    """Does not return."""
    time.sleep(3600)


def is_first(marker: Path) -> bool:
    """Whether the marker was not there; it is now."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


async def until_landed(shared: SharedParameters, updates: int) -> None:
    """Waits until other processes have made so many updates."""
    while shared.version < updates:  # noqa: ASYNC110 (no event of this loop tells it)
        await asyncio.sleep(0.01)


def note_openmp_threads(shared: SharedParameters, process: int) -> Worker:
    """Makes one that says in an element of its process how many threads OpenMP would start.

    On the thread that computes, and asked of OpenMP: torch would set it when it is asked.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    grad = torch.zeros_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        shared.flat[process] = await context.run_blocking(library.omp_get_max_threads)
        await context.submit(grad)

    return worker


def report_all(shared: SharedParameters, process: int) -> Worker:
    """Makes one that sends what it is, and submits with the number of its iteration as its loss."""
    grad = torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        value = [process, context.index, context.iteration]
        context.send(value)
        value.clear()  # what was sent is as it was
        await context.submit(grad, loss=context.iteration)

    return worker


def send(value: object, shared: SharedParameters, process: int) -> Worker:
    """Makes one that sends a value that was made here, and fails if that does."""
    grad = torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        context.send(value() if callable(value) else value)
        await context.submit(grad)

    return worker


def follow(shared: SharedParameters, process: int) -> Worker:
    """Makes one whose gradients are made from what it reads; it sends the names of all threads."""
    grads = [torch.empty_like(shared.flat) for _ in range(2)]

    async def worker(context: WorkerContext) -> None:
        context.send(sorted(thread.name for thread in threading.enumerate()))
        grad = grads[context.iteration % 2]
        await context.run_blocking(torch.sin, context.flat + context.iteration, out=grad)
        await context.submit(grad)

    return worker


def fail_after_submitting(shared: SharedParameters, process: int) -> Worker:
    """Makes one that never waits for anything."""
    grad = torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad, loss=context.iteration)
        raise LookupError("no more")

    return worker


def cancel_itself(shared: SharedParameters, process: int) -> Worker:
    """Makes one that is cancelled once its third iteration, which takes long, has ended."""
    grad = torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad)
        if context.iteration == 2:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            time.sleep(0.01)  # noqa: ASYNC251 (so that others have their turn on the event loop)

    return worker


def wait_for_leave(folder: Path, shared: SharedParameters, process: int) -> Worker:
    """Makes one that writes to a pipe ``begun``, and blocks until it can read from ``leave``."""
    grad = torch.ones_like(shared.flat)
    begun, leave = io.FileIO(folder / "begun", "w"), io.FileIO(folder / "leave")

    async def worker(context: WorkerContext) -> None:
        begun.write(b"x")
        assert leave.read(1)
        time.sleep(0.05)  # noqa: ASYNC251 (it is a long iteration, also if leave was there before)
        context.send(context.iteration)
        await context.submit(grad, loss=context.iteration)

    return worker


def send_random_numbers(shared: SharedParameters, process: int) -> Worker:
    """Makes one that sends the random numbers that it draws when it is made."""
    drawn = [torch.rand(()).item(), random.random(), np.random.rand()]  # noqa: NPY002
    return send(drawn, shared, process)


def step_until(version: int, progress: Progress) -> float:
    """A schedule: a learning rate of 1 until a version, and 0 from there on."""
    assert 0.0 <= progress.seconds < 600.0
    return 1.0 if progress.version < version else 0.0


def count_page_faults(shared: SharedParameters, process: int) -> Worker:
    """Makes one that sends how many page faults it has for 48 MiB, time and again."""
    grad = torch.ones_like(shared.flat)

    def count() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        _activations = [torch.ones(6 << 18) for _ in range(8)]
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    async def worker(context: WorkerContext) -> None:
        context.send(await context.run_blocking(count))
        await context.submit(grad)

    return worker


def use_openmp() -> float:
    """Does something that is big enough for as many threads as torch may use."""
    return float((torch.ones(1 << 20) * 2.0).tanh().sum())


def count_openmp_threads(shared: SharedParameters, process: int) -> Worker:
    """Makes one that sends how many threads a small operation starts on its thread, and a big one.

    Then as many as the worker itself asks for.
    """
    grad = torch.ones_like(shared.flat)

    def count() -> list[int]:
        counts = [len(os.listdir("/proc/self/task"))]
        for threads, operation in (
            (None, lambda: torch.ones(8).tanh()),
            (None, use_openmp),
            (3, use_openmp),
        ):
            if threads is not None:
                torch.set_num_threads(threads)
            operation()
            counts.append(len(os.listdir("/proc/self/task")))
        return [count - counts[0] for count in counts[1:]]

    async def worker(context: WorkerContext) -> None:
        context.send(await context.run_blocking(count))
        await context.submit(grad)

    return worker
