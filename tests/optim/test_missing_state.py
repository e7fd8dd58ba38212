"""State that a program has thrown away, or that a parameter never had, is made by the next step."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from torch.nn import Linear, Parameter, Sequential
from torch.optim import Optimizer

from hogstream.optim import RMSpropAsync

Change = Callable[[Optimizer, Sequential], None]


def clear(optimizer: Optimizer, model: Sequential) -> None:
    optimizer.state.clear()


def replace_all(optimizer: Optimizer, model: Sequential) -> None:
    optimizer.state = defaultdict(dict)


def replace_by_a_plain_dict(optimizer: Optimizer, model: Sequential) -> None:
    optimizer.state = {param: {} for param in model.parameters()}  # type: ignore[assignment]


def set_state(optimizer: Optimizer, model: Sequential) -> None:
    optimizer.__setstate__({"state": defaultdict(dict)})


def empty_one(optimizer: Optimizer, model: Sequential) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][1]] = {}


def empty_one_in_place(optimizer: Optimizer, model: Sequential) -> None:
    optimizer.state[optimizer.param_groups[0]["params"][1]].clear()


def pop_one(optimizer: Optimizer, model: Sequential) -> None:
    optimizer.state.pop(optimizer.param_groups[0]["params"][2])


def load_none(optimizer: Optimizer, model: Sequential) -> None:
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": {}, "param_groups": groups})


def clear_and_load(optimizer: Optimizer, model: Sequential) -> None:
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.state.clear()
    optimizer.load_state_dict(saved)


def append(optimizer: Optimizer, model: Sequential) -> None:
    model.append(Linear(2, 2))
    optimizer.param_groups[0]["params"] += model[-1].parameters()


def replace_layer(optimizer: Optimizer, model: Sequential) -> None:
    model[0] = Linear(3, 4)
    optimizer.param_groups[0]["params"] = list(model.parameters())


def replace_parameter(optimizer: Optimizer, model: Sequential) -> None:
    model[1].weight = Parameter(model.get_parameter("1.weight").detach().clone())
    optimizer.param_groups[0]["params"] = list(model.parameters())


CHANGES: list[Change] = [
    clear,
    replace_all,
    replace_by_a_plain_dict,
    set_state,
    empty_one,
    empty_one_in_place,
    pop_one,
    load_none,
    clear_and_load,
    append,
    replace_layer,
    replace_parameter,
]


def train(make: Callable[..., Optimizer], change: Change) -> list[torch.Tensor]:
    """Parameters, state and counts after steps before and after a change."""
    torch.manual_seed(0)
    model = Sequential(Linear(3, 4), Linear(4, 2))
    optimizer = make(model.parameters(), lr=0.01, alpha=0.9, eps=1e-3)
    for step in range(5):
        if step == 2:
            change(optimizer, model)
        optimizer.zero_grad()
        model(torch.ones(4, 3)).square().sum().backward()
        optimizer.step()
    states = [optimizer.state[param] for param in model.parameters()]
    values = [state[name] for state in states for name in ("step", "square_avg")]
    return [param.detach() for param in model.parameters()] + values


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
@pytest.mark.parametrize("change", CHANGES)
def test_goes_on_as_torch_does(change, flat):
    ours = train(lambda p, **n: RMSpropAsync(p, flat=flat, eps_inside_sqrt=False, **n), change)
    theirs = train(torch.optim.RMSprop, change)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
def test_what_is_left_of_a_state_stays(flat):
    param = Parameter(torch.ones(3))
    optimizer = RMSpropAsync([param], flat=flat, alpha=0.5)
    param.grad = torch.ones(3)
    optimizer.step()
    optimizer.state[param].pop("step")
    optimizer.step()
    assert optimizer.state[param]["step"] == 1
    assert optimizer.state[param]["square_avg"].tolist() == [0.75] * 3


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
def test_old_state_is_left_to_whom_keeps_it(flat):
    param = Parameter(torch.ones(3))
    optimizer = RMSpropAsync([param], flat=flat)
    param.grad = torch.ones(3)
    optimizer.step()
    old, values = optimizer.state[param], copy.deepcopy(optimizer.state[param])
    optimizer.state.clear()
    optimizer.step()
    assert all(torch.equal(old[name], values[name]) for name in ("step", "square_avg"))
    assert optimizer.state[param]["step"] == 1


def test_a_flat_optimizer_is_flat_again():
    model = Sequential(Linear(3, 4), Linear(4, 2))
    optimizer = RMSpropAsync(model.parameters(), flat=True)
    optimizer.state.clear()
    optimizer.step()
    assert optimizer._plan is not None
    assert [launch.table.updates for launch in optimizer._plan.launches] == [1]


def test_resets_leave_nothing_behind():
    model = Linear(3, 2)
    optimizer = RMSpropAsync(model.parameters())
    for _ in range(3):
        optimizer.state.clear()
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
    assert len(optimizer._counts) == 1


def fill_by_share_memory(optimizer: RMSpropAsync) -> None:
    optimizer.share_memory()


def fill_by_loading(optimizer: RMSpropAsync) -> None:
    optimizer.load_state_dict(RMSpropAsync(optimizer.param_groups[0]["params"]).state_dict())


@pytest.mark.parametrize("fill", [fill_by_share_memory, fill_by_loading])
def test_whatever_needs_the_state_makes_it(fill):
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2))]
    optimizer = RMSpropAsync(params)
    optimizer.state.clear()
    fill(optimizer)
    assert all(set(optimizer.state[param]) == {"step", "square_avg"} for param in params)
    assert all(not optimizer.state[param]["square_avg"].any() for param in params)


@pytest.mark.parametrize("change", [clear, set_state, empty_one, pop_one, append, replace_layer])
def test_shared_state_is_not_made_anew(change):
    model = Sequential(Linear(3, 4), Linear(4, 2)).share_memory()
    optimizer = RMSpropAsync(model.parameters()).share_memory()
    change(optimizer, model)
    model(torch.ones(4, 3)).sum().backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(RuntimeError, match=r"param \d in group 0 has no s.*, and other process"):
        optimizer.step()
    assert all(map(torch.equal, model.parameters(), before))


def test_an_optimizer_that_has_loaded_shared_state_may_be_reset():
    param = Parameter(torch.ones(3))
    optimizer = RMSpropAsync([param])
    optimizer.load_state_dict(RMSpropAsync([Parameter(torch.ones(3))]).share_memory().state_dict())
    optimizer.state.clear()
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_state_that_is_shared_by_hand_is_not_made_anew():
    params = [Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = RMSpropAsync(params)
    for state in optimizer.state.values():
        state["square_avg"].share_memory_()
    del optimizer.state[params[0]]
    for param in params:
        param.grad = torch.ones(3)
    with pytest.raises(RuntimeError, match="other processes would not see"):
        optimizer.step()
    assert all(param.eq(1).all() for param in params)


def test_a_copy_of_a_shared_optimizer_may_be_reset():
    param = Parameter(torch.ones(3))
    optimizer = copy.deepcopy(RMSpropAsync([param]).share_memory())
    (param,) = optimizer.param_groups[0]["params"]
    optimizer.state.clear()
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[param]["step"] == 1


def test_an_appended_parameter_that_cannot_be_updated_is_refused():
    good = Parameter(torch.ones(3))
    optimizer = RMSpropAsync([good])
    optimizer.param_groups[0]["params"].append(Parameter(torch.ones(6)[::2]))
    good.grad = torch.ones(3)
    with pytest.raises(ValueError, match="param 1 must fill one block of memory"):
        optimizer.step()
    assert good.tolist() == [1.0] * 3


def test_a_parameter_that_has_left_flat_memory_gets_no_state_again():
    old, new = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    optimizer = RMSpropAsync([old], flat=True)
    optimizer.param_groups[0]["params"] = [new]
    optimizer.state.clear()
    new.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state.keys() == {new}
    assert optimizer.state_dict()["state"].keys() == {0}
