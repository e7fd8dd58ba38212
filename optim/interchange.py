"""State that another library's RMSprop has made, and state for it: what each means by its options.

A state dictionary of ours names every option that it was made with. Those of others leave out what
they cannot be asked for: where epsilon is, what momentum holds, where ``square_avg`` starts. That
is told here, once for each library.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer

from hogstream.optim.options import Group
from hogstream.optim.parameters import needs_state
from hogstream.optim.state import STATE, Kinds, as_real, new_buffer

StateDict = dict[str, Any]

# How a step is run, and how it is rounded: a state that says nothing of that goes on either way.
_RUN = ("foreach", "differentiable", "capturable")
_ROUNDED = ("stochastic_rounding", "seed", "kahan_sum")
# State by rows, which none of them has.
_NOT_BY_ROWS = {"rowwise": False, "lazy_decay": False}
# What all keep.
_BUFFERS = ("square_avg", "grad_avg", "momentum_buffer")
# What all have; and what they take for those of it that their first versions had not.
_COMMON = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")
_AT_FIRST = {"momentum": 0, "centered": False, "maximize": False}


@dataclass(frozen=True)
class _Library:
    """What another library's optimizer keeps in groups, and means by what it does not keep.

    Attributes:
        optimizer: Its name.
        fixed: Options of ours that it has not, or ignores, and what it does about each.
        names: Options of ours that it has, as ours are called and as its own.
        lacking: Options of its own that we have not, and the only value that we can honour.
        steps_are_numbers: Whether it counts in Python's numbers.
        has_complex: Whether it takes complex parameters as their real and imaginary parts.
    """

    optimizer: str
    fixed: dict[str, Any]
    names: dict[str, str]
    lacking: dict[str, Any] = field(default_factory=dict)
    steps_are_numbers: bool = True
    has_complex: bool = False


def _same(*names: str) -> dict[str, str]:
    return dict(zip(names, names, strict=True))


_LIBRARIES = {
    "torch": _Library(
        "torch.optim.RMSprop",
        fixed={
            "eps_inside_sqrt": False,
            "decoupled_weight_decay": False,
            "lr_in_momentum": False,
            "initial_accumulator_value": 0.0,
            **_NOT_BY_ROWS,
        },
        names=_same(*_COMMON, "maximize", *_RUN),
        steps_are_numbers=False,
        has_complex=True,
    ),
    "pfrl": _Library(
        "pfrl's SharedRMSpropEpsInsideSqrt",
        fixed={
            "eps_inside_sqrt": True,
            "decoupled_weight_decay": False,
            "lr_in_momentum": False,
            "initial_accumulator_value": 0.0,
            "maximize": False,  # it is torch's to its constructor, but its step does not look at it
            **_NOT_BY_ROWS,
        },
        names=_same(*_COMMON),
    ),
    "timm": _Library(
        "timm's RMSpropTF",
        fixed={
            "eps_inside_sqrt": True,
            "initial_accumulator_value": 1.0,
            "maximize": False,
            **_NOT_BY_ROWS,
        },
        names={
            **_same(*_COMMON, "lr_in_momentum"),
            "decoupled_weight_decay": "decoupled_decay",
        },
        lacking={"caution": False},
    ),
}


def import_state(state_dict: StateDict, made_by: str) -> StateDict:
    """A state dictionary of another library's RMSprop, as one for ours to load.

    Every option that the other's state means is named in it, so what loads it goes on as the other
    would have, whatever options it was made with itself. How steps are run and rounded
    (``foreach``, ``kahan_sum`` and the like) is not part of that.

    Args:
        state_dict: From the other's ``state_dict()``; it is left as it is.
        made_by: ``"torch"`` for ``torch.optim.RMSprop``, ``"pfrl"`` for
            ``SharedRMSpropEpsInsideSqrt`` or ``RMSpropEpsInsideSqrt``, ``"timm"`` for
            ``RMSpropTF``.

    Returns:
        A dictionary for ``load_state_dict()``. Tensors are the other's own, of any dtype: loading
        copies them, into state of ours.

    Raises:
        ValueError: If ``made_by`` is unknown, an option is missing that is not known by that, or
            the other's options, or its state, cannot be honoured.
    """
    library = _library("made_by", made_by)
    _check_keys(state_dict)
    for saved_id, state in state_dict["state"].items():
        _check_complex(library, state, f"state of parameter {saved_id}")
    groups = [
        _imported(library, group, index) for index, group in enumerate(state_dict["param_groups"])
    ]
    return {**state_dict, "param_groups": groups}


def export_state(optimizer: Optimizer, to: str) -> StateDict:
    """The state of one of our optimizers, as another library's RMSprop keeps it.

    What loads it goes on as ours would have, but for rounding: all values of state have the dtypes
    of their parameters there. ``max_grad_norm`` is no part of it: clip gradients yourself. Nor have
    frozen parameters a part in it: the other starts their state as it does.

    Args:
        optimizer: An ``RMSprop`` or ``RMSpropAsync``.
        to: ``"torch"``, ``"pfrl"`` or ``"timm"``, as in ``import_state``.

    Returns:
        A dictionary for the other's ``load_state_dict()``. All tensors are copies, and learning
        rates are numbers.

    Raises:
        TypeError: If the optimizer is not ours.
        ValueError: If ``to`` is unknown, or an option is one that the other cannot express.
    """
    library = _library("to", to)
    if "eps_inside_sqrt" not in optimizer.defaults:
        raise TypeError(f"optimizer must be an RMSprop or RMSpropAsync, got {optimizer!r}")
    for index, group in enumerate(optimizer.param_groups):
        _check_expressible(library, group, index)
    saved = optimizer.state_dict()
    state: dict[Any, Any] = {}
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for param, saved_id in zip(group["params"], saved_group["params"], strict=True):
            own = saved["state"].get(saved_id) or _first_state(library, param, group)
            if own:
                _check_complex(library, own, f"state of parameter {saved_id}")
                state[saved_id] = _exported(library, own, param)
    groups = [_exported_group(library, group) for group in saved["param_groups"]]
    return {**saved, "state": state, "param_groups": groups}


def readable(optimizer: Optimizer, state_dict: StateDict) -> StateDict:
    """A state dictionary for one of our optimizers to load, whose groups say what they mean.

    One of torch's leaves that out. It is taken where torch's meaning is the optimizer's own, unless
    its steps are Python's numbers, as pfrl writes them, to whom the same keys mean another epsilon.

    Args:
        optimizer: What loads it.
        state_dict: What it is given.

    Returns:
        The dictionary, with every option in it that matters.

    Raises:
        ValueError: If one is missing. If there is no state yet that was made with it, the
            optimizer's own is taken, with a warning.
    """
    _check_keys(state_dict)
    groups = [{**_AT_FIRST, **group} for group in state_dict["param_groups"]]
    mattering = [name for name in optimizer.defaults if name not in (*_RUN, *_ROUNDED)]
    unsaid = [name for name in mattering if any(name not in group for group in groups)]
    if not unsaid:
        return {**state_dict, "param_groups": groups}
    fixed = _LIBRARIES["torch"].fixed
    if len(groups) == len(optimizer.param_groups) and _may_be_of_torch(state_dict):
        pairs = list(zip(optimizer.param_groups, groups, strict=True))
        unsaid = [name for name in fixed if any(own[name] != fixed[name] for own, _ in pairs)]
        if not unsaid:
            return import_state(state_dict, made_by="torch")
        if not state_dict["state"]:
            warnings.warn(
                f"state_dict does not say {', '.join(unsaid)}: what the optimizer was made with is "
                "kept. import_state(state_dict, made_by=...) says what another library means",
                stacklevel=8,  # who called load_state_dict, which torch wraps
            )
            groups = [{**{name: own[name] for name in mattering}, **group} for own, group in pairs]
            return {**state_dict, "param_groups": groups}
    raise ValueError(
        f"state_dict must say {', '.join(unsaid)} in every group, which that of another library "
        "does not: load import_state(state_dict, made_by=...) from hogstream.optim, with "
        f"{' or '.join(map(repr, _LIBRARIES))}"
    )


def _library(name: str, value: str) -> _Library:
    if value not in _LIBRARIES:
        known = " or ".join(map(repr, _LIBRARIES))
        raise ValueError(f"{name} must be {known}, got {value!r}")
    return _LIBRARIES[value]


def _check_keys(state_dict: StateDict) -> None:
    if not state_dict.keys() >= {"state", "param_groups"}:
        raise ValueError(
            f"state_dict must have 'state' and 'param_groups', got {sorted(map(str, state_dict))}"
        )


def _check_complex(library: _Library, state: dict[str, Any], name: str) -> None:
    values = [state[each] for each in _BUFFERS if each in state]
    if not library.has_complex and any(torch.is_tensor(v) and v.is_complex() for v in values):
        raise ValueError(
            f"{name} must be real for {library.optimizer}, which squares a complex gradient as it "
            "is, and not its real and imaginary parts, got complex numbers"
        )


def _imported(library: _Library, group: Group, index: int) -> Group:
    """A group as ours: with every option that matters, and those that are neither library's."""
    group = {name: value for name, value in _AT_FIRST.items() if name in library.names} | group
    needed = {theirs for ours, theirs in library.names.items() if ours not in _RUN}
    if missing := sorted(needed - group.keys()):
        raise ValueError(
            f"group {index} of a state that {library.optimizer} made must have "
            f"{', '.join(missing)}, got {sorted(map(str, group))}"
        )
    for name, value in (library.fixed | library.lacking).items():
        if group.get(name, value) != value:
            raise ValueError(
                f"{name} of group {index} must be {value!r} in a state that {library.optimizer} "
                f"made, got {group[name]!r}"
            )
    known = {*library.names.values(), *library.lacking, *_RUN}
    rest = {name: value for name, value in group.items() if name not in known}
    ours = {name: group[theirs] for name, theirs in library.names.items() if theirs in group}
    return {**rest, **library.fixed, **ours}


