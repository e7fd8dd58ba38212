"""State from and for other libraries: it goes on as it began, or is refused."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from hogstream.optim import RMSprop, RMSpropAsync, export_state, import_state

Options = dict[str, Any]
SHAPES = [(), (3, 4), (5,)]


class Pfrls(torch.optim.RMSprop):
    """What pfrl's ``SharedRMSpropEpsInsideSqrt`` computes and keeps."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param] = new_state(param, group, first=0.0)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param, group in reached(self):
            if not self.state[param]:  # as in what it inherits
                self.state[param] = new_state(param, group, first=0.0)
            update(param, self.state[param], group, param.grad + group["weight_decay"] * param)


class Timms(Optimizer):
    """What timm's ``RMSpropTF`` computes and keeps."""

    def __init__(self, params: Any, lr: float = 0.01, **options: Any) -> None:
        defaults = {"lr": lr, "alpha": 0.9, "eps": 1e-10, "momentum": 0.0, "weight_decay": 0.0}
        switches = {"centered": False, "decoupled_decay": False, "lr_in_momentum": True}
        super().__init__(params, {**defaults, **switches, "caution": False, **options})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param, group in reached(self):
            if not self.state[param]:
                self.state[param] = new_state(param, group, first=1.0)
            grad, decay = param.grad, group["weight_decay"]
            if group["decoupled_decay"]:
                param.mul_(1 - group["lr"] * decay)
            else:
                grad = grad + decay * param
            update(param, self.state[param], group, grad, group["lr_in_momentum"])


def new_state(param: torch.Tensor, group: Options, first: float) -> Options:
    state = {"step": 0, "square_avg": torch.full_like(param, first, requires_grad=False)}
    if group["momentum"] > 0:
        state["momentum_buffer"] = torch.zeros_like(param, requires_grad=False)
    if group["centered"]:
        state["grad_avg"] = torch.zeros_like(param, requires_grad=False)
    return state


def reached(optimizer: Optimizer) -> Iterator[tuple[Any, Options]]:
    with torch.no_grad():
        for group in optimizer.param_groups:
            yield from ((param, group) for param in group["params"] if param.grad is not None)


def update(
    param: torch.Tensor,
    state: Options,
    group: Options,
    grad: torch.Tensor,
    lr_in_momentum: bool = False,
) -> None:
    """A step with epsilon inside the root."""
    state["step"] += 1
    lr, kept = group["lr"], group["alpha"]
    state["square_avg"].lerp_(grad * grad, 1 - kept)
    variance = state["square_avg"]
    if group["centered"]:
        state["grad_avg"].lerp_(grad, 1 - kept)
        variance = variance - state["grad_avg"] ** 2
    step = grad / (variance + group["eps"]).sqrt()
    if group["momentum"] > 0:
        buffer = state["momentum_buffer"].mul_(group["momentum"])
        step = buffer.add_(step * lr if lr_in_momentum else step)
    param.sub_(step if group["momentum"] > 0 and lr_in_momentum else lr * step)


def combinations(**choices: tuple[Any, ...]) -> list[Options]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


@dataclass(frozen=True)
class Library:
    """Another library's optimizer.

    Attributes:
        make: Makes it.
        means: The options with which ours does the same.
        variants: Options of its own.
        dtypes: Of parameters that it takes as we do.
        ours: What we call an option of its own, if not the same.
    """

    make: Callable[..., Optimizer]
    means: Options
    variants: list[Options]
    dtypes: tuple[torch.dtype, ...]
    ours: dict[str, str]

    def ours_alike(self, params: Any, options: Options) -> RMSpropAsync:
        """Ours that does the same."""
        renamed = {self.ours.get(name, name): value for name, value in options.items()}
        return RMSpropAsync(params, **{**self.means, **renamed}, backend="numpy")


