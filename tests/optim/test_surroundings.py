"""What a program has set for all of torch: a default device and dtype, and inference mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from hogstream.kernels import multi_tensor_rmsprop_, rmsprop_
from hogstream.optim import RMSpropAsync

FLAT = pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def surroundings(request: pytest.FixtureRequest) -> Iterator[None]:
    """A default dtype, and a default device where nothing can be computed."""
    torch.set_default_dtype(request.param)
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


@FLAT
@pytest.mark.usefixtures("surroundings")
def test_all_tensors_of_an_optimizer_are_where_parameters_are(flat):
    def ones() -> torch.Tensor:
        return torch.ones(5, dtype=torch.float32, device="cpu")

    param = Parameter(ones())
    param.grad = ones()
    optimizer = RMSpropAsync([param], flat=flat, lr=0.5, alpha=0.0, eps=0.0)
    optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.share_memory()
    optimizer.zero_grad()
    saved["state"][0]["step"] = 300  # as torch 1.11 wrote it
    optimizer.load_state_dict(saved)
    state = optimizer.state[param]
    assert (state["step"].dtype, state["step"].device.type) == (torch.float32, "cpu")
    assert (state["square_avg"].dtype, state["square_avg"].device.type) == (torch.float32, "cpu")
    assert state["step"].item() == 300
    assert param.tolist() == [0.0] * 5
    twin = copy.deepcopy(optimizer)
    (param,) = twin.param_groups[0]["params"]
    param.grad = ones()
    twin.step()
    assert param.tolist() == [-0.5] * 5


@pytest.mark.usefixtures("surroundings")
def test_updates_make_no_tensor_elsewhere():
    tensors = [torch.ones(5, dtype=torch.float32, device="cpu") for _ in range(3)]
    rmsprop_(*tensors, lr=0.5, alpha=0.0, eps=0.0)
    multi_tensor_rmsprop_(*([tensor] for tensor in tensors), lr=0.5, alpha=0.0, eps=0.0)
    assert tensors[0].tolist() == [0.0] * 5


@FLAT
@pytest.mark.parametrize("step_inside", [False, True])
@pytest.mark.parametrize("made_inside", [False, True])
def test_an_optimizer_may_be_made_and_stepped_in_inference_mode(made_inside, step_inside, flat):
    param = Parameter(torch.ones(3))
    with torch.inference_mode(made_inside):
        optimizer = RMSpropAsync([param], flat=flat, lr=0.5, alpha=0.0, eps=0.0)
        optimizer.load_state_dict(optimizer.state_dict())
        saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    with torch.inference_mode(made_inside):
        optimizer.state.clear()
    for expected in (0.5, 0.0):
        with torch.inference_mode(step_inside):
            optimizer.zero_grad()
            if param.grad is None:
                param.grad = torch.ones(3)
            else:
                param.grad.fill_(1.0)
            optimizer.step()
        assert param.tolist() == [expected] * 3
        optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[param]["step"].item() == 2


@FLAT
def test_a_parameter_of_inference_mode_is_updated_outside_too(flat):
    with torch.inference_mode():
        param = Parameter(torch.ones(3))
        param.grad = torch.ones(3)
    optimizer = RMSpropAsync([param], flat=flat, lr=0.25, alpha=0.0, eps=0.0)
    for step in range(4):
        with torch.inference_mode(step % 2 == 0):
            optimizer.step()
    assert param.tolist() == [0.0] * 3
    assert optimizer.state[param]["step"].item() == 4


@pytest.mark.parametrize("which", ["param", "ms"])
@pytest.mark.parametrize("inside", [False, True])
def test_an_update_of_an_inference_tensor(which, inside):
    tensors: dict[str, Any] = {name: torch.ones(3) for name in ("param", "grad", "ms")}
    with torch.inference_mode():
        tensors[which] = torch.ones(3)
    with torch.inference_mode(inside):
        rmsprop_(**tensors, lr=0.5, alpha=0.0, eps=0.0)
    assert tensors["param"].tolist() == [0.5] * 3
