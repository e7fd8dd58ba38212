"""What a parameter group may ask for, beside the numbers and switches of the update."""

from __future__ import annotations

import math
from functools import cache
from itertools import takewhile
from types import NoneType
from typing import Any

import torch

from hogstream.kernels.hyperparameters import HYPERPARAMETERS, Hyperparameters
from hogstream.kernels.rows import check_row_options
from hogstream.optim.parameters import needs_state

Group = dict[str, Any]
_SWITCHES: dict[str, Any] = {
    "rowwise": bool,
    "lazy_decay": bool,
    "differentiable": bool,
    "capturable": bool,
    "foreach": (bool, NoneType),
}
#: The names of all options of a group.
OPTIONS = (*HYPERPARAMETERS, "initial_accumulator_value", "seed", *_SWITCHES)
# Options of relatives that are here by another name.
_OTHER_NAMES = {
    "learning_rate": "lr",
    "rho": "alpha",
    "epsilon": "eps",
    "eps_in_sqrt": "eps_inside_sqrt",
    "decoupled_decay": "decoupled_weight_decay",
    "initial_scale": "initial_accumulator_value",
}
#: Options of relatives that are not here, or not for a group, and why or what to do instead.
NOT_HONOURED = {
    "betas": "RMSprop has alpha for the square of gradients, and momentum",
    "nesterov": "RMSprop has no such momentum",
    "dampening": "RMSprop has no such momentum",
    "amsgrad": "RMSprop keeps no maximum of square_avg",
    "caution": "no updates are masked",
    "bias_correction": "set initial_accumulator_value instead",
    "clipnorm": "clip gradients before the step",
    "clipvalue": "clip gradients before the step",
    "global_clipnorm": "the optimizer has max_grad_norm",
    "max_grad_norm": "it is of the whole optimizer",
    "use_ema": "average parameters by torch.optim.swa_utils",
    "flat": "it is of the whole optimizer",
    "backend": "it is of the whole optimizer",
}
_SHORTEST_MISSPELT = 5  # letters: shorter ones are like too many others
_DOUBLE = (torch.float64, torch.complex128)


def check_group(group: Group) -> Hyperparameters:
    """Checks a parameter group's options.

    What users put into a group for themselves is no matter, such as ``name`` or ``lr_scale``.

    Raises:
        TypeError: If one is of a wrong type.
        ValueError: If one is out of range, more than an update of a parameter of the group can
            hold, or does not go with another; or a key is an option that is not honoured, or one
            misspelt.
    """
    for key, value in group.items():
        if key not in OPTIONS and key != "params" and isinstance(key, str):
            _check_no_option(key, value)
    hyperparameters = Hyperparameters.from_group(group)
    double = all(param.dtype in _DOUBLE for param in group["params"] if needs_state(param))
    hyperparameters.check_held_by(torch.float64 if double else torch.float32)
    first = group["initial_accumulator_value"]
    if isinstance(first, bool) or not isinstance(first, (int, float)) or not 0 <= first < math.inf:
        raise ValueError(f"initial_accumulator_value must be a finite number >= 0, got {first!r}")
    for name, types in _SWITCHES.items():
        if not isinstance(group[name], types):
            allowed = "True, False or None" if name == "foreach" else "True or False"
            raise TypeError(f"{name} must be {allowed}, got {group[name]!r}")
    seed = group["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"seed must be an integer, got {seed!r}")
    if hyperparameters.stochastic_rounding and group["capturable"]:
        raise ValueError(
            "stochastic_rounding must be False with capturable=True, whose steps the host does not "
            "count, got True"
        )
    check_row_options(hyperparameters, rowwise=group["rowwise"], lazy_decay=group["lazy_decay"])
    if group["lazy_decay"] and group["capturable"]:
        raise ValueError(
            "lazy_decay must be False with capturable=True, whose steps the host does not count, "
            "got True"
        )
    others = "capturable", "foreach", "stochastic_rounding", "kahan_sum", "rowwise", "lazy_decay"
    for other in others:
        if group["differentiable"] and group[other]:
            raise ValueError(
                f"{other} must be False with differentiable=True, which goes "
                "through torch's operations one parameter at a time, got True"
            )
    return hyperparameters


def _check_no_option(key: str, value: Any) -> None:
    """Checks that a key of a group asks for nothing that would be left undone."""
    if key in NOT_HONOURED:
        if value:
            reason = NOT_HONOURED[key]
            raise ValueError(
                f"{key} must be left out of a parameter group, got {value!r}: {reason}"
            )
        return
    meant = _meant_by(key)
    if meant is not None:
        raise ValueError(
            f"{key} is no option of a parameter group, got {value!r}: write {meant}, or call it "
            "something less like it if it is your own"
        )


@cache
def _meant_by(key: str) -> str | None:
    """The option that a key seems to mean, if any."""
    return _OTHER_NAMES.get(key) or next((name for name in OPTIONS if _is_meant(key, name)), None)


def _is_meant(key: str, name: str) -> bool:
    """Whether a key is an option's name but for case and underscores, or one slip of the pen.

    That is a letter too many, too few or another one, or two that have changed places.
    """
    key, name = (each.lower().replace("_", "").replace("-", "") for each in (key, name))
    if key == name:
        return True
    if len(name) < _SHORTEST_MISSPELT:
        return False
    start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(key, name, strict=False)))
    key, name = key[start:], name[start:]
    if key[1:] == name or key == name[1:] or key[1:] == name[1:]:
        return True
    return key[:2] == name[1::-1] and key[2:] == name[2:]
