"""What a parameter group may ask for, beside the numbers and switches of the update."""

from __future__ import annotations

import math
from types import NoneType
from typing import Any

import torch

from hogstream.kernels.hyperparameters import Hyperparameters

Group = dict[str, Any]
_SWITCHES: dict[str, Any] = {
    "differentiable": bool,
    "capturable": bool,
    "foreach": (bool, NoneType),
}
_DOUBLE = (torch.float64, torch.complex128)


def check_group(group: Group) -> Hyperparameters:
    """Checks a parameter group's options.

    Raises:
        TypeError: If one is of a wrong type.
        ValueError: If one is out of range, more than an update of a parameter of the group can
            hold, or does not go with another.
    """
    hyperparameters = Hyperparameters.from_group(group)
    double = all(param.dtype in _DOUBLE for param in group["params"])
    hyperparameters.check_held_by(torch.float64 if double else torch.float32)
    first = group["initial_accumulator_value"]
    if isinstance(first, bool) or not isinstance(first, (int, float)) or not 0 <= first < math.inf:
        raise ValueError(f"initial_accumulator_value must be a finite number >= 0, got {first!r}")
    for name, types in _SWITCHES.items():
        if not isinstance(group[name], types):
            allowed = "True, False or None" if name == "foreach" else "True or False"
            raise TypeError(f"{name} must be {allowed}, got {group[name]!r}")
    for other in ("capturable", "foreach"):
        if group["differentiable"] and group[other]:
            raise ValueError(
                f"{other} must be False with differentiable=True, which goes "
                "through torch's operations one parameter at a time, got True"
            )
    return hyperparameters