COMMON = {"momentum": (0, 0.9), "centered": (False, True), "weight_decay": (0, 0.1)}
REALS = torch.float32, torch.float64, torch.bfloat16
LIBRARIES = {
    "torch": Library(
        torch.optim.RMSprop,
        {"eps_inside_sqrt": False},
        combinations(**COMMON, maximize=(False, True)),
        (*REALS, torch.complex64, torch.complex128),
        {},
    ),
    "pfrl": Library(Pfrls, {}, combinations(**COMMON), REALS, {}),
    "timm": Library(
        Timms,
        {"initial_accumulator_value": 1.0},
        combinations(**COMMON, decoupled_decay=(False, True), lr_in_momentum=(False, True)),
        REALS,
        {"decoupled_decay": "decoupled_weight_decay"},
    ),
}
# What ours is made with before it loads, of which nothing must be left.
OTHER: Options = {"lr": 0.3, "alpha": 0.5, "eps": 0.7, "weight_decay": 0.4, "momentum": 0.3}
OTHERWISE: Options = {**OTHER, "decoupled_weight_decay": True, "initial_accumulator_value": 0.2}
NUMBERS: Options = {"lr": 0.05, "alpha": 0.8, "eps": 0.1}  # with which all that may differ is seen
KEPT = {torch.bfloat16: torch.float32}  # the dtype of our state, if not the parameter's
TOLERANCE = {torch.float32: 1e-5, torch.complex64: 1e-5, torch.bfloat16: 0.1}


def made_params(dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in SHAPES]


def copied(params: list[Parameter]) -> list[Parameter]:
    return [Parameter(param.detach().clone()) for param in params]


def train(optimizer: Optimizer, first_seed: int, steps: int) -> None:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for seed in range(first_seed, first_seed + steps):
        generator = torch.Generator().manual_seed(seed)
        for param in params:
            # Of a mean, as nothing is left of a variance by float32 where there is one gradient.
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype) + 0.5
        optimizer.step()


def states(optimizer: Optimizer) -> list[Options]:
    state = optimizer.state_dict()["state"]
    return [state[place] for place in sorted(state)]


def go_on_alike(one: Optimizer, other: Optimizer, dtype: torch.dtype) -> None:
    """Steps on, with another learning rate, and compares parameters and state."""
    for optimizer in (one, other):
        optimizer.param_groups[0]["lr"] *= 0.25
        train(optimizer, first_seed=10, steps=4)
    near = TOLERANCE.get(dtype, 1e-12)
    for got, expected in zip(everything(one), everything(other), strict=True):
        torch.testing.assert_close(got, expected, rtol=near, atol=near, check_dtype=False)


def everything(optimizer: Optimizer) -> list[torch.Tensor]:
    """All parameters, and all state by its names."""
    params = [param.detach() for group in optimizer.param_groups for param in group["params"]]
    of_state = [state[name] for state in states(optimizer) for name in sorted(state)]
    return [*params, *map(torch.as_tensor, of_state)]


EACH = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, library in LIBRARIES.items()
    for dtype in library.dtypes
]


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_ours_goes_on_as_the_other(name, dtype):
    library = LIBRARIES[name]
    for options in library.variants:
        params = made_params(dtype)
        theirs = library.make(params, **NUMBERS, **options)
        train(theirs, first_seed=0, steps=3)
        saved = theirs.state_dict()
        kept = copy.deepcopy(saved)
        ours = RMSpropAsync(copied(params), **OTHERWISE, backend="numpy")
        ours.load_state_dict(import_state(saved, made_by=name))
        assert str(saved) == str(kept)
        assert {state["square_avg"].dtype for state in states(ours)} == {KEPT.get(dtype, dtype)}
        go_on_alike(ours, theirs, dtype)


