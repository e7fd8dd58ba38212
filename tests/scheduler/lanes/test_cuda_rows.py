"""Updates and reads of rows by CUDA lanes: on the driver of tests, and on a GPU if there is one."""

from __future__ import annotations

import asyncio
import gc
import struct
from functools import partial
from typing import Any

import pytest
import torch

from gpu_testing import Gpu, TestGpu, gpu_of_tests, rows_unseen, scheduler_on
from gradient_making import Memory
from hogstream.kernels import rows as row_code
from hogstream.scheduler import SharedParameters, WorkerContext, WorkerError
from hogstream.scheduler.lanes.cuda_graphs import UpdateGraph
from scheduler_rows import (
    ROW_POLICIES,
    VARIANTS,
    WAYS,
    Rows,
    assert_same,
    expected_of,
    make_rows,
    make_shared,
    on_device,
    ones,
    update_in_turn,
)
from scheduler_testing import COUNTING


def tables(gpu: Gpu, **shapes: tuple[int, ...]) -> SharedParameters:
    """Zeros."""
    zeros = {name: torch.zeros(shape, device=gpu.device) for name, shape in shapes.items()}
    return SharedParameters(zeros)


# Bits


async def train(gpu: Gpu, updates: list[Rows], dtype: torch.dtype, **settings: Any) -> None:
    """One worker submits updates of rows, and all bits are those of the kernel on a CPU."""
    shared = make_shared(dtype, gpu.device)
    of_device = [on_device(each, gpu.device) for each in updates]

    async def worker(context: WorkerContext) -> None:
        await context.submit_rows(of_device[context.iteration])

    async with gpu.scheduler(shared, workers=1, **settings) as scheduler:
        report = await scheduler.run(worker, updates=len(updates))
    assert report.updates == shared.version == len(updates)
    assert_same(shared, expected_of(scheduler, updates, dtype))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("policy", ROW_POLICIES)
async def test_rows_get_the_bits_of_the_kernel(gpu: Gpu, policy: str, variant: str) -> None:
    updates = [make_rows(seed) for seed in range(6)]
    await train(gpu, updates, torch.float32, policy=policy, **VARIANTS[variant])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", ["lock-free", "row-locked", "ordered"])
async def test_so_they_do_whatever_way_they_go(gpu: Gpu, policy: str, way: str) -> None:
    updates = [make_rows(seed) for seed in range(6)]
    await train(gpu, updates, torch.float32, policy=policy, **WAYS[way], **VARIANTS["both"])


