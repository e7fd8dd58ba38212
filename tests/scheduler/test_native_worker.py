"""Workers whose step is compiled: the same bits, counts, errors and ends as of others."""

from __future__ import annotations

import asyncio
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

import numba

import native_testing
from hogstream.kernels import sparse_rmsprop_
from hogstream.scheduler import (
    NativeWorker,
    ProcessScheduler,
    RunReport,
    SettingError,
    SharedParameters,
    StreamScheduler,
    WorkerContext,
    WorkerError,
)
from hogstream.scheduler.workers.native_steps import NativeState
from native_testing import (
    factorise,
    fail_at_3,
    far_at_3,
    in_turn,
    infinite_at_3,
    several,
    table_of,
    tick_in_process,
    ticking,
)
from scheduler_testing import COUNTING

compiled_factorise = numba.njit(factorise)
POLICIES = ["lock-free", "locked", "row-locked", "ordered"]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"eps_inside_sqrt": False, "weight_decay": 0.1},
    {"momentum": 0.9, "maximize": True},
    {"centered": True, "momentum": 0.9, "lr_in_momentum": True},
    {"weight_decay": 0.1, "decoupled_weight_decay": True},
]


async def run(
    shared: SharedParameters, worker: NativeWorker, updates: int, **settings: Any
) -> RunReport:
    settings = {"workers": 1, **settings}
    async with StreamScheduler(shared, **settings) as scheduler:
        return await scheduler.run(worker, updates=updates)


