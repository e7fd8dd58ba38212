"""One RMSprop update of one array or tensor."""

from __future__ import annotations

import torch

from hogstream.kernels.backends import select_backend
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.operands import ArrayLike, check_operands


def rmsprop_(
    param: ArrayLike,
    grad: ArrayLike,
    ms: ArrayLike,
    *,
    lr: float = 0.01,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    eps_inside_sqrt: bool = True,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    """Updates ``param`` and ``ms`` in place by one step of RMSprop.

    ``ms = alpha*ms + ((1 - alpha)*grad)*grad``, then ``param -= (lr*grad) / sqrt(ms + eps)``: each
    operation rounded once, in this order, so that every backend gives the same bits. This is
    ChainerRL's ``RMSpropAsync``; the non-centered RMSProp of Mnih et al. 2016 (arXiv 1602.01783).

    Nothing is changed if an argument is refused.

    Args:
        param: Any shape; float16, bfloat16 (tensors only), float32 or float64. Contiguous, or a
            permutation of that. A NumPy array or a tensor.
        grad: Gradient, with the shape, dtype, device and memory layout of ``param``.
        ms: Running mean of squared gradients, in the compute type: float64 for float64
            parameters, else float32. Starts at zero.
        lr: Learning rate, finite and >= 0.
        alpha: Decay of ``ms``, in [0, 1).
        eps: Finite and >= 0.
        weight_decay: Finite and >= 0.
        eps_inside_sqrt: If false, divide by ``sqrt(ms) + eps``, as ``torch.optim.RMSprop``.
        decoupled_weight_decay: Shrink ``param`` by ``1 - lr*weight_decay`` instead of adding
            ``weight_decay*param`` to the gradient.
        maximize: Ascend the gradient.
        backend: ``"triton"``, ``"numba"`` or ``"numpy"``; None picks by device.

    Raises:
        TypeError: If an operand or number is of a wrong type or dtype.
        ValueError: If an operand does not fit, a number is out of range, or ``backend`` is unknown
            or cannot take these operands.
        RuntimeError: If ``backend`` is not available here.
    """
    hyperparameters = Hyperparameters(
        lr=lr,
        alpha=alpha,
        eps=eps,
        weight_decay=weight_decay,
        eps_inside_sqrt=eps_inside_sqrt,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )
    operands = check_operands(param, grad, ms)
    select_backend(backend, operands.param.device.type).update_(operands, hyperparameters)
    for array in (param, ms):
        if isinstance(array, torch.Tensor):
            torch.autograd.graph.increment_version(array)  # so that autograd notices the change
