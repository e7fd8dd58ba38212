"""What a model's workers draw, with a seed, whatever other threads draw meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from hogstream.scheduler import ModelWorker, SharedParameters, StreamScheduler, WorkerContext
from hogstream.scheduler.workers.random_numbers import NothingDrawn, RandomNumbers
from model_testing import OPTIONS, Batch, classified, make_classifier, points

ONES = torch.ones(4, 6)
EYE = torch.eye(6)[None, None]


def in_layers(layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    result = layer.train()(x)
    first: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return first


LSTM = torch.nn.LSTM(6, 6, num_layers=2, dropout=0.5)
ENCODER = torch.nn.TransformerEncoderLayer(6, 2, dropout=0.5)
DRAWS: dict[str, Callable[[], torch.Tensor]] = {
    "rand": lambda: torch.rand(4),
    "randn": lambda: torch.randn(4, dtype=torch.float64),
    "randint": lambda: torch.randint(1, 1000, (4,)),
    "randint_to": lambda: torch.randint(1000, (4,)),
    "randperm": lambda: torch.randperm(100),
    "rand_like": lambda: torch.rand_like(ONES),
    "randn_like": lambda: torch.randn_like(ONES),
    "randint_like": lambda: torch.randint_like(ONES, 1000),
    "bernoulli": lambda: torch.bernoulli(ONES / 2),
    "normal": lambda: torch.normal(ONES, 1.0),
    "multinomial": lambda: torch.multinomial(ONES, 3),
    "poisson": lambda: torch.poisson(100 * ONES),
    "in_place": lambda: torch.empty(4).uniform_() + torch.empty(4).exponential_(),
    "out": lambda: torch.rand(4, out=torch.empty(4)),
    "dropout": lambda: functional.dropout(ONES),
    "native_dropout": lambda: torch.native_dropout(ONES, 0.5, True)[0],
    "alpha_dropout": lambda: functional.alpha_dropout(ONES, training=True),
    "rrelu": lambda: functional.rrelu(-ONES, training=True),
    "gumbel": lambda: functional.gumbel_softmax(ONES),
    "attention": lambda: functional.scaled_dot_product_attention(EYE, EYE, EYE, dropout_p=0.5),
    "gamma": lambda: torch.distributions.Gamma(ONES, ONES).rsample(),
    "lstm": lambda: in_layers(LSTM, torch.ones(3, 2, 6)),
    "encoder": lambda: in_layers(ENCODER, torch.eye(6)[:, None]),
}


@pytest.mark.parametrize("name", DRAWS)
def test_whatever_is_drawn_is_of_the_seed(name: str) -> None:
    """And torch's default generator is left alone."""
    before = torch.get_rng_state()
    drawn = []
    for seed in ("1", "1", "2"):
        with RandomNumbers(seed).drawn():
            drawn += [DRAWS[name](), DRAWS[name]()]
    assert torch.equal(torch.get_rng_state(), before)
    first, second, again, _, other, _ = drawn
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, second)


def test_dropout_of_gpus_drops_a_part_and_scales_the_rest() -> None:
    x = torch.ones(10_000, requires_grad=True)
    with RandomNumbers("1").drawn():
        kept, mask = torch.native_dropout(x, 0.25, True)
        none, _ = torch.native_dropout(x, 1.0, True)
    kept.sum().backward()
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert mask.float().mean() == pytest.approx(0.75, abs=0.02)
    assert torch.equal(x.grad, kept)  # type: ignore[arg-type]
    assert none.eq(0).all()


def test_generator_of_ones_own_is_used_as_it_is() -> None:
    own = torch.Generator().manual_seed(3)
    with RandomNumbers("1").drawn():
        drawn = torch.rand(4, generator=own)
    assert torch.equal(drawn, torch.rand(4, generator=torch.Generator().manual_seed(3)))


def test_what_takes_no_generator_is_an_error() -> None:
    numbers = RandomNumbers("1")
    with numbers.drawn():
        with pytest.raises(RuntimeError, match=r"seed must be None .* by aten._scaled"):
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *[torch.eye(8)[None, None]] * 3, 0.5
            )
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *[torch.eye(8)[None, None]] * 3, 0.0
        )


def test_what_a_backward_would_draw_again_is_an_error() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Dropout())
    for training in (False, True):
        layer.train(training)
        with RandomNumbers("1").drawn():
            loss = checkpoint(layer, ONES, use_reentrant=False).sum()
        with NothingDrawn():
            if training:
                with pytest.raises(RuntimeError, match="loss whose backward draws random numbers"):
                    loss.backward()
            else:
                loss.backward()


def draw(model: torch.nn.Module) -> float:
    kept = model[3](torch.ones(1000))  # type: ignore[index]
    drawn: float = kept.sum().item() + torch.rand(()).item()
    return drawn


@pytest.mark.parametrize("workers", [1, 4])
async def test_workers_draw_what_is_of_their_seed(workers: int) -> None:
    """Over two runs, on threads that draw beside each other, and from torch's generator too."""
    drawn: dict[str, list[float]] = {}

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        drawn.setdefault(threading.current_thread().name, []).append(draw(model))
        return classified(model, batch)

    model = make_classifier(dropout=0.5)
    shared = SharedParameters.from_module(model)
    model_worker = ModelWorker(shared, model, loss, points(0), seed=7)

    async def worker(context: WorkerContext) -> None:
        torch.rand(3)
        await model_worker(context)

    async with StreamScheduler(shared, workers=workers, **OPTIONS) as scheduler:
        for _ in range(2):
            await scheduler.run(worker, updates=20)
    assert sum(map(len, drawn.values())) == 40
    for index in range(workers):
        mine = drawn[f"hogstream-worker-{index}"]
        expected = []
        with RandomNumbers(f"7/0/{index}").drawn():
            for _ in mine:
                expected.append(draw(model))
                classified(model, next(points(0)))
        assert mine == expected


async def test_trained_model_is_that_of_the_seed() -> None:
    """Of one worker."""
    trained = []
    for seed in (3, 3, 4):
        model = make_classifier(dropout=0.5)
        shared = SharedParameters.from_module(model)
        worker = ModelWorker(shared, model, classified, points(0), seed=seed)
        async with StreamScheduler(shared, workers=1, **OPTIONS) as scheduler:
            await scheduler.run(worker, updates=10)
        trained.append(shared.flat)
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])


async def test_without_a_seed_torch_draws_as_it_does() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3).tolist()
    drawn: list[float] = []

    def loss(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
        drawn.append(torch.rand(()).item())
        return classified(model, batch)

    model = make_classifier()
    shared = SharedParameters.from_module(model)
    torch.manual_seed(5)
    async with StreamScheduler(shared, workers=1, **OPTIONS) as scheduler:
        await scheduler.run(ModelWorker(shared, model, loss, points(0)), updates=3)
    assert drawn == expected
