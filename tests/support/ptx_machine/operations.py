"""What instructions compute that touch neither memory nor the order of execution.

Each name has a function here that takes an instruction's qualifiers and returns an ``Operation``,
or raises. NumPy's own additions, products, quotients and roots are IEEE's, each rounded once to
nearest even, denormals kept: they are what PTX calls ``.rn``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ptx_machine.errors import InexactInstructionError, UnknownInstructionError
from ptx_machine.fused import fused_multiply_add
from ptx_machine.scalars import SCALARS, Array, Scalar

_PREDICATE = SCALARS["pred"]


class Operation(NamedTuple):
    """How to compute the result of an instruction.

    Attributes:
        sources: How it looks at each operand.
        result: What comes out.
        compute: From arrays of the sources' types to one of the result's.
    """

    sources: tuple[Scalar, ...]
    result: Scalar
    compute: Callable[..., Array]


class _Qualifiers:
    """An opcode's parts, each of which must be taken."""

    def __init__(self, opcode: str) -> None:
        self.opcode = opcode
        self.name, *self._parts = opcode.split(".")

    def take(self, *allowed: str) -> str | None:
        """The next part if it is one of these, or None."""
        if self._parts and self._parts[0] in allowed:
            return self._parts.pop(0)
        return None

    def must(self, *allowed: str) -> str:
        """The next part, which must be one of these.

        Raises:
            UnknownInstructionError: If it isn't.
        """
        part = self.take(*allowed)
        if part is None:
            given = self._parts[0] if self._parts else "nothing"
            raise UnknownInstructionError(
                f"{self.opcode}: unknown qualifier {given!r}, known here: {', '.join(allowed)}"
            )
        return part

    def scalar(self, *allowed: str) -> Scalar:
        """The next part as a type, which must be one of these."""
        return SCALARS[self.must(*allowed)]

    def end(self) -> None:
        """Checks that no part is left."""
        if self._parts:
            raise UnknownInstructionError(f"{self.opcode}: unknown qualifier {self._parts[0]!r}")


_S, _U, _B = (tuple(f"{kind}{bits}" for bits in (16, 32, 64)) for kind in "sub")
_INTEGERS = (*_S, *_U)
_FLOATS = ("f16", "f32", "f64", "f16x2", "f32x2")


def operation(opcode: str) -> Operation:
    """What an opcode computes.

    Raises:
        UnknownInstructionError: If it, or one of its qualifiers, is not known here.
        InexactInstructionError: If PTX does not say which bits come out.
    """
    qualifiers = _Qualifiers(opcode)
    make = _OPERATIONS.get(qualifiers.name)
    if make is None:
        raise UnknownInstructionError(f"{opcode}: unknown instruction")
    made = make(qualifiers)
    qualifiers.end()
    return made


def is_operation(opcode: str) -> bool:
    """Whether an opcode's name, whatever its qualifiers, is of those here."""
    return opcode.split(".")[0] in _OPERATIONS


# Arithmetic


def _arithmetic(compute: Callable[..., Array]) -> Callable[[_Qualifiers], Operation]:
    """Of two numbers of one type; the first of float32 may be of float16, which is widened."""

    def make(qualifiers: _Qualifiers) -> Operation:
        known = _FLOATS if qualifiers.take("rn") else (*_INTEGERS, *_FLOATS)
        scalar = first = qualifiers.scalar(*known)
        if scalar.name == "f32" and qualifiers.take("f16"):
            first = SCALARS["f16"]
        return Operation((first, scalar), scalar, compute)

    return make


def _multiply(qualifiers: _Qualifiers) -> Operation:
    half = qualifiers.take("lo", "hi", "wide")
    if half is None:
        qualifiers.take("rn")
        scalar = qualifiers.scalar(*_FLOATS)
        return Operation((scalar, scalar), scalar, np.multiply)
    scalar, result, compute = _product(qualifiers, half)
    return Operation((scalar, scalar), result, compute)


