"""What a module has besides parameters: shared by workers, of each its own, or averaged."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hogstream.scheduler import (
    ModelWorker,
    ProcessScheduler,
    SharedParameters,
    StreamScheduler,
    WorkerError,
    load_checkpoint,
    save_checkpoint,
)
from model_testing import (
    OPTIONS,
    PlainLoop,
    classified,
    make_classifier,
    one_thread,
    points,
    train_in_process,
)

DTYPES = [torch.float64, torch.bfloat16, torch.complex128, torch.int64, torch.uint8, torch.bool]


def of(dtype: torch.dtype) -> str:
    return str(dtype).replace("torch.", "of_")


class Counting(torch.nn.Module):
    """Has buffers of many dtypes: writes into one in place, and puts another tensor for one."""

    calls: torch.Tensor
    hidden: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("hidden", torch.zeros(2), persistent=False)
        self.register_buffer("same", self.calls)
        self.register_buffer("nothing", None)
        self.register_buffer("graph", torch.eye(2).to_sparse())
        for dtype in DTYPES:
            self.register_buffer(of(dtype), torch.ones(3, dtype=dtype))

    def forward(self, value: float) -> torch.Tensor:
        self.calls += 1  # in place
        self.hidden = self.hidden + value  # and not
        return self.weight * value


def forward(module: torch.nn.Module, value: float) -> torch.Tensor:
    result: torch.Tensor = module(value)
    return result


def test_buffers_of_a_module_are_shared_as_they_are() -> None:
    module = Counting()
    shared = SharedParameters.from_module(module)
    of_dtypes = [of(dtype) for dtype in DTYPES]
    assert list(shared.buffers) == ["calls", "hidden", *of_dtypes]
    assert all(each is module.get_buffer(name) for name, each in shared.buffers.items())
    other = copy.deepcopy(module)
    shared.attach(other)
    shared.share_memory_(processes=1)
    module(2.0)
    module.of_bool.logical_not_()  # type: ignore[operator]
    shared.buffers["hidden"].copy_(module.hidden)
    assert other.calls is other.same
    for name, each in shared.buffers.items():
        assert each.is_shared(), name
        assert torch.equal(other.get_buffer(name), each), name
    assert other.calls.item() == 1


def test_buffers_go_where_the_parameters_go() -> None:
    shared = SharedParameters.from_module(make_classifier())
    shared.make_worker_buffers(2)
    others: list[SharedParameters] = [pickle.loads(pickle.dumps(shared)), copy.deepcopy(shared)]
    for other in others:
        assert other.worker_buffers is not None
        assert list(other.buffers) == list(shared.buffers)
        assert other.buffers["1.running_var"].eq(1).all()
        assert other.worker_buffers["1.running_var"].shape == (2, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda module: module[1].reset_running_stats(), None),
        (lambda module: module.register_buffer("more", torch.zeros(1)), "buffers' names; .'more'."),
        (lambda module: module[1].to(torch.float64), "must be .*float32.* as the shared one, got"),
        (
            lambda module: module[1].register_buffer("running_mean", torch.zeros(3)),
            r"1.running_mean must be \(\(8,\), torch.float32, .* as the shared one, got \(\(3,\)",
        ),
    ],
)
def test_module_of_other_buffers_is_left_as_it_was(change: Any, message: str | None) -> None:
    shared = SharedParameters.from_module(make_classifier())
    module = make_classifier()
    change(module)
    if message is None:
        shared.attach(module)
        return
    before = [each.data_ptr() for each in (*module.parameters(), *module.buffers())]
    with pytest.raises(ValueError, match=message):
        shared.attach(module)
    assert [each.data_ptr() for each in (*module.parameters(), *module.buffers())] == before


@pytest.mark.parametrize(
    ("buffers", "error", "message"),
    [
        ([torch.zeros(1)], TypeError, "buffers must map names to tensors, got list"),
        ({"b": 1.0}, TypeError, "b must be a torch tensor, got float"),
        ({"b": torch.eye(2).to_sparse()}, ValueError, "b must be dense as a shared buffer, got"),
    ],
)
def test_what_is_no_buffer_is_refused(buffers: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        SharedParameters({"p": torch.zeros(1)}, buffers)


async def test_model_without_shared_buffers_is_refused() -> None:
    model = make_classifier()
    shared = SharedParameters(dict(model.named_parameters()))
    shared.attach(model)  # which keeps its own
    async with StreamScheduler(shared, workers=1) as scheduler:
        with pytest.raises(
            WorkerError, match=r"shared must have buffers as the model.*from_module"
        ):
            await scheduler.run(ModelWorker(shared, model, classified, points(0)), updates=1)


@pytest.mark.parametrize("buffers", ["shared", "average"])
async def test_statistics_of_one_worker_are_those_of_a_plain_loop(buffers: str) -> None:
    """To the bit, over two runs; and what is loaded into the model between them counts.

    The plain loop has as many threads as a worker has, as BatchNorm's sums depend on that.
    """
    model, plain = make_classifier(), make_classifier()
    start = {name: each.clone() for name, each in make_classifier(seed=3).state_dict().items()}
    shared = SharedParameters.from_module(model)
    worker = ModelWorker(shared, model, classified, points(0))
    async with StreamScheduler(shared, workers=1, buffers=buffers, **OPTIONS) as scheduler:
        await scheduler.run(worker, updates=10)
        model.load_state_dict(start)
        await scheduler.run(worker, updates=10)

    with one_thread():
        train = PlainLoop(plain, classified, points(0))
        train.run(10)
        plain.load_state_dict(start)
        train.run(10)
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("buffers", ["shared", "average"])
async def test_model_of_many_workers_evaluates_as_it_trains(buffers: str) -> None:
    model = make_classifier()
    shared = SharedParameters.from_module(model)
    worker = ModelWorker(shared, model, classified, points(0))
    async with StreamScheduler(shared, workers=4, buffers=buffers, **OPTIONS) as scheduler:
        await scheduler.run(worker, updates=400)
        scheduler.hyperparameters = replace(scheduler.hyperparameters, lr=1e-5)
        await scheduler.run(worker, updates=200)  # statistics come to rest
    x, labels = next(points(1, size=1000))
    with torch.no_grad():
        in_training = copy.deepcopy(model)(x).argmax(dim=1)
        in_evaluation = model.eval()(x).argmax(dim=1)
    assert in_evaluation.eq(labels).float().mean() > 0.85
    assert in_evaluation.eq(in_training).float().mean() > 0.9


async def test_workers_keep_buffers_of_their_own() -> None:
    """In the next run too; the model's stay as they were."""
    module = Counting()
    shared = SharedParameters.from_module(module)
    worker = ModelWorker(shared, module, forward, [1.0])
    async with StreamScheduler(shared, workers=2, buffers="worker", **OPTIONS) as scheduler:
        reports = [await scheduler.run(worker, updates=8) for _ in range(2)]
    counts = [sum(each.updates_by_worker[index] for each in reports) for index in range(2)]
    assert shared.worker_buffers is not None
    assert shared.worker_buffers["calls"].tolist() == counts
    assert shared.worker_buffers["hidden"].tolist() == [[count] * 2 for count in counts]
    assert module.calls.item() == 0
    with pytest.raises(ValueError, match="workers must be 2, as many as have buffers, got 3"):
        shared.make_worker_buffers(3)


