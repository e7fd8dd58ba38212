"""``torch.optim.RMSprop`` by name: its arguments and defaults over the same machine."""

from __future__ import annotations

from typing import Any

import torch

from hogstream.optim.rmsprop_async import RMSpropAsync


class RMSprop(RMSpropAsync):
    """RMSprop with the arguments, positions and defaults of ``torch.optim.RMSprop``.

    All else is as in ``RMSpropAsync``, which differs in its defaults: epsilon is outside the root
    here. ``foreach`` is taken, and changes nothing: there is one launch for all tensors either way.

    Args:
        params: As in ``RMSpropAsync``, like all that follows.
        lr: Learning rate.
        alpha: Decay of the mean square.
        eps: Keeps the denominator from zero; added to the root.
        weight_decay: Added to the gradient, times the parameter.
        momentum: Decay of the momentum buffer.
        centered: Divide by the standard deviation of gradients.
        capturable: May be captured in a CUDA graph.
        foreach: True, False or None.
        maximize: Ascend the gradient.
        differentiable: Autograd may go through a step.
        options: ``lr_in_momentum``, ``initial_accumulator_value``, ``decoupled_weight_decay``,
            ``stochastic_rounding``, ``seed``, ``kahan_sum``, ``max_grad_norm``, ``flat`` and
            ``backend``, by name.

    Raises:
        TypeError: As ``RMSpropAsync``.
        ValueError: As ``RMSpropAsync``.
        RuntimeError: As ``RMSpropAsync``.
    """

    def __init__(
        self,
        params: Any,
        lr: float | torch.Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        eps_inside_sqrt: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            params,
            lr,
            alpha,
            eps,
            weight_decay,
            momentum=momentum,
            centered=centered,
            capturable=capturable,
            foreach=foreach,
            maximize=maximize,
            differentiable=differentiable,
            eps_inside_sqrt=eps_inside_sqrt,
            **options,
        )