def _check_expressible(library: _Library, group: Group, index: int) -> None:
    without_effect = {
        "initial_accumulator_value",  # state has started, or is written as it starts
        *(["eps_inside_sqrt"] if not group["eps"] else []),
        *(["decoupled_weight_decay"] if not group["weight_decay"] else []),
        *(["lr_in_momentum"] if not group["momentum"] else []),
    }
    if any(as_real(p).dtype.itemsize == 2 for p in group["params"] if needs_state(p)):
        fixed = {**library.fixed, "stochastic_rounding": False, "kahan_sum": False}
    else:
        fixed = library.fixed
    for name, value in fixed.items():
        if name not in without_effect and group[name] != value:
            raise ValueError(
                f"{name} of group {index} must be {value!r} for {library.optimizer}, which cannot "
                f"go on from another, got {group[name]!r}"
            )


def _first_state(library: _Library, param: torch.Tensor, group: Group) -> dict[str, Any]:
    """What a parameter without state would start from, if the other would start it otherwise."""
    first = library.fixed["initial_accumulator_value"]
    if group["initial_accumulator_value"] == first or not needs_state(param):
        return {}
    kinds = Kinds.of_group(group)
    buffers = {name: new_buffer(param, name, group) for name in kinds.buffers(param)}
    return {"step": torch.zeros((), dtype=torch.float32, device="cpu"), **buffers}