async def test_the_mean_may_next_be_of_another_number_of_workers() -> None:
    """As workers begin anew; not while another scheduler has those buffers."""
    module = Counting()
    shared = SharedParameters.from_module(module)
    worker = ModelWorker(shared, module, forward, [1.0])
    settings = {"buffers": "average", **OPTIONS}
    for workers in (2, 3, 1):
        async with StreamScheduler(shared, workers=workers, **settings) as scheduler:
            await scheduler.run(worker, updates=6)
            with pytest.raises(ValueError, match=f"workers must be {workers}, as many as have buf"):
                await StreamScheduler(shared, workers=4, **settings).__aenter__()
    assert 2 + 2 + 6 <= module.calls.item() <= 6 * 3  # of who made most in each run


@pytest.mark.parametrize(
    ("updates", "mean", "count"),
    [
        ([1, 0, 3], (1.0 + 7.0) / 2, 30),
        ([2, 2, 1], (1.0 + 10.0 + 7.0) / 3, 10),
        ([0, 0, 0], 0.5, 5),
    ],
)
def test_average_is_of_workers_that_took_part(updates: list[int], mean: float, count: int) -> None:
    """Counts, which have no mean, come from who made most updates."""
    buffers = {
        "mean": torch.full((2,), 0.5, dtype=torch.bfloat16),
        "turn": torch.full((), 0.5j, dtype=torch.complex64),
        "count": torch.tensor(5),
    }
    shared = SharedParameters({"p": torch.zeros(1)}, buffers)
    rows = shared.make_worker_buffers(3)
    rows["mean"].copy_(torch.tensor([[1.0], [10.0], [7.0]]).expand(3, 2))
    rows["turn"].copy_(torch.tensor([1.0j, 10.0j, 7.0j]))
    rows["count"].copy_(torch.tensor([10, 20, 30]))
    shared.average_worker_buffers(updates)
    assert buffers["mean"].tolist() == [mean, mean]
    assert buffers["turn"].item() == pytest.approx(mean * 1j)
    assert buffers["count"].item() == count
    shared.reset_worker_buffers()
    assert rows["count"].tolist() == [count] * 3


