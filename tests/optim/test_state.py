"""State: made at once, loaded to the bit, shared between processes, copied and pickled."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from hogstream.optim import RMSprop, RMSpropAsync
from optim_testing import parameters, step_along, step_in_child
from process_testing import may_fork_with_threads, run_to_end
from update_testing import COMPUTE, DTYPES, State, assert_same_bits

SHAPES = [(3, 4), (5,)]


def states(optimizer: Optimizer) -> list[State]:
    return [
        State(param.detach().clone(), optimizer.state[param]["square_avg"].clone())
        for group in optimizer.param_groups
        for param in group["params"]
    ]


def assert_same_states(actual: Optimizer, expected: Optimizer) -> None:
    for one, other in zip(states(actual), states(expected), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_state_is_made_with_the_optimizer(dtype):
    params = parameters((), (0, 3), (2, 3, 4, 5), dtype=dtype)
    params[2].data = params[2].data.to(memory_format=torch.channels_last)
    optimizer = RMSpropAsync(params)
    for param in params:
        state = optimizer.state[param]
        assert set(state) == {"step", "square_avg"}  # as torch.optim.RMSprop has them
        assert state["step"].dtype == torch.float32
        assert state["step"].shape == ()
        assert state["square_avg"].dtype == COMPUTE[dtype]
        assert state["square_avg"].shape == param.shape
        assert state["square_avg"].stride() == param.stride()
        assert not state["square_avg"].any()
        assert not state["square_avg"].requires_grad


def test_steps_are_counted_where_there_was_a_gradient():
    params = parameters(*SHAPES)
    optimizer = RMSpropAsync(params)
    step_along(optimizer, first_seed=0, steps=2)
    before = states(optimizer)[1]
    params[0].grad, params[1].grad = torch.ones_like(params[0]), None
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in params] == [3, 2]
    assert_same_bits(states(optimizer)[1], before)


ALL_AT_ONCE: dict[str, Any] = {"momentum": 0.9, "centered": True, "weight_decay": 0.1}
OPTIONS: list[dict[str, Any]] = [
    {"weight_decay": 0.01},
    {**ALL_AT_ONCE, "maximize": True, "eps_inside_sqrt": False},
    {**ALL_AT_ONCE, "lr_in_momentum": True, "initial_accumulator_value": 1.0},
    {"momentum": 0.9, "decoupled_weight_decay": True, "weight_decay": 0.1},
    {"lr": torch.tensor(0.1), "centered": True},
    {"kahan_sum": True, "momentum": 0.9},
    {"stochastic_rounding": True, "seed": 7},
]


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


WAYS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "file": through_a_file,
    "pickle": lambda saved: pickle.loads(pickle.dumps(saved)),
    "deepcopy": copy.deepcopy,
}


def all_of(optimizer: Optimizer) -> list[torch.Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    of_state = [
        optimizer.state[param][name] for param in params for name in names_of_state(optimizer)
    ]
    return [param.detach() for param in params] + of_state


def names_of_state(optimizer: Optimizer) -> list[str]:
    return sorted(next(iter(optimizer.state.values())))


@pytest.mark.parametrize(
    ("way", "dtype"),
    [
        *[(WAYS["file"], dtype) for dtype in (*COMPUTE, torch.complex64)],
        *[(WAYS[name], torch.float32) for name in ("pickle", "deepcopy")],
    ],
)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_resumes_to_the_bit(options, dtype, way):
    of_pair = [(False, False)] if dtype.is_complex else [(False, True), (True, False)]
    for flat, resumed_flat in of_pair:
        optimizer = RMSpropAsync(parameters(*SHAPES, dtype=dtype), **options, flat=flat)
        step_along(optimizer, first_seed=0, steps=3)
        saved = way(optimizer.state_dict())

        params = [
            torch.nn.Parameter(param.detach().clone())
            for param in optimizer.param_groups[0]["params"]
        ]
        resumed = RMSpropAsync(params, lr=0.3, momentum=0.5, flat=resumed_flat)
        resumed.load_state_dict(saved)
        assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
        for each in (optimizer, resumed):
            step_along(each, first_seed=3, steps=3)
        assert all(map(torch.equal, all_of(resumed), all_of(optimizer)))
        assert [resumed.state[param]["step"].item() for param in params] == [6, 6]


def test_goes_on_from_the_state_of_torch():
    theirs = torch.optim.RMSprop(parameters(*SHAPES), lr=0.02, alpha=0.9, weight_decay=0.1)
    step_along(theirs, first_seed=0, steps=3)
    params = [
        torch.nn.Parameter(param.detach().clone()) for param in theirs.param_groups[0]["params"]
    ]
    ours = RMSpropAsync(params, eps_inside_sqrt=False)
    ours.load_state_dict(theirs.state_dict())
    for optimizer in (theirs, ours):
        step_along(optimizer, first_seed=3, steps=3)
    torch.testing.assert_close(params, [p.detach() for p in theirs.param_groups[0]["params"]])
    assert ours.state_dict()["param_groups"][0]["eps_inside_sqrt"] is False
    assert ours.state[params[0]]["step"].item() == 6


def test_a_parameter_without_saved_state_starts_afresh():
    params = parameters(*SHAPES)
    theirs = torch.optim.RMSprop(params)
    params[0].grad = torch.ones_like(params[0])
    theirs.step()  # makes the state of the first parameter only

    ours = RMSprop(params)
    step_along(ours, first_seed=0)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state[params[0]]["square_avg"].eq(0.01).all()
    assert ours.state[params[1]]["square_avg"].eq(0.0).all()
    assert [ours.state[param]["step"].item() for param in params] == [1, 0]


def test_state_is_loaded_into_the_memory_that_is_shared():
    saved = RMSpropAsync(parameters(*SHAPES))
    step_along(saved, first_seed=0)
    optimizer = RMSpropAsync(parameters(*SHAPES)).share_memory()
    tensors = [tensor for state in optimizer.state.values() for tensor in state.values()]
    pointers = [tensor.data_ptr() for tensor in tensors]

    optimizer.load_state_dict(saved.state_dict())
    loaded = [tensor for state in optimizer.state.values() for tensor in state.values()]
    assert [tensor.data_ptr() for tensor in loaded] == pointers
    assert all(tensor.is_shared() for tensor in loaded)
    expected = [tensor for state in saved.state.values() for tensor in state.values()]
    assert all(torch.equal(*pair) for pair in zip(loaded, expected, strict=True))


def test_the_saved_state_is_not_an_alias():
    saved = RMSpropAsync(parameters(*SHAPES))
    step_along(saved, first_seed=0)
    loaded = RMSpropAsync(parameters(*SHAPES))
    loaded.load_state_dict(saved.state_dict())
    before = states(saved)
    step_along(loaded, first_seed=1)
    for state, old in zip(states(saved), before, strict=True):
        assert_same_bits(state, old)


def test_hooks_translate_and_see_what_is_loaded():
    saved = RMSpropAsync(parameters(*SHAPES, dtype=torch.bfloat16))
    step_along(saved, first_seed=0)
    old = saved.state_dict()
    old["state"] = {place: (s["step"], s["square_avg"]) for place, s in old["state"].items()}

    def translate(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        named = {
            place: dict(zip(("step", "square_avg"), values, strict=True))
            for place, values in state_dict["state"].items()
        }
        return {**state_dict, "state": named}

    seen: list[torch.Tensor] = []
    optimizer = RMSpropAsync(parameters(*SHAPES, dtype=torch.bfloat16))
    optimizer.register_load_state_dict_pre_hook(translate)
    optimizer.register_load_state_dict_post_hook(
        lambda loaded: seen.extend(state.ms for state in states(loaded))
    )
    optimizer.load_state_dict(old)
    assert [ms.dtype for ms in seen] == [torch.float32] * 2
    assert all(map(torch.equal, seen, (state.ms for state in states(saved))))


def state_of(make: Callable[[Any], Optimizer], *shapes: tuple[int, ...]) -> dict[str, Any]:
    optimizer = make(parameters(*shapes))
    step_along(optimizer, first_seed=0)
    return optimizer.state_dict()


def in_two_groups(params: list[torch.nn.Parameter]) -> Optimizer:
    return RMSpropAsync([{"params": [param]} for param in params])


def with_momentum_set_later(params: list[torch.nn.Parameter]) -> Optimizer:
    optimizer = torch.optim.RMSprop(params)
    optimizer.register_step_post_hook(  # and no buffer
        lambda *_: optimizer.param_groups[0].update(momentum=0.9)
    )
    return optimizer


def with_negative_lr(params: list[torch.nn.Parameter]) -> Optimizer:
    optimizer = torch.optim.RMSprop(params)
    optimizer.param_groups[0]["lr"] = -1.0
    return optimizer


def with_another(name: str, value: Any) -> Callable[[list[torch.nn.Parameter]], Optimizer]:
    """Makes an optimizer that saves another value of the first parameter's state, or none."""

    def make(params: list[torch.nn.Parameter]) -> Optimizer:
        optimizer = RMSpropAsync(params)

        def change(_: Optimizer, saved: dict[str, Any]) -> None:
            state = {**saved["state"][0], name: value}
            saved["state"][0] = {each: state[each] for each in state if state[each] is not None}

        optimizer.register_state_dict_post_hook(change)
        return optimizer

    return make


