from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hogstream.kernels import rmsprop_
from hogstream.scheduler import (
    ModelWorker,
    SharedParameters,
    SimulatedWorker,
    StreamScheduler,
    WorkerContext,
    WorkerError,
)
from model_testing import PlainLoop, classified, make_classifier, one_thread, points

Batch = tuple[torch.Tensor, torch.Tensor]
Loss = Callable[[torch.nn.Module, Any], torch.Tensor]
#: With these and float64, an update subtracts its gradient: ms stays near 0, as gradients weigh
#: 1 - alpha = 2**-53, that the divisor is sqrt(eps) = 1.
SUBTRACTING: dict[str, Any] = {"lr": 1.0, "alpha": 1 - 2**-53, "eps": 1.0}
OPTIONS: dict[str, Any] = {"lr": 0.01, "eps": 0.01}


def make_model(hidden: int = 8) -> torch.nn.Sequential:
    torch.manual_seed(0)
    first, last = torch.nn.Linear(4, hidden), torch.nn.Linear(hidden, 1)
    return torch.nn.Sequential(first, torch.nn.Tanh(), last)


def make_large() -> torch.nn.Sequential:
    """Its gradients are not copied: each is submitted where the backward has left it."""
    return make_model(10_000)


def make_batches(seed: int = 1) -> Iterator[Batch]:
    """A linear function to learn."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        x = torch.randn(16, 4, generator=generator)
        yield x, x.sum(dim=1, keepdim=True)


def squared_error(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    x, y = batch
    error: torch.Tensor = model(x) - y
    return (error**2).mean()


def noted(loss: Loss, losses: list[float]) -> Loss:
    """A loss that notes its values."""

    def note(model: torch.nn.Module, batch: Any) -> torch.Tensor:
        value = loss(model, batch)
        losses.append(value.item())
        return value

    return note


@pytest.mark.parametrize(("make", "depth"), [(make_model, 1), (make_model, 2), (make_large, 1)])
async def test_one_model_worker_trains_like_a_plain_loop(
    make: Callable[[], torch.nn.Module], depth: int
) -> None:
    """With depth 2 an iteration reads parameters that may lack the update in flight."""
    model, plain = make(), make()
    shared = SharedParameters.from_module(model)
    losses: list[float] = []
    worker = ModelWorker(shared, model, noted(squared_error, losses), make_batches())
    async with StreamScheduler(shared, workers=1, depth=depth, **OPTIONS) as scheduler:
        await scheduler.run(worker, updates=100)

    batches = make_batches()
    mss = [torch.zeros_like(parameter) for parameter in plain.parameters()]
    plain_losses = []
    for _ in range(100):
        plain.zero_grad()
        loss = squared_error(plain, next(batches))
        loss.backward()
        plain_losses.append(loss.item())
        for parameter, ms in zip(plain.parameters(), mss, strict=True):
            assert parameter.grad is not None
            rmsprop_(parameter, parameter.grad, ms, **OPTIONS)
    if depth == 1:
        assert losses == plain_losses
        for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    else:
        assert losses[-1] == pytest.approx(plain_losses[-1], rel=0.5)


@pytest.mark.parametrize("outputs", [1, 40_000], ids=["copied", "in place"])
async def test_gradient_in_flight_is_not_made_anew(outputs: int) -> None:
    """The first update is held back until the worker is at its second gradient."""
    second = threading.Event()

    def loss(model: torch.nn.Module, x: float) -> torch.Tensor:
        if x == 2.0:
            second.set()
        return x * model.weight.sum()  # type: ignore[operator]

    model = torch.nn.Linear(1, outputs, bias=False, dtype=torch.float64)
    torch.nn.init.zeros_(model.weight)
    shared = SharedParameters.from_module(model)
    async with StreamScheduler(shared, workers=1, depth=2, **SUBTRACTING) as scheduler:
        kernel = scheduler.backend.kernel

        def hold(*operands: Any) -> None:
            assert second.wait(timeout=60)
            kernel(*operands)

        scheduler.backend = replace(scheduler.backend, kernel=hold)
        await scheduler.run(ModelWorker(shared, model, loss, iter([1.0, 2.0])), updates=2)
    torch.testing.assert_close(shared.flat, torch.full_like(shared.flat, -(1.0 + 2.0)))


@pytest.mark.parametrize("policy", ["lock-free", "locked", "ordered", "awaited"])
async def test_many_model_workers_learn(policy: str) -> None:
    model = make_model()
    shared = SharedParameters.from_module(model)
    losses: list[float] = []
    worker = ModelWorker(shared, model, noted(squared_error, losses), make_batches())
    before = squared_error(model, next(make_batches(seed=2))).item()
    async with StreamScheduler(shared, workers=4, depth=2, policy=policy, **OPTIONS) as scheduler:
        report = await scheduler.run(worker, updates=400)
    assert report.updates == len(losses) == 400
    # Not the last one: a lock-free update that is held up puts back what was learned meanwhile.
    assert np.median(losses[200:]) < before / 5


async def test_reading_a_batch_leaves_the_event_loop_free() -> None:
    """The first batch is not there until the loop, turning, says so."""
    turned = threading.Event()

    def batches() -> Iterator[Batch]:
        assert turned.wait(timeout=60)
        yield from make_batches()

    model = make_model()
    shared = SharedParameters.from_module(model)
    async with StreamScheduler(shared, workers=2) as scheduler:
        run = asyncio.create_task(
            scheduler.run(ModelWorker(shared, model, squared_error, batches()), updates=2)
        )
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(0.001, turned.set)
        assert (await run).updates == 2


async def test_simulated_workers_rotate_their_own_gradients() -> None:
    """Gradients are powers of ten, and each update subtracts its gradient: digits count uses."""
    gradients = [torch.full((8,), 10.0**power, dtype=torch.float64) for power in range(4)]
    shared = SharedParameters({"p": torch.zeros(8, dtype=torch.float64)})
    async with StreamScheduler(shared, workers=2, policy="locked", **SUBTRACTING) as scheduler:
        report = await scheduler.run(SimulatedWorker(gradients, workers=2), updates=8)
    uses = [round(-shared.flat[0].item() / 10**power) % 10 for power in range(4)]
    by_worker = report.updates_by_worker
    assert [uses[0] + uses[2], uses[1] + uses[3]] == by_worker
    assert abs(uses[0] - uses[2]) <= 1
    assert abs(uses[1] - uses[3]) <= 1


async def test_thinking_takes_time() -> None:
    shared = SharedParameters({"p": torch.zeros(8)})
    worker = SimulatedWorker([torch.ones(8)], workers=1, think_time=0.01, think_spread=0.5, seed=3)
    async with StreamScheduler(shared, workers=1) as scheduler:
        report = await scheduler.run(worker, updates=5)
    draws = random.Random("3/0")
    thought = sum(0.01 * draws.lognormvariate(0, 0.5) for _ in range(5))
    assert report.seconds >= thought


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers must be an integer >= 1 and <= 2, got 0"),
        ({"workers": 3}, "workers must be an integer >= 1 and <= 2, got 3"),
        ({"think_time": -1.0}, "think_time must be a finite number >= 0, got -1.0"),
        ({"think_time": float("nan")}, "think_time must be a finite number >= 0, got nan"),
        ({"think_spread": float("inf")}, "think_spread must be a finite number >= 0, got inf"),
    ],
)
def test_bad_simulation_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimulatedWorker([torch.ones(1)] * 2, **{"workers": 1, **arguments})


class TwoHeads(torch.nn.Module):
    """A batch goes through one of two heads; the embedding's gradient is sparse."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(rows, 4, sparse=True)
        self.trunk = torch.nn.Linear(4, 4)
        self.heads = torch.nn.ModuleList([torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)])

    def forward(self, head: int) -> torch.Tensor:
        hidden = torch.tanh(self.trunk(self.table(torch.arange(3))))
        squares: torch.Tensor = self.heads[head](hidden) ** 2
        return squares.mean()