@pytest.mark.parametrize("policy", ["lock-free", "row-locked"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
async def test_rows_of_every_dtype(gpu: Gpu, dtype: torch.dtype, policy: str) -> None:
    if gpu.device.type == "cpu" and dtype != torch.float64:
        pytest.skip("the driver of tests computes in float32 and float64")
    updates = [make_rows(seed, dtype) for seed in range(3)]
    await train(gpu, updates, dtype, policy=policy, momentum=0.5, on_nonfinite="skip")


async def test_updates_of_rows_come_between_graphs_of_others(
    gpu: Gpu, graphs: list[UpdateGraph]
) -> None:
    """All rows, each once, are what a dense update updates."""
    shared = SharedParameters({"p": torch.ones(40, 5, device=gpu.device)})
    grads = [torch.full((200,), 0.5 + each, device=gpu.device) for each in range(2)]
    every = torch.arange(40, device=gpu.device)

    async def worker(context: WorkerContext) -> None:
        grad = grads[context.index]
        if context.iteration % 5 == 4:
            await context.submit_rows("p", every, grad.view(40, 5))
        else:
            await context.submit(grad)

    settings: dict[str, Any] = {"policy": "ordered", "batch": 2, "batch_of": "lanes", "depth": 2}
    async with gpu.scheduler(shared, workers=2, alpha=0.5, **settings) as scheduler:
        await scheduler.run(worker, updates=80)
    assert graphs
    flat = shared.flat.cpu()
    assert flat.isfinite().all()
    assert flat.eq(flat[0]).all()


async def test_lr_is_divided_by_staleness(gpu: Gpu) -> None:
    """Worker 0 reads first and lands last: with a staleness of 3 its step is a third."""
    shared, mine, others = make_shared(device=gpu.device), make_rows(0), make_rows(1)
    options: dict[str, Any] = {"weight_decay": 0.1, "decoupled_weight_decay": True}
    others_landed = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            await others_landed.wait()
        await context.submit_rows(on_device(others if context.index else mine, gpu.device))
        if context.iteration == 2:
            others_landed.set()

    async with gpu.scheduler(
        shared, workers=2, staleness_aware=True, lr=0.3, **options
    ) as scheduler:
        report = await scheduler.run(worker, updates=4)
    assert dict(report.staleness) == {0: 3, 3: 1}
    expected = make_shared()
    update_in_turn(expected, expected.state, [others] * 3, lr=0.3, **options)
    update_in_turn(expected, expected.state, [mine], lr=0.3 / 3, **options)
    assert_same(shared, expected)


# What is counted, and what is locked


@pytest.mark.parametrize("policy", ROW_POLICIES)
async def test_racing_updates_are_all_counted(gpu: Gpu, policy: str) -> None:
    """With these numbers a row subtracts 1 for each of its updates that is not lost."""
    shared = tables(gpu, first=(3, 2), p=(24, 40))
    touched = torch.zeros(24)
    chances = [torch.Generator().manual_seed(worker) for worker in range(4)]

    async def worker(context: WorkerContext) -> None:
        rows = torch.randint(24, (16,), generator=chances[context.index])
        await context.submit_rows("p", *ones(rows.tolist(), 40, gpu.device))
        touched[rows.unique()] += 1

    async with gpu.scheduler(
        shared, workers=4, policy=policy, depth=4, telemetry=True, **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=400)
    assert report.updates == shared.version == sum(report.staleness.values()) == 400
    counted = -shared.views["p"].cpu()
    landed, survived, overwritten = shared.row_races["p"].counts.cpu()
    assert torch.equal(landed.float(), touched)
    assert report.block_updates == landed.sum()
    assert report.lost_block_updates == (landed - survived).sum()
    assert report.overwritten_block_updates == overwritten.sum()
    assert (landed - survived <= overwritten).all()
    safe = overwritten == 0
    assert torch.equal(counted[safe], touched[safe, None].expand(-1, 40))
    assert (counted <= touched[:, None]).all()
    assert safe.all() or policy in ("lock-free", "bounded:2")
    assert report.rows is report.stale_rows is None


async def test_updates_of_all_and_of_rows_are_counted_beside_each_other(gpu: Gpu) -> None:
    shared = tables(gpu, p=(8, 100))
    grad = torch.ones(800, device=gpu.device)

    async def worker(context: WorkerContext) -> None:
        if context.iteration % 2:
            await context.submit(grad)
        else:
            await context.submit_rows("p", *ones([1, 1, 5], 100, gpu.device))

    async with gpu.scheduler(shared, workers=1, telemetry=True) as scheduler:
        first = await scheduler.run(worker, updates=20)
        second = await scheduler.run(worker, updates=20)
    assert shared.races is not None
    for report in (first, second):
        assert report.block_updates == 10 * shared.races.blocks + 10 * 2
        assert report.lost_block_updates == report.overwritten_block_updates == 0


@pytest.mark.parametrize("policy", ["locked", "ordered", "awaited", "row-locked"])
async def test_a_row_that_is_read_is_of_one_version(gpu: Gpu, policy: str) -> None:
    """Updates subtract 1 from each element of all rows; under a lock of all, rows are alike too."""
    width = gpu.medium
    shared = tables(gpu, p=(2, width))
    every, grads = ones([0, 1], width, gpu.device)

    async def worker(context: WorkerContext) -> None:
        if context.index < 2:
            read = await context.read_rows("p", every)
            assert read.eq(read[:, :1]).all()
            assert policy == "row-locked" or read.eq(read[0, 0]).all()
        await context.submit_rows("p", every, grads)

    async with gpu.scheduler(shared, workers=4, policy=policy, depth=3, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=100)
    assert shared.flat.eq(-100).all()


@pytest.mark.parametrize("rows", [{"items": []}, {"items": [], "biases": [3]}, {"empty": [1]}])
async def test_of_no_rows_nothing_happens_but_a_landing(
    gpu: Gpu, rows: dict[str, list[int]]
) -> None:
    widths = {"items": 5, "biases": 1, "empty": 0}
    shared, before = make_shared(device=gpu.device), make_shared()
    update = {name: ones(each, widths[name], gpu.device) for name, each in rows.items()}

    async def worker(context: WorkerContext) -> None:
        await context.submit_rows(update)
        assert (await context.read_rows("items", ones([], 5, gpu.device)[0])).shape == (0, 5)

    async with gpu.scheduler(shared, workers=1, weight_decay=0.5) as scheduler:
        await scheduler.run(worker, updates=2)
    assert shared.version == 2
    reached = shared.flat.cpu().ne(before.flat)
    names = {name for name, view in before.views_of(reached).items() if view.any()}
    assert names == {"biases"} & rows.keys()


# What goes wrong


@pytest.mark.parametrize("settings", [{}, {"policy": "row-locked"}, {"on_nonfinite": "skip"}])
@pytest.mark.parametrize("row", [-1, 8, 1 << 40])
@pytest.mark.parametrize("table", ["a", "b"])
async def test_a_row_that_is_not_there_is_an_error_of_its_worker(
    gpu: Gpu, table: str, row: int, settings: dict[str, Any]
) -> None:
    """Nothing of its update has happened then, in no table; others go on."""
    shared = tables(gpu, a=(8, 3), b=(8, 5))

    async def worker(context: WorkerContext) -> None:
        update = {"a": ones([1, 2], 3, gpu.device), "b": ones([1, 2], 5, gpu.device)}
        if context.index == 0:
            update[table] = ones([1, row, 2], 3 if table == "a" else 5, gpu.device)
        await context.submit_rows(update)

    with rows_unseen():
        async with gpu.scheduler(
            shared, workers=2, on_error="continue", **settings, **COUNTING
        ) as scheduler:
            report = await scheduler.run(worker, updates=10)
    (error,) = report.failures.values()
    assert isinstance(error, IndexError)
    assert "rows must be >= 0 and < 8 or 8, the rows of their table: nothing was" in str(error)
    assert report.dropped == [1, 0]
    assert report.updates == shared.version == 9
    for view in shared.views.values():
        assert view[1:3].eq(-9).all()
        assert view.count_nonzero() == view[1:3].numel()


@pytest.mark.parametrize("policy", ["lock-free", "row-locked"])
async def test_a_row_that_is_not_there_cannot_be_read(gpu: Gpu, policy: str) -> None:
    shared = tables(gpu, p=(8, 3))

    async def worker(context: WorkerContext) -> None:
        assert (await context.read_rows("p", ones([7, 0], 3, gpu.device)[0])).eq(0).all()
        await context.read_rows("p", ones([0, 8], 3, gpu.device)[0])

    with rows_unseen():
        async with gpu.scheduler(shared, workers=1, policy=policy) as scheduler:
            with pytest.raises(WorkerError, match=r"< 8, the rows of their table: such rows were"):
                await scheduler.run(worker, updates=1)


@pytest.mark.parametrize("policy", ["lock-free", "row-locked"])
@pytest.mark.parametrize("table", ["a", "b"])
async def test_an_update_that_is_not_finite_in_one_table_is_left_out(
    gpu: Gpu, table: str, policy: str
) -> None:
    shared = tables(gpu, a=(8, 3), b=(8, 5))

    async def worker(context: WorkerContext) -> None:
        update = {"a": ones([1, 2], 3, gpu.device), "b": ones([4, 4], 5, gpu.device)}
        if context.iteration % 2:
            update[table][1][1, 2] = torch.inf
        await context.submit_rows(update)

    async with gpu.scheduler(
        shared, workers=1, policy=policy, on_nonfinite="skip", **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=10)
    assert report.updates == shared.version == 5
    assert report.nonfinite == [5]
    assert shared.views["a"][1:3].eq(-5).all()
    assert shared.views["b"][4].eq(-5).all()  # a gradient of 2, and its root


@pytest.mark.parametrize("spoiled", ["a", "b"])
async def test_a_row_that_is_not_there_is_worse_than_an_infinity(gpu: Gpu, spoiled: str) -> None:
    """Whichever of the two tables comes first."""
    shared = tables(gpu, a=(8, 3), b=(8, 5))

    async def worker(context: WorkerContext) -> None:
        widths = {"a": 3, "b": 5}
        update = {
            name: ones([1, 2] if name == spoiled else [1, 8], width, gpu.device)
            for name, width in widths.items()
        }
        update[spoiled][1][0, 0] = torch.nan
        await context.submit_rows(update)

    with rows_unseen():
        async with gpu.scheduler(shared, workers=1, on_nonfinite="skip") as scheduler:
            with pytest.raises(WorkerError, match="the rows of their table: nothing was updated"):
                await scheduler.run(worker, updates=1)
    assert scheduler.report is not None
    assert (scheduler.report.dropped, scheduler.report.nonfinite) == ([1], [0])
    assert shared.flat.eq(0).all()


async def test_a_worker_may_go_on_where_a_row_could_not_be_read(gpu: Gpu) -> None:
    shared = tables(gpu, p=(8, 3))

    async def worker(context: WorkerContext) -> None:
        with pytest.raises(IndexError):
            await context.read_rows("p", ones([8], 3, gpu.device)[0])
        await context.submit_rows("p", *ones([1], 3, gpu.device))

    with rows_unseen():
        async with gpu.scheduler(shared, workers=1, **COUNTING) as scheduler:
            report = await scheduler.run(worker, updates=3)
    assert (report.updates, report.failures) == (3, {})


async def test_whole_updates_lock_no_rows(gpu: Gpu) -> None:
    shared = tables(gpu, p=(8, 3))

    async def worker(context: WorkerContext) -> None:
        await context.submit(torch.ones(24, device=gpu.device))

    async with gpu.scheduler(shared, workers=1, policy="row-locked") as scheduler:
        with pytest.raises(WorkerError, match="grad must be of rows, by submit_rows"):
            await scheduler.run(worker, updates=1)


# On the driver of tests alone


@pytest.mark.parametrize("policy", ROW_POLICIES)
async def test_gradients_of_rows_live_until_their_update_has_landed(policy: str) -> None:
    with gpu_of_tests() as gpu:
        await _submit_and_forget(gpu, policy)
    assert gpu.tests.violations() == []


async def _submit_and_forget(gpu: TestGpu, policy: str) -> None:
    shared = SharedParameters({"p": torch.zeros(8, 8)})
    memory = Memory(gpu, 64, torch.float32)

    async def worker(context: WorkerContext) -> None:
        stream = next(iter(gpu.streams))
        gpu.tests.hold(stream)
        grad = memory.take()
        with gpu.computing(0):
            gpu.torch.launch_fill(0, grad, 1.0)
        await context.submit_rows("p", torch.arange(8).flip(0), grad.view(8, 8))
        del grad
        gc.collect(0)
        for _ in range(20):
            await asyncio.sleep(0)
        assert memory.blocks == 0
        gpu.tests.release(stream)
        await context.lane.done(context.lane.record_event())
        assert memory.blocks == 1

    async with scheduler_on(shared, workers=1, depth=4, policy=policy, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=1)
    assert shared.flat.eq(-1).all()
    memory.close()


async def test_rows_that_a_lane_has_yet_to_make_are_sorted_behind_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They are looked at when the stream has come to it that is the current one, as on a GPU."""
    shared = SharedParameters({"p": torch.zeros(8, 8)})
    rows = torch.zeros(4, dtype=torch.int64)

    def as_kernels_do(sort: Any, *operands: Any) -> Any:
        of_tests.tests.wait_idle(of_tests.current_stream())
        return sort(*operands)

    def make() -> None:
        value = struct.unpack("<d", struct.pack("<q", 5))[0]
        of_tests.torch.launch_fill(of_tests.current_stream(), rows.view(torch.float64), value)

    async def worker(context: WorkerContext) -> None:
        await context.run_blocking(make)
        await context.submit_rows("p", rows, torch.ones(4, 8))

    with gpu_of_tests() as of_tests:
        monkeypatch.setattr(row_code, "sort_rows", partial(as_kernels_do, row_code.sort_rows))
        async with scheduler_on(shared, workers=1, **COUNTING) as scheduler:
            await scheduler.run(worker, updates=1)
    assert of_tests.tests.violations() == []
    assert shared.flat.view(8, 8)[5].eq(-1).all()
    assert shared.flat.count_nonzero() == 8


async def test_kernels_that_lock_rows_are_there_before_workers_start() -> None:
    """Wherever state and gradients lie; so no worker waits for a compiler."""
    shared = SharedParameters({"p": torch.zeros(8, 4), "s": torch.zeros(())})
    every, grads = torch.arange(8), torch.ones(33)

    async def worker(context: WorkerContext) -> None:
        grad = grads[context.iteration % 2 :][:32].view(8, 4)
        await context.submit_rows("p", every, grad)
        await context.read_rows("p", every)

    with gpu_of_tests() as gpu:
        async with scheduler_on(
            shared, workers=2, policy="row-locked", state="per-worker"
        ) as scheduler:
            loaded = gpu.tests.modules_loaded
            await scheduler.run(worker, updates=8)
            assert gpu.tests.modules_loaded == loaded


@pytest.mark.parametrize("policy", ["lock-free", "row-locked"])
async def test_everybody_is_told_of_a_device_that_is_lost(policy: str) -> None:
    shared = SharedParameters({"p": torch.zeros(8, 8)})

    async def worker(context: WorkerContext) -> None:
        await context.submit_rows("p", *ones([1], 8))

    with gpu_of_tests() as gpu:
        async with scheduler_on(
            shared, workers=3, depth=2, policy=policy, on_error="continue"
        ) as scheduler:
            gpu.tests.lose()
            with pytest.raises(WorkerError, match=r"workers 0, 1, 2 failed: .*ILLEGAL_ADDRESS"):
                await scheduler.run(worker, updates=9)
    assert shared.flat.eq(0).all()
