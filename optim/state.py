"""What an optimizer keeps of each parameter: made, checked, and loaded."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.operands import COMPUTE_DTYPES
from hogstream.optim.options import Group, check_group

#: What an update takes of state, in the order of ``Operands``, by torch's names.
BUFFERS = ("square_avg", "grad_avg", "momentum_buffer")
#: All names of state.
STATE = ("step", *BUFFERS)

_STEP_DTYPES = (torch.float32, torch.float64, torch.int64)
# The type of state: that in which a parameter, or each part of a complex one, is computed.
_STATE_DTYPES = {
    **COMPUTE_DTYPES,
    torch.complex32: torch.complex64,
    torch.complex64: torch.complex64,
    torch.complex128: torch.complex128,
}


class Kinds(NamedTuple):
    """Which kinds of state the parameters of a group have, besides ``step`` and ``square_avg``."""

    centered: bool
    momentum: bool

    @classmethod
    def of(cls, hyperparameters: Hyperparameters) -> Kinds:
        """Those that updates with these take."""
        switches = hyperparameters.switches
        return cls(switches.centered, switches.momentum)

    @classmethod
    def of_group(cls, group: Group) -> Kinds:
        """Those that a parameter group asks for."""
        return cls(group["centered"], group["momentum"] != 0)

    @property
    def buffers(self) -> tuple[str, ...]:
        """Names of ``BUFFERS``."""
        is_wanted = True, self.centered, self.momentum
        return tuple(name for name, wanted in zip(BUFFERS, is_wanted, strict=True) if wanted)

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the state."""
        return ("step", *self.buffers)


def as_real(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor, or if it is complex a view of its real and imaginary parts, as a last axis."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def new_buffer(param: torch.Tensor, name: str, group: Group) -> torch.Tensor:
    """A part of a parameter's state at its start, laid out as the parameter.

    Args:
        param: The parameter.
        name: One of ``BUFFERS``.
        group: Of the parameter.
    """
    buffer = torch.zeros_like(
        param,
        dtype=_STATE_DTYPES[param.dtype],
        memory_format=torch.preserve_format,
        requires_grad=False,
    )
    as_real(buffer).fill_(first_value(name, group))
    return buffer


def first_value(name: str, group: Group) -> float:
    """What a part of state starts at."""
    return float(group["initial_accumulator_value"]) if name == "square_avg" else 0.0


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


def pair(
    optimizer: Optimizer, state_dict: dict[str, Any]
) -> list[tuple[Group, torch.Tensor, dict[str, Any]]]:
    """Each parameter with its group and its saved state, which is empty if none was saved."""
    return [
        (group, param, state_dict["state"].get(saved_id, {}))
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
    names_of: list[tuple[str, ...]] = []  # by parameter
    for group, saved in zip(groups, saved_groups, strict=True):
        hyperparameters = check_group({**group, **saved, "params": group["params"]})
        names_of += [Kinds.of(hyperparameters).names] * len(group["params"])
    for index, (_, param, saved) in enumerate(pair(optimizer, state_dict)):
        if not saved:
            continue
        if missing := set(names_of[index]) - saved.keys():
            raise ValueError(
                f"state of parameter {index} must have {', '.join(names_of[index])}, "
                f"got none of {sorted(missing)}"
            )
        for name in names_of[index]:
            shape = () if name == "step" else tuple(param.shape)
            got = tuple(as_saved(saved[name]).shape)
            if got != shape:
                raise ValueError(f"{name} of parameter {index} must have shape {shape}, got {got}")


def as_saved(value: Any) -> torch.Tensor:
    """A value of a saved state as a tensor: old versions of torch wrote ``step`` as a number."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64, device="cpu")