# Each message with the optimizer, and the shapes of its parameters, whose state it refuses.
UNLOADABLE: dict[str, tuple[Callable[[Any], Optimizer], list[tuple[int, ...]]]] = {
    "must have step, square_avg, momentum_buffer, got none of ['momentum_buffer']": (
        with_momentum_set_later,
        SHAPES,
    ),
    "lr must be a finite number >= 0, got -1.0": (with_negative_lr, SHAPES),
    "state_dict must have groups of [2] parameters, got [1]": (RMSpropAsync, SHAPES[:1]),
    "state_dict must have groups of [2] parameters, got [1, 1]": (in_two_groups, SHAPES),
    "square_avg of parameter 1 must have shape (5,), got (6,)": (RMSpropAsync, [(3, 4), (6,)]),
    "state of parameter 0 must have step, square_avg, got none of ['square_avg']": (
        with_another("square_avg", None),
        SHAPES,
    ),
    "state_dict must say alpha, ": (torch.optim.Adam, SHAPES),
    "square_avg of parameter 0 must be real, got torch.complex64": (
        with_another("square_avg", torch.ones(3, 4, dtype=torch.complex64)),
        SHAPES,
    ),
    "momentum_buffer of parameter 0 must have shape (3, 4), got (4,)": (
        with_another("momentum_buffer", torch.ones(4)),  # which no option asks for
        SHAPES,
    ),
    "step of parameter 0 must be a tensor or a number, got 'three'": (
        with_another("step", "three"),
        SHAPES,
    ),
}