@pytest.mark.parametrize(("name", "dtype"), EACH)
def test_the_other_goes_on_as_ours(name, dtype):
    library = LIBRARIES[name]
    for options in library.variants:
        params = made_params(dtype)
        ours = library.ours_alike(params, {**NUMBERS, **options})
        train(ours, first_seed=0, steps=3)
        theirs = library.make(copied(params), **OTHER)
        exported = export_state(ours, to=name)
        for state in exported["state"].values():
            assert isinstance(state["step"], torch.Tensor if name == "torch" else int)
            assert {each.dtype for key, each in state.items() if key != "step"} == {dtype}
        theirs.load_state_dict(exported)  # which takes tensors as they are, not copies
        train(copy.deepcopy(theirs), first_seed=20, steps=1)
        go_on_alike(theirs, ours, dtype)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_parameter_without_state_starts_as_the_other_starts_it(name):
    params = made_params(torch.float64)
    theirs = LIBRARIES[name].make(params, **NUMBERS)
    theirs.state.clear()
    params[1].grad = torch.ones_like(params[1])
    theirs.step()
    ours = RMSpropAsync(copied(params), **OTHERWISE, backend="numpy")
    ours.load_state_dict(import_state(theirs.state_dict(), made_by=name))
    go_on_alike(ours, theirs, torch.float64)
    again = LIBRARIES[name].ours_alike(copied(params), NUMBERS)
    again.param_groups[0]["initial_accumulator_value"] = 0.4
    again.state.clear()
    theirs = LIBRARIES[name].make(copied(params), **NUMBERS)
    theirs.load_state_dict(export_state(again, to=name))
    go_on_alike(theirs, again, torch.float64)


# What has no effect may be anything.
WITHOUT_EFFECT = {
    "eps": {"eps": 0.0, "eps_inside_sqrt": True},
    "decay": {"eps_inside_sqrt": False, "decoupled_weight_decay": True},
    "momentum": {"eps_inside_sqrt": False, "lr_in_momentum": True},
    "start": {"eps_inside_sqrt": False, "initial_accumulator_value": 0.4},
    "rounding": {"eps_inside_sqrt": False, "kahan_sum": True},
}


@pytest.mark.parametrize("options", WITHOUT_EFFECT.values(), ids=WITHOUT_EFFECT.keys())
def test_what_has_no_effect_is_exported(options):
    params = made_params(torch.float64)
    ours = RMSpropAsync(params, **{**NUMBERS, **options}, backend="numpy")
    del ours.state[params[0]]  # as of one that has never been trained
    theirs = torch.optim.RMSprop(copied(params))
    theirs.load_state_dict(export_state(ours, to="torch"))
    go_on_alike(theirs, ours, torch.float64)


def test_frozen_parameters_are_exported_as_nothing():
    frozen = [
        Parameter(torch.zeros(3).to(dtype), requires_grad=False)
        for dtype in (torch.float8_e4m3fn, torch.uint8, torch.bfloat16)
    ]
    ours = RMSpropAsync([*frozen, *made_params(F32)], kahan_sum=True, backend="numpy")
    exported = export_state(ours, to="timm")
    assert list(exported["state"]) == [3, 4, 5]
    assert exported["param_groups"][0]["params"] == [0, 1, 2, 3, 4, 5]


HOW_STEPS_ARE_DONE = {
    *("foreach", "differentiable", "capturable"),
    *("stochastic_rounding", "seed", "kahan_sum"),
}


def test_what_else_a_group_has_is_kept():
    options = {"lr": torch.tensor(0.25), "name": "all"}
    ours = RMSprop([{"params": made_params(torch.float32), **options}])
    torch.optim.lr_scheduler.ExponentialLR(ours, 0.5)
    for name in ("torch", "pfrl", "timm"):
        ours.param_groups[0]["eps"] = 0
        exported = export_state(ours, to=name)
        (group,) = exported["param_groups"]
        assert (group["lr"], group["name"], group["initial_lr"]) == (0.25, "all", 0.25)
        assert isinstance(group["lr"], float)
        (group,) = import_state(exported, made_by=name)["param_groups"]
        assert (group["name"], group["initial_lr"]) == ("all", 0.25)
        assert ours.defaults.keys() - group.keys() <= HOW_STEPS_ARE_DONE


def saved_of(make: Callable[..., Optimizer], dtype: torch.dtype, **options: Any) -> Options:
    optimizer = make(made_params(dtype), **options)
    train(optimizer, first_seed=0, steps=2)
    return optimizer.state_dict()


