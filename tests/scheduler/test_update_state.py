"""Updates with momentum, and centered ones: their state, and what they come to."""

from __future__ import annotations

import asyncio
import copy
import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from hogstream.kernels import rmsprop_
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.scheduler import (
    ProcessScheduler,
    RunReport,
    SharedParameters,
    SimulatedWorker,
    StreamScheduler,
    WorkerContext,
)
from hogstream.scheduler.checkpoints import load_checkpoint, save_checkpoint
from hogstream.scheduler.update_state import UpdateState
from process_workers import submit_ones as submit_ones_there
from scheduler_testing import (
    POLICIES,
    RACING,
    part_of,
    python_lanes,
    racing_gradients,
    submit_ones,
)

N = 1001
FORMS: dict[str, dict[str, Any]] = {
    "centered": {"centered": True, "alpha": 0.9},
    "momentum": {"momentum": 0.9},
    "centered, momentum": {"centered": True, "momentum": 0.5, "eps_inside_sqrt": False},
    "lr in momentum": {"momentum": 0.9, "lr_in_momentum": True, "weight_decay": 0.1},
}
EVERYTHING: dict[str, Any] = {"centered": True, "momentum": 0.9}


def gradients_of(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(N, generator=generator) for _ in range(count)]


def state_for(options: dict[str, Any], *shape: int) -> UpdateState:
    """Zeros for what updates with such options have."""
    return UpdateState(
        torch.zeros(shape),
        torch.zeros(shape) if options.get("centered") else None,
        torch.zeros(shape) if options.get("momentum") else None,
    )


def update_(param: torch.Tensor, grad: torch.Tensor, state: UpdateState, **options: Any) -> None:
    """One update, by the backend that all are held to."""
    rmsprop_(param, grad, **state._asdict(), backend="numpy", **options)


def made_by(gradients: Sequence[torch.Tensor], **options: Any) -> tuple[torch.Tensor, UpdateState]:
    """What ones become by updates one after the other, and their state."""
    param, state = torch.ones(N), state_for(options, N)
    for grad in gradients:
        update_(param, grad, state, **options)
    return param, state


def assert_equal(actual: UpdateState, expected: UpdateState) -> None:
    assert actual.named().keys() == expected.named().keys()
    for kind, tensor in expected.named().items():
        assert torch.equal(actual.named()[kind], tensor), kind


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("policy", POLICIES)
async def test_one_worker_makes_the_updates_of_a_plain_loop(
    policy: str, form: str, backend: str
) -> None:
    batch = 1 if policy in ("awaited", "bounded:2") else 3  # which wait for each update
    gradients, options = gradients_of(4), FORMS[form]
    shared = SharedParameters({"p": torch.ones(N)})
    async with StreamScheduler(
        shared, workers=1, depth=4, batch=batch, policy=policy, backend=backend, **options
    ) as scheduler:
        report = await scheduler.run(SimulatedWorker(gradients, workers=1), updates=12)
    param, state = made_by(gradients * 3, **options)
    assert torch.equal(shared.flat, param)
    assert_equal(shared.state, state)
    assert report.bytes_per_update == N * (20 + 8 * (len(state.named()) - 1))


@pytest.mark.parametrize("form", FORMS)
async def test_ordered_updates_land_in_the_order_of_submission(form: str, backend: str) -> None:
    shared = SharedParameters({"p": torch.ones(N)})
    gradients, options = gradients_of(5), FORMS[form]
    order: list[torch.Tensor] = []

    async def worker(context: WorkerContext) -> None:
        order.append(gradients[context.index])
        await context.submit(order[-1])

    async with StreamScheduler(
        shared, workers=5, policy="ordered", backend=backend, **options
    ) as scheduler:
        await scheduler.run(worker, updates=40)
    param, state = made_by(order, **options)
    assert torch.equal(shared.flat, param)
    assert_equal(shared.state, state)


