"""The update, written once: every backend runs these functions, over numbers of its own kind.

Each operation is rounded once, to nearest even, and none is fused with another: so all backends
give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from operator import truediv as divide
from types import FunctionType
from typing import Any, NamedTuple

#: In how many sums the squares of a row are added up: that of each column is column modulo this.
LANES = 32


def clamp(x: float) -> float:
    """0 in place of what is less than 0; NaN stays."""
    return 0.0 if x < 0 else x


def where(condition: bool, x: float, y: float) -> float:
    """One of two numbers; of each element, in a backend."""
    return x if condition else y


# Without annotations, which Triton would run.
def gradient(  # type: ignore[no-untyped-def]
    p,  # elements of the parameter: of the compute type, as all that follows
    g,  # those of its gradient
    factors,  # as ``Factors``
    COUPLED,  # a bool, as in ``Switches``
):
    """The gradient as all that follows takes it."""
    _, _, _, _, weight_decay, _, sign, _ = factors
    g = g * sign
    if COUPLED:
        g = g + weight_decay * p
    return g


def descend(  # type: ignore[no-untyped-def]
    p,  # elements of the parameter: of the compute type, as all that follows
    g,  # those of its gradient, from ``gradient``
    ms,  # their mean square, with this gradient's
    ga,  # the gradients' mean, if CENTERED, without this one
    buf,  # their momentum buffer, if MOMENTUM
    factors,  # as ``Factors``
    EPS_INSIDE_SQRT,  # a bool: this and what follows as in ``Switches``
    CENTERED,
    MOMENTUM,
    LR_IN_MOMENTUM,
):
    """The new ``p``, ``ga`` and ``buf``."""
    lr, alpha, beta, eps, _, shrink, _, momentum = factors
    p = p * shrink
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
    return p, ga, buf


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
    _, alpha, beta, _, _, _, _, _ = factors
    g = gradient(p, g, factors, COUPLED)  # type: ignore[no-untyped-call]
    ms = alpha * ms + (beta * g) * g
    p, ga, buf = descend(  # type: ignore[no-untyped-call]
        p, g, ms, ga, buf, factors, EPS_INSIDE_SQRT, CENTERED, MOMENTUM, LR_IN_MOMENTUM
    )
    return p, ms, ga, buf


def row_mean_square(  # type: ignore[no-untyped-def]
    ms,  # of a row: of the compute type, as all that follows
    squares,  # the sum of the squares of the row's gradient
    width,  # how many elements it has
    factors,  # as ``Factors``
):
    """The new ``ms`` of a row that has one for all its elements."""
    _, alpha, beta, _, _, _, _, _ = factors
    return alpha * ms + beta * divide(squares, width)


def decay(  # type: ignore[no-untyped-def]
    one,  # 1 for each row: float64
    alpha,  # float64
    passed,  # how many updates passed each row by, >= 0: int64
    bits,  # how many of its bits may be set
):
    """``alpha**passed`` by squaring, in float64: what is left of state that they passed by."""
    factor = one
    power = one * alpha
    for _ in range(bits):
        factor = where((passed & 1) == 1, factor * power, factor)
        power = power * power
        passed = passed >> 1
    return factor


class Formula(NamedTuple):
    """The functions above over the numbers of one backend."""

    gradient: Callable[..., Any]
    descend: Callable[..., Any]
    rmsprop: Callable[..., Any]
    row_mean_square: Callable[..., Any]
    decay: Callable[..., Any]


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def formula_over(
    *,
    compiled: Callable[[Callable[..., Any]], Callable[..., Any]] = _as_it_is,
    **names: Any,
) -> Formula:
    """The formula over a backend's numbers, which have Python's operators.

    Args:
        compiled: Makes of a function what a backend runs.
        names: What the functions call, as the backend has it: ``sqrt`` and ``divide``, correctly
            rounded, ``clamp``, ``where``, and what else must be known by name where they run.
    """
    known = {**globals(), **names}

    def over(function: Callable[..., Any]) -> Callable[..., Any]:
        made = compiled(FunctionType(function.__code__, known, function.__name__))
        known[function.__name__] = made
        return made

    functions: tuple[Any, ...] = gradient, descend, rmsprop, row_mean_square, decay
    return Formula(*map(over, functions))