def through_heads(model: torch.nn.Module, head: int) -> torch.Tensor:
    loss: torch.Tensor = model(head)
    return loss


def through_cleared_heads(model: torch.nn.Module, head: int) -> torch.Tensor:
    """Clears gradients, as loops that people copy do first."""
    loss = through_heads(model, head)
    model.zero_grad()
    return loss


def through_replaced_gradients(model: torch.nn.Module, head: int) -> torch.Tensor:
    """A backward adds to what is there: zeros here, where a parameter is to have a gradient."""
    loss = through_heads(model, head)
    for parameter in (*model.trunk.parameters(), *model.heads[head].parameters()):  # type: ignore
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return loss


def through_frozen_trunk(model: torch.nn.Module, head: int) -> torch.Tensor:
    model.trunk.requires_grad_(False)
    return through_heads(model, head)


def gone_backward_itself(model: torch.nn.Module, head: int) -> torch.Tensor:
    loss = through_heads(model, head)
    loss.backward()
    return loss.detach()


HEADS = [0, 1, 1, 0, 1, 1, 1, 1]
DECAY = {"weight_decay": 0.1}
DECOUPLED = {"weight_decay": 0.1, "decoupled_weight_decay": True}


@pytest.mark.parametrize("options", [DECAY, DECOUPLED, {"eps": 0.0}], ids=str)
@pytest.mark.parametrize(
    "frozen", [(), ("trunk.weight",), ("heads.1.bias", "table.weight")], ids=str
)
@pytest.mark.parametrize(
    "loss",
    [
        through_heads,
        through_cleared_heads,
        through_replaced_gradients,
        through_frozen_trunk,
        gone_backward_itself,
    ],
)
@pytest.mark.parametrize("rows", [3, 10_000], ids=["copied", "in place"])
async def test_only_what_a_loss_reaches_is_updated(
    backend: str, rows: int, loss: Any, frozen: tuple[str, ...], options: dict[str, Any]
) -> None:
    """As a loop that leaves parameters without a gradient alone, their ms too."""
    options = {"lr": 0.01, "eps": 1e-8, **options}
    torch.manual_seed(0)
    model, plain = TwoHeads(rows), TwoHeads(rows)
    plain.load_state_dict(model.state_dict())
    for each in (model, plain):
        for name in frozen:
            each.get_parameter(name).requires_grad_(False)
    shared = SharedParameters.from_module(model)
    worker = ModelWorker(shared, model, loss, iter(HEADS))
    async with StreamScheduler(shared, backend=backend, workers=1, **options) as scheduler:
        await scheduler.run(worker, updates=len(HEADS))

    parameters = dict(plain.named_parameters())
    mss = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for head in HEADS:
        plain.zero_grad()
        made = loss(plain, head)
        if made.requires_grad:
            made.backward()
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                rmsprop_(parameter, parameter.grad.to_dense(), mss[name], **options)
    for name, ms in shared.views_of(shared.ms).items():
        for ours, theirs in ((ms, mss[name]), (model.get_parameter(name), parameters[name])):
            # With eps=0, rows of the table that no loss reaches become NaN.
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    assert shared.version == len(HEADS)


