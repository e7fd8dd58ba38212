"""What an optimizer keeps of each parameter: made, checked, and loaded."""

from __future__ import annotations

from numbers import Real
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from hogstream.kernels.operands import COMPUTE_DTYPES, same_layout
from hogstream.optim.options import Group, check_group
from hogstream.optim.parameters import check_distributed_alike, is_distributed, own_part

#: What an update takes of state, in the order of ``Operands``, by torch's names.
BUFFERS = ("square_avg", "grad_avg", "momentum_buffer", "kahan_comp")
#: The same of updates of rows.
ROW_BUFFERS = (*BUFFERS, "last_update")
#: All names of state.
STATE = ("step", *ROW_BUFFERS)

_STEP_DTYPES = (torch.float32, torch.float64, torch.int64)
# The type of state: that in which a parameter, or each part of a complex one, is computed.
_STATE_DTYPES = {
    **COMPUTE_DTYPES,
    torch.complex32: torch.complex64,
    torch.complex64: torch.complex64,
    torch.complex128: torch.complex128,
}


class Kinds(NamedTuple):
    """Which kinds of state the parameters of a group have, besides ``step`` and ``square_avg``.

    Attributes:
        centered: Whether there is ``grad_avg``.
        momentum: Whether there is ``momentum_buffer``.
        compensated: Whether there is ``kahan_comp`` of those of 16 bits.
        rowwise: Whether ``square_avg`` has one value for each row.
        lazy: Whether there is ``last_update``.
    """

    centered: bool
    momentum: bool
    compensated: bool
    rowwise: bool
    lazy: bool

    @classmethod
    def of_group(cls, group: Group) -> Kinds:
        """Those that a parameter group asks for."""
        return cls(
            group["centered"],
            group["momentum"] != 0,
            group["kahan_sum"],
            group["rowwise"],
            group["lazy_decay"],
        )

    def buffers(self, param: torch.Tensor) -> tuple[str, ...]:
        """Names of ``ROW_BUFFERS``: what a parameter has of them."""
        compensated = self.compensated and as_real(param).itemsize == 2
        is_wanted = True, self.centered, self.momentum, compensated, self.lazy
        return tuple(name for name, wanted in zip(ROW_BUFFERS, is_wanted, strict=True) if wanted)

    def is_by_row(self, name: str) -> bool:
        """Whether a part of state has one value for each row of its parameter."""
        return name == "last_update" or (name == "square_avg" and self.rowwise)

    def shape(self, name: str, param: torch.Tensor) -> tuple[int, ...]:
        """That of a part of a parameter's state."""
        if name == "step":
            return ()
        return tuple(param.shape[:1] or (1,) if self.is_by_row(name) else param.shape)

    def dtype(self, name: str, param: torch.Tensor) -> torch.dtype:
        """That of a part of a parameter's state, but for ``step``."""
        if name == "last_update":
            return torch.int64
        if name == "kahan_comp":
            return param.dtype
        if self.is_by_row(name):
            return COMPUTE_DTYPES[as_real(param).dtype]
        return _STATE_DTYPES[param.dtype]

    def names(self, param: torch.Tensor) -> tuple[str, ...]:
        """All names of a parameter's state."""
        return ("step", *self.buffers(param))


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
    kinds = Kinds.of_group(group)
    dtype = kinds.dtype(name, param)
    if kinds.is_by_row(name):
        buffer = torch.zeros(kinds.shape(name, param), dtype=dtype, device=param.device)
    else:
        buffer = torch.zeros_like(
            param, dtype=dtype, memory_format=torch.preserve_format, requires_grad=False
        )
    as_real(buffer).fill_(first_value(name, group))
    return buffer


def made_to_fit(
    buffer: torch.Tensor | None, param: torch.Tensor, name: str, group: Group
) -> torch.Tensor:
    """A part of a parameter's state in new memory, with the values that it had if there are any.

    Where one value for each row takes the place of one for each element, it is their mean; and the
    other way round, each element has its row's.

    Args:
        buffer: What there is of it; None for nothing.
        param: The parameter.
        name: One of ``BUFFERS``.
        group: Of the parameter.
    """
    new = new_buffer(param, name, group)
    if buffer is None:
        return new
    kinds = Kinds.of_group(group)
    if buffer.shape == new.shape:
        new.copy_(buffer)
    elif kinds.is_by_row(name) and buffer.shape == param.shape:
        new.copy_(as_real(buffer).reshape(len(new), -1).mean(1))
    elif not kinds.is_by_row(name) and buffer.shape == new.shape[:1]:
        parts = as_real(new)
        parts.copy_(buffer.reshape(-1, *[1] * (parts.dim() - 1)).expand_as(parts))
    return new