@pytest.mark.parametrize("message", UNLOADABLE)
def test_refuses_to_load(message):
    optimizer = RMSprop(parameters(*SHAPES))
    step_along(optimizer, first_seed=7)
    twin = copy.deepcopy(optimizer)
    make, shapes = UNLOADABLE[message]
    saved = state_of(make, *shapes)
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        optimizer.load_state_dict(saved)
    for each in (optimizer, twin):
        step_along(each, first_seed=8)
    assert_same_states(optimizer, twin)


def test_state_follows_the_options_that_are_loaded():
    plain, full = (RMSprop(parameters(*SHAPES), **options) for options in ({}, ALL_AT_ONCE))
    saved = [copy.deepcopy(each.state_dict()) for each in (plain, full)]
    step_along(full, first_seed=0)
    full.load_state_dict(saved[0])
    plain.load_state_dict(saved[1])
    assert [names_of_state(each) for each in (plain, full)] == [
        ["grad_avg", "momentum_buffer", "square_avg", "step"],
        ["square_avg", "step"],
    ]
    shared = RMSprop(parameters(*SHAPES)).share_memory()
    with pytest.raises(RuntimeError, match="has no grad_avg and no momentum_buffer, and other"):
        shared.load_state_dict(saved[1])
    assert shared.param_groups[0]["momentum"] == 0


def test_a_buffer_that_is_not_used_at_the_moment_is_saved_too():
    optimizer = RMSprop(parameters(*SHAPES), momentum=0.9)
    step_along(optimizer, first_seed=0)
    optimizer.param_groups[0]["momentum"] = 0.0
    step_along(optimizer, first_seed=1)
    params = [
        torch.nn.Parameter(param.detach().clone()) for param in optimizer.param_groups[0]["params"]
    ]
    resumed = RMSprop(params, momentum=0.9)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, resumed):
        each.param_groups[0]["momentum"] = 0.9
        step_along(each, first_seed=2)
    assert all(map(torch.equal, all_of(resumed), all_of(optimizer)))


def test_what_a_user_keeps_in_state_is_loaded():
    saved = RMSprop(parameters(*SHAPES))
    saved.state[saved.param_groups[0]["params"][1]]["mine"] = [torch.ones(2), "text"]
    optimizer = RMSprop(parameters(*SHAPES))
    optimizer.load_state_dict(saved.state_dict())
    mine = optimizer.state[optimizer.param_groups[0]["params"][1]]["mine"]
    assert torch.equal(mine[0], torch.ones(2))


@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7), torch.tensor(7.0).double()], ids=repr)
def test_a_count_of_any_type_is_loaded(step):
    saved = RMSprop(parameters(*SHAPES)).state_dict()
    saved["state"][0]["step"] = step
    optimizer = RMSprop(parameters(*SHAPES))
    own = optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]
    optimizer.load_state_dict(saved)
    step_along(optimizer, first_seed=0)
    assert (own.item(), own.dtype) == (8, torch.float32)


def shared_optimizer() -> tuple[torch.nn.ParameterList, RMSpropAsync]:
    module = torch.nn.ParameterList(parameters(*SHAPES))
    module.share_memory()
    return module, RMSpropAsync(module.parameters()).share_memory()


@may_fork_with_threads
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_another_process_updates_the_shared_state(method):
    _, optimizer = shared_optimizer()
    alone = RMSpropAsync(parameters(*SHAPES))
    step_in_child(alone)

    context = torch.multiprocessing.get_context(method)
    assert run_to_end(context.Process(target=step_in_child, args=(optimizer,))) == 0
    assert_same_states(optimizer, alone)
    assert [state["step"].item() for state in optimizer.state.values()] == [2, 2]


COPIES: dict[str, Callable[[RMSpropAsync], RMSpropAsync]] = {
    "pickle": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("make_copy", COPIES.values(), ids=COPIES.keys())
def test_a_copy_steps_as_the_original(make_copy):
    optimizer = RMSpropAsync(parameters(*SHAPES), weight_decay=0.1, backend="numpy")
    step_along(optimizer, first_seed=0)
    twin = make_copy(optimizer)
    assert twin.backend == "numpy"
    before = states(optimizer)
    step_along(twin, first_seed=1)
    for state, old in zip(states(optimizer), before, strict=True):
        assert_same_bits(state, old)
    step_along(optimizer, first_seed=1)
    assert_same_states(twin, optimizer)
