"""A model that has left the shared memory is told so, and not trained in vain."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hogstream.optim import RMSprop
from hogstream.scheduler import ModelWorker, SharedParameters, StreamScheduler, WorkerError

Batch = tuple[torch.Tensor, torch.Tensor]


def make_model(seed: int = 0) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    convolution, norm = torch.nn.Conv2d(2, 4, 2), torch.nn.BatchNorm2d(4)
    return torch.nn.Sequential(convolution, norm, torch.nn.Flatten(), torch.nn.Linear(36, 1))


def make_batches() -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(8, 2, 4, 4, generator=generator)
        yield x, x.sum(dim=(1, 2, 3)).unsqueeze(1)


def squared_error(model: torch.nn.Module, batch: Batch) -> torch.Tensor:
    x, y = batch
    error: torch.Tensor = model(x) - y
    return (error**2).mean()


def worker_of(shared: SharedParameters, model: torch.nn.Module) -> ModelWorker:
    return ModelWorker(shared, model, squared_error, make_batches())


def values_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [each.detach().clone() for each in model.parameters()]


async def train(scheduler: StreamScheduler, worker: ModelWorker, model: torch.nn.Module) -> bool:
    """Whether some updates have reached all parameters of the model."""
    before = values_of(model)
    await scheduler.run(worker, updates=4)
    return not any(map(torch.equal, before, values_of(model)))


def load_by_assignment(model: torch.nn.Module) -> None:
    model.load_state_dict(make_model(1).state_dict(), assign=True)


def set_from_a_vector(model: torch.nn.Module) -> None:
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector.detach(), model.parameters())


def replace_data(model: Any) -> None:
    model[3].weight.data = torch.ones(1, 36)


def replace_layer(model: Any) -> None:
    model[3] = torch.nn.Linear(36, 1)


def replace_parameter(model: Any) -> None:
    model[3].bias = torch.nn.Parameter(torch.ones(1))


def replace_buffer(model: Any) -> None:
    model[1].running_var = torch.ones(4)


def optimize_flat(model: torch.nn.Module) -> None:
    optimizer = RMSprop(model.parameters(), flat=True)
    squared_error(model, next(make_batches())).backward()
    optimizer.step()


def narrow_and_widen(model: torch.nn.Module) -> None:
    model.bfloat16()
    model.float()


def lay_out_channels_last(model: torch.nn.Module) -> None:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


#: Ways to move a model, and the first of its tensors that are elsewhere then.
MOVES: list[tuple[Callable[[Any], object], str]] = [
    (load_by_assignment, "parameter 0.weight"),
    (set_from_a_vector, "parameter 0.weight"),
    (replace_data, "parameter 3.weight"),
    (replace_layer, "parameter 3.weight"),
    (replace_parameter, "parameter 3.bias"),
    (replace_buffer, "buffer 1.running_var"),
    (optimize_flat, "parameter 0.weight"),
    (narrow_and_widen, "parameter 0.weight"),
    (lay_out_channels_last, "parameter 0.weight"),
    (SharedParameters.from_module, "parameter 0.weight"),
]


@pytest.mark.parametrize(("move", "first"), MOVES)
@pytest.mark.parametrize("runs_before", [0, 1])
async def test_model_that_was_moved_is_refused_until_it_is_attached_again(
    move: Callable[[Any], object], first: str, runs_before: int
) -> None:
    model = make_model()
    shared = SharedParameters.from_module(model)
    worker = worker_of(shared, model)
    async with StreamScheduler(shared, workers=2) as scheduler:
        for _ in range(runs_before):
            assert await train(scheduler, worker, model)
        moved = move(model)  # what it returns may be where the model is
        before, version = shared.flat.clone(), shared.version
        with pytest.raises(WorkerError, match=f"got {first} elsewhere.*shared.attach"):
            await scheduler.run(worker, updates=4)
        assert torch.equal(shared.flat, before)
        assert shared.version == version
        del moved
        shared.attach(model)
        assert await train(scheduler, worker, model)


def move_all(shared: SharedParameters, model: torch.nn.Module) -> None:
    shared.share_memory_(processes=1)


def move_module(shared: SharedParameters, model: torch.nn.Module) -> None:
    model.share_memory()


def load_in_place(shared: SharedParameters, model: torch.nn.Module) -> None:
    model.load_state_dict(make_model(1).state_dict())


def load_its_own_by_assignment(shared: SharedParameters, model: torch.nn.Module) -> None:
    model.load_state_dict(model.state_dict(), assign=True)


def attach_another(shared: SharedParameters, model: torch.nn.Module) -> None:
    shared.attach(make_model(1))


@pytest.mark.parametrize(
    "change", [move_all, move_module, load_in_place, load_its_own_by_assignment, attach_another]
)
async def test_model_that_stays_attached_is_trained(
    change: Callable[[SharedParameters, torch.nn.Module], None],
) -> None:
    model = make_model()
    shared = SharedParameters.from_module(model)
    change(shared, model)
    async with StreamScheduler(shared, workers=2) as scheduler:
        assert await train(scheduler, worker_of(shared, model), model)


def another(shared: SharedParameters, model: torch.nn.Module) -> torch.nn.Module:
    return make_model(1)


def a_copy(shared: SharedParameters, model: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(model)


def pickled(shared: SharedParameters, model: torch.nn.Module) -> torch.nn.Module:
    loaded: torch.nn.Module = pickle.loads(pickle.dumps(model))
    return loaded


def pointed_to_a_snapshot(shared: SharedParameters, model: torch.nn.Module) -> torch.nn.Module:
    shared.attach(model, shared.views_of(shared.flat.clone()))
    return model


@pytest.mark.parametrize("make", [another, a_copy, pickled, pointed_to_a_snapshot])
async def test_model_that_is_not_attached_serves_as_a_pattern(
    make: Callable[[SharedParameters, torch.nn.Module], torch.nn.Module],
) -> None:
    attached = make_model()
    shared = SharedParameters.from_module(attached)
    pattern = make(shared, attached)
    before = shared.flat.clone()
    async with StreamScheduler(shared, workers=2) as scheduler:
        assert not await train(scheduler, worker_of(shared, pattern), pattern)
    assert not torch.equal(shared.flat, before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
async def test_copy_of_shared_parameters_has_no_model_attached(
    copied: Callable[[SharedParameters], SharedParameters],
) -> None:
    model = make_model()
    shared = copied(SharedParameters.from_module(model))
    replace_data(model)
    async with StreamScheduler(shared, workers=1) as scheduler:
        await scheduler.run(worker_of(shared, model), updates=1)
    assert shared.version == 1


def test_attached_model_is_not_kept_alive() -> None:
    model = make_model()
    shared = SharedParameters.from_module(model)
    died = weakref.ref(model)
    del model
    gc.collect()
    assert died() is None
    shared.attach(make_model())


def test_module_of_another_dtype_is_told_so() -> None:
    model = make_model()
    shared = SharedParameters.from_module(model)
    model.bfloat16()
    with pytest.raises(ValueError, match=r"0\.weight must be .*float32.*, got .*bfloat16"):
        shared.check_still_attached(model)
