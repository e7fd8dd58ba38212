"""What updates keep from one to the next, besides the parameters."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch

from hogstream.kernels.hyperparameters import Hyperparameters, Switches


class UpdateState(NamedTuple):
    """Tensors of one shape, in the compute type; the names are those that ``rmsprop_`` has.

    Attributes:
        ms: Running mean of squared gradients.
        grad_avg: Running mean of gradients, of centered updates; else None.
        momentum_buffer: That of updates with momentum; else None.
    """

    ms: torch.Tensor
    grad_avg: torch.Tensor | None = None
    momentum_buffer: torch.Tensor | None = None

    def named(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        return {
            prefix + kind: tensor for kind, tensor in self._asdict().items() if tensor is not None
        }

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> UpdateState:
        """What a function makes of each: a part, say."""
        return UpdateState(**{kind: function(tensor) for kind, tensor in self.named().items()})

    def only(self, kinds: Collection[str]) -> UpdateState:
        """``ms``, and of the others those of some kinds."""
        return UpdateState(
            self.ms, *(getattr(self, kind) if kind in kinds else None for kind in KINDS)
        )


#: What not all updates have, by its names in ``UpdateState``.
KINDS = ("grad_avg", "momentum_buffer")


def kinds_of(switches: Switches) -> tuple[str, ...]:
    """Which of ``KINDS`` updates have."""
    has = switches.centered, switches.momentum
    return tuple(kind for kind, is_there in zip(KINDS, has, strict=True) if is_there)


def check_has_state(hyperparameters: Hyperparameters, kinds: Collection[str]) -> None:
    """Checks that the workers of an open scheduler have the state that updates need.

    Args:
        hyperparameters: Of the updates.
        kinds: Which of ``KINDS`` the scheduler was opened with.

    Raises:
        ValueError: If one is missing.
    """
    needed = kinds_of(hyperparameters.switches)
    for name, kind, without in (
        ("centered", "grad_avg", False),
        ("momentum", "momentum_buffer", 0),
    ):
        if kind in needed and kind not in kinds:
            raise ValueError(
                f"{name} must be {without} in a scheduler that was opened without {kind}, got "
                f"{getattr(hyperparameters, name)!r}: assign it before the scheduler is "
                f"opened, and {without} then for updates that shall have none"
            )