def factors(dtype: torch.dtype) -> tuple[SharedParameters, tuple[Any, ...]]:
    """Factors of 6 users and 5 items, and 40 ratings."""
    generator = torch.Generator().manual_seed(0)
    rng = np.random.default_rng(0)
    users, items = (torch.randn(rows, 19, generator=generator, dtype=dtype) for rows in (6, 5))
    shared = SharedParameters({"bias": torch.zeros(3, dtype=dtype), "users": users, "items": items})
    ratings = rng.standard_normal(40).astype(shared.flat.numpy().dtype)
    return shared, (rng.integers(0, 6, 40), rng.integers(0, 5, 40), ratings)


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        *(("lock-free", options) for options in VARIANTS),
        *((policy, VARIANTS[1]) for policy in POLICIES[1:]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
async def test_one_worker_gives_the_bits_of_updates_one_by_one(policy, dtype, options):
    shared, samples = factors(dtype)
    tables = {name: shared.views[name].clone() for name in ("users", "items")}
    state = {name: [torch.zeros_like(table) for _ in range(3)] for name, table in tables.items()}
    numbers = {"lr": 0.1, "alpha": 0.9, "eps": 1e-3, **options}
    worker = NativeWorker(
        shared, factorise, samples, {"users": 1, "items": 1}, order=lambda _: np.arange(40), chunk=7
    )
    report = await run(shared, worker, 60, policy=policy, **numbers)
    of_step = [table.numpy() for table in tables.values()]
    rows = np.zeros(1, np.int64), np.zeros(1, np.int64)
    grads = np.zeros_like(of_step[0][:1]), np.zeros_like(of_step[0][:1])
    for index in [*range(40), *range(20)]:
        compiled_factorise(tuple(of_step), samples, NativeState(index, rows, grads))
        for place, (name, table) in enumerate(tables.items()):
            ms, grad_avg, buffer = state[name]
            sparse_rmsprop_(
                table,
                rows[place],
                grads[place],
                ms,
                grad_avg=grad_avg if options.get("centered") else None,
                momentum_buffer=buffer if options.get("momentum") else None,
                **numbers,
            )
    assert report.updates == shared.version == 60
    assert report.staleness == {0: sum(report.staleness.values())}
    for name, table in tables.items():
        assert torch.equal(shared.views[name], table)
    assert not shared.views["bias"].any()


async def test_rows_may_be_alike_or_none():
    # Of four rows of a sample: the same twice, whose gradients are added in their order.
    rows = np.array([[2, 0, 2, -1], [-1, -1, -1, -1], [1, 1, 1, 1]])
    grads = np.random.default_rng(0).standard_normal((3, 4, 5)).astype(np.float32)
    shared = table_of(3, 5)
    worker = NativeWorker(
        shared, several, (rows, grads), {"table": 4}, order=lambda _: np.arange(3)
    )
    report = await run(shared, worker, 3)
    table, ms = (torch.zeros(3, 5) for _ in range(2))
    for of_sample, values in zip(rows, grads, strict=True):
        there = of_sample >= 0
        sparse_rmsprop_(table, of_sample[there], np.ascontiguousarray(values[there]), ms)
    assert torch.equal(shared.views["table"], table)
    assert report.updates == shared.version == 3


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("chunk", [1, 7, 100, 5000])
@pytest.mark.parametrize("policy", POLICIES)
async def test_each_sample_of_an_epoch_is_taken_once(policy, chunk, workers):
    shared = table_of(1000)
    report = await run(
        shared, ticking(shared, chunk=chunk), 2300, workers=workers, policy=policy, **COUNTING
    )
    times = -shared.views["table"][:, 0]
    # No two workers have a row at once but where an epoch ends: nothing else may be lost.
    assert times.min() >= 2 - (workers > 1)
    assert times.max() <= 3
    assert times.sum() == 2300 or workers > 1
    assert sum(report.updates_by_worker) == report.updates == shared.version == 2300
    assert not report.partial
    assert not shared.views["before"].any()


@pytest.mark.parametrize("policy", ["locked", "row-locked", "ordered"])
async def test_nothing_is_lost_where_updates_wait_for_each_other(policy):
    shared = table_of(1, 40)
    worker = NativeWorker(
        shared, native_testing.tick, (np.zeros(64, np.int64),), {"table": 1}, chunk=500
    )
    report = await run(shared, worker, 50_000, workers=3, policy=policy, telemetry=True, **COUNTING)
    assert (shared.views["table"] == -50_000).all()
    assert report.lost_block_updates == report.overwritten_block_updates == 0
    assert report.block_updates == 50_000


async def test_races_are_counted_by_the_block_in_which_a_row_begins():
    shared = table_of(1000)
    report = await run(shared, ticking(shared), 2000, telemetry=True, **COUNTING)
    assert report.block_updates == 2000
    assert report.lost_block_updates == 0


async def test_losses_are_heard_by_the_chunk():
    shared, heard = table_of(10), []
    worker = NativeWorker(
        shared, several_losses, (np.arange(10.0),), {"table": 1}, order=in_turn, chunk=5
    )
    async with StreamScheduler(shared, workers=1) as scheduler:
        await scheduler.run(worker, updates=100, on_loss=lambda *each: heard.append(each))
    assert heard[0] == (0, 2.0)  # the mean of 0 to 4
    assert heard[1] == (0, 7.0)
    assert {worker for worker, _ in heard} == {0}


def several_losses(parameters: Any, samples: Any, state: Any) -> Any:
    state.rows[0][0] = state.sample
    return samples[0][state.sample]


async def test_a_schedule_gives_each_chunk_its_rate():
    shared = table_of(1000)
    async with StreamScheduler(shared, workers=1, **COUNTING) as scheduler:
        await scheduler.run(ticking(shared), updates=1000, lr_schedule=lambda progress: 0.5)
    assert (shared.views["table"] == -0.5).all()


async def test_rates_are_divided_by_staleness_which_one_worker_has_none_of():
    shared = table_of(1000)
    report = await run(shared, ticking(shared), 1000, staleness_aware=True, **COUNTING)
    assert (shared.views["table"] == -1).all()
    assert report.staleness == {0: 1000}  # each is looked at


async def test_each_worker_may_have_state_of_its_own():
    shared = table_of(1000)
    await run(shared, ticking(shared, chunk=50), 3000, workers=2, state="per-worker")
    assert shared.worker_state is not None
    assert not shared.ms.any()
    assert (shared.worker_state.ms.sum(1) > 0).all()


FAILING: list[tuple[Callable[..., Any], type[Exception], str, dict[str, Any]]] = [
    (fail_at_3, LookupError, "sample 3", {}),
    (far_at_3, IndexError, "rows of table 0 must be >= 0 and < 10, or -1 for none, got 99", {}),
    (infinite_at_3, FloatingPointError, "an infinity or NaN", {"on_nonfinite": "raise"}),
]


@pytest.mark.parametrize(("step", "error", "message", "settings"), FAILING)
async def test_a_step_that_fails_ends_its_worker_and_what_was_made_counts(
    step, error, message, settings
):
    shared = table_of(10)
    worker = NativeWorker(shared, step, (np.arange(10),), {"table": 1}, order=in_turn)
    async with StreamScheduler(shared, workers=1, **COUNTING, **settings) as scheduler:
        with pytest.raises(WorkerError) as caught:
            await scheduler.run(worker, updates=80)
        (failure,) = caught.value.failures.values()
        assert type(failure) is error
        assert message in str(failure)
        assert scheduler.report is not None
        assert scheduler.report.updates == shared.version == 3
        assert scheduler.report.partial
        assert shared.views["table"][:, 0].tolist() == [-1.0] * 3 + [0.0] * 7


async def test_a_worker_that_fails_is_restarted_until_it_fails_three_times_in_a_row():
    shared = table_of(10)
    worker = NativeWorker(shared, fail_at_3, (np.arange(10),), {"table": 1}, order=in_turn)
    async with StreamScheduler(shared, workers=1, on_error="restart", **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=80)
    # Each epoch makes three before it fails: so no failure follows another without an update.
    assert report.updates == shared.version == 80
    assert report.restarts[0] > 3


async def test_gradients_that_are_not_finite_are_left_out():
    shared = table_of(10)
    worker = NativeWorker(shared, infinite_at_3, (np.arange(10),), {"table": 1}, order=in_turn)
    heard: list[float] = []
    async with StreamScheduler(shared, workers=1, on_nonfinite="skip", **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=20, on_loss=lambda _, loss: heard.append(loss))
    assert shared.views["table"][:, 0].tolist() == [-2.0] * 3 + [0.0] + [-2.0] * 6
    assert heard == [1.0] * len(heard) != []
    assert report.nonfinite == [2]
    assert report.updates == shared.version == 18


@pytest.mark.parametrize("policy", POLICIES)
async def test_a_run_that_is_cancelled_has_counted_what_it_made(policy):
    shared = table_of(1000)
    scheduler = StreamScheduler(shared, workers=2, policy=policy, **COUNTING)
    begun = asyncio.Event()
    async with scheduler:
        task = asyncio.create_task(
            scheduler.run(ticking(shared), seconds=600, on_loss=lambda *_: begun.set())
        )
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    report = scheduler.report
    assert report is not None
    assert report.partial
    assert report.updates == shared.version > 0
    if policy != "lock-free":  # of which races at the borders of epochs lose some
        assert -shared.views["table"][:, 0].sum() == report.updates


@pytest.mark.parametrize("policy", POLICIES[1:])
async def test_a_worker_may_be_called_again_when_its_wait_was_cancelled(policy):
    shared = table_of(1000)
    native = ticking(shared)

    async def worker(context: WorkerContext) -> None:
        for _ in range(50):  # of which each is given up, now or soon
            call = asyncio.ensure_future(native(context))
            await asyncio.sleep(0)
            call.cancel()
            try:
                await call
            except asyncio.CancelledError:
                continue
            except RuntimeError as error:
                if "must submit once" not in str(error):  # as what was given up has made it all
                    raise
            return
        await native(context)

    async with StreamScheduler(shared, workers=2, policy=policy, **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=50_000)
    assert report.updates == shared.version == 50_000
    assert -shared.views["table"][:, 0].sum() == 50_000


async def test_stale_rows_are_counted_with_telemetry_alone():
    shared = table_of(1000)
    assert (await run(shared, ticking(shared), 1000)).rows is None
    report = await run(shared, ticking(shared), 1000, telemetry=True)
    assert (report.rows, report.stale_rows) == (1000, 0)
    report = await run(shared, ticking(shared), 1000, workers=2, telemetry=True)
    assert report.rows == 1000


async def test_a_run_that_is_stopped_ends_after_the_chunks_under_way():
    shared = table_of(1000)
    async with StreamScheduler(shared, workers=2, **COUNTING) as scheduler:
        report = await scheduler.run(
            ticking(shared, chunk=100), seconds=600, on_loss=lambda *_: scheduler.stop()
        )
    assert report.partial
    assert 0 < report.updates == shared.version


async def test_an_order_may_be_in_parts():
    shared = table_of(1000)
    parts = [np.arange(0, 300), np.arange(300, 301), np.arange(301, 1000)]
    worker = ticking(shared, order=lambda _: parts, chunk=256)
    await run(shared, worker, 3000, **COUNTING)
    assert (shared.views["table"] == -3).all()


async def test_a_worker_lets_go_of_a_scheduler_that_has_closed():
    shared = table_of(1000)
    worker = ticking(shared)
    async with StreamScheduler(shared, workers=2) as scheduler:
        await scheduler.run(worker, updates=2000)
    closed = weakref.ref(scheduler)
    del scheduler
    gc.collect()
    assert closed() is None
    await run(shared, worker, 1000)


async def test_epochs_go_on_from_run_to_run():
    shared = table_of(1000)
    worker = ticking(shared, chunk=100)
    async with StreamScheduler(shared, workers=1, **COUNTING) as scheduler:
        for _ in range(4):
            await scheduler.run(worker, updates=500)
    assert (shared.views["table"] == -2).all()


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["lock-free", "locked"])
async def test_processes_share_what_compiled_steps_update(policy):
    shared = table_of(1000)
    async with ProcessScheduler(
        shared, processes=2, workers=1, policy=policy, **COUNTING
    ) as scheduler:
        report = await scheduler.run(tick_in_process, updates=2000)
    assert report.updates == shared.version == 2000
    assert report.updates_by_worker == [1000, 1000]
    if policy == "locked":
        assert (shared.views["table"] == -2).all()


