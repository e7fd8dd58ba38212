"""Updates of some parameters: the others stay as they are, and what is counted is counted once."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch

from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerContext, WorkerError
from scheduler_testing import COUNTING, POLICIES

#: Of shapes that neither start nor end where a block of race counters does, one of them empty.
SIZES = {"a": 3, "b": 20_000, "empty": 0, "c": 5, "d": 9_000}


def make_shared() -> SharedParameters:
    return SharedParameters({name: torch.ones(size) for name, size in SIZES.items()})


def moved(shared: SharedParameters) -> set[str]:
    """Names of those of which each element has moved; the others are as they were."""
    whole = {
        name for name, view in shared.views.items() if view.numel() and bool((view != 1).all())
    }
    for name in shared.views.keys() - whole:
        assert shared.views[name].eq(1).all()
        assert shared.views_of(shared.ms)[name].eq(0).all()
    return whole


@pytest.mark.parametrize("on_nonfinite", ["apply", "raise"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    "only",
    [["a"], ["b", "a"], {"a", "c"}, ("d", "b", "empty"), {"a": 1, "b": 2, "c": 3, "d": 4}.keys()],
    ids=["first", "neighbours", "apart", "with empty", "all"],
)
async def test_the_others_are_left_alone(
    backend: str, policy: str, only: Collection[str], on_nonfinite: str
) -> None:
    """No decay moves them, nor what the gradient holds for them."""
    names = set(only)
    shared = make_shared()
    expected = make_shared().flat.numpy()
    grad = torch.full((shared.elements,), float("nan"))
    views = shared.views_of(grad)
    for name in names:
        views[name].fill_(2.0)
    reached = ~np.isnan(grad.numpy())
    options: dict[str, Any] = {"lr": 0.125, "alpha": 0.0, "eps": 0.0, "weight_decay": 1.0}

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad, only=only)

    async with StreamScheduler(
        shared, backend=backend, workers=1, policy=policy, on_nonfinite=on_nonfinite, **options
    ) as scheduler:
        report = await scheduler.run(worker, updates=3)
    for _ in range(3):
        expected[reached] -= 0.125  # g / sqrt(g * g), whatever g is
    assert moved(shared) == names - {"empty"}
    np.testing.assert_array_equal(shared.flat.numpy(), expected)
    assert (report.updates, shared.version, dict(report.staleness)) == (3, 3, {0: 3})


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton compiles here")
async def test_triton_updates_the_same(backend: str) -> None:
    """Its kernel for several parts is another one."""
    states = []
    for name in (backend, "triton"):
        shared = make_shared()
        grad = torch.randn(shared.elements, generator=torch.Generator().manual_seed(0))

        async def worker(context: WorkerContext, grad: torch.Tensor = grad) -> None:
            await context.submit(grad, only=["a", "c", "d"])

        async with StreamScheduler(shared, backend=name, workers=1, weight_decay=0.1) as scheduler:
            await scheduler.run(worker, updates=2)
        assert moved(shared) == {"a", "c", "d"}
        states.append(shared)
    assert torch.equal(states[0].flat, states[1].flat)
    assert torch.equal(states[0].ms, states[1].ms)


async def test_a_gradient_serves_one_set_of_names_after_the_other(backend: str) -> None:
    """More sets than are kept, of one gradient."""
    names = [f"p{index}" for index in range(100)]
    shared = SharedParameters({name: torch.zeros(2) for name in names})
    grad = torch.ones(shared.elements)

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad, only=names[: context.iteration % 100 + 1] or None)

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=200)
    counts = [int(-shared.views[name][0]) for name in names]
    assert counts == [2 * (100 - index) for index in range(100)]


async def test_a_part_that_is_not_finite_leaves_out_the_whole_update(backend: str) -> None:
    shared = make_shared()
    grad = torch.ones(shared.elements)
    shared.views_of(grad)["d"][-1] = float("inf")

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad, only=["a", "c", "d"] if context.iteration else ["b"])

    async with StreamScheduler(
        shared, backend=backend, workers=1, on_nonfinite="skip", **COUNTING
    ) as scheduler:
        report = await scheduler.run(worker, updates=2)
    assert moved(shared) == {"b"}
    assert (report.updates, report.nonfinite) == (1, [1])


async def test_races_are_counted_in_the_blocks_that_a_part_touches() -> None:
    shared = make_shared()
    block = shared.count_races(1 << 13).block
    names = ["a", "c", "d"]
    starts = dict(zip(SIZES, np.cumsum([0, *SIZES.values()]).tolist(), strict=False))
    runs = [("a", "a"), ("c", "d")]
    touched = [
        set(range(starts[first] // block, (starts[last] + SIZES[last] - 1) // block + 1))
        for first, last in runs
    ]
    grad = torch.ones(shared.elements)

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad, only=names)

    async with StreamScheduler(shared, workers=3, policy="locked", telemetry=True) as scheduler:
        report = await scheduler.run(worker, updates=30)
    assert shared.races is not None
    expected = [sum(30 for blocks in touched if each in blocks) for each in range(4)]
    assert shared.races.counts.tolist() == [expected, expected, [0] * 4]
    assert report.lost_updates_fraction == 0


async def test_counters_show_what_racing_parts_lose() -> None:
    """Elements of the parameters count those that survived; where nothing overlapped, all did."""
    shared = SharedParameters({name: torch.zeros(1 << 15) for name in "abc"})
    grads = [torch.ones(shared.elements) for _ in range(4)]

    async def worker(context: WorkerContext) -> None:
        await context.submit(grads[context.index], only=["a", "c"])

    async with StreamScheduler(shared, workers=4, telemetry=True, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=400)
    assert shared.races is not None
    landed, survived, overwritten = shared.races.counts
    by_block = shared.views["a"].numel() // shared.races.block
    assert landed.tolist() == [400] * by_block + [0] * by_block + [400] * by_block
    assert torch.all(landed - survived <= overwritten)
    counted = -shared.flat.view(-1, shared.races.block)
    assert torch.equal(counted[overwritten == 0].amin(1), landed[overwritten == 0].float())


@pytest.mark.parametrize(
    ("only", "error", "message"),
    [
        ([], ValueError, "only must name at least one parameter, got none"),
        (["x"], ValueError, "only must name shared parameters, got 'x', which are none"),
        (["a", "y", "x"], ValueError, "got 'x', 'y', which are none"),
        ("a", TypeError, "only must be a collection of names or None, got 'a'"),
        (3, TypeError, "only must be a collection of names or None, got 3"),
    ],
)
async def test_names_that_cannot_be_are_refused_and_nothing_changes(
    backend: str, only: Any, error: type[Exception], message: str
) -> None:
    shared = make_shared()
    grad = torch.ones(shared.elements)

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad, only=only)

    async with StreamScheduler(shared, backend=backend, workers=1) as scheduler:
        with pytest.raises(WorkerError, match=message) as caught:
            await scheduler.run(worker, updates=1)
    assert isinstance(caught.value.failures[0], error)
    assert moved(shared) == set()
    assert shared.version == 0
