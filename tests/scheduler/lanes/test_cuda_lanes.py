"""What CUDA lanes do: on the driver of tests, in CPU memory, and on a GPU where there is one."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
import torch

from gpu_testing import Gpu, gpu_of_tests, scheduler_on
from hogstream.kernels import rmsprop_
from hogstream.scheduler import (
    SharedParameters,
    SimulatedWorker,
    StreamScheduler,
    WorkerContext,
    WorkerError,
)
from hogstream.scheduler.lanes.cuda_graphs import UpdateGraph
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.tracing.timeline import Timeline
from scheduler_testing import COUNTING, RACING, part_of, racing_gradients, submit_ones

N = 30_001


def normal_gradients(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, generator=generator) for _ in range(count)]


def assert_made_by(shared: SharedParameters, gradients: list[torch.Tensor], **options: Any) -> None:
    """The state is that of updates with these gradients, one after the other, on the CPU."""
    param, state = torch.zeros(N), shared.state.map(lambda each: torch.zeros(N))
    for gradient in gradients:
        rmsprop_(param, gradient, **state._asdict(), **options, backend="numpy")
    assert torch.equal(shared.flat.cpu(), param)
    for kind, tensor in state.named().items():
        assert torch.equal(shared.state.named()[kind].cpu(), tensor), kind


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"on_nonfinite": "skip"},
        {"telemetry": True},
        {"telemetry": True, "on_nonfinite": "skip"},
        {"timeline": Timeline()},
        {"process_lock": ProcessLock()},
        {"batch": 2, "batch_of": "lane"},
        {"batch": 2, "batch_of": "lanes", "on_nonfinite": "skip", "telemetry": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
@pytest.mark.parametrize("policy", ["lock-free", "locked", "ordered", "awaited", "bounded:3"])
async def test_one_worker_makes_the_updates_of_the_cpu(
    gpu: Gpu, policy: str, options: dict[str, Any], graphs: list[UpdateGraph]
) -> None:
    if "batch" in options and policy in ("awaited", "bounded:3"):
        pytest.skip("a policy that waits for each update has no batches")
    gradients = normal_gradients(3)
    shared = gpu.zeros(N)
    worker = SimulatedWorker([gradient.to(gpu.device) for gradient in gradients], workers=1)
    async with gpu.scheduler(shared, workers=1, policy=policy, depth=6, **options) as scheduler:
        report = await scheduler.run(worker, updates=30)
    assert report.updates == shared.version == 30
    assert_made_by(shared, gradients * 10)
    assert len(graphs) == (3 if "batch" in options else 0)  # for each pair of gradients


@pytest.mark.parametrize("settings", [{}, {"on_nonfinite": "skip"}, {"batch": 2}], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {"centered": True},
        {"momentum": 0.9},
        {"centered": True, "momentum": 0.9, "eps_inside_sqrt": False, "weight_decay": 0.1},
        {"momentum": 0.9, "lr_in_momentum": True},
    ],
    ids=lambda options: "-".join(options),
)
async def test_updates_with_momentum_and_centered_ones_are_those_of_the_cpu(
    gpu: Gpu, options: dict[str, Any], settings: dict[str, Any], graphs: list[UpdateGraph]
) -> None:
    gradients = normal_gradients(2)
    shared = gpu.zeros(N)
    worker = SimulatedWorker([gradient.to(gpu.device) for gradient in gradients], workers=1)
    async with gpu.scheduler(shared, workers=1, depth=4, **settings, **options) as scheduler:
        await scheduler.run(worker, updates=12)
    assert_made_by(shared, gradients * 6, **options)
    assert len(shared.state.named()) == 1 + len(options.keys() & {"centered", "momentum"})
    assert len(graphs) == ("batch" in settings)


@pytest.mark.parametrize("settings", [{}, {"batch": 8, "batch_of": "lanes"}], ids=str)
@pytest.mark.parametrize("kind", RACING)
async def test_eight_lanes_race_and_all_stays_finite(
    gpu: Gpu, kind: str, settings: dict[str, Any]
) -> None:
    """Rounding alone, or a race, makes ``ms - grad_avg**2`` less than 0: its root would be NaN."""
    shared = gpu.zeros(gpu.medium)
    gradients = [each.to(gpu.device) for each in racing_gradients(kind, gpu.medium)]
    options: dict[str, Any] = {"centered": True, "momentum": 0.9, "alpha": 0.9, **settings}
    async with gpu.scheduler(shared, workers=8, depth=4, **options) as scheduler:
        await scheduler.run(SimulatedWorker(gradients, workers=8), updates=800)
    for tensor in (shared.flat, *shared.state.named().values()):
        assert tensor.isfinite().all()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"on_nonfinite": "skip"},
        {"process_lock": ProcessLock()},
        {"batch": 2, "batch_of": "lane", "on_nonfinite": "skip"},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
async def test_updates_of_some_parameters_are_those_of_the_cpu(
    gpu: Gpu, options: dict[str, Any]
) -> None:
    sizes = {"a": 3, "b": 20_000, "c": 5, "d": 9_000}
    only = [None, ["a"], ["a", "c", "d"], ["b", "d"]]
    grads = normal_gradients(1)[0][: sum(sizes.values())].repeat(3, 1)
    grads[1, 25_000] = float("nan")  # in d
    states = []
    for device, schedule in (("cpu", StreamScheduler), (gpu.device, gpu.scheduler)):
        shared = SharedParameters({k: torch.ones(n, device=device) for k, n in sizes.items()})
        of_device = list(grads.to(device))

        async def worker(
            context: WorkerContext, shared: SharedParameters = shared, grads: Any = of_device
        ) -> None:
            names = only[context.iteration % 4]
            await context.submit(part_of(shared, grads[context.iteration % 3], names))

        async with schedule(shared, workers=1, depth=4, weight_decay=0.1, **options) as scheduler:
            await scheduler.run(worker, updates=48)
        states.append((shared.flat.cpu(), shared.ms.cpu(), shared.version))
    (flat, ms, version), (on_gpu, ms_on_gpu, version_on_gpu) = states
    torch.testing.assert_close(on_gpu, flat, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(ms_on_gpu, ms, rtol=0, atol=0, equal_nan=True)
    assert version_on_gpu == version


@pytest.mark.parametrize("workers", [4, 40])  # torch's pool has 32 streams: 40 are our own
@pytest.mark.parametrize(
    "options",
    [
        {"policy": "locked"},
        {"policy": "ordered"},
        {"policy": "ordered", "batch": 4, "batch_of": "lanes"},
        {"policy": "locked", "batch": 4, "batch_of": "lanes"},
        {"policy": "awaited"},
        {"policy": "ordered", "batch": 2, "batch_of": "lane", "on_nonfinite": "skip"},
        pytest.param(
            {"policy": "lock-free", "process_lock": ProcessLock()}, id="lock-free-process_lock"
        ),
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
async def test_without_races_no_update_is_lost(
    gpu: Gpu, options: dict[str, Any], workers: int
) -> None:
    shared = gpu.zeros(gpu.large)
    async with gpu.scheduler(shared, workers=workers, depth=2, **COUNTING, **options) as each:
        report = await each.run(submit_ones(shared), updates=400)
    assert report.updates == 400
    assert shared.flat.eq(-400).all()


@pytest.mark.parametrize("batch_of", ["lane", "lanes"])
async def test_graphs_race_as_launches_do_and_count_the_same(
    gpu: Gpu, batch_of: str, graphs: list[UpdateGraph]
) -> None:
    shared = gpu.zeros(gpu.medium)
    async with gpu.scheduler(
        shared, workers=8, depth=4, batch=4, batch_of=batch_of, telemetry=True, **COUNTING
    ) as scheduler:
        report = await scheduler.run(submit_ones(shared), updates=800)
    assert graphs
    assert shared.races is not None
    assert report.updates == shared.version == 800
    assert report.block_updates == 800 * shared.races.blocks
    assert shared.flat.min() >= -800
    assert shared.flat.max() <= -1


async def test_no_update_overlaps_another_if_they_are_ordered(gpu: Gpu) -> None:
    shared = gpu.zeros(gpu.large)
    async with gpu.scheduler(
        shared, workers=8, depth=2, policy="ordered", telemetry=True, **COUNTING
    ) as scheduler:
        report = await scheduler.run(submit_ones(shared), updates=400)
    assert report.lost_block_updates == report.overwritten_block_updates == 0


async def test_graph_follows_a_launch_on_its_lanes_and_is_followed(gpu: Gpu) -> None:
    """A batch of lanes runs on one stream, and a snapshot on its lane's: each waits."""
    shared = gpu.zeros(gpu.large)
    seen: list[torch.Tensor] = []
    grad = torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        seen.append(torch.stack(context.flat.aminmax()))
        await context.submit(grad)

    async with gpu.scheduler(
        shared,
        workers=4,
        policy="ordered",
        read="snapshot",
        batch=4,
        batch_of="lanes",
        **COUNTING,
    ) as scheduler:
        await scheduler.run(worker, updates=200)
    assert shared.flat.eq(-200).all()
    for low, high in torch.stack(seen).tolist():
        assert low == high  # no snapshot was taken in the midst of an update