async def test_it_is_compiled_anew_where_it_is_sent():
    shared = table_of(1000)
    worker = NativeWorker(shared, native_testing.tick, (np.arange(1000),), {"table": 1}, seed=3)
    sent, memory = pickle.loads(pickle.dumps((worker, shared)))
    await run(memory, sent, 1000, **COUNTING)
    assert (memory.views["table"] == -1).all()


async def test_an_order_may_be_made_by_shuffling_in_place():
    shared, samples = table_of(10), np.arange(10)

    def order(generator: np.random.Generator) -> Any:
        generator.shuffle(samples)
        return samples

    await run(shared, ticking(shared, 10, order=order, chunk=15), 150, **COUNTING)
    assert (shared.views["table"] == -15).all()


REFUSED_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"policy": "awaited"}, "policy must be 'lock-free' or .* got 'awaited'"),
    ({"policy": "bounded:2"}, "policy must be .* got 'bounded:2'"),
    ({"read": "snapshot"}, "read must be 'live' for a compiled step.* got 'snapshot'"),
    ({"batch": 2, "depth": 2}, "batch must be 1 for a compiled step.* got 2"),
    ({"deadline": 9.0}, "deadline must be None for a compiled step.* got 9.0"),
    ({"backend": "numpy"}, "backend must be 'numba' for a compiled step, got 'numpy'"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED_SETTINGS)