async def test_replicas_follow_what_is_frozen_in_the_model() -> None:
    """Frozen between iterations, then thawed; what a loss has frozen once stays so meanwhile."""
    model = make_model()
    first, _, last = model
    shared = SharedParameters.from_module(model)
    moved: list[list[bool]] = []
    before = shared.flat.clone()

    async def worker(context: WorkerContext) -> None:
        await model_worker(context)
        was, now = shared.views_of(before), shared.views
        moved.append([not torch.equal(was[key], now[key]) for key in ("0.bias", "2.bias")])
        before.copy_(shared.flat)
        if len(moved) in (2, 4):
            first.requires_grad_(len(moved) == 4)

    frozen = threading.Event()

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        if len(moved) == 6 and not frozen.is_set():
            frozen.set()
            model[2].requires_grad_(False)  # type: ignore[index]
        return squared_error(model, batch)

    model_worker = ModelWorker(shared, model, loss, make_batches())
    async with StreamScheduler(shared, workers=1, **OPTIONS) as scheduler:
        await scheduler.run(worker, updates=4)
        await scheduler.run(worker, updates=4)
    both, only_last, only_first = [True, True], [False, True], [True, False]
    assert moved == [both] * 2 + [only_last] * 2 + [both] * 2 + [only_first] * 2
    assert all(parameter.requires_grad for parameter in last.parameters())


