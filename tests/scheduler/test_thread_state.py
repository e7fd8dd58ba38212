"""What is of each thread alone, on the threads that compute for workers and on lanes."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hogstream.kernels.backends.floating_point import FloatingPointMode
from hogstream.scheduler import ProcessScheduler, SharedParameters, StreamScheduler, WorkerContext
from process_workers import note_openmp_threads
from scheduler_testing import small, submit_ones

_torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    threads, mode = torch.get_num_threads(), FloatingPointMode()
    yield
    torch.set_num_threads(threads)
    mode.set()


def on_new_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def openmp_threads() -> int:
    """How many OpenMP would start for the calling thread; unlike torch, it changes nothing."""
    return int(_torch_cpu.omp_get_max_threads())


def mkl_threads() -> int | None:
    """How many MKL would, if torch has it."""
    info = torch.__config__.parallel_info()
    counts = [line.split()[-1] for line in info.splitlines() if "mkl_get_max_threads" in line]
    return int(counts[0]) if counts else None


@pytest.mark.parametrize(
    ("cores", "workers", "given", "expected"),
    [
        (2, 1, 2, 1),
        (2, 4, 2, 1),
        (16, 1, 16, 15),
        (16, 4, 16, 3),
        (16, 4, 2, 2),
        (16, 1, 1, 1),
    ],
)
async def test_each_worker_has_its_share_of_the_cores(
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    workers: int,
    given: int,
    expected: int,
) -> None:
    """The event loop's thread too while a run goes on; others never, nor those that are new."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))
    torch.set_num_threads(given)
    shared = small()
    submit = submit_ones(shared)
    seen: set[tuple[int, int | None]] = set()

    def look() -> None:
        seen.add((openmp_threads(), mkl_threads()))

    async def worker(context: WorkerContext) -> None:
        await context.run_blocking(look)
        assert (openmp_threads(), mkl_threads()) in ((expected, expected), (expected, None))
        assert on_new_thread(torch.get_num_threads) == given
        await submit(context)

    async with StreamScheduler(shared, backend=backend, workers=workers) as scheduler:
        assert openmp_threads() == given
        report = await scheduler.run(worker, updates=2 * workers)
        assert torch.get_num_threads() == given
    assert report.torch_threads == expected
    assert seen in ({(expected, expected)}, {(expected, None)})
    assert (openmp_threads(), mkl_threads()) in ((given, given), (given, None))
    assert on_new_thread(torch.get_num_threads) == given


async def test_worker_may_ask_for_other_threads() -> None:
    """On its own thread, for all its later calls."""
    torch.set_num_threads(2)
    shared = small()
    submit = submit_ones(shared)
    seen = []

    async def worker(context: WorkerContext) -> None:
        if context.iteration == 0:
            await context.run_blocking(torch.set_num_threads, 5)
        seen.append(await context.run_blocking(openmp_threads))
        await submit(context)

    async with StreamScheduler(shared, workers=1) as scheduler:
        await scheduler.run(worker, updates=3)
    assert seen == [5, 5, 5]


async def test_runs_that_overlap_leave_what_was_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What opens during another run has its own share of the cores; what is set there stays."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    torch.set_num_threads(6)
    shared, other = small(), small()
    submit = submit_ones(shared)
    seen: list[int] = []

    async def worker(context: WorkerContext) -> None:
        if not seen:
            seen.append(openmp_threads())
            async with StreamScheduler(other, workers=2) as inner:
                torch.set_num_threads(5)
                report = await inner.run(submit_ones(other), updates=2)
                seen.extend([report.torch_threads, openmp_threads()])
        await submit(context)

    async with StreamScheduler(shared, workers=7) as scheduler:
        await scheduler.run(worker, updates=7)
    assert seen == [1, 3, 1]
    assert openmp_threads() == 5


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
async def test_processes_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are forked, as those have as many cores as this one is made to believe."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    torch.set_num_threads(16)
    shared = small()
    async with ProcessScheduler(shared, processes=2, start_method="fork", lr=0.0) as scheduler:
        report = await scheduler.run(note_openmp_threads, updates=2)
    assert shared.flat[:2].tolist() == [7, 7]
    assert report.torch_threads == 7


def foreign_threads() -> set[int]:
    """Threads of this process that Python has not started."""
    started = {thread.native_id for thread in threading.enumerate()}
    return set(map(int, os.listdir("/proc/self/task"))) - started


async def test_a_snapshot_starts_no_threads(backend: str) -> None:
    """Of OpenMP, as torch would for a copy of this size."""
    torch.set_num_threads(2)
    shared = SharedParameters({"p": torch.arange(1 << 18).float()})
    submit = submit_ones(shared)
    started: set[int] = set()

    async def worker(context: WorkerContext) -> None:
        started.update(foreign_threads() - before)
        np.testing.assert_array_equal(context.flat.numpy(), shared.flat.numpy())
        await submit(context)

    async with StreamScheduler(shared, backend=backend, workers=1, read="snapshot") as scheduler:
        before = foreign_threads()
        await scheduler.run(worker, updates=4)
    assert not started


@pytest.mark.parametrize("flush", [True, False])
async def test_all_compute_in_the_floating_point_mode_of_the_opening(
    backend: str, flush: bool
) -> None:
    """Workers' threads start at different times; a lane takes an update from any thread."""
    shared = SharedParameters({"p": torch.zeros(64)})
    shared.flat.view(torch.int32).fill_(1000)  # times 2**-149
    grad = torch.zeros(64)
    options: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.5, "decoupled_weight_decay": True}
    seen = set()

    def look() -> None:
        seen.add(float(np.float32(1e-20) * np.float32(1e-20)) == 0.0)

    async def worker(context: WorkerContext) -> None:
        await context.run_blocking(look)
        await context.submit(grad)

    torch.set_flush_denormal(flush)
    async with StreamScheduler(shared, backend=backend, workers=3, **options) as scheduler:
        torch.set_flush_denormal(not flush)
        await scheduler.run(worker, updates=3)
    assert seen == {flush}
    assert shared.flat.view(torch.int32).unique().tolist() == [0 if flush else 125]