def _multiply_add(qualifiers: _Qualifiers) -> Operation:
    half = qualifiers.must("lo", "hi", "wide")
    scalar, result, product = _product(qualifiers, half)
    return Operation((scalar, scalar, result), result, lambda a, b, c: product(a, b) + c)


def _product(
    qualifiers: _Qualifiers, half: str
) -> tuple[Scalar, Scalar, Callable[[Array, Array], Array]]:
    """Which types integers and their product have, and how to multiply."""
    scalar = qualifiers.scalar(*(each for each in _INTEGERS if half == "lo" or "64" not in each))
    if half == "lo":
        return scalar, scalar, np.multiply
    twice = SCALARS[f"{scalar.name[0]}{2 * scalar.bits}"]

    def wide(a: Array, b: Array) -> Array:
        return np.multiply(a, b, dtype=twice.dtype)

    if half == "wide":
        return scalar, twice, wide
    return scalar, scalar, lambda a, b: (wide(a, b) >> scalar.bits).astype(scalar.dtype)


def _fused(qualifiers: _Qualifiers) -> Operation:
    qualifiers.must("rn")
    scalar = qualifiers.scalar("f32", "f64", "f32x2")
    return Operation((scalar,) * 3, scalar, fused_multiply_add)


def _divide(qualifiers: _Qualifiers) -> Operation:
    _refuse_approximation(qualifiers)
    if qualifiers.take("rn"):
        scalar = qualifiers.scalar("f32", "f64")
        return Operation((scalar, scalar), scalar, np.divide)
    scalar = qualifiers.scalar(*_U)
    return Operation((scalar, scalar), scalar, np.floor_divide)


def _refuse_approximation(qualifiers: _Qualifiers) -> None:
    if qualifiers.take("approx", "full"):
        raise InexactInstructionError(f"{qualifiers.opcode}: an approximation has no defined bits")


def _rounded(compute: Callable[[Array], Array]) -> Callable[[_Qualifiers], Operation]:
    """Of one number, what also has an approximation."""

    def make(qualifiers: _Qualifiers) -> Operation:
        _refuse_approximation(qualifiers)
        qualifiers.must("rn")
        scalar = qualifiers.scalar("f32", "f64")
        return Operation((scalar,), scalar, compute)

    return make


def _approximation(qualifiers: _Qualifiers) -> Operation:
    _refuse_approximation(qualifiers)
    raise UnknownInstructionError(f"{qualifiers.opcode}: unknown qualifiers")


def _of_one(compute: Callable[[Array], Array], *allowed: str) -> Callable[[_Qualifiers], Operation]:
    def make(qualifiers: _Qualifiers) -> Operation:
        scalar = qualifiers.scalar(*allowed)
        return Operation((scalar,), scalar, compute)

    return make


def _extreme(integer: Callable[..., Array], number: Callable[..., Array]) -> Any:
    """The lesser or greater of two; of floating-point numbers, that which is not NaN."""

    def make(qualifiers: _Qualifiers) -> Operation:
        scalar = qualifiers.scalar(*_INTEGERS, "f32", "f64")
        if not scalar.is_float:
            return Operation((scalar, scalar), scalar, integer)

        def compute(a: Array, b: Array) -> Array:
            # Of zeros that differ in sign, -0 is the lesser.
            negative = np.signbit(a) if number is np.fmin else np.signbit(b)
            return np.where((a == 0) & (b == 0), np.where(negative, a, b), number(a, b))

        return Operation((scalar, scalar), scalar, compute)

    return make


# Bits


def _logic(compute: Callable[..., Array]) -> Callable[[_Qualifiers], Operation]:
    def make(qualifiers: _Qualifiers) -> Operation:
        scalar = qualifiers.scalar(*_B, "pred")
        return Operation((scalar,) * (1 if compute is np.invert else 2), scalar, compute)

    return make