def replace_parameter(model: torch.nn.Module) -> None:
    model[0].weight = torch.nn.Parameter(torch.ones(8, 4))  # type: ignore[index]


def replace_data(model: torch.nn.Module) -> None:
    model[2].bias.data = torch.ones(1)  # type: ignore[index]


def add_parameter(model: torch.nn.Module) -> None:
    model.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))


def freeze_all(model: torch.nn.Module) -> None:
    model.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace_parameter, r"loss must leave the model its parameters, got another 0\.weight"),
        (add_parameter, "loss must leave the model its parameters and buffers, got another scale"),
        (replace_data, r"loss must leave 2\.bias in shared memory, got other data in it"),
        (freeze_all, "loss must depend on a parameter of the model that requires a gradient"),
    ],
)
async def test_loss_that_would_train_nothing_is_an_error(change: Any, message: str) -> None:
    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        change(model)
        return squared_error(model, batch)

    model = make_model()
    shared = SharedParameters.from_module(model)
    before = shared.flat.clone()
    async with StreamScheduler(shared, workers=1) as scheduler:
        with pytest.raises(WorkerError, match=message):
            await scheduler.run(ModelWorker(shared, model, loss, make_batches()), updates=1)
    assert torch.equal(shared.flat, before)


async def test_replicas_go_on_where_parameters_have_moved_to() -> None:
    model = make_model()
    shared = SharedParameters.from_module(model)
    worker = ModelWorker(shared, model, squared_error, make_batches())
    for _ in range(2):
        before = shared.flat.clone()
        async with StreamScheduler(shared, workers=1) as scheduler:
            await scheduler.run(worker, updates=3)
        assert not torch.equal(shared.flat, before)
        if not shared.flat.is_shared():
            shared.share_memory_(processes=1)
    assert shared.version == 6


