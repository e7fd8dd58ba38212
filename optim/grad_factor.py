"""What gradients are multiplied by before all else: what unscales them, and what clips their norm.

They are read with the factor, and stay as they are. On a GPU it is made there, and the host does
not wait for it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from hogstream.optim.parameters import in_whole, placement_of
from hogstream.optim.state import as_real

# As torch has it in ``clip_grad_norm_``.
_NORM_EPS = 1e-6


class Scaling(NamedTuple):
    """What is to be known of the gradients of a step.

    Attributes:
        factor: What they are multiplied by: float64, shape ().
        found_inf: Not 0 if one is infinite or NaN, and the step is to be left out: float32, of one
            element; None if nobody has looked.
    """

    factor: torch.Tensor
    found_inf: torch.Tensor | None

    def is_left_out(self, on_host: bool) -> bool:
        """Whether the host knows that the step is left out.

        Args:
            on_host: Whether some of it is computed there: then it waits for what a GPU has found.
        """
        found = self.found_inf
        return found is not None and (on_host or found.device.type == "cpu") and bool(found)

    def on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """What a launch on a GPU takes besides."""
        taken = {"grad_factor": self.factor.to(device, non_blocking=True)}
        if self.found_inf is not None:
            taken["found_inf"] = self.found_inf.to(device, torch.float32, non_blocking=True)
        return taken


@torch.no_grad()
def scaling_of(
    grads: list[torch.Tensor],
    max_norm: float | None,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
) -> Scaling:
    """What comes of a greatest norm, and of what torch's ``GradScaler`` says.

    Args:
        grads: All gradients of a step.
        max_norm: The greatest norm that they may have together once they are unscaled, or None.
        grad_scale: What they have been multiplied by, of one element, or None.
        found_inf: As in ``Scaling``.
    """
    device = grads[0].device if grads else torch.device("cpu")
    factor = torch.ones((), dtype=torch.float64, device=device)
    if grad_scale is not None:
        factor = 1.0 / grad_scale.detach().to(factor)
    if max_norm is not None and grads:
        norm = _norm_of(grads).to(factor) * factor
        factor = factor * (max_norm / (norm + _NORM_EPS)).clamp(max=1.0)
    return Scaling(factor.reshape(()), found_inf)


def check_max_grad_norm(value: Any) -> None:
    """Checks the option of that name.

    Raises:
        ValueError: If it is not None, nor a finite number > 0.
    """
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (is_number and 0 < value < math.inf):
        raise ValueError(f"max_grad_norm must be a finite number > 0 or None, got {value!r}")


def _norm_of(grads: list[torch.Tensor]) -> torch.Tensor:
    """The norm of all together; those of 16 bits are added in float32."""
    alike: dict[tuple[torch.device, torch.dtype, Any], list[torch.Tensor]] = {}
    for grad in (as_real(each.resolve_conj()) for each in grads):
        alike.setdefault((grad.device, grad.dtype, placement_of(grad)), []).append(grad)
    norms = [
        in_whole(norm)
        for (_, dtype, _), each in alike.items()
        for norm in torch._foreach_norm(each, 2, dtype=max(dtype, torch.float32, key=_size_of))
    ]
    there = norms[0].device
    norm: torch.Tensor = torch.linalg.vector_norm(
        torch.stack([each.to(there, torch.float64) for each in norms])
    )
    return norm


def _size_of(dtype: torch.dtype) -> int:
    return dtype.itemsize