def put_smaller(module: Any) -> None:
    module.hidden = torch.zeros(1)


def put_integers(module: Any) -> None:
    module.hidden = torch.zeros(2, dtype=torch.int64)


def put_where_none_was(module: Any) -> None:
    module.nothing = torch.zeros(1)


def put_none(module: Any) -> None:
    module.hidden = None


def add(module: Any) -> None:
    module.register_buffer("another", torch.zeros(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put_smaller, r"buffer hidden float32 of shape \(2,\), got float32 of shape \(1,\)"),
        (put_integers, r"buffer hidden float32 of shape \(2,\), got int64 of shape \(2,\)"),
        (put_where_none_was, r"buffer nothing None, got float32 of shape \(1,\): register it so"),
        (put_none, r"buffer hidden float32 of shape \(2,\), got None"),
        (add, "loss must leave the model its parameters and buffers, got another another"),
    ],
)
async def test_buffer_that_cannot_be_shared_is_an_error(change: Any, message: str) -> None:
    def loss(module: torch.nn.Module, value: float) -> torch.Tensor:
        result = forward(module, value)
        change(module)
        return result

    module = Counting()
    shared = SharedParameters.from_module(module)
    async with StreamScheduler(shared, workers=1) as scheduler:
        with pytest.raises(WorkerError, match=message):
            await scheduler.run(ModelWorker(shared, module, loss, [1.0]), updates=1)


async def test_data_put_into_a_buffer_is_shared() -> None:
    def loss(module: torch.nn.Module, value: float) -> torch.Tensor:
        module.hidden.data = torch.full((2,), value)
        return module.weight * value  # type: ignore[operator, return-value]

    module = Counting()
    shared = SharedParameters.from_module(module)
    async with StreamScheduler(shared, workers=1) as scheduler:
        await scheduler.run(ModelWorker(shared, module, loss, iter([3.0, 5.0])), updates=2)
    assert module.hidden.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("buffers", ["shared", "worker"])
async def test_resumed_model_evaluates_the_same(buffers: str, tmp_path: Path) -> None:
    """Also one that has had workers with buffers of their own, where the file has none."""
    models = [torch.nn.Sequential(make_classifier(), Several()) for _ in range(2)]
    first, second = (SharedParameters.from_module(model) for model in models)
    rows = second.make_worker_buffers(2)
    if buffers == "worker":
        first.make_worker_buffers(2)["0.1.running_mean"].fill_(7.0)
    with torch.no_grad():
        for each in (*first.flat, *models[0].buffers()):
            each.add_(1) if each.dtype != torch.bool else each.logical_not_()
    save_checkpoint(tmp_path / "saved", first)
    load_checkpoint(tmp_path / "saved", second)
    for name, value in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], value), name
    mean = 7.0 if buffers == "worker" else 1.0
    assert rows["0.1.running_mean"].eq(mean).all()
    third = SharedParameters.from_module(make_classifier())
    with pytest.raises(ValueError, match=r"missing: .*buffer/1.running_mean"):
        load_checkpoint(tmp_path / "saved", third)


class Several(torch.nn.Module):
    """Has buffers of several dtypes, one of which lies column by column."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("columns", torch.ones(2, 3).t())
        for dtype in DTYPES:
            self.register_buffer(of(dtype), torch.ones(3, dtype=dtype))


@pytest.mark.slow
async def test_models_train_over_processes() -> None:
    """Each run begins with the buffers of the model here, and ends with the mean in them."""
    model = make_classifier()
    tracked = model[1].num_batches_tracked
    assert isinstance(tracked, torch.Tensor)
    shared = SharedParameters.from_module(model)
    async with ProcessScheduler(shared, processes=2, buffers="average", **OPTIONS) as scheduler:
        await scheduler.run(train_in_process, updates=200)
        assert tracked.item() == 100
        tracked.fill_(1000)
        await scheduler.run(partial(train_in_process, dropout=0.5), updates=20)
    assert tracked.item() == 1010
    x, labels = next(points(1, size=1000))
    assert model.eval()(x).argmax(dim=1).eq(labels).float().mean() > 0.8
