"""What the loop of CUDA lanes launches for an update of whole parameters, or of parts of them.

This module needs Numba.
"""

from __future__ import annotations

from typing import Any

from hogstream.kernels.backends.numba_atomics import (
    atomic_load,
    float_load,
    float_store,
)
from hogstream.kernels.backends.numba_compile import njit
from hogstream.kernels.launch_table import ELEMENTS, GRAD
from hogstream.scheduler.lanes.cuda_calls import (
    FINITE_FUNCTION,
    FUNCTION,
    PROGRAM,
    clear_verdict,
    fetch_verdict,
    launch_kernel,
    set_argument,
    set_scratch,
)
from hogstream.scheduler.lanes.rings import (
    ARGUMENTS,
    FACTOR_WORDS,
    FACTORS,
    FORM,
    PARTS,
    RACES,
    READ_VERSION,
    STALENESS_AWARE,
    UPDATE,
    VERDICT,
    WORD,
    of_part,
    version,
)

#: Arguments of the kernels of the update, behind the factors, that lanes have no use for: the key
#: of stochastic rounding, and what gradients are multiplied by.
UNUSED = 2


@njit
def update_all(lane: int, row: int, found: int, thread: int, settings: int) -> Any:
    """Launches an update, part by part, if its gradient is finite or nobody asks; 0 or an error."""
    kernel = atomic_load(atomic_load(row + WORD * FORM) + WORD * UPDATE)
    checks = atomic_load(kernel + WORD * FINITE_FUNCTION) != 0
    parts = atomic_load(row + WORD * PARTS)
    error = 0
    if checks:
        error = clear_verdict(lane, settings)
        for part in range(parts):
            if error == 0:
                error = check_finite(kernel, lane, row, part, thread, settings)
    for part in range(parts):
        if error == 0:
            set_update_arguments(lane, row, part, thread, settings)
            programs = programs_of(kernel, row, part)
            error = launch_kernel(kernel, FUNCTION, programs, lane, thread, settings)
    if error == 0 and checks:
        error = fetch_verdict(lane, found, settings)
    return error


@njit
def check_finite(kernel: int, lane: int, row: int, part: int, thread: int, settings: int) -> Any:
    """Launches what looks whether the gradient of a part is finite; 0 or an error."""
    set_argument(thread, 0, of_part(row, GRAD, part))
    set_argument(thread, 1, of_part(row, ELEMENTS, part))
    set_argument(thread, 2, atomic_load(lane + WORD * VERDICT))
    set_scratch(thread, 3)
    programs = programs_of(kernel, row, part)
    return launch_kernel(kernel, FINITE_FUNCTION, programs, lane, thread, settings)


@njit
def programs_of(kernel: int, row: int, part: int) -> Any:
    """How many programs take the elements of a part."""
    program = atomic_load(kernel + WORD * PROGRAM)
    return (of_part(row, ELEMENTS, part) + program - 1) // program


@njit
def set_update_arguments(lane: int, row: int, part: int, thread: int, settings: int) -> None:
    """What ``rmsprop_kernel`` takes."""
    for what in range(ELEMENTS + 1):  # which is the last of a table
        set_argument(thread, what, of_part(row, what, part))
    place = set_factors(row, ELEMENTS + 1, thread, settings)
    set_argument(thread, place, atomic_load(lane + WORD * VERDICT))
    set_argument(thread, place + 1, atomic_load(settings + WORD * RACES))
    set_scratch(thread, place + 2)


@njit
def set_factors(row: int, place: int, thread: int, settings: int) -> int:
    """Sets the factors of a row's update as arguments from a place on, and those that are unused.

    Returns:
        The place of the argument behind them.
    """
    factors = atomic_load(row + WORD * FORM) + WORD * FACTORS
    for index in range(FACTOR_WORDS):
        set_argument(thread, place + index, atomic_load(factors + WORD * index))
    if atomic_load(settings + WORD * STALENESS_AWARE):
        stale = version(settings) - atomic_load(row + WORD * READ_VERSION)
        lr = thread + WORD * (ARGUMENTS + place)  # the first of them
        float_store(lr, float_load(lr) / max(stale, 1))
    for index in range(UNUSED):
        set_argument(thread, place + FACTOR_WORDS + index, 0)
    return place + FACTOR_WORDS + UNUSED
