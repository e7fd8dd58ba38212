"""What the kernels are held to: the update in float64, and the NumPy expression users write."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hogstream.kernels.hyperparameters import Hyperparameters

Array = npt.NDArray[Any]


def reference(
    param: Array,
    grad: Array,
    ms: Array,
    hyperparameters: Hyperparameters,
    grad_avg: Array | None = None,
    momentum_buffer: Array | None = None,
) -> tuple[Array, Array, Array | None, Array | None]:
    """One update in float64, by the formula and with no thought for speed or rounding.

    Args:
        param: Any shape and float dtype.
        grad: Shape of ``param``.
        ms: Shape of ``param``.
        hyperparameters: The numbers and switches of the update.
        grad_avg: Shape of ``param``, if the update is centered.
        momentum_buffer: Shape of ``param``, if it has momentum.

    Returns:
        The new ``param``, ``ms``, ``grad_avg`` and ``momentum_buffer``, in float64, and None where
        there was none; the arguments are left alone.
    """
    h = hyperparameters
    p, g, ms = (np.asarray(array, np.float64) for array in (param, grad, ms))
    ga, buf = (x if x is None else np.asarray(x, np.float64) for x in (grad_avg, momentum_buffer))
    if h.maximize:
        g = -g
    if h.decoupled_weight_decay:
        p = p * (1 - h.lr * h.weight_decay)
    else:
        g = g + h.weight_decay * p
    with np.errstate(all="ignore"):
        ms = v = h.alpha * ms + (1 - h.alpha) * g**2
        if ga is not None:
            ga = h.alpha * ga + (1 - h.alpha) * g
            v = np.maximum(ms - ga**2, 0)  # which keeps NaN
        d = np.sqrt(v + h.eps) if h.eps_inside_sqrt else np.sqrt(v) + h.eps
        step = h.lr * g / d
        if buf is not None and h.lr_in_momentum:
            buf = step = h.momentum * buf + step
        elif buf is not None:
            buf = h.momentum * buf + g / d
            step = h.lr * buf
        return p - step, ms, ga, buf


def plain_expression_(
    param: Array, grad: Array, ms: Array, lr: float = 0.01, alpha: float = 0.99, eps: float = 1e-8
) -> None:
    """The update as one writes it in NumPy, in place: the baseline of tests and benchmarks.

    Args:
        param: Any shape, float32 or float64.
        grad: Shape and dtype of ``param``.
        ms: Shape and dtype of ``param``.
        lr: Learning rate.
        alpha: Decay of ``ms``.
        eps: Inside the root.
    """
    with np.errstate(all="ignore"):
        ms *= alpha
        ms += (1 - alpha) * grad * grad
        param -= lr * grad / np.sqrt(ms + eps)
