"""Hooks of steps and of states, as torch's tests of its optimizers have them, over its tables."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from torch_suite import each_differentiable, each_info, params_of

# Hooks of steps


@pytest.mark.parametrize("place", ["register_step_pre_hook", "register_step_post_hook"])
@each_differentiable
def test_a_hook_is_called_at_each_step_until_it_is_removed(row, place):
    optimizer = row.make([torch.ones(2, device=row.device)])
    seen: list[Any] = []
    handle = getattr(optimizer, place)(lambda each, args, kwargs: seen.append(each))
    optimizer.step()
    optimizer.step()
    assert seen == [optimizer] * 2
    handle.remove()
    optimizer.step()
    assert len(seen) == 2


@each_differentiable
def test_hooks_of_all_optimizers_go_around_those_of_one(row):
    param = torch.ones(2, device=row.device)
    optimizer, other = row.make([param]), torch.optim.SGD([param])
    seen: list[str] = []

    def note(word: str) -> Any:
        return lambda *_: seen.append(word)

    handles = [
        register_optimizer_step_pre_hook(note("all before")),
        register_optimizer_step_post_hook(note("all after")),
    ]
    try:
        for each in (optimizer, other):
            each.register_step_pre_hook(note("before"))
            each.register_step_post_hook(note("after"))
        for each in (optimizer, other, optimizer):
            each.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == ["all before", "before", "after", "all after"] * 3
    optimizer.step()
    assert seen[12:] == ["before", "after"]


@each_info
def test_a_hook_before_the_step_may_change_its_arguments(info):
    (param,) = params_of((2,))
    optimizer = info.optim_cls([param])
    optimizer.register_step_pre_hook(lambda _, args, kwargs: (args, {"closure": lambda: 7.0}))
    assert optimizer.step() == 7.0
    optimizer.register_step_pre_hook(lambda *_: "neither None nor arguments")
    with pytest.raises(RuntimeError, match="must return None or a tuple"):
        optimizer.step()


# Hooks of states


def mark(optimizer: Any) -> None:
    optimizer.state["mark"] = 1


def marked(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
    return {**state_dict, "was marked": state_dict["state"].pop("mark", None) is not None}


@each_differentiable
def test_hooks_see_a_state_before_and_after_it_is_saved(row):
    params = params_of((2, 3), device=row.device)
    after = row.make(params)
    after.register_state_dict_post_hook(marked)
    assert not after.state_dict()["was marked"]
    before = row.make(params)
    handle = before.register_state_dict_pre_hook(mark)
    assert before.state_dict()["state"]["mark"] == 1
    handle.remove()
    both = row.make(params)
    both.register_state_dict_pre_hook(mark)
    both.register_state_dict_post_hook(marked)
    saved = both.state_dict()
    assert saved["was marked"]
    assert "mark" not in saved["state"]


@each_differentiable
def test_hooks_before_loading_change_the_state_in_their_order(row):
    optimizer = row.make(params_of((2, 3), device=row.device))
    saved = optimizer.state_dict()

    def in_place(_: Any, state_dict: dict[str, Any]) -> None:
        state_dict["param_groups"][0]["lr"] = 0.002

    def another(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = deepcopy(state_dict)
        state_dict["param_groups"][0]["lr"] = 0.003
        return state_dict

    optimizer.register_load_state_dict_pre_hook(in_place)
    optimizer.load_state_dict(saved)
    assert float(optimizer.param_groups[0]["lr"]) == 0.002
    handle = optimizer.register_load_state_dict_pre_hook(another, prepend=True)
    optimizer.load_state_dict(saved)
    assert float(optimizer.param_groups[0]["lr"]) == 0.002
    handle.remove()
    optimizer.register_load_state_dict_pre_hook(another)
    optimizer.load_state_dict(saved)
    assert float(optimizer.param_groups[0]["lr"]) == 0.003


@each_differentiable
def test_hooks_after_loading_see_what_was_loaded(row):
    (param,) = params_of((2, 3), device=row.device)
    optimizer = row.make([param])
    seen: list[Any] = []

    def put(each: Any) -> None:
        seen.append((float(each.param_groups[0]["lr"]), each.state[param]["square_avg"]))
        each.state["of the user"] = len(seen)

    saved = deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["lr"] = 0.125
    optimizer.register_load_state_dict_post_hook(put)
    optimizer.load_state_dict(saved)
    ((lr, square_avg),) = seen
    assert lr == 0.125
    assert square_avg is optimizer.state[param]["square_avg"]
    assert optimizer.state["of the user"] == 1
    optimizer.step()  # what the user keeps in the state is left alone
    assert optimizer.state_dict()["state"]["of the user"] == 1