def _shift_left(qualifiers: _Qualifiers) -> Operation:
    scalar = qualifiers.scalar(*_B)

    def compute(a: Array, by: Array) -> Array:
        limited = np.minimum(by, scalar.bits - 1).astype(scalar.dtype)
        return np.where(by < scalar.bits, a << limited, scalar.dtype.type(0))

    return Operation((scalar, SCALARS["u32"]), scalar, compute)


def _shift_right(qualifiers: _Qualifiers) -> Operation:
    scalar = qualifiers.scalar(*_B, *_U, *_S)
    signed = scalar.dtype.kind == "i"

    def compute(a: Array, by: Array) -> Array:
        shifted = a >> np.minimum(by, scalar.bits - 1).astype(scalar.dtype)
        return shifted if signed else np.where(by < scalar.bits, shifted, scalar.dtype.type(0))

    return Operation((scalar, SCALARS["u32"]), scalar, compute)


def _extract(qualifiers: _Qualifiers) -> Operation:
    """Bits ``first`` to ``first + count``, without a sign; what lies beyond the number is 0."""
    scalar = qualifiers.scalar("u32", "u64")

    def compute(a: Array, first: Array, count: Array) -> Array:
        first, count = first & np.uint32(255), count & np.uint32(255)
        one, last = scalar.dtype.type(1), scalar.bits - 1
        shifted = a >> np.minimum(first, last).astype(scalar.dtype)
        mask = (one << np.minimum(count, last).astype(scalar.dtype)) - one
        kept = np.where(count > last, shifted, shifted & mask)
        return np.where(first > last, scalar.dtype.type(0), kept)

    return Operation((scalar, SCALARS["u32"], SCALARS["u32"]), scalar, compute)


def _permute(qualifiers: _Qualifiers) -> Operation:
    """Four of the eight bytes of two words, each chosen by three bits of a selector.

    A fourth bit asks for the sign of the byte in its place.
    """
    scalar = qualifiers.scalar("b32")

    def compute(a: Array, b: Array, selector: Array) -> Array:
        both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
        result = np.zeros_like(both)
        for place in range(4):
            choice = (selector >> np.uint32(4 * place)).astype(np.uint64)
            byte = both >> (choice % np.uint64(8) * np.uint64(8)) & np.uint64(255)
            sign = np.where(byte > 127, np.uint64(255), np.uint64(0))
            byte = np.where(choice & np.uint64(8) != 0, sign, byte)
            result = result | byte << np.uint64(8 * place)
        return result.astype(np.uint32)

    return Operation((scalar, scalar, scalar), scalar, compute)


# Choice

