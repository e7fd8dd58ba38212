"""State by the names of parameters, as ``torch.distributed.checkpoint`` saves and loads it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import Linear, Sequential

from hogstream.optim import RMSpropAsync

dcp = pytest.importorskip("torch.distributed.checkpoint.state_dict")

FULL = {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "lr_in_momentum": True}
KINDS: dict[str, dict[str, bool]] = {
    "nested": {},
    "flattened": {"flatten_optimizer_state_dict": True},
    "full": {"full_state_dict": True},
    "full_on_cpu": {"full_state_dict": True, "cpu_offload": True},
}


def made(dtype: torch.dtype, **options: Any) -> tuple[Sequential, RMSpropAsync]:
    torch.manual_seed(0)
    model = Sequential(Linear(4, 3), Linear(3, 2)).to(dtype)
    groups = [
        {"params": model[0].parameters(), "eps": 0.01},
        {"params": model[1].parameters(), "eps_inside_sqrt": False},
    ]
    return model, RMSpropAsync(groups, backend="numpy", **options)


def train(model: Sequential, optimizer: RMSpropAsync, steps: int) -> None:
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(2, 4, dtype=dtype)).float().pow(2).sum().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, FULL], ids=["plain", "full"])
@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
def test_goes_on_to_the_bit(flat, options, dtype, kind):
    model, optimizer = made(dtype, lr=0.02, **options)
    train(model, optimizer, steps=3)
    of_kind = dcp.StateDictOptions(**kind)
    saved = copy.deepcopy(dcp.get_state_dict(model, optimizer, options=of_kind))

    for steps_before in (0, 1):
        twin, resumed = made(dtype, lr=0.5, maximize=True, flat=flat, **options)
        train(twin, resumed, steps_before)
        dcp.set_model_state_dict(twin, copy.deepcopy(saved[0]), options=of_kind)
        dcp.set_optimizer_state_dict(twin, resumed, copy.deepcopy(saved[1]), options=of_kind)
        again, original = copy.deepcopy((model, optimizer))
        for each in ((twin, resumed), (again, original)):
            train(*each, steps=2)
        states = zip(
            [(param, resumed.state[param]) for param in twin.parameters()],
            [(param, original.state[param]) for param in again.parameters()],
            strict=True,
        )
        for (param, state), (other, expected) in states:
            assert torch.equal(param, other)
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[name], expected[name]) for name in expected)
            assert state["square_avg"].dtype == torch.float32


def test_what_torchs_optimizer_saved_by_names_is_loaded():
    model, ours = made(torch.float32)
    theirs = torch.optim.RMSprop(model.parameters(), lr=0.25)
    train(model, theirs, steps=2)  # type: ignore[arg-type]
    saved = dcp.get_optimizer_state_dict(model, theirs)
    ours = RMSpropAsync(model.parameters(), eps_inside_sqrt=False, backend="numpy")
    dcp.set_optimizer_state_dict(model, ours, saved)
    assert ours.param_groups[0]["lr"] == 0.25
    for param in model.parameters():
        assert torch.equal(ours.state[param]["square_avg"], theirs.state[param]["square_avg"])
