"""What is done to a model whose parameters are in flat memory: saved, copied, moved, shared."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch
from torch.nn import Conv2d, Linear, Module, Parameter, Sequential

from hogstream.optim import RMSpropAsync
from optim_testing import accumulate_in_child
from process_testing import may_fork_with_threads, run_to_end
from update_testing import DTYPES


class Small(Module):
    """A layer with parameters of every odd kind."""

    def __init__(self) -> None:
        super().__init__()
        self.scalar = Parameter(torch.tensor(2.0))
        self.empty = Parameter(torch.zeros(0, 3))
        self.one = Parameter(torch.ones(1, 6, 1))
        self.transposed = Parameter(torch.arange(6.0).reshape(2, 3).T.clone().T.contiguous().T)


def make_model(dtype: torch.dtype = torch.float32) -> Sequential:
    torch.manual_seed(0)
    conv = Conv2d(3, 4, 2)
    conv.weight.data = conv.weight.data.to(memory_format=torch.channels_last)
    model = Sequential(conv, Linear(4, 64), Small(), Linear(64, 512))
    model.to(dtype)
    return model


def saved_bytes(module: Module) -> int:
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    return file.tell()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_layer_is_saved_as_what_it_is(dtype, tmp_path):
    plain, flat = make_model(dtype), make_model(dtype)
    RMSpropAsync(flat.parameters(), flat=True)
    for one, other in zip([plain, *plain], [flat, *flat], strict=True):
        assert saved_bytes(other) <= saved_bytes(one) + 64
        torch.save(other.state_dict(), tmp_path / "layer.pt")
        loaded = torch.load(tmp_path / "layer.pt")
        for name, tensor in one.state_dict().items():
            assert torch.equal(loaded[name], tensor)
            assert loaded[name].stride() == tensor.stride()
    assert len(pickle.dumps(flat)) < 1.1 * len(pickle.dumps(plain)) + 1000


@pytest.mark.parametrize("dtype", DTYPES)
def test_safetensors_takes_the_model(dtype, tmp_path: Path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, loaded = make_model(dtype), make_model(dtype)
    for param in loaded.parameters():
        param.data.zero_()
    # It knows only contiguous tensors.
    model, loaded = Sequential(model[1], model[3]), Sequential(loaded[1], loaded[3])
    RMSpropAsync(model.parameters(), flat=True)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.load_model(loaded, tmp_path / "model.safetensors")
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))


def share(model: Module) -> Module:
    return model.share_memory()


def to_double_and_back(model: Module) -> Module:
    return model.double().float()


def load(model: Module) -> Module:
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    return model


def deepcopy(model: Module) -> Module:
    copy.deepcopy(model)
    return model


def send(model: Module) -> Module:
    ForkingPickler.dumps(model)  # which moves it to shared memory
    return model


CHANGES: list[Callable[[Module], Module]] = [
    share,
    to_double_and_back,
    load,
    deepcopy,
    send,
]


@pytest.mark.parametrize("changed_at", [0, 2])
@pytest.mark.parametrize("change", CHANGES)
def test_trains_on_to_the_same_bits(change, changed_at):
    results = []
    for flat in (False, True):
        model = make_model()
        optimizer = RMSpropAsync(model.parameters(), flat=flat, weight_decay=0.1)
        for step in range(4):
            if step == changed_at:
                change(model)
            optimizer.zero_grad()
            sum((p.square().sum() for p in model.parameters()), torch.zeros(())).backward()
            optimizer.step()
        results.append([param.detach() for param in model.parameters()])
    assert all(map(torch.equal, *results))


def test_a_copied_model_has_memory_of_its_own():
    model = make_model()
    optimizer = RMSpropAsync(model.parameters(), flat=True)
    twin = copy.deepcopy(model)
    before = [param.detach().clone() for param in twin.parameters()]
    for param in model.parameters():
        assert param.grad is not None
        param.grad.fill_(1.0)
    optimizer.step()
    assert all(map(torch.equal, twin.parameters(), before))


def test_memory_lives_as_long_as_a_parameter():
    model = make_model()
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = RMSpropAsync(model.parameters(), flat=True)
    del optimizer
    others = [torch.full((param.numel() + 64,), math.nan) for param in model.parameters()]
    assert all(map(torch.equal, model.parameters(), before))
    del others


@may_fork_with_threads
@pytest.mark.parametrize(
    ("method", "share_optimizer"),
    [("fork", False), ("fork", True), pytest.param("spawn", False, marks=pytest.mark.slow)],
)
def test_processes_share_parameters_and_no_gradients(method, share_optimizer):
    model = Sequential(Linear(3, 2), Linear(2, 1))
    optimizer = RMSpropAsync(model.parameters(), flat=True)
    model.share_memory()
    if share_optimizer:
        optimizer.share_memory()
    for param in model.parameters():
        assert param.grad is not None
        param.grad.fill_(5.0)
    start = [param.detach().clone() for param in model.parameters()]
    context = torch.multiprocessing.get_context(method)
    process = context.Process(target=accumulate_in_child, args=(model, optimizer))
    assert run_to_end(process) == 0
    assert all(p.grad is not None and bool((p.grad == 5).all()) for p in model.parameters())
    assert not any(map(torch.equal, model.parameters(), start))  # the child's step has landed
    counts = [optimizer.state[param]["step"].item() for param in model.parameters()]
    # What is sent to a spawned process is shared by that.
    assert counts == [1.0 if share_optimizer or method == "spawn" else 0.0] * 4


@may_fork_with_threads
def test_a_child_of_a_fork_is_given_the_gradients_as_they_were():
    model = Linear(3, 2)
    optimizer = RMSpropAsync(model.parameters(), flat=True)
    model.share_memory()
    expected = torch.arange(6.0).reshape(2, 3)
    assert model.weight.grad is not None
    model.weight.grad.copy_(expected)

    def look() -> None:
        assert model.weight.grad is not None
        assert not model.weight.grad.is_shared()
        assert torch.equal(model.weight.grad, expected)
        optimizer.zero_grad()

    context = torch.multiprocessing.get_context("fork")
    assert run_to_end(context.Process(target=look)) == 0
    assert torch.equal(model.weight.grad, expected)