@pytest.mark.parametrize("form", FORMS)
async def test_each_worker_has_its_own_state(form: str, backend: str) -> None:
    shared = SharedParameters({"p": torch.ones(N)})
    gradients, options = gradients_of(3), FORMS[form]
    order: list[int] = []

    async def worker(context: WorkerContext) -> None:
        order.append(context.index)
        await context.submit(gradients[context.index])

    async with StreamScheduler(
        shared, workers=3, policy="ordered", backend=backend, state="per-worker", **options
    ) as scheduler:
        await scheduler.run(worker, updates=9)
    param, states = torch.ones(N), state_for(options, 3, N)
    for index in order:
        update_(param, gradients[index], states.map(itemgetter(index)), **options)
    assert torch.equal(shared.flat, param)
    assert shared.worker_state is not None
    assert_equal(shared.worker_state, states)
    assert shared.state.named().keys() == {"ms"}
    assert shared.ms.eq(0).all()


async def test_state_of_parameters_without_a_gradient_is_left_alone(backend: str) -> None:
    sizes = {"a": 3, "b": 500, "c": 5, "d": 1000}
    only = [["a"], ["b", "c"], ["d", "a"], None]
    shared = SharedParameters({name: torch.ones(size) for name, size in sizes.items()})
    grad = torch.linspace(-2, 2, shared.elements)

    async def worker(context: WorkerContext) -> None:
        await context.submit(part_of(shared, grad, only[context.iteration % 4]))

    async with StreamScheduler(shared, workers=1, backend=backend, **EVERYTHING) as scheduler:
        await scheduler.run(worker, updates=11)
    for name, expected in shared.views_of(torch.ones_like(shared.flat)).items():
        state = state_for(EVERYTHING, expected.numel())
        for step in range(11):
            if name in (only[step % 4] or sizes):
                update_(expected, shared.views_of(grad)[name], state, **EVERYTHING)
        assert torch.equal(shared.views[name], expected)
        assert_equal(
            UpdateState(*(shared.views_of(each)[name] for each in shared.state.named().values())),
            state,
        )


@pytest.mark.parametrize("form", FORMS)
async def test_lr_is_divided_by_staleness(form: str, backend: str) -> None:
    """Worker 0 reads first and lands last: with a staleness of 3 its step is a third."""
    shared = SharedParameters({"p": torch.ones(N)})
    gradients, options = gradients_of(2), {"lr": 0.3, **FORMS[form]}
    others_landed = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            await others_landed.wait()
        await context.submit(gradients[context.index])
        if context.iteration == 2:
            others_landed.set()

    async with StreamScheduler(
        shared, workers=2, staleness_aware=True, backend=backend, **options
    ) as scheduler:
        report = await scheduler.run(worker, updates=4)
    assert dict(report.staleness) == {0: 3, 3: 1}
    param, state = made_by([gradients[1]] * 3, **options)
    update_(param, gradients[0], state, **{**options, "lr": 0.3 / 3})
    assert torch.equal(shared.flat, param)
    assert_equal(shared.state, state)


@pytest.mark.parametrize("policy", ["lock-free", "locked"])
async def test_telemetry_counts_them_as_others(policy: str) -> None:
    shared = SharedParameters({"p": torch.zeros(1 << 15)})
    async with StreamScheduler(
        shared, workers=4, depth=4, policy=policy, telemetry=True, **EVERYTHING
    ) as scheduler:
        report = await scheduler.run(submit_ones(shared), updates=400)
    assert shared.races is not None
    assert report.block_updates == 400 * shared.races.blocks
    assert report.lost_block_updates is not None
    assert report.overwritten_block_updates is not None
    assert 0 <= report.lost_block_updates <= report.overwritten_block_updates
    assert policy == "lock-free" or report.overwritten_block_updates == 0


# Races: what ``ms`` and the mean of gradients come to is not of the same updates


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("gradients", RACING)
async def test_eight_lanes_race_and_all_stays_finite(
    gradients: str, momentum: float, backend: str
) -> None:
    """Rounding alone, or a race, makes ``ms - grad_avg**2`` less than 0: its root would be NaN."""
    shared = SharedParameters({"p": torch.zeros(1 << 14)})
    settings: dict[str, Any] = {"workers": 8, "depth": 8, "backend": backend, "alpha": 0.9}
    async with StreamScheduler(shared, centered=True, momentum=momentum, **settings) as scheduler:
        worker = SimulatedWorker(racing_gradients(gradients, shared.elements), workers=8)
        report = await scheduler.run(worker, updates=2000)
    assert report.updates == 2000
    assert shared.flat.isfinite().all()
    for kind, tensor in shared.state.named().items():
        assert tensor.isfinite().all(), kind