def without(saved: Options, *names: str) -> Options:
    groups = [{n: v for n, v in g.items() if n not in names} for g in saved["param_groups"]]
    return {**saved, "param_groups": groups}


F32, C64 = torch.float32, torch.complex64
# Each message, with who is said to have made what.
NOT_IMPORTED: dict[str, tuple[str, Callable[[], Options]]] = {
    "made_by must be 'torch' or 'pfrl' or 'timm', got 'keras'": ("keras", dict),
    "state_dict must have 'state' and 'param_groups', got ['model']": (
        "torch",
        lambda: {"model": saved_of(torch.optim.RMSprop, F32)},
    ),
    "group 0 of a state that torch.optim.RMSprop made must have alpha, got": (
        "torch",
        lambda: saved_of(torch.optim.Adam, F32),
    ),
    "group 0 of a state that timm's RMSpropTF made must have decoupled_decay, lr_in_mom": (
        "timm",
        lambda: saved_of(torch.optim.RMSprop, F32),
    ),
    "eps_inside_sqrt of group 0 must be False in a state that torch.optim.RMSprop made": (
        "torch",
        lambda: saved_of(RMSpropAsync, F32),
    ),
    "maximize of group 0 must be False in a state that pfrl's": (
        "pfrl",
        lambda: saved_of(Pfrls, F32, maximize=True),
    ),
    "caution of group 0 must be False in a state that timm's RMSpropTF made, got True": (
        "timm",
        lambda: saved_of(Timms, F32, caution=True),
    ),
    "state of parameter 0 must be real for timm's RMSpropTF, which squares": (
        "timm",
        lambda: saved_of(Timms, C64),
    ),
}