_COMPARISONS: dict[str, Callable[..., Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


def _unordered(a: Array, b: Array) -> Array:
    either: Array = np.isnan(a) | np.isnan(b)
    return either


def _compare(qualifiers: _Qualifiers) -> Operation:
    """Of numbers that NaN are among, a comparison is false, or true if its name ends with u."""
    name = qualifiers.must(
        *_COMPARISONS, *(f"{each}u" for each in _COMPARISONS), "lo", "ls", "hi", "hs", "num", "nan"
    )
    scalar = qualifiers.scalar(*_B, *_INTEGERS, "f32", "f64")
    compute = _comparison(name, scalar)
    if compute is None:
        raise UnknownInstructionError(f"{qualifiers.opcode}: no comparison of {scalar.name}")
    return Operation((scalar, scalar), _PREDICATE, compute)


def _comparison(name: str, scalar: Scalar) -> Callable[..., Array] | None:
    if scalar.is_float:
        if name == "nan":
            return _unordered
        if name == "num":
            return lambda a, b: ~_unordered(a, b)
        if name == "ne":
            return lambda a, b: (a != b) & ~_unordered(a, b)
        if name in _COMPARISONS:
            return _COMPARISONS[name]
        base = _COMPARISONS.get(name[:-1])
        return None if base is None else lambda a, b: base(a, b) | _unordered(a, b)
    if name in ("lo", "ls", "hi", "hs"):
        name = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}[name]
        return _COMPARISONS[name] if scalar.name in _U else None
    if scalar.name in _B and name not in ("eq", "ne"):
        return None
    return _COMPARISONS.get(name)


def _select(qualifiers: _Qualifiers) -> Operation:
    scalar = qualifiers.scalar(*_B, *_INTEGERS, "f32", "f64")
    return Operation(
        (scalar, scalar, _PREDICATE), scalar, lambda a, b, which: np.where(which, a, b)
    )


# Conversions


def _move(qualifiers: _Qualifiers) -> Operation:
    scalar = qualifiers.scalar(*_B, *_INTEGERS, "f32", "f64", "pred")
    return Operation((scalar,), scalar, lambda a: a)


def _convert(qualifiers: _Qualifiers) -> Operation:
    rounding = qualifiers.take("rn", "rzi")
    result = qualifiers.scalar("u8", "s8", *_INTEGERS, "f16", "f32", "f64", "f16x2")
    if result.name == "f16x2":
        return _convert_pair(qualifiers, rounding)
    source = qualifiers.scalar("u8", "s8", *_INTEGERS, "f16", "f32", "f64")
    needed = _rounding_of(source, result)
    if rounding != needed:
        raise UnknownInstructionError(f"{qualifiers.opcode}: rounding must be {needed}")
    if needed == "rzi":
        return Operation((source,), result, lambda a: _saturated(a, result))
    return Operation((source,), result, lambda a: a.astype(result.dtype))


def _rounding_of(source: Scalar, result: Scalar) -> str | None:
    """What a conversion must say of its rounding."""
    if source.is_float and not result.is_float:
        return "rzi"
    exact = not result.is_float or (source.is_float and source.bits <= result.bits)
    return None if exact else "rn"


def _saturated(a: Array, result: Scalar) -> Array:
    """Towards zero; what is out of range is its limit, and NaN is 0."""
    limits = np.iinfo(result.dtype)
    whole = np.trunc(np.where(np.isnan(a), 0, a)).astype(np.float64)
    inside = np.clip(whole, float(limits.min), np.nextafter(float(limits.max) + 1, 0))
    return np.where(
        whole >= float(limits.max), result.dtype.type(limits.max), inside.astype(result.dtype)
    )


def _convert_pair(qualifiers: _Qualifiers, rounding: str | None) -> Operation:
    """Two numbers into the halves of one: the first into the upper."""
    source, half = qualifiers.scalar("f32"), np.dtype("f2")
    if rounding != "rn":
        raise UnknownInstructionError(f"{qualifiers.opcode}: rounding must be rn")

    def compute(upper: Array, lower: Array) -> Array:
        return np.stack([lower.astype(half), upper.astype(half)], axis=-1).reshape(-1)

    return Operation((source, source), SCALARS["f16x2"], compute)


_OPERATIONS: dict[str, Callable[[_Qualifiers], Operation]] = {
    "abs": _of_one(np.abs, *_S, "f32", "f64"),
    "add": _arithmetic(np.add),
    "and": _logic(np.bitwise_and),
    "bfe": _extract,
    "cvt": _convert,
    "div": _divide,
    "ex2": _approximation,
    "fma": _fused,
    "lg2": _approximation,
    "mad": _multiply_add,
    "max": _extreme(np.maximum, np.fmax),
    "min": _extreme(np.minimum, np.fmin),
    "mov": _move,
    "mul": _multiply,
    "neg": _of_one(np.negative, *_S, "f32", "f64"),
    "not": _logic(np.invert),
    "or": _logic(np.bitwise_or),
    "prmt": _permute,
    "rcp": _rounded(np.reciprocal),
    "rsqrt": _approximation,
    "selp": _select,
    "setp": _compare,
    "shl": _shift_left,
    "shr": _shift_right,
    "sqrt": _rounded(np.sqrt),
    "sub": _arithmetic(np.subtract),
    "tanh": _approximation,
    "xor": _logic(np.bitwise_xor),
}
