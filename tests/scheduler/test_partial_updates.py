"""Updates of some parameters: the others stay as they are, and what is counted is counted once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerContext, WorkerError
from scheduler_testing import COUNTING, POLICIES, part_of

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
    [["a"], ["b", "a"], ["a", "c"], ["d", "b", "empty"], ["a", "b", "c", "d"]],
    ids=["first", "neighbours", "apart", "with empty", "all"],
)
@pytest.mark.parametrize("views", [True, False], ids=["views", "apart"])
async def test_the_others_are_left_alone(
    backend: str, policy: str, only: list[str], on_nonfinite: str, views: bool
) -> None:
    """No decay moves them, nor what is beside the gradients in memory."""
    names = set(only)
    shared = make_shared()
    expected = make_shared().flat.numpy()
    grad = torch.full((shared.elements,), float("nan"))
    of_flat = shared.views_of(grad)
    for name in names:
        of_flat[name].fill_(2.0)
    grads = {name: of_flat[name] if views else of_flat[name].clone() for name in only}
    reached = ~np.isnan(grad.numpy())
    options: dict[str, Any] = {"lr": 0.125, "alpha": 0.0, "eps": 0.0, "weight_decay": 1.0}

    async def worker(context: WorkerContext) -> None:
        await context.submit(grads)

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

        grads = part_of(shared, grad, ["a", "c", "d"])

        async def worker(context: WorkerContext, grads: Any = grads) -> None:
            await context.submit(grads)

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
        await context.submit(part_of(shared, grad, names[: context.iteration % 100 + 1]))

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=200)
    counts = [int(-shared.views[name][0]) for name in names]
    assert counts == [2 * (100 - index) for index in range(100)]


async def test_a_part_that_is_not_finite_leaves_out_the_whole_update(backend: str) -> None:
    shared = make_shared()
    grad = torch.ones(shared.elements)
    grad[-1] = float("inf")

    async def worker(context: WorkerContext) -> None:
        names = ["a", "c", "d"] if context.iteration else ["b"]
        await context.submit(part_of(shared, grad, names))

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
        await context.submit(part_of(shared, grad, names))

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
        await context.submit(part_of(shared, grads[context.index], ["a", "c"]))

    async with StreamScheduler(shared, workers=4, telemetry=True, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=400)
    assert shared.races is not None
    landed, survived, overwritten = shared.races.counts
    by_block = shared.views["a"].numel() // shared.races.block
    assert landed.tolist() == [400] * by_block + [0] * by_block + [400] * by_block
    assert torch.all(landed - survived <= overwritten)
    counted = -shared.flat.view(-1, shared.races.block)
    assert torch.equal(counted[overwritten == 0].amin(1), landed[overwritten == 0].float())


@pytest.mark.parametrize("worker_state", [False, True], ids=["shared", "per worker"])
async def test_gradients_of_layers_are_taken_where_they_are(
    backend: str, worker_state: bool
) -> None:
    """Of any shape, in any order, new ones each time: against updates of a flat gradient."""
    shapes = {"first": (3, 4), "scalar": (), "none": (0, 2), "last": (2, 1, 5)}
    zeros = {name: torch.zeros(shape) for name, shape in shapes.items()}
    options: dict[str, Any] = {
        "state": "per-worker" if worker_state else "shared",
        "momentum": 0.5,
        "centered": True,
    }

    async def trained(*, by_name: bool) -> SharedParameters:
        shared = SharedParameters(zeros)
        generator = torch.Generator().manual_seed(0)

        async def worker(context: WorkerContext) -> None:
            grad = torch.randn(shared.elements, generator=generator)
            views = shared.views_of(grad)
            named = {name: views[name].clone() for name in reversed(views)}
            await context.submit(named if by_name else grad)

        async with StreamScheduler(shared, backend=backend, workers=1, **options) as scheduler:
            await scheduler.run(worker, updates=20)
        return shared

    one, other = await trained(by_name=True), await trained(by_name=False)
    assert torch.equal(one.flat, other.flat)
    for kind, tensor in (other.worker_state or other.state).named().items():
        assert torch.equal((one.worker_state or one.state).named()[kind], tensor)
        assert tensor.ne(0).all()
    assert one.version == other.version == 20


def overlapping(shared: SharedParameters) -> dict[str, torch.Tensor]:
    return {"b": torch.ones(20_000), "a": shared.flat[1:4]}


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ({}, ValueError, "grad must hold at least one gradient by name, got none"),
        (
            {"x": torch.ones(3)},
            ValueError,
            "grad must name shared parameters, got 'x', which are none",
        ),
        ({"a": torch.ones(3), "y": 1, 3: 1}, ValueError, "got 'y', 3, which are none"),
        ({"a": 1.0}, TypeError, "the gradient of a must be a torch tensor, got float"),
        ({"a": None}, TypeError, "the gradient of a must be a torch tensor, got NoneType"),
        (
            {"a": torch.ones(2)},
            ValueError,
            r"the gradient of a must have the shape of param, \(3,\), got \(2,\)",
        ),
        (
            {"a": torch.ones(3, dtype=torch.float64)},
            TypeError,
            "the gradient of a must be float32 as param, got float64",
        ),
        (
            {"a": torch.ones(6)[::2]},
            ValueError,
            r"the gradient of a must be contiguous, got strides \(2,\)",
        ),
        (
            {"a": torch.ones(3).to_sparse()},
            ValueError,
            "the gradient of a must be dense, got layout sparse_coo",
        ),
        (
            overlapping,
            ValueError,
            "the gradient of a must not overlap the shared parameters or their state",
        ),
        ("a", TypeError, "grad must be a torch tensor, got str"),
    ],
)
async def test_gradients_that_cannot_be_are_refused_and_nothing_changes(
    backend: str, grads: Any, error: type[Exception], message: str
) -> None:
    shared = make_shared()

    async def worker(context: WorkerContext) -> None:
        await context.submit(grads(shared) if callable(grads) else grads)

    async with StreamScheduler(shared, backend=backend, workers=1) as scheduler:
        with pytest.raises(WorkerError, match=message) as caught:
            await scheduler.run(worker, updates=1)
    assert isinstance(caught.value.failures[0], error)
    assert moved(shared) == set()
    assert shared.version == 0


async def test_what_is_only_negative_by_a_bit_is_taken_as_it_is(backend: str) -> None:
    shared = SharedParameters({"a": torch.zeros(2)})
    grad = torch._neg_view(torch.ones(2))  # as that of a conjugate's imaginary part is

    async def worker(context: WorkerContext) -> None:
        await context.submit({"a": grad})

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=1)
    assert shared.flat.tolist() == [1.0, 1.0]


async def test_gradients_side_by_side_may_be_of_parameters_that_are_not(backend: str) -> None:
    shared = SharedParameters({name: torch.zeros(4) for name in "abc"})
    grads = torch.ones(8)

    async def worker(context: WorkerContext) -> None:
        await context.submit({"a": grads[:4], "c": grads[4:]})

    async with StreamScheduler(shared, backend=backend, workers=1, **COUNTING) as scheduler:
        await scheduler.run(worker, updates=3)
    assert [shared.views[name].unique().tolist() for name in "abc"] == [[-3], [0], [-3]]