class Tied(torch.nn.Module):
    """Has one weight by two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = torch.nn.Linear(4, 4, bias=False)
        self.decoder = torch.nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decoded: torch.Tensor = self.decoder(torch.tanh(self.encoder(x)))
        return decoded[:, :1]


def make_bfloat16() -> torch.nn.Module:
    return make_model().to(torch.bfloat16)


def make_frozen() -> torch.nn.Module:
    model = make_classifier()
    model[0].requires_grad_(False)
    model[1].bias.requires_grad_(False)
    return model


def in_its_dtype(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    dtype = next(model.parameters()).dtype
    return squared_error(model, (batch[0].to(dtype), batch[1].to(dtype)))


@pytest.mark.parametrize("read", ["live", "snapshot"])
@pytest.mark.parametrize(
    ("make", "loss", "batches"),
    [
        (Tied, squared_error, make_batches),
        (make_bfloat16, in_its_dtype, make_batches),
        (make_frozen, classified, points),
        (make_large, squared_error, make_batches),
    ],
    ids=["tied", "bfloat16", "frozen", "large"],
)
async def test_models_of_all_kinds_train_as_in_a_plain_loop(
    make: Callable[[], torch.nn.Module], loss: Loss, batches: Any, read: str
) -> None:
    """To the bit, and what is frozen or unfrozen between runs is so in the next."""
    options = {**OPTIONS, "weight_decay": 0.1}
    model, plain = make(), make()
    train = PlainLoop(plain, loss, batches(1), **options)
    shared = SharedParameters.from_module(model)
    worker = ModelWorker(shared, model, loss, batches(1))
    async with StreamScheduler(shared, workers=1, read=read, **options) as scheduler:
        for change in (True, False, True):
            for each in (model, plain):
                first, last = next(each.parameters()), list(each.parameters())[-1]
                last.requires_grad_(change)
                first.requires_grad_(first.requires_grad or not change)
            await scheduler.run(worker, updates=5)
            with one_thread():
                train.run(5)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert shared.version == 15


@pytest.mark.parametrize("max_grad_norm", [None, 0.1, 100.0])
@pytest.mark.parametrize("accumulate", [1, 3, 4])
@pytest.mark.parametrize("kind", ["whole", "parts", "bfloat16", "large"])
async def test_update_may_be_of_several_batches_and_clipped(
    kind: str, accumulate: int, max_grad_norm: float | None
) -> None:
    """As torch clips the gradient of the mean of the losses."""
    make = {"bfloat16": make_bfloat16, "large": make_large}.get(kind, make_model)
    model, plain = make(), make()
    if kind == "parts":
        for each in (model, plain):
            each[0].weight.requires_grad_(False)  # type: ignore[index]
    shared = SharedParameters.from_module(model)
    losses: list[float] = []
    worker = ModelWorker(
        *(shared, model, in_its_dtype, make_batches()),
        accumulate=accumulate,
        max_grad_norm=max_grad_norm,
    )

    async with StreamScheduler(shared, workers=1, **OPTIONS) as scheduler:
        await scheduler.run(worker, updates=4, on_loss=lambda _, loss: losses.append(loss))

    train = PlainLoop(plain, in_its_dtype, make_batches())
    batches = make_batches()
    means = []
    for _ in range(4):
        plain.zero_grad()
        values = [in_its_dtype(plain, next(batches)) for _ in range(accumulate)]
        (sum(values, torch.zeros(())) / accumulate).backward()
        means.append(sum(value.item() for value in values) / accumulate)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)
        train.update()
    within = 0.02 if kind == "bfloat16" else 1e-6
    assert losses == pytest.approx(means, rel=10 * within)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=10 * within, atol=within)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
async def test_loss_is_computed_under_autocast(autocast: torch.dtype | None) -> None:
    dtypes = set()

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        result = model(batch[0])
        dtypes.add(result.dtype)
        value: torch.Tensor = result.float().mean()
        return value

    model = make_model()
    shared = SharedParameters.from_module(model)
    before = shared.flat.clone()
    worker = ModelWorker(shared, model, loss, make_batches(), autocast=autocast)
    async with StreamScheduler(shared, workers=2) as scheduler:
        await scheduler.run(worker, updates=4)
    assert dtypes == {autocast or torch.float32}
    assert not torch.equal(shared.flat, before)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3.0, "TypeError: loss must return a tensor, got float"),
        (None, "TypeError: loss must return a tensor, got NoneType"),
        (torch.ones(2), r"ValueError: loss must return a scalar, got shape \(2,\)"),
        (
            torch.ones((), dtype=torch.complex64, requires_grad=True),
            "TypeError: loss must return a real scalar, got complex64",
        ),
    ],
)
async def test_loss_that_is_no_real_scalar_is_an_error(value: Any, message: str) -> None:
    model = make_model()
    shared = SharedParameters.from_module(model)
    worker = ModelWorker(shared, model, lambda model, batch: value, make_batches())
    async with StreamScheduler(shared, workers=1) as scheduler:
        with pytest.raises(WorkerError, match=message):
            await scheduler.run(worker, updates=1)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"shared": None}, TypeError, "shared must be"),
        ({"model": make_model}, TypeError, "model must be"),
        ({"loss": "mse"}, TypeError, "loss must be callable, got 'mse'"),
        ({"batches": make_batches}, TypeError, "batches must be iterable, got <function"),
        ({"accumulate": 0}, ValueError, "accumulate must be an integer >= 1, got 0"),
        ({"max_grad_norm": 0}, ValueError, "max_grad_norm must be a finite number > 0, got 0"),
        ({"autocast": torch.float32}, ValueError, "autocast must be bfloat16, float16 or None"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
    ],
)
def test_bad_arguments_of_a_model_worker_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make_model()
    good = {
        "shared": SharedParameters.from_module(model),
        "model": model,
        "loss": squared_error,
        "batches": make_batches(),
    }
    with pytest.raises(error, match=message):
        ModelWorker(**{**good, **arguments})