async def test_settings_that_a_chunk_cannot_keep_are_refused(settings, message):
    shared = table_of(1000)
    with pytest.raises(WorkerError, match=message) as caught:
        await run(shared, ticking(shared), 10, **settings)
    assert isinstance(caught.value.failures[0], SettingError)
    assert shared.version == 0


GOOD: dict[str, Any] = {
    "step": native_testing.tick,
    "samples": (np.arange(5),),
    "tables": {"table": 1},
}
REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"step": 3}, TypeError, "step must be a plain function, got 3"),
    ({"samples": np.arange(5)}, TypeError, "samples must be a tuple of at least one array"),
    ({"samples": ()}, TypeError, "samples must be a tuple of at least one array"),
    ({"samples": ([1, 2],)}, TypeError, r"samples\[0\] must be"),
    ({"samples": (np.arange(5), np.arange(4))}, ValueError, "arrays of one length"),
    ({"samples": (np.arange(0),)}, ValueError, "arrays of one length, at least 1"),
    ({"tables": {}}, ValueError, "tables must name at least one"),
    ({"tables": {"tabel": 1}}, ValueError, "tables must be among before, table, got 'tabel'"),
    ({"shared": table_of(0)}, ValueError, "must have rows and columns, got 'table'"),
    ({"shared": table_of(4, 0)}, ValueError, "must have rows and columns, got 'table'"),
    ({"step": native_testing.no_loss}, TypeError, "step must return a loss, a real number"),
    ({"tables": {"table": 0}}, ValueError, r"tables\['table'\] must be .* got 0"),
    ({"tables": ["table"]}, TypeError, "tables must be"),
    ({"chunk": 0}, ValueError, "chunk must be .* got 0"),
    ({"seed": -1}, ValueError, "seed must be .* got -1"),
    ({"order": 3}, TypeError, "order must be a plain function, got 3"),
    ({"shared": torch.zeros(3)}, TypeError, "shared must be"),
    (
        {"shared": table_of(3, dtype=torch.float16)},
        ValueError,
        "float32 or float64 on a CPU .*float16",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED)
def test_bad_arguments_are_refused(changed, error, message):
    with pytest.raises(error, match=message):
        NativeWorker(**({"shared": table_of(5)} | GOOD | changed))


BAD_ORDERS: list[Any] = [
    np.array([], np.int64),
    np.array([0, 10]),
    np.array([-1]),
    np.array([[0]]),
    np.array([0.0]),
    [np.array([0]), np.array([10])],
    [],
    None,
]


@pytest.mark.parametrize("order", BAD_ORDERS, ids=str)
async def test_an_order_of_samples_that_are_not_there_fails_its_worker(order):
    shared = table_of(10)
    worker = ticking(shared, 10, order=lambda _: order)
    with pytest.raises(WorkerError, match="order must make"):
        await run(shared, worker, 10)
    assert shared.version == 0


async def test_where_a_step_raises_python_s_error_the_lock_is_free_again():
    shared = table_of(10)
    worker = NativeWorker(shared, fail_at_3, (np.arange(10),), {"table": 1}, order=in_turn)
    async with StreamScheduler(shared, workers=1, policy="locked", **COUNTING) as scheduler:
        with pytest.raises(WorkerError):
            await scheduler.run(worker, updates=80)
        await scheduler.run(ticking(shared, 10), updates=10)
    assert shared.version == 13
