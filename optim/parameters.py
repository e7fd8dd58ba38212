"""What parameters an optimizer may hold: frozen ones of any kind, and parts of distributed ones."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.nn.parameter import is_lazy


def has_memory(param: torch.Tensor) -> bool:
    """Whether a parameter has been given memory: not one that is lazy, or on the meta device."""
    return not is_lazy(param) and param.device.type != "meta"


def needs_state(param: torch.Tensor) -> bool:
    """Whether steps take state of a parameter: not of one that is frozen, or has no memory yet."""
    return (param.requires_grad and has_memory(param)) or param.grad is not None


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether it is a ``DTensor``."""
    # Nobody has one who has not imported this, which takes long.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that this process has of a distributed tensor; any other tensor as it is."""
    if not is_distributed(tensor):
        return tensor
    with torch.no_grad():
        part: torch.Tensor = tensor.to_local()  # type: ignore[attr-defined]
    if hasattr(part, "wait"):  # it is still on its way
        part = part.wait()
    return part


def in_whole(tensor: torch.Tensor) -> torch.Tensor:
    """A distributed tensor as each process has it when all have asked; any other as it is."""
    if not is_distributed(tensor):
        return tensor
    whole: torch.Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
    return whole


def placement_of(tensor: torch.Tensor) -> Any:
    """How a distributed tensor is placed, over which processes; None of any other."""
    if not is_distributed(tensor):
        return None
    return tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]


def check_distributed_alike(tensor: Any, param: torch.Tensor, name: str) -> None:
    """Checks that a tensor is distributed if its parameter is, over the same processes.

    Raises:
        TypeError: If only one of them is a ``DTensor``.
        ValueError: If their meshes differ.
    """
    if is_distributed(tensor) != is_distributed(param):
        wanted = "a DTensor" if is_distributed(param) else "a plain tensor"
        raise TypeError(f"{name} must be {wanted} as its param, got a {type(tensor).__name__}")
    if is_distributed(param) and tensor.device_mesh != param.device_mesh:  # type: ignore[attr-defined]
        raise ValueError(
            f"{name} must be on the mesh of its param, "
            f"{param.device_mesh}, got {tensor.device_mesh}"  # type: ignore[attr-defined]
        )


def own_part_of_grad(grad: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """What this process has of a gradient once it is placed as its parameter.

    All processes of the mesh must ask for it if it is placed otherwise, or is a sum whose parts
    the processes have.
    """
    if is_distributed(param) and grad.placements != param.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(placements=param.placements)  # type: ignore[attr-defined]
    return own_part(grad)