async def test_a_mean_that_is_of_another_update_does_no_harm() -> None:
    """Behind each update another one lands its mean of gradients alone, 1,000 times as large."""
    shared = SharedParameters({"p": torch.zeros(8)})

    def race(update: Callable[..., Any], *operands: Any) -> None:
        update(*operands)
        assert shared.grad_avg is not None
        shared.grad_avg.fill_(1000.0)

    async with python_lanes(shared, race, workers=1, centered=True) as scheduler:
        await scheduler.run(submit_ones(shared), updates=5)
    assert shared.ms.lt(1).all()
    assert shared.flat.isfinite().all()


# What is made when


async def test_state_is_made_when_a_scheduler_is_opened_that_needs_it() -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    assert (shared.grad_avg, shared.momentum_buffer) == (None, None)
    scheduler = StreamScheduler(shared, workers=2, momentum=0.9)
    assert shared.momentum_buffer is None
    async with scheduler:
        buffer = shared.momentum_buffer
        assert buffer is not None
        assert (buffer.shape, buffer.dtype) == ((N,), torch.float32)
        await scheduler.run(submit_ones(shared), updates=2)
    assert shared.grad_avg is None
    async with StreamScheduler(shared, workers=1, **EVERYTHING):
        assert shared.momentum_buffer is buffer
        assert buffer.gt(0).all()
        assert shared.grad_avg is not None


async def test_updates_without_momentum_leave_the_buffer_of_others_alone(backend: str) -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    state = shared.make_state()
    for tensor in state.named().values():
        tensor.fill_(3.0)
    async with StreamScheduler(shared, workers=1, backend=backend) as scheduler:
        await scheduler.run(submit_ones(shared), updates=3)
    param, ms = torch.zeros(N), torch.full((N,), 3.0)
    for _ in range(3):
        rmsprop_(param, torch.ones(N), ms)
    assert torch.equal(shared.flat, param)
    assert torch.equal(shared.ms, ms)
    for kind in ("grad_avg", "momentum_buffer"):
        assert shared.state.named()[kind].eq(3.0).all()


async def test_hyperparameters_that_are_assigned_before_count(backend: str) -> None:
    shared = SharedParameters({"p": torch.ones(N)})
    gradients = gradients_of(2)
    scheduler = StreamScheduler(shared, workers=1, backend=backend)
    scheduler.hyperparameters = Hyperparameters(**EVERYTHING)
    async with scheduler:
        report = await scheduler.run(SimulatedWorker(gradients, workers=1), updates=6)
    param, state = made_by(gradients * 3, **EVERYTHING)
    assert torch.equal(shared.flat, param)
    assert_equal(shared.state, state)
    assert report.state_kinds == 3


async def test_momentum_may_change_while_workers_run_but_not_begin(backend: str) -> None:
    shared = SharedParameters({"p": torch.ones(N)})
    (grad,) = gradients_of(1)
    momenta = [0.9, 0.5, 0.0, 0.9, 0.0]

    async def worker(context: WorkerContext) -> None:
        now = scheduler.hyperparameters
        scheduler.hyperparameters = replace(now, momentum=momenta[context.iteration])
        await context.submit(grad)

    async with StreamScheduler(shared, workers=1, backend=backend, momentum=0.1) as scheduler:
        await scheduler.run(worker, updates=5)
        with pytest.raises(ValueError, match="centered must be False in a scheduler that was open"):
            scheduler.hyperparameters = Hyperparameters(centered=True)
        assert scheduler.hyperparameters.centered is False
    param, state = torch.ones(N), state_for({"momentum": 0.9}, N)
    for momentum in momenta:
        needed = {"momentum": momentum}
        kinds = ["momentum_buffer"] if momentum else []
        update_(param, grad, state.only(kinds), **needed)
    assert torch.equal(shared.flat, param)
    assert_equal(shared.state, state)

    async with StreamScheduler(shared, workers=1) as plain:
        with pytest.raises(ValueError, match=r"momentum must be 0 in .* without momentum_buffer"):
            plain.hyperparameters = Hyperparameters(momentum=0.9)
    plain.hyperparameters = Hyperparameters(momentum=0.9)
    async with plain:
        assert plain.hyperparameters.momentum == 0.9