@pytest.mark.parametrize("batch", [1, 4])
async def test_update_that_is_not_finite_is_left_out(gpu: Gpu, batch: int) -> None:
    gradients = normal_gradients(4)
    gradients[1][N - 1] = float("nan")
    gradients[2][0] = float("inf")
    shared = gpu.zeros(N)
    worker = SimulatedWorker([gradient.to(gpu.device) for gradient in gradients], workers=1)
    async with gpu.scheduler(
        shared, workers=1, depth=8, batch=batch, on_nonfinite="skip", telemetry=True
    ) as scheduler:
        report = await scheduler.run(worker, updates=32)
    assert report.nonfinite == [16]
    assert report.updates == shared.version == 16
    assert shared.races is not None
    assert report.block_updates == 16 * shared.races.blocks
    assert_made_by(shared, [gradients[0], gradients[3]] * 8)


async def test_gradient_that_is_not_finite_is_an_error_of_its_worker(gpu: Gpu) -> None:
    shared = gpu.zeros(64)

    async def worker(context: WorkerContext) -> None:
        value = float("nan") if context.index else 1.0
        await context.submit(torch.full_like(shared.flat, value))

    async with gpu.scheduler(
        shared, workers=2, on_nonfinite="raise", on_error="continue", **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=8)
    assert isinstance(report.failures[1], FloatingPointError)
    assert shared.flat.eq(-report.updates).all()


