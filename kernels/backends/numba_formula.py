"""The formula on vectors of elements in memory, in LLVM's language."""

from __future__ import annotations

from operator import truediv

from llvmlite import ir

from hogstream.kernels.backends.numba_vectors import (
    Emitter,
    Vector,
    clamp,
    finite_or_0,
    sqrt,
)
from hogstream.kernels.formula import formula_over
from hogstream.kernels.hyperparameters import Switches
from hogstream.kernels.launch_table import (
    GRAD_AVG,
    KAHAN_COMP,
    MOMENTUM_BUFFER,
    MS,
    PARAM,
)

# What the formula takes of state.
_STATE = MS, GRAD_AVG, MOMENTUM_BUFFER

#: The formula over vectors.
formula = formula_over(sqrt=sqrt, divide=truediv, clamp=clamp)


def written_by(switches: Switches) -> tuple[int, ...]:
    """The rows of a table where it is said what an update writes."""
    is_written = {
        GRAD_AVG: switches.centered,
        MOMENTUM_BUFFER: switches.momentum,
        KAHAN_COMP: switches.compensated,
    }
    return (PARAM, MS, *(row for row in is_written if is_written[row]))


def load_param(emitter: Emitter, at: dict[int, ir.Value], switches: Switches) -> Vector:
    """Elements of a parameter, with what rounding has left of them.

    Args:
        emitter: Of the parameter's elements.
        at: Their addresses, by the rows of a table.
        switches: Of the update.
    """
    p = emitter.load_stored(at[PARAM])
    return p + emitter.load_stored(at[KAHAN_COMP]) if switches.compensated else p


def emit_update(
    emitter: Emitter,
    at: dict[int, ir.Value],
    g: Vector,
    factors: list[Vector],
    where: tuple[ir.Value, ir.Value],
    switches: Switches,
    *,
    ms: Vector | None = None,
    left: Vector | None = None,
) -> None:
    """Writes code that updates elements by their gradients.

    Args:
        emitter: Of the parameter's elements.
        at: Addresses of them and of their state, by the rows of a table.
        g: Their gradients.
        factors: As ``Factors``.
        where: The place of the first of them, and the key of the step, for stochastic rounding.
        switches: Of the update.
        ms: Their mean square if it has its new value already, which is then not read or written.
        left: What is left of their state after updates that have passed them by; None if all is.
    """
    p = load_param(emitter, at, switches)
    state = {row: emitter.load_computed(at[row]) for row in _STATE if row in at}
    if left is not None:
        state |= {row: state[row] * left for row in (MS, GRAD_AVG) if row in state}
    if ms is None:
        p, *new = formula.rmsprop(p, g, *map(state.get, _STATE), factors, *switches.of_formula)
    else:
        g = formula.gradient(p, g, factors, switches.coupled)
        ga, buf = state.get(GRAD_AVG), state.get(MOMENTUM_BUFFER)
        p, *new = formula.descend(p, g, ms, ga, buf, factors, *switches.of_descent)
        new = [ms, *new]
    for row, numbers in zip(_STATE, new, strict=True):
        if row in state:
            emitter.store_computed(numbers, at[row])
    if switches.stochastic:
        emitter.store_by_chance(p, at[PARAM], *where)
        return
    emitter.store_rounded(p, at[PARAM])
    if switches.compensated:
        emitter.store_rounded(finite_or_0(p - emitter.rounded(p)), at[KAHAN_COMP])
