"""How parameters of 16 bits are rounded stochastically, written once for all backends.

Up or down is decided by a hash of a counter: the place of the element and the step. So the same
seed gives the same bits on every backend and in any order, and a run that is resumed goes on as if
it had not ended.

``random``, ``bfloat16`` and ``float16`` take unsigned integers of 32 bits, of which each backend
has its own kind, with Python's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

#: An element's place is its index, and this much more for each update before its own in a table.
PLACES = 1 << 40
_U64 = (1 << 64) - 1


def key_of_step(seed: int, step: int, launch: int = 0) -> int:
    """What all elements have in common at a step: 64 bits, by SplitMix64.

    Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".

    Args:
        seed: The user's.
        step: How many steps there were before.
        launch: Which of the step's launches it is for.
    """
    word = (seed + 0x9E3779B97F4A7C15 * (step + 1) + 0xD1B54A32D192ED03 * launch) & _U64
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _U64
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _U64
    return word ^ word >> 31


def where(condition: bool, x: int, y: int) -> int:
    """One of two numbers; of each element, in a backend."""
    return x if condition else y


# Without annotations, as the formula.
def mixed(x):  # type: ignore[no-untyped-def]
    """A hash of 32 bits: "lowbias32" of C. Wellons' hash-prospector."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


def random(low, high, key_low, key_high):  # type: ignore[no-untyped-def]
    """32 random bits, by the halves of an element's place and of the step's key."""
    return mixed(mixed(low ^ key_low) ^ high ^ key_high)  # type: ignore[no-untyped-call]


def bfloat16(bits, random):  # type: ignore[no-untyped-def]
    """The bits of bfloat16, from those of float32."""
    rounded = (bits + (random >> 16)) >> 16
    special = where((bits & 0x7FFFFF) == 0, bits >> 16, 0x7FC0)  # infinity or NaN
    return where((bits & 0x7F800000) == 0x7F800000, special, rounded)


def float16(bits, random):  # type: ignore[no-untyped-def]
    """The bits of float16, from those of float32."""
    magnitude = bits & 0x7FFFFFFF
    exponent = magnitude >> 23
    # In units of 2^-13 of the last place: what is less than 2^-14 is denormal, others are not.
    shift = where(exponent < 82, 31, 113 - exponent)
    denormal = ((magnitude & 0x7FFFFF) | 0x800000) >> where(exponent > 112, 0, shift)
    units = where(exponent > 112, magnitude - 0x38000000, denormal)
    rounded = (units + (random >> 19)) >> 13
    rounded = where(rounded > 0x7C00, 0x7C00, rounded)  # which is infinity
    rounded = where(magnitude > 0x7F800000, 0x7E00, rounded)  # NaN
    return ((bits >> 16) & 0x8000) | rounded


def over(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A function of this module over a backend's numbers.

    Args:
        function: It.
        names: What it calls, as the backend has it.
    """
    return FunctionType(function.__code__, {**globals(), **names}, function.__name__)