async def test_staleness_counts_what_landed_since_the_read(gpu: Gpu) -> None:
    shared = gpu.zeros(64)
    others_landed = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            await others_landed.wait()
        await context.submit(torch.ones_like(shared.flat))
        if context.iteration == 3:
            others_landed.set()

    async with gpu.scheduler(shared, workers=2, staleness_aware=True, **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=5)
    assert dict(report.staleness) == {0: 4, 4: 1}
    assert shared.version == 5
    assert shared.flat.eq(-4.25).all()  # four whole steps, and one of a quarter


async def test_snapshot_is_of_the_version_that_it_says(gpu: Gpu) -> None:
    shared = gpu.zeros(gpu.large)
    seen: list[tuple[int, float]] = []

    async def worker(context: WorkerContext) -> None:
        seen.append((context.read_version, context.flat.max().item()))
        await context.submit(torch.ones_like(shared.flat))

    async with gpu.scheduler(
        shared, workers=4, policy="locked", read="snapshot", **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=40)
    assert report.updates == 40
    assert all(value == -version for version, value in seen)


@pytest.mark.parametrize("workers", [1, 40])
async def test_streams_are_those_of_lanes_that_were_closed(gpu: Gpu, workers: int) -> None:
    device = gpu.cuda
    seen: list[set[int]] = []
    for _ in range(3):
        shared = gpu.zeros(1 << 10)
        async with gpu.scheduler(
            shared, workers=workers, depth=2, batch=2, batch_of="lanes"
        ) as scheduler:
            await scheduler.run(submit_ones(shared), updates=100)
            lanes: Any = scheduler._dispatch.lanes
            seen.append({lane.stream for lane in lanes.lanes})
        assert seen[-1] <= set(device._idle_streams)
        with pytest.raises(RuntimeError, match="closed"):
            lanes.lanes[0].record_event()
        with pytest.raises(RuntimeError, match="closed"):
            lanes.lanes[0].computing()
    assert seen[0] == seen[1] == seen[2]


