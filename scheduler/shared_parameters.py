"""The parameters and mean squares that all workers update: flat, with named views."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch

from hogstream.kernels.operands import COMPUTE_DTYPES, check_param


class SharedParameters:
    """Flat parameters and ``ms``, one of each, that every worker reads and updates.

    Attributes:
        flat: All parameters, shape (elements,), contiguous.
        ms: Running mean of squared gradients, shape (elements,), in the compute type: float64 for
            float64 parameters, else float32. Starts at zero.
        version: How many updates the parameters have had.
        views: Each parameter by name: a view of ``flat`` in the parameter's shape.
    """

    def __init__(self, parameters: Mapping[str, torch.Tensor]) -> None:
        """Copies parameters into flat storage; the tensors given are left alone.

        Args:
            parameters: Name to tensor of any shape; one dtype (float16, bfloat16, float32 or
                float64) and one device for all.

        Raises:
            TypeError: If there is something else than tensors in a mapping, a dtype cannot be
                updated, or dtypes differ.
            ValueError: If there are no parameters, or devices differ.
        """
        if not isinstance(parameters, Mapping):
            raise TypeError(
                f"parameters must map names to tensors, got {type(parameters).__name__}"
            )
        for name, tensor in parameters.items():
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a torch tensor, got {type(tensor).__name__}")
        if not parameters:
            raise ValueError("parameters must hold at least one tensor, got none")
        tensors = {name: tensor.detach() for name, tensor in parameters.items()}
        first_name, first = next(iter(tensors.items()))
        for name, tensor in tensors.items():
            check_param(tensor, name)
            if tensor.dtype != first.dtype:
                raise TypeError(f"{name} must be {first.dtype} as {first_name}, got {tensor.dtype}")
            if tensor.device != first.device:
                raise ValueError(
                    f"{name} must be on {first.device} as {first_name}, got {tensor.device}"
                )
        self.flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        self.ms = torch.zeros_like(self.flat, dtype=COMPUTE_DTYPES[first.dtype])
        self.version = 0
        self._shapes = {name: tensor.shape for name, tensor in tensors.items()}
        self.views: Mapping[str, torch.Tensor] = MappingProxyType(self.views_of(self.flat))

    @classmethod
    def from_module(cls, module: torch.nn.Module) -> SharedParameters:
        """Makes a module's parameters shared: they become views of the flat storage.

        Buffers, such as running statistics, stay the module's own.

        Raises:
            TypeError: If ``module`` is not one, a dtype cannot be updated, or dtypes differ.
            ValueError: If the module has no parameters, or devices differ.
        """
        if not isinstance(module, torch.nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
        shared = cls(dict(module.named_parameters()))
        shared.attach(module)
        return shared

    @property
    def elements(self) -> int:
        """How many parameters there are, counted one by one."""
        return self.flat.numel()

    def attach(self, module: torch.nn.Module) -> None:
        """Re-points a module's parameters into the shared storage; their old values are dropped.

        Args:
            module: With the names, shapes, dtype and device of the shared parameters, such as a
                deep copy of the module they were made from.

        Raises:
            ValueError: If a name, shape, dtype or device differs; the module is left as it was.
        """
        parameters = dict(module.named_parameters())
        if parameters.keys() != self.views.keys():
            differing = sorted(parameters.keys() ^ self.views.keys())
            raise ValueError(f"module must have the shared parameters' names; {differing} differ")
        for name, parameter in parameters.items():
            mine, theirs = _signature(self.views[name]), _signature(parameter)
            if mine != theirs:
                raise ValueError(f"{name} must be {mine} as the shared one, got {theirs}")
        for name, parameter in parameters.items():
            parameter.data = self.views[name]

    def views_of(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Views of a flat tensor by parameter name: of a gradient, say, or a snapshot.

        Args:
            flat: Shape (elements,).
        """
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self._shapes.items(), flat.split(sizes), strict=True)
        }


def _signature(tensor: torch.Tensor) -> tuple[tuple[int, ...], torch.dtype, torch.device]:
    return tuple(tensor.shape), tensor.dtype, tensor.device
