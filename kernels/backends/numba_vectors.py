"""Arithmetic on vectors in LLVM's language, for functions that Numba compiles."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hogstream.kernels import rounding
from hogstream.kernels.backends.numba_atomics import emit_prefetch
from hogstream.kernels.hyperparameters import Factors

#: Bytes of a line of the CPU's caches.
CACHE_LINE = 64
# How far ahead memory is asked for: 8 to 24 lines do as well, fewer or more do not.
_LINES_AHEAD = 16
# Into the second level of caches: into the first, the same costs a tenth on a Zen 4.
_LOCALITY = 1
_I32, _I64 = ir.IntType(32), ir.IntType(64)


class Format(NamedTuple):
    """How a parameter's elements are stored, and the type that they are computed in.

    Attributes:
        stored: LLVM's type of an element in memory.
        stored_bytes: Its size.
        exponent: Its bits, which are all set if an element is infinite or NaN, and only then.
        compute: LLVM's type of an element in a register, and of one of ``ms`` in memory.
        compute_bytes: Its size.
    """

    stored: ir.Type
    stored_bytes: int
    exponent: int
    compute: ir.Type
    compute_bytes: int


#: Formats by the name of the parameter's dtype.
FORMATS = {
    "float16": Format(ir.HalfType(), 2, 0x7C00, ir.FloatType(), 4),
    # LLVM's own bfloat16 rounds by a library.
    "bfloat16": Format(ir.IntType(16), 2, 0x7F80, ir.FloatType(), 4),
    "float32": Format(ir.FloatType(), 4, 0x7F80_0000, ir.FloatType(), 4),
    "float64": Format(ir.DoubleType(), 8, 0x7FF0_0000_0000_0000, ir.DoubleType(), 8),
}


class Vector:
    """Elements in a register, with Python's operators; each rounds once, and none is fused.

    Attributes:
        value: Of LLVM's type of vectors.
    """

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        """Made by ``Emitter``."""
        self.builder, self.value = builder, value

    def __add__(self, other: Vector) -> Vector:
        return Vector(self.builder, self.builder.fadd(self.value, other.value))

    def __sub__(self, other: Vector) -> Vector:
        return Vector(self.builder, self.builder.fsub(self.value, other.value))

    def __mul__(self, other: Vector) -> Vector:
        return Vector(self.builder, self.builder.fmul(self.value, other.value))

    def __truediv__(self, other: Vector) -> Vector:
        return Vector(self.builder, self.builder.fdiv(self.value, other.value))


class Integers:
    """Unsigned integers of 32 bits in a register, with Python's operators.

    Attributes:
        value: Of LLVM's type of vectors.
    """

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        """Made by ``Emitter``."""
        self.builder, self.value = builder, value

    def __add__(self, other: Integers | int) -> Integers:
        return self._by(self.builder.add, other)

    def __sub__(self, other: Integers | int) -> Integers:
        return self._by(self.builder.sub, other)

    def __rsub__(self, other: int) -> Integers:
        return self._other(other) - self

    def __mul__(self, other: Integers | int) -> Integers:
        return self._by(self.builder.mul, other)

    def __and__(self, other: Integers | int) -> Integers:
        return self._by(self.builder.and_, other)

    def __or__(self, other: Integers | int) -> Integers:
        return self._by(self.builder.or_, other)

    def __xor__(self, other: Integers | int) -> Integers:
        return self._by(self.builder.xor, other)

    def __rshift__(self, other: Integers | int) -> Integers:
        return self._by(self.builder.lshr, other)

    def __lt__(self, other: Integers | int) -> Integers:
        return self._by(partial(self.builder.icmp_unsigned, "<"), other)

    def __gt__(self, other: Integers | int) -> Integers:
        return self._by(partial(self.builder.icmp_unsigned, ">"), other)

    def __eq__(self, other: object) -> Any:
        return self._by(partial(self.builder.icmp_unsigned, "=="), other)

    def where(self, x: Integers | int, y: Integers | int) -> Integers:
        """Elements of one where these, as a condition, hold, and of the other elsewhere."""
        like = next(each for each in (x, y) if isinstance(each, Integers))
        x, y = (like._other(each) for each in (x, y))
        return Integers(self.builder, self.builder.select(self.value, x.value, y.value))

    def _by(self, operation: Any, other: Any) -> Integers:
        return Integers(self.builder, operation(self.value, self._other(other).value))

    def _other(self, other: Any) -> Integers:
        if isinstance(other, Integers):
            return other
        kind = self.value.type
        return Integers(self.builder, ir.Constant(kind, [other] * kind.count))

    __hash__ = None  # type: ignore[assignment]


_random = rounding.over(rounding.random, mixed=rounding.mixed)
_bfloat16, _float16 = (
    rounding.over(each, where=Integers.where) for each in (rounding.bfloat16, rounding.float16)
)


def sqrt(vector: Vector) -> Vector:
    """The correctly rounded root of each element."""
    kind = vector.value.type
    bits = 64 if kind.element == ir.DoubleType() else 32
    root = vector.builder.module.declare_intrinsic(
        f"llvm.sqrt.v{kind.count}f{bits}", (), ir.FunctionType(kind, [kind])
    )
    return Vector(vector.builder, vector.builder.call(root, [vector.value]))


def finite_or_0(vector: Vector) -> Vector:
    """0 in place of elements that are not finite."""
    b, kind = vector.builder, vector.value.type
    zero = ir.Constant(kind, [0.0] * kind.count)
    none = b.fsub(vector.value, vector.value)  # NaN of those
    return Vector(b, b.select(b.fcmp_ordered("==", none, zero), vector.value, zero))


def clamp(vector: Vector) -> Vector:
    """0 in place of elements that are less than 0; NaN stays."""
    b, kind = vector.builder, vector.value.type
    zero = ir.Constant(kind, [0.0] * kind.count)
    below = b.fcmp_ordered("<", vector.value, zero)
    return Vector(b, b.select(below, zero, vector.value))


class Emitter:
    """Writes code that works on ``width`` elements at once; addresses are int64.

    Attributes:
        form: The format of the elements.
        width: How many.
    """

    def __init__(self, builder: ir.IRBuilder, form: Format, width: int) -> None:
        """Writes where the builder is, of elements in a format."""
        self._builder, self.form, self.width = builder, form, width
        self._compute = ir.VectorType(form.compute, width)

    def place(self, address: ir.Value, index: ir.Value, element_bytes: int) -> ir.Value:
        """The address of an element, by its index."""
        return self._builder.add(address, self._builder.mul(index, _I64(element_bytes)))

    def load_stored(self, address: ir.Value) -> Vector:
        """Stored elements in the compute type: exact, but for gradients of a wider one."""
        value = self._builder.load(self._at(address, self.form.stored), align=1)
        return Vector(self._builder, self._widened(value))

    def _widened(self, value: ir.Value) -> ir.Value:
        b, stored = self._builder, self.form.stored
        if stored == ir.IntType(16):
            bits = b.shl(b.zext(value, ir.VectorType(_I32, self.width)), self._i32(16))
            stored = ir.FloatType()
            value = b.bitcast(bits, ir.VectorType(stored, self.width))
        if stored == self.form.compute:
            return value
        if stored == ir.DoubleType():  # as a gradient of narrower parameters may be
            return b.fptrunc(value, self._compute)
        return b.fpext(value, self._compute)

    def load_computed(self, address: ir.Value) -> Vector:
        """Elements that are of the compute type in memory too."""
        pointer = self._at(address, self.form.compute)
        return Vector(self._builder, self._builder.load(pointer, align=1))

    def store_rounded(self, vector: Vector, address: ir.Value) -> None:
        """Stores elements as a parameter's are, rounded to nearest even."""
        pointer = self._at(address, self.form.stored)
        self._builder.store(self._narrowed(vector.value), pointer, align=1)

    def store_by_chance(
        self, vector: Vector, address: ir.Value, place: ir.Value, key: ir.Value
    ) -> None:
        """Stores elements as a parameter's are, of 16 bits, rounded stochastically.

        Args:
            vector: Of float32.
            address: Where to.
            place: Of the first of them, 64 bits.
            key: Of the step, 64 bits.
        """
        b, wide = self._builder, ir.VectorType(_I64, self.width)
        first, keys = (self._spread(each, wide) for each in (place, key))
        places = b.add(first, ir.Constant(wide, list(range(self.width))))
        random = _random(*self._halves(places), *self._halves(keys))
        to_bits = _bfloat16 if self.form.stored == ir.IntType(16) else _float16
        bits = to_bits(Integers(b, b.bitcast(vector.value, random.value.type)), random)
        narrow = b.trunc(bits.value, ir.VectorType(ir.IntType(16), self.width))
        b.store(narrow, self._at(address, ir.IntType(16)), align=1)

    def rounded(self, vector: Vector) -> Vector:
        """What is left of elements when they are stored, rounded to nearest even."""
        b, narrow = self._builder, self._narrowed(vector.value)
        return Vector(b, self._widened(narrow))

    def store_computed(self, vector: Vector, address: ir.Value) -> None:
        """Stores elements in the compute type."""
        self._builder.store(vector.value, self._at(address, self.form.compute), align=1)

    def spread(self, scalar: ir.Value) -> Vector:
        """A scalar of the compute type, in every element."""
        return Vector(self._builder, self._spread(scalar, self._compute))

    def read_ahead(self, address: ir.Value, element_bytes: int) -> None:
        """Asks for memory that will be wanted after a few more turns of a loop."""
        ahead = _I64(_LINES_AHEAD * self.width * element_bytes)
        emit_prefetch(self._builder, self._builder.add(address, ahead), _LOCALITY)

    def finite(self, address: ir.Value) -> ir.Value:
        """Whether no stored element is infinite or NaN."""
        b, width = self._builder, self.width
        kind = ir.VectorType(ir.IntType(8 * self.form.stored_bytes), width)
        exponent = ir.Constant(kind, [self.form.exponent] * width)
        values = b.load(b.inttoptr(address, kind.as_pointer()), align=1)
        beyond = b.icmp_unsigned("==", b.and_(values, exponent), exponent)
        none = ir.IntType(width)(0)
        return b.icmp_unsigned("==", b.bitcast(beyond, none.type), none)

    def _spread(self, scalar: ir.Value, kind: ir.Type) -> ir.Value:
        empty = ir.Constant(kind, ir.Undefined)
        first = self._builder.insert_element(empty, scalar, _I32(0))
        return self._builder.shuffle_vector(first, empty, self._i32(0))

    def _halves(self, numbers: ir.Value) -> tuple[Integers, Integers]:
        """The low and the high 32 bits of numbers of 64."""
        b, kind = self._builder, ir.VectorType(_I32, self.width)
        shift = ir.Constant(numbers.type, [32] * self.width)
        high = b.trunc(b.lshr(numbers, shift), kind)
        return Integers(b, b.trunc(numbers, kind)), Integers(b, high)

    def _at(self, address: ir.Value, element: ir.Type) -> ir.Value:
        return self._builder.inttoptr(address, ir.VectorType(element, self.width).as_pointer())

    def _i32(self, value: int) -> ir.Constant:
        return ir.Constant(ir.VectorType(_I32, self.width), [value] * self.width)

    def _narrowed(self, value: ir.Value) -> ir.Value:
        b, stored = self._builder, self.form.stored
        if stored == self.form.compute:
            return value
        narrow = ir.VectorType(stored, self.width)
        if stored != ir.IntType(16):
            return b.fptrunc(value, narrow)
        bits = b.bitcast(value, ir.VectorType(_I32, self.width))
        odd = b.and_(b.lshr(bits, self._i32(16)), self._i32(1))
        rounded = b.lshr(b.add(bits, b.add(odd, self._i32(0x7FFF))), self._i32(16))
        is_nan = b.fcmp_unordered("uno", value, value)
        return b.trunc(b.select(is_nan, self._i32(0x7FC0), rounded), narrow)