async def test_lanes_that_cannot_all_be_opened_leave_nothing_open(
    gpu: Gpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device = gpu.cuda
    taken: list[int] = []
    take = device.take_stream

    def refuse() -> int:
        if len(taken) == 3:
            raise RuntimeError("cuStreamCreateWithPriority failed")
        taken.append(take())
        return taken[-1]

    monkeypatch.setattr(device, "take_stream", refuse)
    with pytest.raises(RuntimeError, match="cuStreamCreateWithPriority"):
        async with gpu.scheduler(gpu.zeros(64), workers=8):
            pass
    assert set(taken) <= set(device._idle_streams)


async def test_nobody_is_locked_out_while_a_gradient_is_made() -> None:
    with gpu_of_tests() as gpu:
        shared = SharedParameters({"p": torch.zeros(64)})
        ones = torch.ones(64)
        others_landed = asyncio.Event()
        landed: list[int] = []

        def compute() -> None:  # whose work on the lane's stream is held
            gpu.torch.launch_fill(gpu.torch.current_stream(), late, 1.0)

        async def worker(context: WorkerContext) -> None:
            if context.index == 0:
                gpu.tests.hold(lanes[0].stream)
                await context.run_blocking(compute)
                asyncio.get_running_loop().create_task(release())
                await context.submit(late)
            else:
                await context.submit(ones)
                if context.iteration == 9:
                    others_landed.set()
            landed.append(context.index)

        async def release() -> None:
            await others_landed.wait()
            gpu.tests.release(lanes[0].stream)

        lanes: Any = ()
        late = torch.full((64,), torch.nan)
        async with scheduler_on(shared, workers=2, policy="locked", **COUNTING) as scheduler:
            opened: Any = scheduler._dispatch.lanes
            lanes = opened.lanes
            await asyncio.wait_for(scheduler.run(worker, updates=11), 60)
    assert gpu.tests.violations() == []
    assert shared.flat.eq(-11).all()
    assert landed[-1] == 0


async def test_several_gradients_of_one_read_are_no_graph(graphs: list[UpdateGraph]) -> None:
    with gpu_of_tests() as gpu:
        shared = SharedParameters({"p": torch.zeros(64)})
        ones = torch.ones(64)

        async def worker(context: WorkerContext) -> None:
            await context.submit([ones, ones, ones])

        async with scheduler_on(shared, workers=1, depth=4, **COUNTING) as scheduler:
            await scheduler.run(worker, updates=30)
    assert gpu.tests.violations() == []
    assert shared.flat.eq(-30).all()
    assert not graphs


@pytest.mark.parametrize("count", [1, 2])
async def test_gradients_of_a_stream_that_is_captured_are_refused(count: int) -> None:
    """Else the updates would be drawn into the graph of whoever captures."""
    with gpu_of_tests() as gpu:
        shared = SharedParameters({"p": torch.zeros(64)})
        stream, grads = gpu.torch.make_stream(), [torch.ones(64)] * count

        async def worker(context: WorkerContext) -> None:
            with gpu.computing(stream), suppress(StopIteration):
                context.submit(grads).send(None)

        async with scheduler_on(shared, workers=1, depth=8, **COUNTING) as scheduler:
            gpu.tests.capture(stream, True)
            with pytest.raises(WorkerError, match="CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"):
                await scheduler.run(worker, updates=count)
            gpu.tests.capture(stream, False)
            await scheduler.run(worker, updates=count)
    assert gpu.tests.violations() == []
    assert shared.flat.eq(-count).all()


@pytest.mark.gpu
async def test_updates_of_some_parameters_are_not_counted() -> None:
    shared = SharedParameters({"p": torch.zeros(64, device="cuda")})
    grad = torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        await context.submit({"p": grad})

    async with StreamScheduler(shared, workers=1, telemetry=True) as scheduler:
        with pytest.raises(WorkerError, match="grad must be flat with telemetry on a GPU"):
            await scheduler.run(worker, updates=1)
    assert shared.version == 0
