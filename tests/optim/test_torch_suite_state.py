"""What is saved, loaded, copied and pickled, as torch's tests have it, over its tables."""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.testing import assert_close

from hogstream.optim import import_state
from torch_suite import (
    TORCH,
    LeastSquares,
    each_info,
    each_of_torchs,
    each_row,
    filled,
    give_grads,
    params_in,
    params_of,
)
from triton_testing import DEVICE, on_tritons_device

named = pytest.mark.parametrize("named", [False, True], ids=["unnamed", "named"])
loaded_named = pytest.mark.parametrize("loaded_named", [False, True], ids=["", "into_named"])


def given(problem: LeastSquares, named: bool) -> Any:
    return problem.named() if named else problem.params


def trained(row: Any, *, named: bool = False, steps: int = 5) -> tuple[LeastSquares, Any]:
    problem = LeastSquares.made(row.device)
    optimizer = row.make(given(problem, named))
    problem.train(optimizer, steps)
    return problem, optimizer


def twin_of(problem: LeastSquares) -> LeastSquares:
    """The same problem at the same place, with parameters of its own."""
    weight, bias = (Parameter(param.detach().clone()) for param in problem.params)
    return LeastSquares(weight, bias, problem.input)


def without_names(state_dict: dict[str, Any]) -> dict[str, Any]:
    groups = [{**group, "param_names": None} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


def assert_same(a: Any, b: Any) -> None:
    """Equal to the bit, through dictionaries and lists."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for name in a:
            assert_same(a[name], b[name])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for each, other in zip(a, b, strict=True):
            assert_same(each, other)
    elif isinstance(a, torch.Tensor):
        assert_close(a, b, rtol=0, atol=0)
    else:
        assert a == b


@loaded_named
@named
@each_row
def test_a_loaded_state_goes_on_to_the_bit(row, named, loaded_named):
    problem, optimizer = trained(row, named=named)
    twin = twin_of(problem)
    loaded = row.make(given(twin, loaded_named))
    saved = deepcopy(optimizer.state_dict())
    kept = deepcopy(saved)
    loaded.load_state_dict(saved)
    assert_same(saved, kept)
    for _ in range(5):
        problem.train(optimizer, 1)
        twin.train(loaded, 1)
        assert_close(twin.params, problem.params, rtol=0, atol=0)
    assert_same(without_names(loaded.state_dict()), without_names(optimizer.state_dict()))
    if named or loaded_named:
        assert loaded.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]


@each_row
def test_a_group_that_is_listed_twice_is_saved_alike(row):
    _, optimizer = trained(row)
    saved = optimizer.state_dict()["param_groups"][-1]
    optimizer.param_groups.extend(optimizer.param_groups)
    assert_same(optimizer.state_dict()["param_groups"][-1], saved)


@each_row
def test_a_state_of_before_an_option_was_there_is_loaded(row):
    problem, optimizer = trained(row)
    saved = deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        for flag in row.info.not_og_supported_flags:
            group.pop(flag, None)
    optimizer.load_state_dict(saved)
    before = deepcopy(problem.params)
    problem.train(optimizer, 1)
    assert not torch.equal(problem.weight, before[0])


@each_row
def test_a_count_that_was_saved_as_a_number_is_loaded(row):
    problem, optimizer = trained(row, steps=3)
    saved = deepcopy(optimizer.state_dict())
    for state in saved["state"].values():
        state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    problem.train(optimizer, 1)
    for param in problem.params:
        step = optimizer.state[param]["step"]
        assert isinstance(step, torch.Tensor)
        assert step.item() == 4


@pytest.mark.parametrize("weights_only", [False, True])
@named
@each_row
def test_a_file_holds_the_state(row, named, weights_only):
    _, optimizer = trained(row, named=named)
    saved = optimizer.state_dict()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    assert_same(torch.load(file, weights_only=weights_only), saved)


@each_row
def test_a_loaded_state_is_a_copy(row):
    problem, optimizer = trained(row)
    twin = twin_of(problem)
    loaded = row.make(twin.params)
    loaded.load_state_dict(optimizer.state_dict())
    before = deepcopy(optimizer.state_dict()["state"])
    twin.train(loaded, 1)
    assert_same(optimizer.state_dict()["state"], before)


@each_row
def test_the_device_of_counts_stays(row):
    problem, optimizer = trained(row)
    before = [optimizer.state[param]["step"].device for param in problem.params]
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    assert [optimizer.state[param]["step"].device for param in problem.params] == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@each_row
def test_a_state_is_loaded_for_parameters_of_another_dtype(row, dtype):
    problem, optimizer = trained(row)
    cast = [Parameter(param.detach().to(dtype)) for param in problem.params]
    loaded = row.make(cast)
    loaded.load_state_dict(optimizer.state_dict())
    # torch gives state the dtype of parameters, which is too coarse a one for half types.
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    for param, theirs in zip(cast, problem.params, strict=True):
        for name, value in loaded.state[param].items():
            assert value.dtype == (torch.float32 if name == "step" else kept)
            assert_close(value.float(), optimizer.state[theirs][name], rtol=0, atol=0)
        param.grad = filled(param.detach(), 0)
    loaded.step()


@on_tritons_device
@pytest.mark.parametrize("captured", [False, True])
@each_info
def test_a_state_is_loaded_whether_it_was_captured_or_not(info, captured):
    # As when what a GPU has trained goes on elsewhere: how it is launched is not part of the state.
    params = params_of((2, 3), device=str(DEVICE))
    optimizer = info.optim_cls(params, capturable=captured, backend="triton")
    give_grads(params, 0)
    optimizer.step()
    saved = optimizer.state_dict()
    for group in saved["param_groups"]:
        group["capturable"] = not captured
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["capturable"] == captured
    optimizer.step()
    assert optimizer.state[params[0]]["step"].item() == 2


@each_row
def test_a_state_of_other_parameters_is_refused(row):
    _, optimizer = trained(row)
    saved = optimizer.state_dict()
    before = deepcopy(saved)
    groups = saved["param_groups"]
    fewer = {**saved, "param_groups": [{**groups[0], "params": groups[0]["params"][:1]}]}
    twice = {**saved, "param_groups": groups * 2}
    for wrong in (fewer, twice):
        with pytest.raises(ValueError, match="group"):
            optimizer.load_state_dict(wrong)
    assert_same(optimizer.state_dict(), before)


@each_row
def test_state_of_the_user_stays_and_is_saved(row):
    problem, optimizer = trained(row)
    optimizer.state[problem.bias]["of the user"] = [torch.ones(2), torch.zeros(())]
    optimizer.param_groups[0]["name"] = "all"
    problem.train(optimizer, 1)
    saved = deepcopy(optimizer.state_dict())
    assert_same(saved["state"][1]["of the user"], [torch.ones(2), torch.zeros(())])
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["name"] == "all"
    assert_same(optimizer.state[problem.bias]["of the user"], [torch.ones(2), torch.zeros(())])


@each_row
def test_state_of_another_layout_is_loaded(row):
    (param,) = params_of((4, 6), device=row.device)
    twin = Parameter(param.detach().clone())
    optimizer, loaded = row.make([param]), row.make([twin])
    give_grads([param], 0)
    optimizer.step()
    with torch.no_grad():
        twin.copy_(param)
    saved = deepcopy(optimizer.state_dict())
    saved["state"][0] = {
        name: value.T.contiguous().T if value.ndim else value
        for name, value in saved["state"][0].items()
    }
    loaded.load_state_dict(saved)
    for params, each in (([param], optimizer), ([twin], loaded)):
        give_grads(params, 1)
        each.step()
    assert_close(twin, param, rtol=0, atol=0)


# Between torch's optimizer and ours


@each_of_torchs
def test_torch_goes_on_from_our_state(row):
    problem, optimizer = trained(row)
    twin = twin_of(problem)
    theirs = row.make_torchs(twin.params)
    theirs.load_state_dict(deepcopy(optimizer.state_dict()))
    for _ in range(5):
        problem.train(optimizer, 1)
        twin.train(theirs, 1)
        assert_close(twin.params, problem.params)


@each_of_torchs
def test_we_go_on_from_torchs_state(row):
    problem = LeastSquares.made(row.device)
    theirs = row.make_torchs(problem.params)
    problem.train(theirs, 5)
    twin = twin_of(problem)
    ours = row.make(twin.params)
    ours.load_state_dict(deepcopy(theirs.state_dict()))
    for _ in range(5):
        problem.train(theirs, 1)
        twin.train(ours, 1)
        assert_close(twin.params, problem.params)


@each_info
def test_torchs_state_that_is_imported_says_how_it_was_made(info):
    # An optimizer without options takes those of what it loads, as torch's do.
    kwargs: dict[str, Any] = {"momentum": 0.9, "centered": True, "weight_decay": 0.1, "lr": 0.02}
    problem = LeastSquares.made("cpu")
    theirs = torch.optim.RMSprop(problem.params, **kwargs)
    problem.train(theirs, 3)
    twin = twin_of(problem)
    ours = info.optim_cls(twin.params)
    ours.load_state_dict(import_state(theirs.state_dict(), made_by="torch"))
    assert {name: ours.param_groups[0][name] for name in kwargs} == kwargs
    problem.train(theirs, 3)
    twin.train(ours, 3)
    assert_close(twin.params, problem.params)


# Copies

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": deepcopy,
    "pickle": lambda each: pickle.loads(pickle.dumps(each)),
}


def public(optimizer: Any) -> set[str]:
    return {name for name in vars(optimizer) if not name.startswith("_")}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES)
@each_row
def test_a_copy_has_the_same_attributes_and_steps_alike(row, make_copy):
    problem, optimizer = trained(row)
    twin = make_copy(optimizer)
    assert public(twin) == public(optimizer)
    pairs = list(zip(params_in(twin), problem.params, strict=True))
    for step in range(3):
        for copied, param in pairs:
            for each in (copied, param):
                each.grad = filled(param.detach(), step)
        twin.step()
        optimizer.step()
        for copied, param in pairs:
            assert copied is not param
            assert_close(copied, param, rtol=0, atol=0)
    assert_same(twin.state_dict(), optimizer.state_dict())


@each_info
def test_a_shallow_copy_of_the_state_is_what_state_dict_gives(info):
    (param,) = params_of((3,))
    optimizer = info.optim_cls([param])
    give_grads([param], 0)
    optimizer.step()
    saved = copy(optimizer.state_dict())["state"][0]
    assert saved["square_avg"].data_ptr() == optimizer.state[param]["square_avg"].data_ptr()


def test_torchs_row_lists_the_options_that_came_later():
    assert set(TORCH.not_og_supported_flags) <= torch.optim.RMSprop([torch.ones(1)]).defaults.keys()


@pytest.mark.gpu
@each_row
def test_a_state_from_the_host_is_loaded_on_the_device(row):
    if row.device == "cuda":
        pytest.skip("the state is made on the host")
    problem, optimizer = trained(row)
    weight, bias = (Parameter(param.detach().cuda()) for param in problem.params)
    twin = LeastSquares(weight, bias, problem.input.cuda())
    loaded = row.make(twin.params)
    saved = deepcopy(optimizer.state_dict())
    kept = deepcopy(saved)
    loaded.load_state_dict(saved)
    assert_same(saved, kept)
    for param in twin.params:
        devices = {name: value.device.type for name, value in loaded.state[param].items()}
        assert devices.pop("step") == "cpu"
        assert set(devices.values()) == {"cuda"}
    for _ in range(5):
        problem.train(optimizer, 1)
        twin.train(loaded, 1)
        assert_close([param.cpu() for param in twin.params], [*problem.params])
