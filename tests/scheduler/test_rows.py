"""Updates of rows: the bits of ``sparse_rmsprop_``, and all else as other updates have it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hogstream.scheduler import (
    LinearDecay,
    SettingError,
    SharedParameters,
    StreamScheduler,
    WorkerContext,
    WorkerError,
)
from process_testing import LIMIT_SECONDS
from scheduler_rows import (
    LANES,
    ROW_POLICIES,
    SERIAL,
    VARIANTS,
    WAYS,
    Rows,
    assert_same,
    expected_of,
    make_rows,
    make_shared,
    ones,
    update_in_turn,
)
from scheduler_testing import COUNTING, python_lanes, submit_ones


async def train(shared: SharedParameters, updates: list[Rows], **settings: Any) -> StreamScheduler:
    """One worker that submits updates of rows, one after the other."""

    async def worker(context: WorkerContext) -> None:
        await context.submit_rows(updates[context.iteration])

    async with StreamScheduler(shared, workers=1, **settings) as scheduler:
        report = await scheduler.run(worker, updates=len(updates))
    assert report.updates == shared.version == len(updates)
    return scheduler


# Bits


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("policy", ROW_POLICIES)
@pytest.mark.parametrize("lanes", LANES)
async def test_rows_get_the_bits_of_the_kernel(lanes: str, policy: str, variant: str) -> None:
    if (lanes, policy) == ("python", "row-locked"):
        pytest.skip("such lanes lock no rows")
    shared, updates = make_shared(), [make_rows(seed) for seed in range(6)]
    settings = {**LANES[lanes], **VARIANTS[variant]}
    scheduler = await train(shared, updates, policy=policy, **settings)
    assert_same(shared, expected_of(scheduler, updates))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("lanes", LANES)
async def test_so_they_do_whatever_way_they_go(lanes: str, way: str) -> None:
    if (lanes, way) == ("python", "watched"):
        pytest.skip("such lanes count nothing")
    shared, updates = make_shared(), [make_rows(seed) for seed in range(6)]
    # Of more than one in flight, lr would depend on how stale each is.
    scheduler = await train(shared, updates, **LANES[lanes], **WAYS[way], **VARIANTS["both"])
    assert_same(shared, expected_of(scheduler, updates))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("lanes", ["compiled", "python"])
async def test_rows_of_every_dtype(lanes: str, dtype: torch.dtype) -> None:
    shared, updates = make_shared(dtype), [make_rows(seed, dtype) for seed in range(3)]
    scheduler = await train(shared, updates, **LANES[lanes], momentum=0.5)
    assert_same(shared, expected_of(scheduler, updates, dtype))


async def test_arrays_are_taken_as_tensors_are(backend: str) -> None:
    shared, updates = make_shared(), [make_rows(0)]
    arrays: Any = {
        name: (rows.numpy(), grads.numpy()) for name, (rows, grads) in updates[0].items()
    }
    await train(shared, [arrays], backend=backend)
    one = make_shared()
    await train(one, updates, backend=backend)
    assert_same(shared, one)


async def test_one_table_needs_no_mapping(backend: str) -> None:
    """And its rows may change as soon as they are submitted: lanes have them sorted."""
    shared = make_shared()
    rows, grads = torch.tensor([3, 1, 3]), torch.ones(3, 5)

    async def worker(context: WorkerContext) -> None:
        submitted = rows.clone()
        await context.submit_rows("items", submitted, grads, loss=0.5)
        submitted.fill_(99)

    losses: list[float] = []
    async with StreamScheduler(shared, workers=1, backend=backend, depth=3) as scheduler:
        await scheduler.run(worker, updates=4, on_loss=lambda _, loss: losses.append(loss))
    assert_same(shared, expected_of(scheduler, [{"items": (rows, grads)}] * 4))
    assert losses == [0.5] * 4


async def test_updates_of_rows_and_of_all_take_turns(backend: str) -> None:
    """All rows of all tables, each once, are what a dense update updates."""
    shapes = {"a": (7, 3), "b": (5,)}
    shared, dense = (SharedParameters({n: torch.ones(s) for n, s in shapes.items()}) for _ in "12")
    grad = torch.randn(dense.elements, generator=torch.Generator().manual_seed(0))
    of_rows: Rows = {
        name: (torch.arange(len(view)), view.reshape(len(view), -1))
        for name, view in dense.views_of(grad).items()
    }
    schedule = LinearDecay(0.1, updates=8)

    async def take_turns(context: WorkerContext) -> None:
        if context.iteration % 2:
            await context.submit(grad)
        else:
            await context.submit_rows(of_rows)

    async def only_dense(context: WorkerContext) -> None:
        await context.submit(grad)

    for each, worker in ((shared, take_turns), (dense, only_dense)):
        async with StreamScheduler(
            each, workers=1, backend=backend, momentum=0.5, weight_decay=0.1
        ) as scheduler:
            scheduler.hyperparameters = replace(scheduler.hyperparameters, alpha=0.9)
            await scheduler.run(worker, updates=8, lr_schedule=schedule)
    assert_same(shared, dense)


@pytest.mark.parametrize("decoupled", [False, True])
async def test_lr_is_divided_by_staleness(backend: str, decoupled: bool) -> None:
    """Worker 0 reads first and lands last: with a staleness of 3 its step is a third."""
    shared, mine, others = make_shared(), make_rows(0), make_rows(1)
    options: dict[str, Any] = {"weight_decay": 0.1, "decoupled_weight_decay": decoupled}
    others_landed = asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            await others_landed.wait()
        await context.submit_rows(others if context.index else mine)
        if context.iteration == 2:
            others_landed.set()

    async with StreamScheduler(
        shared, workers=2, staleness_aware=True, backend=backend, lr=0.3, **options
    ) as scheduler:
        report = await scheduler.run(worker, updates=4)
    assert dict(report.staleness) == {0: 3, 3: 1}
    expected = make_shared()
    update_in_turn(expected, expected.state, [others] * 3, lr=0.3, **options)
    update_in_turn(expected, expected.state, [mine], lr=0.3 / 3, **options)
    assert_same(shared, expected)


# What is counted


async def test_of_several_tables_it_is_one_update(backend: str) -> None:
    shared = make_shared()
    rows = make_rows(0)

    async def worker(context: WorkerContext) -> None:
        assert context.read_version == shared.version == context.iteration
        await context.submit_rows(rows)

    async with StreamScheduler(shared, workers=1, backend=backend) as scheduler:
        report = await scheduler.run(worker, updates=3)
    assert (report.updates, shared.version, dict(report.staleness)) == (3, 3, {0: 3})


@pytest.mark.parametrize("rows", [{"items": []}, {"items": [], "biases": [3]}, {"empty": [1]}])
async def test_of_no_rows_nothing_happens_but_a_landing(
    backend: str, rows: dict[str, list[int]]
) -> None:
    widths = {"items": 5, "biases": 1, "empty": 0}
    shared, before = make_shared(), make_shared()
    update = {name: ones(each, widths[name]) for name, each in rows.items()}
    telemetry = backend == "numba"
    await train(shared, [update] * 2, backend=backend, weight_decay=0.5, telemetry=telemetry)
    reached = shared.flat.ne(before.flat) | shared.ms.ne(0)
    names = {name for name, view in shared.views_of(reached).items() if view.any()}
    assert names == {"biases"} & rows.keys()
    assert reached.sum() == len(names)
    if telemetry:
        assert shared.row_versions is not None
        assert shared.row_versions.count_nonzero() == len(names)


@pytest.mark.parametrize("policy", ROW_POLICIES)
@pytest.mark.parametrize("depth", [1, 4])
async def test_racing_updates_are_all_counted(backend: str, policy: str, depth: int) -> None:
    """With these numbers a row subtracts 1 for each of its updates that is not lost."""
    if (backend, policy) == ("numpy", "row-locked"):
        pytest.skip("such lanes lock no rows")
    table, updates = 24, 400
    shared = SharedParameters({"p": torch.zeros(table, 40)})
    touched = torch.zeros(table)
    chances = [np.random.default_rng(worker) for worker in range(4)]

    async def worker(context: WorkerContext) -> None:
        rows = torch.from_numpy(chances[context.index].integers(0, table, 16))
        await context.submit_rows("p", rows, torch.ones(16, 40))
        touched[rows.unique()] += 1

    async with StreamScheduler(
        shared, workers=4, policy=policy, backend=backend, depth=depth, **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=updates)
    assert report.updates == shared.version == sum(report.staleness.values()) == updates
    counted = -shared.views["p"]
    assert (counted <= touched[:, None]).all()
    if policy in SERIAL:
        assert torch.equal(counted, touched[:, None].expand_as(counted))


@pytest.mark.parametrize("policy", ["lock-free", "row-locked"])
async def test_counters_show_what_racing_rows_lose(policy: str) -> None:
    """In blocks of one element; where no updates overlapped, all of them are counted there."""
    rows, width = 16, 128
    shared = SharedParameters({"first": torch.zeros(3), "p": torch.zeros(rows, width)})
    shared.count_races(1)
    every = torch.arange(rows)
    grads = torch.ones(rows, width)

    async def worker(context: WorkerContext) -> None:
        await context.submit_rows("p", every, grads)

    async with StreamScheduler(
        shared, workers=4, policy=policy, telemetry=True, depth=16, **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=2000)
    assert report.block_updates == 2000 * rows
    assert shared.races is not None
    landed, survived, overwritten = shared.races.counts[:, 3:].view(3, rows, width)[:, :, 0]
    assert landed.tolist() == [2000] * rows
    assert (landed - survived <= overwritten).all()
    safe = overwritten == 0
    assert torch.equal(-shared.views["p"][safe].amin(1), landed[safe].float())
    if policy == "row-locked":
        assert report.lost_block_updates == report.overwritten_block_updates == 0
        assert safe.all()


async def test_rows_are_locked_and_counted_by_the_same_blocks() -> None:
    """With no counters before, telemetry finds nothing lost, however narrow rows are."""
    shared = SharedParameters({"p": torch.zeros(200, 3)})
    rows = [torch.arange(index, 200, 2) for index in range(2)]

    async def worker(context: WorkerContext) -> None:
        await context.submit_rows("p", rows[context.index % 2], torch.ones(100, 3))

    async with StreamScheduler(
        shared, workers=4, policy="row-locked", telemetry=True, depth=8, **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=1000)
    assert report.block_updates == 1000 * -(-600 // 64)
    assert report.lost_block_updates == report.overwritten_block_updates == 0


# Stale rows


async def test_stale_rows_by_hand() -> None:
    """Worker 0 reads first, then worker 1 changes rows twice, and reads before worker 0 lands.

    Each update is of version: 1, rows 1 and 2 of a; 2, rows 0 and 2 of b; 3, that of worker 0, of
    which row 1 of a and row 0 of b were changed since its read; and 4, that has read version 2, and
    of which version 3 has changed row 0 of a.
    """
    shared = SharedParameters({"a": torch.zeros(4, 2), "b": torch.zeros(3)})
    has_read, has_changed, has_landed = (asyncio.Event() for _ in range(3))

    async def worker_0(context: WorkerContext) -> None:
        has_read.set()
        await has_changed.wait()
        await context.submit_rows({"a": ones([1, 3, 1, 0], 2), "b": ones([0], 1)})
        has_landed.set()

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            await worker_0(context)
        elif context.iteration == 0:
            await has_read.wait()
            await context.submit_rows("a", *ones([1, 2], 2))
        elif context.iteration == 1:
            await context.submit_rows("b", *ones([0, 2], 1))
            has_changed.set()
        else:
            await has_landed.wait()
            await context.submit_rows({"a": ones([0, 2], 2), "b": ones([1], 1)})

    async with StreamScheduler(shared, workers=2, telemetry=True) as scheduler:
        report = await scheduler.run(worker, updates=4)
        assert shared.row_versions is not None
        assert shared.row_versions.tolist() == [4, 3, 4, 3, 3, 4, 2]
        assert (report.rows, report.stale_rows) == (2 + 2 + 4 + 3, 0 + 0 + 2 + 1)
        assert report.to_dict()["stale_rows_fraction"] == 3 / 11
        dense = await scheduler.run(submit_ones(shared), updates=2)
    assert (dense.rows, dense.stale_rows, dense.stale_rows_fraction) == (0, 0, None)


async def test_without_telemetry_no_stale_row_is_counted(backend: str) -> None:
    shared, updates = make_shared(), [make_rows(0)]
    scheduler = await train(shared, updates, backend=backend)
    assert shared.row_versions is None
    assert scheduler.report is not None
    assert scheduler.report.rows is scheduler.report.stale_rows is None
    assert scheduler.report.to_dict()["stale_rows_fraction"] is None


# Waits, and what goes wrong


async def give_up(wait: Coroutine[Any, Any, None]) -> None:
    """Cancels a wait that has begun."""
    task = asyncio.create_task(wait)
    for _ in range(10):
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_a_wait_for_the_bound_that_is_cancelled_takes_the_update_back(backend: str) -> None:
    """Worker 0 has read, so worker 1 may make one update; at its next it waits, and gives up."""
    shared = SharedParameters({"p": torch.zeros(3, 2)})
    inside, given_up = asyncio.Event(), asyncio.Event()

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            inside.set()
            await given_up.wait()
        elif context.iteration == 0:
            await inside.wait()
        else:
            await give_up(context.submit_rows("p", *ones([1], 2)))
            given_up.set()
        await context.submit_rows("p", *ones([2 * context.index], 2))

    async with StreamScheduler(
        shared, workers=2, policy="bounded:1", backend=backend, **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=3)
    assert report.updates == shared.version == 3
    assert shared.views["p"].tolist() == [[-1, -1], [0, 0], [-2, -2]]


async def test_a_wait_for_the_lock_that_is_cancelled_takes_the_update_back() -> None:
    """Worker 0 has it, until the test lets its update land; worker 1 gives up, and tries again."""
    shared = SharedParameters({"p": torch.zeros(3, 2)})
    inside, may_land = threading.Event(), threading.Event()

    def kernel(update: Callable[..., Any], *operands: Any) -> None:
        inside.set()
        assert may_land.wait(LIMIT_SECONDS)
        update(*operands)

    async def worker(context: WorkerContext) -> None:
        if context.index == 0:
            await context.submit(torch.ones(6))
            return
        await context.run_blocking(inside.wait, LIMIT_SECONDS)
        await give_up(context.submit_rows("p", *ones([1], 2)))
        may_land.set()
        await context.submit_rows("p", *ones([2], 2))

    async with python_lanes(shared, kernel, workers=2, policy="awaited", **COUNTING) as scheduler:
        report = await scheduler.run(worker, updates=2)
    assert report.updates == shared.version == 2
    assert shared.views["p"].tolist() == [[-1, -1], [-1, -1], [-2, -2]]


@pytest.mark.parametrize("on_nonfinite", ["apply", "skip", "raise"])
async def test_gradients_that_are_not_finite(backend: str, on_nonfinite: str) -> None:
    """One element of one table leaves the whole update out."""
    shared = SharedParameters({"a": torch.zeros(4, 3), "b": torch.zeros(4)})
    spoiled = torch.ones(1, 1)
    spoiled[0, 0] = float("inf")

    async def worker(context: WorkerContext) -> None:
        of_b = (torch.tensor([1]), spoiled) if context.iteration else ones([2], 1)
        await context.submit_rows({"a": ones([context.iteration], 3), "b": of_b})

    async with StreamScheduler(
        shared, workers=1, backend=backend, on_nonfinite=on_nonfinite, **COUNTING
    ) as scheduler:
        if on_nonfinite == "raise":
            with pytest.raises(WorkerError, match="a gradient held an infinity or NaN"):
                await scheduler.run(worker, updates=2)
        else:
            await scheduler.run(worker, updates=2)
    report, applied = scheduler.report, on_nonfinite == "apply"
    assert report is not None
    assert (report.updates, report.nonfinite) == (1 + applied, [1 - applied])
    assert shared.views["a"][:, 0].tolist() == [-1, -applied, 0, 0]
    assert shared.views["b"].isnan().tolist() == [False, applied, False, False]


def overlapping(shared: SharedParameters) -> Any:
    """Gradients in the memory of another table."""
    return {"biases": (torch.tensor([0, 1]), shared.views["cubes"].view(-1)[:2].view(2, 1))}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (({},), ValueError, "name must map at least one table to its rows and gradients, got none"),
        (({"biases": 1},), TypeError, "name must map biases to a tuple of rows and gradients, got"),
        (({"x": ones([0], 1)},), ValueError, "name must be that of a shared parameter, got 'x'"),
        ((3, *ones([0], 1)), ValueError, "name must be that of a shared parameter, got 3"),
        ((["biases"],), ValueError, r"name must be that of a shared parameter, got \['biases'\]"),
        (("scalar", *ones([0], 1)), ValueError, "name must be that of a parameter of an axis or"),
        (({"biases": ones([0], 1)}, 1), TypeError, "rows and grads must be left out where name"),
        (("biases",), TypeError, "the rows of biases must be a NumPy array or a torch tensor"),
        (("biases", torch.tensor([0])), TypeError, "the gradients of biases must be a NumPy"),
        (("biases", *ones([3, 30], 1)), IndexError, "the rows of biases must be >= 0 and < 30"),
        (("biases", *ones([-1], 1)), IndexError, "the rows of biases must be >= 0 .*, got -1 at 0"),
        (
            ("biases", torch.tensor([0.0]), torch.ones(1, 1)),
            TypeError,
            "the rows of biases must be int32 or int64, got float32",
        ),
        (
            ("biases", torch.tensor([[0]]), torch.ones(1, 1)),
            ValueError,
            r"the rows of biases must be dense and have shape \(k,\)",
        ),
        (
            ("items", *ones([0, 1], 4)),
            ValueError,
            r"the gradients of items must be dense and have shape \(2, 5\), got",
        ),
        (
            ("items", torch.tensor([0]), torch.ones(1, 5, dtype=torch.float64)),
            TypeError,
            "the gradients of items must be float32 as the table, got float64",
        ),
        (
            ("items", torch.tensor([0, 1]), torch.ones(5, 2).t()),
            ValueError,
            "the gradients of items must be contiguous",
        ),
        (
            ("items", torch.tensor([0]), torch.ones(1, 5, device="meta")),
            ValueError,
            "the gradients of items must be on cpu as the table, got meta",
        ),
        (
            (overlapping,),
            ValueError,
            "the gradients of biases must not overlap the shared parameters or their state",
        ),
        (({"biases": ones([0], 1), "x": ones([0], 1)},), ValueError, "got 'x'"),
        (("biases", *ones([0], 1), "much"), TypeError, "loss must be a number or None, got 'much'"),
    ],
)
async def test_what_cannot_be_is_refused_and_nothing_changes(
    backend: str, arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    shared, before = make_shared(), make_shared()

    async def worker(context: WorkerContext) -> None:
        given = [each(shared) if callable(each) else each for each in arguments]
        with pytest.raises(error, match=message):
            await context.submit_rows(*given)
        assert_same(shared, before)
        await context.submit_rows("biases", *ones([0], 1))  # as nothing was submitted

    async with StreamScheduler(shared, workers=1, backend=backend) as scheduler:
        await scheduler.run(worker, updates=1)
    assert shared.version == 1


async def test_an_iteration_submits_once(backend: str) -> None:
    shared = make_shared()

    async def worker(context: WorkerContext) -> None:
        await context.submit_rows("biases", *ones([0], 1))
        with pytest.raises(RuntimeError, match="got a second call, of submit_rows"):
            await context.submit_rows("biases", *ones([0], 1))

    async with StreamScheduler(shared, workers=1, backend=backend) as scheduler:
        await scheduler.run(worker, updates=1)


async def test_what_computes_returns_no_rows(backend: str) -> None:
    shared = make_shared()

    async def worker(context: WorkerContext) -> None:
        await context.compute(lambda: ({"biases": ones([0], 1)}, None))  # type: ignore[dict-item]

    message = "the gradient of biases must be a torch tensor, got tuple: rows go by submit_rows"
    async with StreamScheduler(shared, workers=1, backend=backend) as scheduler:
        with pytest.raises(WorkerError, match=message):
            await scheduler.run(worker, updates=1)
    assert shared.version == 0


@pytest.mark.parametrize("by", ["submit", "several", "compute"])
async def test_a_policy_that_locks_rows_takes_no_other_updates(by: str) -> None:
    shared = make_shared()
    grad = torch.ones(shared.elements)

    async def worker(context: WorkerContext) -> None:
        if by == "compute":
            await context.compute(lambda: (grad, None))
        else:
            await context.submit([grad, grad] if by == "several" else grad)

    async with StreamScheduler(shared, workers=1, policy="row-locked") as scheduler:
        with pytest.raises(WorkerError, match="grad must be of rows, by submit_rows, with policy="):
            await scheduler.run(worker, updates=2)
    assert_same(shared, make_shared())


async def test_lanes_in_python_lock_no_rows() -> None:
    with pytest.raises(SettingError, match="policy must be another than row-locked with backend"):
        StreamScheduler(make_shared(), workers=1, policy="row-locked", backend="numpy")


# Reads


@pytest.mark.parametrize("policy", ROW_POLICIES)
@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("read", ["live", "snapshot"])
async def test_rows_are_read(lanes: str, policy: str, read: str) -> None:
    """After the worker's own updates before; several at once, and beside whole snapshots."""
    if (lanes, policy) == ("python", "row-locked"):
        pytest.skip("such lanes lock no rows")
    shared = make_shared()
    rows = torch.tensor([5, 0, 5], dtype=torch.int32)

    async def worker(context: WorkerContext) -> None:
        assert torch.equal(context.flat, shared.flat)
        cubes = shared.views["cubes"].view(6, 33)
        before = cubes.clone()
        names = ["cubes", "biases", "empty"]
        of_cubes, of_biases, of_empty = await asyncio.gather(
            *(context.read_rows(name, rows % 4) for name in names)
        )
        assert torch.equal(of_cubes, before[rows % 4])
        assert torch.equal(of_biases, shared.views["biases"][rows % 4].view(3, 1))
        assert of_empty.shape == (3, 0)
        await context.submit_rows("cubes", *ones([1], 33))
        assert torch.equal(await context.read_rows("cubes", np.array([1])), cubes[1:2])
        assert cubes[1].ne(before[1]).all()
        assert torch.equal(of_cubes, before[rows % 4])  # which is a copy

    async with StreamScheduler(
        shared, workers=1, policy=policy, read=read, **LANES[lanes]
    ) as scheduler:
        await scheduler.run(worker, updates=4)