@pytest.mark.parametrize("message", NOT_IMPORTED)
def test_is_not_imported(message):
    made_by, make = NOT_IMPORTED[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        import_state(make(), made_by=made_by)


OUTSIDE: Options = {"eps_inside_sqrt": False}
NOT_EXPORTED: dict[str, tuple[str, Options]] = {
    "to must be 'torch' or 'pfrl' or 'timm', got 'optax'": ("optax", {}),
    "eps_inside_sqrt of group 0 must be False for torch.optim.RMSprop, which": ("torch", {}),
    "eps_inside_sqrt of group 0 must be True for pfrl's": ("pfrl", OUTSIDE),
    "eps_inside_sqrt of group 0 must be True for timm's RMSpropTF": ("timm", OUTSIDE),
    "decoupled_weight_decay of group 0 must be False for torch.optim.RMSprop": (
        "torch",
        {**OUTSIDE, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "lr_in_momentum of group 0 must be False for torch.optim.RMSprop, which": (
        "torch",
        {**OUTSIDE, "momentum": 0.9, "lr_in_momentum": True},
    ),
    "kahan_sum of group 0 must be False for torch.optim.RMSprop": (
        "torch",
        {**OUTSIDE, "kahan_sum": True},
    ),
    "stochastic_rounding of group 0 must be False for pfrl's": (
        "pfrl",
        {"stochastic_rounding": True},
    ),
    "maximize of group 0 must be False for pfrl's": ("pfrl", {"maximize": True}),
    "maximize of group 0 must be False for timm's RMSpropTF": ("timm", {"maximize": True}),
}


@pytest.mark.parametrize("message", NOT_EXPORTED)
def test_is_not_exported(message):
    to, options = NOT_EXPORTED[message]
    with pytest.raises(ValueError, match=re.escape(message)):
        export_state(RMSpropAsync(made_params(torch.bfloat16), **options), to=to)


def test_complex_state_and_other_optimizers_are_not_exported():
    with pytest.raises(ValueError, match="state of parameter 0 must be real for pfrl's"):
        export_state(RMSpropAsync(made_params(C64)), to="pfrl")
    with pytest.raises(TypeError, match="optimizer must be an RMSprop or RMSpropAsync, got RMSp"):
        export_state(torch.optim.RMSprop(made_params(F32)), to="torch")


# What torch's optimizer keeps is taken where it means what ours was made with.


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"maximize": True}], ids=str)
def test_torchs_state_is_loaded_by_an_optimizer_that_means_the_same(options):
    params = made_params(F32)
    theirs = torch.optim.RMSprop(params, **NUMBERS, momentum=0.9, centered=True, **options)
    train(theirs, first_seed=0, steps=3)
    ours = RMSprop(copied(params), backend="numpy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flags = {"foreach", "differentiable", "capturable", "maximize"}  # which came later
        ours.load_state_dict(without(theirs.state_dict(), *(flags - options.keys())))
    go_on_alike(ours, theirs, F32)


def of_torch() -> Options:
    return saved_of(torch.optim.RMSprop, F32)


def of_old_torch_or_pfrl() -> Options:
    return saved_of(Pfrls, F32)


def test_torchs_state_is_rounded_as_the_optimizer_was_made():
    params = made_params(torch.bfloat16)
    theirs = torch.optim.RMSprop(params, **NUMBERS)
    train(theirs, first_seed=0, steps=3)
    ours = RMSprop(copied(params), kahan_sum=True, backend="numpy")
    train(ours, first_seed=9, steps=2)
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["kahan_sum"]
    assert not any(state["kahan_comp"].any() for state in states(ours))


# What is not said, to which options, by what.
UNSAID: list[tuple[str, Options, Callable[[], Options]]] = [
    ("eps_inside_sqrt", {"eps_inside_sqrt": True}, of_torch),
    ("decoupled_weight_decay", {"decoupled_weight_decay": True}, of_torch),
    ("lr_in_momentum", {"lr_in_momentum": True}, of_torch),
    ("initial_accumulator_value", {"initial_accumulator_value": 1}, of_torch),
    ("lr_in_momentum, initial_accumulator_value, eps_inside_sqrt", {}, of_old_torch_or_pfrl),
    ("initial_accumulator_value, eps_inside_sqrt", {}, lambda: saved_of(Timms, F32)),
    ("alpha, lr_in_momentum", {}, lambda: saved_of(torch.optim.Adam, F32)),
    ("eps_inside_sqrt", {}, lambda: without(saved_of(RMSprop, F32), "eps_inside_sqrt")),
    ("lr", {}, lambda: without(saved_of(RMSprop, F32), "lr")),
]


@pytest.mark.parametrize(("names", "options", "make"), UNSAID)
def test_what_does_not_say_all_is_not_loaded(names, options, make):
    ours = RMSprop(made_params(F32), **options, backend="numpy")
    train(ours, first_seed=5, steps=1)
    before = copy.deepcopy(ours.state_dict())
    with pytest.raises(ValueError, match=f"state_dict must say {names}.*import_state"):
        ours.load_state_dict(make())
    assert str(ours.state_dict()) == str(before)


def test_options_without_state_leave_out_what_ours_keeps():
    saved = torch.optim.RMSprop(made_params(F32), lr=0.5, momentum=0.9).state_dict()
    ours = RMSpropAsync(made_params(F32), decoupled_weight_decay=True)
    train(ours, first_seed=0, steps=1)
    with pytest.warns(UserWarning, match=r"does not say eps_inside_sqrt, decoupled_weight_decay: "):
        ours.load_state_dict(saved)
    (group,) = ours.param_groups
    assert (group["lr"], group["momentum"]) == (0.5, 0.9)
    assert (group["eps_inside_sqrt"], group["decoupled_weight_decay"]) == (True, True)
    assert not any(tensor.any() for state in states(ours) for tensor in state.values())


@pytest.mark.parametrize("saved", [{}, {"state.0.step": 1}], ids=str)
def test_what_is_no_state_dictionary_is_not_loaded(saved):
    with pytest.raises(ValueError, match="state_dict must have 'state' and 'param_groups', got"):
        RMSprop(made_params(F32)).load_state_dict(saved)