def is_outgrown(name: str, param: torch.Tensor, state: dict[str, Any], kinds: Kinds) -> bool:
    """Whether a part of a parameter's state is for another dtype, device or layout than it has now.

    So is one of another shape that no step was made with. What no parameter's state could be is
    not: the step refuses that.
    """
    buffer = state.get(name)
    if name == "step" or not isinstance(buffer, torch.Tensor) or buffer.layout != torch.strided:
        return False
    if is_distributed(buffer) != is_distributed(param):
        return False
    other = kinds._replace(rowwise=not kinds.rowwise)
    of = other if buffer.shape == other.shape(name, param) and other.is_by_row(name) else kinds
    if buffer.shape == param.shape != kinds.shape(name, param):
        of = other  # of each element, where there is to be one for each row
    is_complex = param.is_complex() and not of.is_by_row(name)
    if buffer.is_complex() != is_complex or is_integral(buffer) != (name == "last_update"):
        return False
    if buffer.shape != kinds.shape(name, param):
        return of is other or not state.get("step", 1)
    if (buffer.dtype, buffer.device) != (kinds.dtype(name, param), param.device):
        return True
    if kinds.is_by_row(name):
        return not buffer.is_contiguous()
    own, of_param = own_part(buffer), own_part(param)
    return own.shape != of_param.shape or not same_layout(own, of_param)


def is_integral(tensor: torch.Tensor) -> bool:
    """Whether it holds whole numbers, or truth values."""
    return not (tensor.is_floating_point() or tensor.is_complex())


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
        TypeError: If a hyperparameter or value of state is of a wrong type.
        ValueError: If groups, parameters, names of state or shapes differ, state is complex where
            its parameter is not, or a hyperparameter cannot be honoured.
    """
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    sizes = [len(group["params"]) for group in groups]
    saved_sizes = [len(group["params"]) for group in saved_groups]
    if saved_sizes != sizes:
        raise ValueError(f"state_dict must have groups of {sizes} parameters, got {saved_sizes}")
    kinds_of: list[Kinds] = []  # by parameter
    for group, saved in zip(groups, saved_groups, strict=True):
        kept = {name: group[name] for name in ("params", "capturable")}
        check_group({**group, **saved, **kept})
        kinds_of += [Kinds.of_group({**group, **saved})] * len(group["params"])
    for index, (_, param, saved) in enumerate(pair(optimizer, state_dict)):
        if not saved:
            continue
        # What rounding has left is nothing where it was not kept.
        kinds = kinds_of[index]
        if missing := set(kinds.names(param)) - {"kahan_comp"} - saved.keys():
            raise ValueError(
                f"state of parameter {index} must have {', '.join(kinds.names(param))}, "
                f"got none of {sorted(missing)}"
            )
        for name in filter(saved.__contains__, STATE):
            _check_value(f"{name} of parameter {index}", saved[name], param, name, kinds)


def _check_value(said: str, value: Any, param: torch.Tensor, name: str, kinds: Kinds) -> None:
    if not isinstance(value, (torch.Tensor, Real)):
        raise TypeError(f"{said} must be a tensor or a number, got {value!r}")
    shape = kinds.shape(name, param)
    value = as_saved(value)
    if tuple(value.shape) != shape:
        raise ValueError(f"{said} must have shape {shape}, got {tuple(value.shape)}")
    is_of_param = name != "step" and not kinds.is_by_row(name)
    is_complex = param.is_complex() and is_of_param
    if value.is_complex() != is_complex:
        kind = "complex" if is_complex else "real"
        raise ValueError(f"{said} must be {kind}, got {value.dtype}")
    if is_of_param:
        check_distributed_alike(value, param, said)


def as_saved(value: Any) -> torch.Tensor:
    """A value of a saved state as a tensor: old versions of torch wrote ``step`` as a number."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64, device="cpu")
