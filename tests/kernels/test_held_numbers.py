"""Numbers that the compute type cannot hold are refused wherever they come in."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from hogstream.optim import RMSpropAsync
from hogstream.scheduler import ProcessScheduler, SharedParameters, StreamScheduler
from update_testing import fresh_state, update_, update_list_

Numbers = dict[str, Any]
NARROW = [torch.float16, torch.bfloat16, torch.float32]


def one_tensor(param: torch.Tensor, numbers: Numbers) -> None:
    update_(fresh_state(param, **numbers), torch.zeros_like(param), **numbers)


def list_of_tensors(param: torch.Tensor, numbers: Numbers) -> None:
    params = [torch.ones(3, dtype=torch.float64), param]
    update_list_(
        [fresh_state(each, **numbers) for each in params],
        [torch.zeros_like(each) for each in params],
        **numbers,
    )


def optimizer(param: torch.Tensor, numbers: Numbers) -> None:
    RMSpropAsync([Parameter(param)], **numbers)


def flat_optimizer(param: torch.Tensor, numbers: Numbers) -> None:
    RMSpropAsync([Parameter(param)], flat=True, **numbers)


def group(param: torch.Tensor, numbers: Numbers) -> None:
    RMSpropAsync([Parameter(param)]).add_param_group(
        {"params": [Parameter(param.clone())], **numbers}
    )


def stepped(param: torch.Tensor, change: Callable[[RMSpropAsync], None]) -> None:
    wrapped = Parameter(param)
    made = RMSpropAsync([wrapped])
    for number in range(2):
        wrapped.grad = torch.zeros_like(wrapped)
        if number == 1:
            change(made)
        made.step()


def changed_group(param: torch.Tensor, numbers: Numbers) -> None:
    stepped(param, lambda made: made.param_groups[0].update(numbers))


def changed_group_of_tensors(param: torch.Tensor, numbers: Numbers) -> None:
    tensors = {
        name: torch.tensor(value, dtype=torch.float64)
        for name, value in numbers.items()
        if not isinstance(value, bool)
    }
    stepped(param, lambda made: made.param_groups[0].update({**numbers, **tensors}))


def loaded(param: torch.Tensor, numbers: Numbers) -> None:
    saved = RMSpropAsync([torch.ones(3, dtype=torch.float64)]).state_dict()
    saved["param_groups"][0].update(numbers)
    RMSpropAsync([Parameter(param)]).load_state_dict(saved)


def scheduler(param: torch.Tensor, numbers: Numbers) -> None:
    StreamScheduler(SharedParameters({"w": param}), workers=1, **numbers)


def changed_scheduler(param: torch.Tensor, numbers: Numbers) -> None:
    made = StreamScheduler(SharedParameters({"w": param}), workers=1)
    made.hyperparameters = replace(made.hyperparameters, **numbers)


def process_scheduler(param: torch.Tensor, numbers: Numbers) -> None:
    ProcessScheduler(SharedParameters({"w": param}), processes=1, **numbers)


ENTRIES = [
    one_tensor,
    list_of_tensors,
    optimizer,
    flat_optimizer,
    group,
    changed_group,
    changed_group_of_tensors,
    loaded,
    scheduler,
    changed_scheduler,
    process_scheduler,
]
HOLD = "must be a number that float32, the compute type, can hold, got "
# Each message with the numbers that float64 holds and float32 does not.
LOST: dict[str, Numbers] = {
    f"eps {HOLD}1e-46, which becomes 0.0 there": {"eps": 1e-46},
    f"lr {HOLD}1e+39, which becomes inf there": {"lr": 1e39},
    f"lr {HOLD}1e-46, which becomes 0.0 there": {"lr": 1e-46},
    f"alpha {HOLD}0.99999999, which becomes 1.0 there": {"alpha": 0.99999999},
    f"weight_decay {HOLD}1e+39, which becomes inf there": {"weight_decay": 1e39},
    f"momentum {HOLD}1e+39, which becomes inf there": {"momentum": 1e39},
    f"momentum {HOLD}1e-46, which becomes 0.0 there": {"momentum": 1e-46},
    f"1 - lr*weight_decay {HOLD}-1e+40, which becomes -inf there": {
        "lr": 1e20,
        "weight_decay": 1e20,
        "decoupled_weight_decay": True,
    },
}
# The last that float32 holds, zeros, and what is only small.
HELD: list[Numbers] = [
    {"eps": 1e-45},
    {"eps": 0.0},
    {"lr": 0.0},
    {"lr": 3.4e38},
    {"alpha": 0.0},
    {"alpha": 1 - 2**-24},
    {"alpha": 1.0},
    {"momentum": 3.4e38},
    {"momentum": 1e-45},
    {"weight_decay": 1e-4, "lr": 1e-5, "decoupled_weight_decay": True},
    {"weight_decay": 1.0, "lr": 1.0, "decoupled_weight_decay": True},
]


@pytest.mark.parametrize(("message", "numbers"), LOST.items(), ids=LOST.keys())
@pytest.mark.parametrize("enter", ENTRIES)
def test_refuses_what_float32_cannot_hold_and_changes_nothing(enter, message, numbers):
    for dtype in NARROW:
        param = torch.ones(3, dtype=dtype)
        with pytest.raises(ValueError, match=re.escape(message)):
            enter(param, numbers)
        assert param.tolist() == [1.0] * 3


@pytest.mark.parametrize("numbers", LOST.values(), ids=LOST.keys())
@pytest.mark.parametrize("enter", ENTRIES)
def test_float64_holds_them(enter, numbers):
    enter(torch.ones(3, dtype=torch.float64), numbers)


@pytest.mark.parametrize("numbers", HELD, ids=str)
@pytest.mark.parametrize("enter", ENTRIES)
def test_takes_the_last_that_float32_holds(enter, numbers):
    enter(torch.ones(3), numbers)


def test_refuses_a_factor_that_not_even_float64_holds():
    numbers = {"lr": 1e200, "weight_decay": 1e200, "decoupled_weight_decay": True}
    message = "1 - lr*weight_decay must be a number that float64, the compute type, can hold"
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer(torch.ones(3, dtype=torch.float64), numbers)


def test_a_parameter_that_joins_a_group_is_held_to_its_numbers():
    double = Parameter(torch.ones(3, dtype=torch.float64))
    made = RMSpropAsync([double], eps=1e-46)
    double.grad = torch.ones_like(double)
    made.step()
    before = double.tolist()
    made.param_groups[0]["params"].append(Parameter(torch.ones(3)))
    with pytest.raises(ValueError, match=r"eps must be a number that float32"):
        made.step()
    assert double.tolist() == before
