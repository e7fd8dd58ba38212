"""Steps are counted in float32, as torch has them, and beyond what float32 can count in ones."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch

from hogstream.optim import RMSpropAsync
from hogstream.optim.step_counts import Counter, new_counts
from optim_testing import parameters, step_in_child, step_with
from process_testing import may_fork_with_threads, run_to_end

FLAT = pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])


def shown(optimizer: RMSpropAsync) -> list[float]:
    params = optimizer.param_groups[0]["params"]
    return [optimizer.state[param]["step"].item() for param in params]


def nearest(count: int) -> float:
    return float(np.float32(count))


@FLAT
@pytest.mark.parametrize("start", [2**24 - 2, 2**24 - 1, 2**24, 2**24 + 2, 2**25 - 4, 2**30])
def test_the_count_is_the_nearest_that_float32_holds(start, flat):
    params = parameters((3,), (2, 2))
    optimizer = RMSpropAsync(params, flat=flat)
    optimizer.state[params[0]]["step"].fill_(start)
    for step in range(1, 140):
        step_with(optimizer, params)
        assert shown(optimizer) == [nearest(start + step), step]
    assert optimizer.state_dict()["state"][0]["step"].dtype == torch.float32


def test_counts_where_another_parameter_is_reached_each_time():
    params = parameters((3,), (5,), (7,))
    optimizer = RMSpropAsync(params)
    for param in params:
        optimizer.state[param]["step"].fill_(2**24)
    for _ in range(5):
        for first in range(3):
            step_with(optimizer, [params[first], params[(first + 1) % 3]])
    assert shown(optimizer) == [nearest(2**24 + 10)] * 3


class Strange(torch.Tensor):
    """A class of somebody else's."""


@pytest.mark.parametrize(
    "step",
    [
        torch.zeros(()).as_subclass(Strange),
        torch.nn.Parameter(torch.zeros(()), requires_grad=False),
        torch.zeros((), dtype=torch.float64),
        torch.zeros(2)[1],
    ],
    ids=["of another class", "parameter", "float64", "view"],
)
def test_a_step_of_another_kind_is_counted_where_it_is(step):
    params = parameters((3,), (5,))
    optimizer = RMSpropAsync(params)
    optimizer.state[params[1]]["step"] = step
    for steps in range(1, 5):
        step_with(optimizer, params)
        assert shown(optimizer) == [steps, steps]
    assert optimizer.state[params[1]]["step"] is step


@pytest.mark.parametrize("counted", [1, 3])
@pytest.mark.parametrize("start", [0.0, 5.0, 2.0**24 - 8])
def test_a_count_that_is_set_anew_goes_on_from_there(start, counted):
    params = parameters((3,), (5,))
    optimizer = RMSpropAsync(params)
    for param in params:
        optimizer.state[param]["step"].fill_(2**24)
    for _ in range(counted):  # which leave a rest of 1 or -1
        step_with(optimizer, params)
    optimizer.state[params[1]]["step"].fill_(start)
    step_with(optimizer, params)
    assert shown(optimizer) == [nearest(2**24 + counted + 1), start + 1]


COPIES: dict[str, Callable[[RMSpropAsync], RMSpropAsync]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
def test_a_copy_counts_on(make_copy):
    params = parameters((3,), (5,))
    optimizer = RMSpropAsync(params)
    optimizer.state[params[1]]["step"].fill_(2**24)
    step_with(optimizer, params)
    twin = make_copy(optimizer)
    for _ in range(3):  # with another plan each time
        step_with(twin, twin.param_groups[0]["params"])
        step_with(twin, twin.param_groups[0]["params"][1:])
    step_with(twin, twin.param_groups[0]["params"][1:])
    assert shown(twin) == [4, 2**24 + 8]
    assert shown(optimizer) == [1, 2**24]


def test_a_loaded_count_has_no_rest():
    (param,) = params = parameters((3,))
    optimizer = RMSpropAsync(params)
    optimizer.state[param]["step"].fill_(2**24)
    saved = copy.deepcopy(optimizer.state_dict())
    for _ in range(3):
        step_with(optimizer, params)
        optimizer.load_state_dict(saved)
    assert shown(optimizer) == [2**24]
    for _ in range(2):
        step_with(optimizer, params)
    assert shown(optimizer) == [2**24 + 2]


def test_a_count_of_another_dtype_that_was_put_there_counts():
    params = parameters((3,), (5,), (7,))
    optimizer = RMSpropAsync(params)
    for param, dtype in zip(params, (torch.int64, torch.float64, torch.float32), strict=True):
        optimizer.state[param]["step"] = torch.tensor(2**24, dtype=dtype)
    for _ in range(3):
        step_with(optimizer, params)
    assert shown(optimizer) == [2**24 + 3, 2**24 + 3, 2**24 + 4]


@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (3, TypeError, "must be a tensor of float32, float64 or int64, got 3"),
        (torch.tensor(3, dtype=torch.bfloat16), TypeError, "must be a tensor of float32"),
        (torch.ones(1), ValueError, r"must have shape \(\), got \(1,\)"),
    ],
)
def test_refuses_a_step_that_cannot_count_before_anything_changes(step, error, message):
    params = parameters((3,), (5,))
    optimizer = RMSpropAsync(params)
    optimizer.state[params[1]]["step"] = step
    before = [param.detach().clone() for param in params]
    with pytest.raises(error, match=f"step of param 1 in group 0 {message}"):
        step_with(optimizer, params)
    assert all(map(torch.equal, params, before))


@may_fork_with_threads
@pytest.mark.parametrize(
    "methods", [("fork", "fork"), pytest.param(("spawn", "fork"), marks=pytest.mark.slow)]
)
def test_processes_count_together(methods):
    (param,) = params = parameters((3,))
    optimizer = RMSpropAsync(params).share_memory()
    optimizer.state[param]["step"].fill_(2**28)  # 32 steps to the next that float32 holds
    for method in methods:
        context = torch.multiprocessing.get_context(method)
        for _ in range(15):
            step_with(optimizer, params)
        assert run_to_end(context.Process(target=step_in_child, args=(optimizer,))) == 0
    assert shown(optimizer) == [nearest(2**28 + 34)]


@pytest.mark.gpu
def test_counts_on_a_device():
    counts = new_counts(2, torch.device("cuda"))
    counts[0, 0] = 2**24
    counter = Counter(*counts)
    for step in range(1, 12):
        counter.add_one()
        assert counts[0].tolist() == [nearest(2**24 + step), step]
