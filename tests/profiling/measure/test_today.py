"""Workers as people run them today: in threads, and in processes that end with their scope."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys

import pytest
import torch

from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.event_loop import run
from hogstream.profiling.interruption import End, gather_until_interrupted
from hogstream.profiling.measure import today
from hogstream.profiling.measure.today import PROCESSES, SETUPS, THREADS, Gradients, Today
from process_testing import run_python

CPU = torch.device("cpu")
GRADIENTS = Gradients(seed=3, dtype=torch.float32, device=CPU)
SECONDS = 0.05


def processes() -> list[str]:
    return sorted(each.name for each in multiprocessing.active_children())


@pytest.mark.slow
def test_every_setup_makes_updates_at_every_size() -> None:
    """And no process of it outlives the scope."""

    async def measure() -> None:
        async with Today((64, 2000), 2, GRADIENTS) as setups:
            for elements, workers in ((64, 1), (64, 2), (2000, 2)):
                before = setups._flats[elements].clone()
                measures = await setups.prepare(elements, workers, 2 * workers)
                assert list(measures) == list(SETUPS)
                for measure in measures.values():
                    assert await measure(SECONDS) > 0
                assert setups._flats[elements].ne(before).any()  # by processes, seen from here
            assert processes() == ["hogstream-today-0", "hogstream-today-1"]

    run(measure())
    assert processes() == []


@pytest.mark.slow
def test_processes_that_fail_or_die_are_an_error_and_end_with_the_scope() -> None:
    async def measure() -> None:
        async with Today((64,), 2, GRADIENTS) as setups:
            failed = "process 0 of what people run today failed: KeyError: 65"
            with pytest.raises(MeasurementError, match=failed):
                await setups.prepare(65, 1, 1)
            measures = await setups.prepare(64, 2, 2)
            for each in multiprocessing.active_children():
                if each.name.endswith("1") and each.pid is not None:
                    os.kill(each.pid, signal.SIGKILL)
            in_processes = [measures[each] for each in SETUPS if each.spread_over == PROCESSES]
            await in_processes[0](SECONDS)

    ended = "process 1 of what people run today ended with exit code -9"
    with pytest.raises(MeasurementError, match=ended):
        run(measure())
    assert processes() == []


@pytest.mark.slow
def test_processes_end_with_a_scope_that_is_cancelled() -> None:
    async def measure() -> None:
        async with Today((64,), 2, GRADIENTS) as setups:
            await setups.prepare(64, 2, 2)

    async def cancelled() -> None:
        measuring = asyncio.ensure_future(measure())
        while len(processes()) < 2:  # noqa: ASYNC110, their start is what it waits for
            await asyncio.sleep(0.001)
        measuring.cancel()
        await measuring

    with pytest.raises(asyncio.CancelledError):
        run(cancelled())
    assert processes() == []


SERVES = """
import multiprocessing, torch
from torch.multiprocessing.reductions import StorageWeakRef
from hogstream.profiling.measure import today
mine, its = multiprocessing.Pipe()
given = [{64: torch.zeros(64)}]
storage = StorageWeakRef(given[0][64].untyped_storage())
mine.send(("prepare", 64, 1, 1))
mine.send(("prepare", 65, 1, 1))
mine.close()
gradients = today.Gradients(3, torch.float32, torch.device("cpu"))
today._serve(its, 0, given, multiprocessing.Lock(), gradients)
print(storage.expired())
"""


@pytest.mark.slow
def test_a_process_gives_back_what_is_shared_before_it_ends() -> None:
    """Else the memory of a GPU is kept for it; also if nobody is there to hear an answer."""
    assert run_python("-c", SERVES) == "True\n"


@pytest.mark.parametrize("spread_over", [THREADS, PROCESSES])
def test_each_is_measured_with_a_lock_and_without_and_ours_with_one(spread_over: str) -> None:
    mine = [each for each in SETUPS if each.spread_over == spread_over]
    assert [each.lock for each in mine if each.update == today.TORCH] == [False, True]
    ours = [each.lock for each in mine if each.update == today.OURS]
    assert ours == ([True] if spread_over == THREADS else [])


def test_threads_exclude_each_other_under_the_lock() -> None:
    total, made = [0], [0, 0, 0]

    def worker(index: int) -> today.Make:
        def update(number: int) -> None:
            assert number == made[index]
            made[index] += 1
            total[0] = int(total[0]) + 1  # a read and a write, with nothing to make them one

        return update

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        rate = run(today._in_threads([worker(each) for each in range(3)], True, CPU, SECONDS))
    finally:
        sys.setswitchinterval(before)
    assert total[0] == sum(made) > 0
    assert 0 < rate <= sum(made) / SECONDS


def test_what_fails_in_a_thread_is_an_error() -> None:
    def fail(number: int) -> None:
        raise LookupError(f"no update {number}")

    with pytest.raises(LookupError, match="no update 0"):
        run(today._in_threads([fail, fail], True, CPU, SECONDS))


def test_optimizers_share_parameters_and_nothing_else() -> None:
    shared = torch.zeros(8)
    first = today._with_torch(shared, [torch.ones(8)])
    after_one = shared.clone()
    today._with_torch(shared, [torch.ones(8)])
    torch.testing.assert_close(shared, 2 * after_one)  # its square average began at zero too
    first(1)
    assert shared.lt(2 * after_one).all()


def test_gradients_are_the_same_in_every_process_and_for_no_two_workers() -> None:
    every = GRADIENTS.make(100, range(4))
    assert len({tuple(each.tolist()) for each in every}) == 4
    for worker in range(2):
        for mine, same in zip(
            GRADIENTS.make(100, range(worker, 4, 2)), every[worker::2], strict=True
        ):
            assert torch.equal(mine, same)


def test_what_was_measured_before_it_failed_is_kept() -> None:
    async def measure():
        yield 1
        raise MeasurementError("process 0 of what people run today ended")

    error = "process 0 of what people run today ended"
    assert gather_until_interrupted(measure()) == ([1], End(partial=True, error=error))