def _factors_at_intrinsic(
    _context: Any,
    address: types.Type,  # of ``Factors``: int64
    dtype: Any,  # name of the parameter's: literal
) -> Any:
    """The factors of an update, from float64 in memory, each rounded to the compute type."""
    wide = dtype.literal_value == "float64"
    compute = types.float64 if wide else types.float32
    result = types.UniTuple(compute, len(Factors._fields))

    def emit(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        first = builder.inttoptr(args[0], ir.DoubleType().as_pointer())
        values = [
            builder.load(builder.gep(first, [_I64(index)]), align=8) for index in range(len(result))
        ]
        if not wide:
            values = [builder.fptrunc(value, ir.FloatType()) for value in values]
        return context.make_tuple(builder, result, values)

    return result(address, dtype), emit


factors_at: Any = intrinsic(prefer_literal=True)(_factors_at_intrinsic)


def _computed_at_intrinsic(
    _context: Any,
    address: types.Type,  # int64
    dtype: Any,  # name of the parameter's: literal
) -> Any:
    """An element of the compute type in memory."""
    wide = dtype.literal_value == "float64"
    compute = FORMATS[dtype.literal_value].compute

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.load(builder.inttoptr(args[0], compute.as_pointer()), align=1)

    return (types.float64 if wide else types.float32)(address, dtype), emit


computed_at: Any = intrinsic(prefer_literal=True)(_computed_at_intrinsic)


def _set_computed_intrinsic(
    _context: Any,
    address: types.Type,  # int64
    value: types.Type,  # of the compute type
) -> Any:
    """Writes an element of the compute type to memory."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        builder.store(args[1], builder.inttoptr(args[0], args[1].type.as_pointer()), align=1)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.void(address, value), emit


set_computed: Any = intrinsic(_set_computed_intrinsic)


def _finite_intrinsic(
    _context: Any,
    grad: types.Type,  # address: int64
    dtype: Any,  # name of its dtype: literal
    width: Any,  # how many elements to look at: literal
) -> Any:
    """Whether a few elements are finite."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        emitter = Emitter(builder, FORMATS[dtype.literal_value], width.literal_value)
        return emitter.finite(args[0])

    return types.boolean(grad, dtype, width), emit


finite: Any = intrinsic(prefer_literal=True)(_finite_intrinsic)