@pytest.mark.parametrize("policy", SERIAL)
async def test_a_row_that_is_read_is_of_one_version(backend: str, policy: str) -> None:
    """Updates subtract 1 from each element of all rows; under a lock of all, rows are alike too."""
    if (backend, policy) == ("numpy", "row-locked"):
        pytest.skip("such lanes lock no rows")
    shared = SharedParameters({"p": torch.zeros(2, 1 << 18)})
    every, grads = torch.arange(2), torch.ones(2, 1 << 18)

    async def worker(context: WorkerContext) -> None:
        if context.index < 2:
            read = await context.read_rows("p", every)
            assert read.eq(read[:, :1]).all()
            assert policy == "row-locked" or read.eq(read[0, 0]).all()
        await context.submit_rows("p", every, grads)

    async with StreamScheduler(
        shared, workers=4, policy=policy, backend=backend, depth=3, **COUNTING
    ) as scheduler:
        await scheduler.run(worker, updates=100)
    assert shared.flat.eq(-100).all()


@pytest.mark.parametrize(
    ("name", "rows", "error", "message"),
    [
        ("x", torch.tensor([0]), ValueError, "name must be that of a shared parameter, got 'x'"),
        ("items", torch.tensor([40]), IndexError, "the rows of items must be >= 0 and < 40"),
        ("items", [1], TypeError, "the rows of items must be a NumPy array or a torch tensor"),
    ],
)
async def test_rows_that_cannot_be_read(
    backend: str, name: str, rows: Any, error: type[Exception], message: str
) -> None:
    shared = make_shared()
    kept: list[WorkerContext] = []

    async def worker(context: WorkerContext) -> None:
        kept.append(context)
        with pytest.raises(error, match=message):
            await context.read_rows(name, rows)
        await context.submit_rows("biases", *ones([0], 1))

    async with StreamScheduler(shared, workers=1, backend=backend) as scheduler:
        await scheduler.run(worker, updates=1)
        with pytest.raises(RuntimeError, match="must call read_rows while its run goes on"):
            await kept[0].read_rows("items", torch.tensor([0]))