# Copies, other processes, files


@pytest.mark.parametrize("shares", [False, True], ids=["", "shared memory"])
def test_state_goes_with_the_parameters(shares: bool) -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    for place, tensor in enumerate(shared.make_state().named().values()):
        tensor.fill_(place)
    for place, tensor in enumerate(shared.make_worker_state(2).named().values()):
        tensor.fill_(10 + place)
    if shares:
        shared.share_memory_(2)
        assert all(tensor.is_shared() for tensor in shared.state.named().values())
        assert shared.worker_state is not None
        assert all(tensor.is_shared() for tensor in shared.worker_state.named().values())
    for other in (shared, copy.deepcopy(shared), pickle.loads(pickle.dumps(shared))):
        assert [t[0].item() for t in other.state.named().values()] == [0, 1, 2]
        assert other.worker_state is not None
        assert [t[0, 0].item() for t in other.worker_state.named().values()] == [10, 11, 12]
        assert other.make_state().ms is other.ms


def test_a_process_makes_no_state_that_others_would_share() -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    shared.make_state(["momentum_buffer"])
    shared.make_worker_state(4, ["grad_avg"])
    shared.share_memory_(2)
    there = pickle.loads(pickle.dumps(shared))
    there.enter_process(1)
    assert there.worker_state.grad_avg.shape == (2, N)
    assert there.make_state(["momentum_buffer"]).grad_avg is None
    with pytest.raises(RuntimeError, match="shared must have grad_avg before it is sent to a proc"):
        there.make_state(["grad_avg"])


def test_there_are_no_other_kinds() -> None:
    shared = SharedParameters({"p": torch.zeros(N)})
    with pytest.raises(ValueError, match="each of kinds must be one of grad_avg, momentum_buffer"):
        shared.make_state(["momentum"])
    assert shared.state.named().keys() == {"ms"}


@pytest.mark.parametrize(("state", "backend"), [("shared", "numba"), ("per-worker", "numpy")])
async def test_processes_share_it(state: str, backend: str) -> None:
    shared = SharedParameters({"p": torch.ones(N)})
    settings = {"policy": "locked", "backend": backend, "state": state, **EVERYTHING}
    async with ProcessScheduler(shared, processes=2, **settings) as scheduler:
        report: RunReport = await scheduler.run(submit_ones_there, updates=10)
    assert report.updates == 10
    assert report.state_kinds == 3
    ones = torch.ones(N)
    if state == "shared":
        param, expected = made_by([ones] * 10, **EVERYTHING)
        assert torch.equal(shared.flat, param)
        assert_equal(shared.state, expected)
    else:
        assert shared.worker_state is not None
        for row in range(2):
            _, expected = made_by([ones] * 5, **EVERYTHING)
            assert_equal(shared.worker_state.map(itemgetter(row)), expected)


async def test_a_run_goes_on_from_a_checkpoint_to_the_bit(tmp_path: Path, backend: str) -> None:
    gradients, settings = gradients_of(3), {"workers": 1, "backend": backend, **EVERYTHING}
    before, after = (SharedParameters({"p": torch.ones(N)}) for _ in range(2))
    async with StreamScheduler(before, **settings) as scheduler:
        await scheduler.run(SimulatedWorker(gradients, workers=1), updates=6)
    save_checkpoint(tmp_path / "file", before)
    load_checkpoint(tmp_path / "file", after)
    async with StreamScheduler(after, **settings) as scheduler:
        await scheduler.run(SimulatedWorker(gradients, workers=1), updates=6)
    param, state = made_by(gradients * 4, **EVERYTHING)
    assert torch.equal(after.flat, param)
    assert_equal(after.state, state)