def _exported(library: _Library, state: dict[str, Any], param: torch.Tensor) -> dict[str, Any]:
    """A parameter's state in new memory, of the parameter's dtype."""
    others = {name: value for name, value in state.items() if name not in STATE}
    buffers = {
        name: state[name].detach().to(param.dtype, copy=True) for name in _BUFFERS if name in state
    }
    step = state["step"]
    step = int(step) if library.steps_are_numbers else step.clone()
    return {**others, "step": step, **buffers}


def _exported_group(library: _Library, group: Group) -> Group:
    """A group as the other's: its options, and those that are neither library's."""
    ours = {*library.names, *library.fixed, *_RUN, *_ROUNDED}
    rest = {name: value for name, value in group.items() if name not in ours}
    theirs = {library.names[name]: group[name] for name in library.names}
    numbers = {
        name: float(value) if isinstance(value, torch.Tensor) else value
        for name, value in theirs.items()
    }
    return {**rest, **numbers, **library.lacking}


def _may_be_of_torch(state_dict: StateDict) -> bool:
    """Whether torch may have made a state: its groups say nothing but what torch's do."""
    torchs = _LIBRARIES["torch"]
    needed = {*_COMMON} - {*_AT_FIRST}
    foreign = {*torchs.fixed, *_LIBRARIES["timm"].names.values()} - {*torchs.names}
    return all(
        needed <= group.keys() and not foreign & group.keys()
        for group in state_dict["param_groups"]
    ) and all(isinstance(each.get("step"), torch.Tensor) for each in state_dict["state"].values())
