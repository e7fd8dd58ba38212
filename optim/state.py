"""What an optimizer keeps of each parameter: made, checked, and loaded."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.operands import COMPUTE_DTYPES

#: The names of state, as ``torch.optim.RMSprop`` has them.
STATE = ("step", "square_avg")

Group = dict[str, Any]
_STEP_DTYPES = (torch.float32, torch.float64, torch.int64)


def new_ms(param: torch.Tensor) -> torch.Tensor:
    """``square_avg`` of zero, laid out as the parameter."""
    return torch.zeros_like(
        param,
        dtype=COMPUTE_DTYPES[param.dtype],
        memory_format=torch.preserve_format,
        requires_grad=False,
    )


def check_step(name: str, step: Any) -> None:
    """Checks a count of steps, which may not be the one that was made with the optimizer.

    Raises:
        TypeError: If it is no tensor, or of a dtype that cannot count.
        ValueError: If it is not of shape ().
    """
    if not isinstance(step, torch.Tensor) or step.dtype not in _STEP_DTYPES:
        raise TypeError(f"{name} must be a tensor of float32, float64 or int64, got {step!r}")
    if step.shape != ():
        raise ValueError(f"{name} must have shape (), got {tuple(step.shape)}")


def check_group(group: Group, index: int) -> Hyperparameters:
    """Checks a parameter group's hyperparameters, and that it asks for nothing else.

    Raises:
        TypeError: If one is of a wrong type.
        ValueError: If one is out of range or more than an update of a parameter of the group can
            hold, or ``momentum`` or ``centered`` is on.
    """
    for name in ("momentum", "centered"):
        if group.get(name):
            raise ValueError(f"{name} of group {index} must be off, got {group[name]}")
    hyperparameters = Hyperparameters.from_group(group)
    double = all(param.dtype == torch.float64 for param in group["params"])
    hyperparameters.check_held_by(torch.float64 if double else torch.float32)
    return hyperparameters


def pair(
    optimizer: Optimizer, state_dict: dict[str, Any]
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Each parameter with its saved state, which is empty if none was saved."""
    return [
        (param, state_dict["state"].get(saved_id, {}))
        for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
        for param, saved_id in zip(group["params"], saved["params"], strict=True)
    ]


def check_loadable(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Checks that a state fits an optimizer.

    Raises:
        TypeError: If a hyperparameter is of a wrong type.
        ValueError: If groups, parameters, names of state or shapes differ, or a hyperparameter
            cannot be honoured.
    """
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if saved_sizes != sizes:
        raise ValueError(f"state_dict must have groups of {sizes} parameters, got {saved_sizes}")
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        check_group({**group, **saved, "params": group["params"]}, index)
    for index, (param, saved) in enumerate(pair(optimizer, state_dict)):
        if saved and saved.keys() != set(STATE):
            raise ValueError(
                f"state of parameter {index} must have step and square_avg, got {sorted(saved)}"
            )
        for name, shape in (("step", ()), ("square_avg", tuple(param.shape))):
            got = tuple(as_saved(saved[name]).shape) if saved else shape
            if got != shape:
                raise ValueError(f"{name} of parameter {index} must have shape {shape}, got {got}")


def as_saved(value: Any) -> torch.Tensor:
    """A value of a saved state as a tensor: old versions of torch wrote ``step`` as a number."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64, device="cpu")
