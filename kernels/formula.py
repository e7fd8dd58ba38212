"""The update, written once: every backend runs this function, over numbers of its own kind.

Each operation is rounded once, to nearest even, and none is fused with another: so all backends
give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from operator import truediv as divide
from types import FunctionType
from typing import Any


def clamp(x: float) -> float:
    """0 in place of what is less than 0; NaN stays."""
    return 0.0 if x < 0 else x


# Without annotations, which Triton would run.
def rmsprop(  # type: ignore[no-untyped-def]
    p,  # elements of the parameter: of the compute type, as all that follows
    g,  # those of its gradient
    ms,  # their mean square
    ga,  # their mean, if CENTERED
    buf,  # their momentum buffer, if MOMENTUM
    factors,  # as ``Factors``
    EPS_INSIDE_SQRT,  # a bool: this and what follows as in ``Switches``
    COUPLED,
    CENTERED,
    MOMENTUM,
    LR_IN_MOMENTUM,
):
    """The new ``p``, ``ms``, ``ga`` and ``buf``: here of Python's own floats."""
    lr, alpha, beta, eps, weight_decay, shrink, sign, momentum = factors
    g = g * sign
    if COUPLED:
        g = g + weight_decay * p
    p = p * shrink
    ms = alpha * ms + (beta * g) * g
    v = ms
    if CENTERED:
        ga = alpha * ga + beta * g
        v = clamp(ms - ga * ga)  # which rounding, or a race, may have made less than 0
    # Before the root: else some compilers keep a factor in memory until then.
    step = g if MOMENTUM and not LR_IN_MOMENTUM else lr * g
    d = sqrt(v + eps) if EPS_INSIDE_SQRT else sqrt(v) + eps
    step = divide(step, d)
    if MOMENTUM:
        buf = momentum * buf + step
        step = buf if LR_IN_MOMENTUM else lr * buf
    p = p - step
    return p, ms, ga, buf


def rmsprop_over(
    sqrt: Callable[..., Any],
    divide: Callable[..., Any],
    clamp: Callable[..., Any],
    **more: Any,
) -> Callable[..., Any]:
    """The formula over a backend's numbers, which have Python's operators.

    Args:
        sqrt: The correctly rounded root.
        divide: The correctly rounded quotient.
        clamp: As above.
        more: What else must be known by name where it runs.
    """
    names = {**globals(), "sqrt": sqrt, "divide": divide, "clamp": clamp, **more}
    return FunctionType(rmsprop.__code__, names, rmsprop.__name__)
