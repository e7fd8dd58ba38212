"""The update in Numba: one pass over memory on a CPU thread, without the GIL.

The kernel works on one cache line of ``ms`` at a time and asks for the lines that follow: left to
itself, LLVM makes loops in which roots and divisions keep reads from being under way early enough
(measured in ``docs/speed-notes.md``).

This module needs Numba; ``backends`` imports it on first use.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hogstream.kernels.backends.cpu_threads import Pieces
from hogstream.kernels.backends.numba_atomics import atomic_add, atomic_load, atomic_store
from hogstream.kernels.hyperparameters import Hyperparameters, Scalars
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED

Int64s = npt.NDArray[np.int64]

_CACHE_LINE = 64
# How far ahead memory is asked for: 8 to 24 lines do as well, fewer or more do not.
_LINES_AHEAD = 16
# Cache lines of a gradient that are looked at together: 2 and 8 do nearly as well.
_FINITE_LINES = 4
# Elements that race counters count together: 2^10 to 2^15 cost as little.
_RACE_BLOCK = 1 << 13
# Of some 10 ns each.
_SPINS = 20_000
_I32, _I64 = ir.IntType(32), ir.IntType(64)


class _Format(NamedTuple):
    """How a parameter's elements are stored, and the type that they are computed in."""

    stored: ir.Type
    stored_bytes: int
    exponent: int  # its bits, which are all set if an element is infinite or NaN, and only then
    compute: ir.Type
    compute_bytes: int


_FORMATS = {
    "float16": _Format(ir.HalfType(), 2, 0x7C00, ir.FloatType(), 4),
    # LLVM's own bfloat16 rounds by a library.
    "bfloat16": _Format(ir.IntType(16), 2, 0x7F80, ir.FloatType(), 4),
    "float32": _Format(ir.FloatType(), 4, 0x7F80_0000, ir.FloatType(), 4),
    "float64": _Format(ir.DoubleType(), 8, 0x7FF0_0000_0000_0000, ir.DoubleType(), 8),
}
_NAMES = {getattr(torch, name): name for name in _FORMATS}


def update_(
    table: LaunchTable, hyperparameters: Hyperparameters, pieces: Pieces | None = None
) -> bool:
    """Updates the parameters and ``ms`` of a table in place, in one pass over memory.

    Args:
        table: Of tensors on the CPU.
        hyperparameters: The numbers and switches of the update.
        pieces: Shared with other threads that do the same; None to do all on this one.

    Returns:
        Whether all is done: if not, other threads are still at it.
    """
    pieces = pieces or Pieces(table.elements, table.elements)
    dtype = _NAMES[table.dtype]
    kernel = _kernel(dtype, hyperparameters.eps_inside_sqrt, hyperparameters.coupled)
    wide = dtype == "float64"
    factors = hyperparameters.in_float64 if wide else hyperparameters.in_float32
    return kernel(table.columns, pieces.counters, pieces.size, pieces.elements, factors)


def race_block(dtype: torch.dtype, device: torch.device) -> int:
    """How many elements race counters count together: as many for all dtypes."""
    return _RACE_BLOCK


@cache
def _kernel(dtype: str, eps_inside_sqrt: bool, coupled: bool) -> Callable[..., bool]:
    stored_bytes, compute_bytes = _FORMATS[dtype].stored_bytes, _FORMATS[dtype].compute_bytes

    @numba.njit(nogil=True, error_model="numpy", cache=True)
    def kernel(columns: Int64s, counters: Int64s, size: int, elements: int, factors: Any) -> bool:
        taken, done = counters.ctypes.data, counters.ctypes.data + _CACHE_LINE
        start = atomic_add(taken, size)
        while start < elements:
            stop = min(start + size, elements)
            first = 0
            for update in range(columns.shape[1]):
                begin, end = max(start - first, 0), min(stop - first, columns[3, update])
                first += columns[3, update]
                if begin >= end:
                    continue
                param = columns[0, update] + begin * stored_bytes
                grad = columns[1, update] + begin * stored_bytes
                ms = columns[2, update] + begin * compute_bytes
                _update(param, grad, ms, end - begin, factors, dtype, eps_inside_sqrt, coupled)
            atomic_add(done, stop - start)
            start = atomic_add(taken, size)
        return await_done(done, elements)

    return kernel


@cache
def update_function(dtype: str, eps_inside_sqrt: bool, coupled: bool) -> Any:
    """One update as other compiled code calls it, with race counters or without.

    A function in C, called by its address: one that Numba compiles into its callers would not be
    kept in its cache together with them.

    Args:
        dtype: Of the parameter: ``float16``, ``bfloat16``, ``float32`` or ``float64``.
        eps_inside_sqrt: As in ``Hyperparameters``.
        coupled: As in ``Hyperparameters``.

    Returns:
        ``update(param, grad, ms, elements, factors, counts, blocks, block_elements)``, a
        ``CFunc`` of Numba. All arguments are int64, and it returns 0. The first three are
        addresses, ``factors`` that of ``Hyperparameters.scalars`` as seven float64, each rounded
        here. ``counts`` is the address of ``RaceCounters.counts``, for ``blocks`` blocks of
        ``block_elements`` elements, or 0 to count no races; the other two are of no account then.
    """
    stored_bytes, compute_bytes = _FORMATS[dtype].stored_bytes, _FORMATS[dtype].compute_bytes

    @numba.cfunc(types.int64(*[types.int64] * 8), cache=True)
    def update(
        param: int,
        grad: int,
        ms: int,
        elements: int,
        factors: int,
        counts: int,
        blocks: int,
        block_elements: int,
    ) -> int:
        rounded = _factors_at(factors, dtype)
        if counts == 0:
            blocks, block_elements = 1, elements
        for block in range(blocks):
            first = block * block_elements
            version = witness = 0
            if counts != 0:
                version, witness = begin_block(counts, blocks, block)
            _update(
                param + first * stored_bytes,
                grad + first * stored_bytes,
                ms + first * compute_bytes,
                min(block_elements, elements - first),
                rounded,
                dtype,
                eps_inside_sqrt,
                coupled,
            )
            if counts != 0:
                end_block(counts, blocks, block, version, witness)
        return 0

    return update


@cache
def finite_function(dtype: str) -> Any:
    """A look at a gradient as other compiled code takes it.

    Args:
        dtype: Of the gradient: ``float16``, ``bfloat16``, ``float32`` or ``float64``.

    Returns:
        ``finite(grad, elements)``, a ``CFunc`` of Numba. It takes an address and a number, both
        int64, and returns 1 if no element is infinite or NaN, else 0, soon after the first that is.
    """
    stored_bytes = _FORMATS[dtype].stored_bytes
    block = _FINITE_LINES * _CACHE_LINE // stored_bytes

    @numba.cfunc(types.int64(types.int64, types.int64), cache=True)
    def finite(grad: int, elements: int) -> int:
        for _ in range(elements // block):
            if not _finite(grad, dtype, block):
                return 0
            grad += block * stored_bytes
        for _ in range(elements % block):
            if not _finite(grad, dtype, 1):
                return 0
            grad += stored_bytes
        return 1

    return finite


@numba.njit(nogil=True, cache=True)
def begin_block(counts: int, blocks: int, block: int) -> tuple[int, int]:
    """Notes how often a block has been updated; to be called before any of it is read.

    Args:
        counts: The address of ``RaceCounters.counts``.
        blocks: How many blocks there are.
        block: Which one.

    Returns:
        The block's version and its witness, for ``end_block``.
    """
    version = atomic_load(counts + 8 * (LANDED * blocks + block))
    witness = atomic_load(counts + 8 * (SURVIVED * blocks + block))
    return version, witness


@numba.njit(nogil=True, cache=True)
def end_block(counts: int, blocks: int, block: int, version: int, witness: int) -> None:
    """Counts an update of a block; to be called after all of it has been written.

    Args:
        counts: The address of ``RaceCounters.counts``.
        blocks: How many blocks there are.
        block: Which one.
        version: As ``begin_block`` gave it.
        witness: The same.
    """
    atomic_store(counts + 8 * (SURVIVED * blocks + block), witness + 1)
    overlapping = atomic_add(counts + 8 * (LANDED * blocks + block), 1) - version
    if overlapping != 0:
        atomic_add(counts + 8 * (OVERWRITTEN * blocks + block), overlapping)


@numba.njit(nogil=True, cache=True)
def await_done(done: int, elements: int) -> bool:
    """Waits for the last pieces of other threads, for as long as one may take.

    Sleeping until one of them wakes the caller would take longer.

    Args:
        done: The address of the counter of elements that are done.
        elements: What it will come to.
    """
    spins = _SPINS
    while spins > 0 and atomic_add(done, 0) < elements:
        spins -= 1
    return spins > 0


def _update_intrinsic(
    _context: Any,
    param: types.Type,
    grad: types.Type,
    ms: types.Type,
    elements: types.Type,
    factors: types.Type,
    dtype: Any,
    eps_inside_sqrt: Any,
    coupled: Any,
) -> Any:
    """Updates so many elements at three addresses: a cache line of ``ms`` at a time, then the rest.

    Not a compiled function in the closure of its callers: those would never be read back from
    Numba's cache.
    """

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        *addresses, elements, factors = args[:5]
        switches = eps_inside_sqrt.literal_value, coupled.literal_value
        form = _FORMATS[dtype.literal_value]
        sizes = form.stored_bytes, form.stored_bytes, form.compute_bytes
        line = _CACHE_LINE // form.compute_bytes
        whole = builder.and_(elements, _I64(-line))
        for width, first, end in ((line, _I64(0), whole), (1, whole, elements)):
            emitter = _Emitter(builder, form, width)
            with cgutils.for_range_slice(builder, first, end, _I64(width)) as (index, _):
                param, grad, ms = (
                    builder.add(address, builder.mul(index, _I64(size)))
                    for address, size in zip(addresses, sizes, strict=True)
                )
                emitter.update(param, grad, ms, factors, *switches)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    arguments = (param, grad, ms, elements, factors, dtype, eps_inside_sqrt, coupled)
    return types.void(*arguments), emit


_update: Any = intrinsic(prefer_literal=True)(_update_intrinsic)


def _factors_at_intrinsic(_context: Any, address: types.Type, dtype: Any) -> Any:
    """The factors of an update, from seven float64 in memory, each rounded to the compute type."""
    wide = dtype.literal_value == "float64"
    compute = types.float64 if wide else types.float32
    result = types.UniTuple(compute, len(Scalars._fields))

    def emit(context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        first = builder.inttoptr(args[0], ir.DoubleType().as_pointer())
        values = [
            builder.load(builder.gep(first, [_I64(index)]), align=8) for index in range(len(result))
        ]
        if not wide:
            values = [builder.fptrunc(value, ir.FloatType()) for value in values]
        return context.make_tuple(builder, result, values)

    return result(address, dtype), emit


_factors_at: Any = intrinsic(prefer_literal=True)(_factors_at_intrinsic)


def _finite_intrinsic(_context: Any, grad: types.Type, dtype: Any, width: Any) -> Any:
    """Whether ``width`` elements at an address are finite."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        emitter = _Emitter(builder, _FORMATS[dtype.literal_value], width.literal_value)
        return emitter.finite(args[0])

    return types.boolean(grad, dtype, width), emit


_finite: Any = intrinsic(prefer_literal=True)(_finite_intrinsic)


class _Emitter:
    """Writes LLVM code that works on ``width`` elements at once."""

    def __init__(self, builder: ir.IRBuilder, form: _Format, width: int) -> None:
        self._builder, self._form, self._width = builder, form, width
        self._compute = ir.VectorType(form.compute, width)

    def update(
        self,
        param: ir.Value,
        grad: ir.Value,
        ms: ir.Value,
        factors: ir.Value,
        eps_inside_sqrt: bool,
        coupled: bool,
    ) -> None:
        """The formula, with addresses as int64 and factors as a struct of the compute type."""
        if self._width > 1:
            self._read_ahead(param, self._form.stored_bytes)
            self._read_ahead(grad, self._form.stored_bytes)
            self._read_ahead(ms, self._form.compute_bytes)
        lr, alpha, beta, eps, weight_decay, shrink, sign = (
            self._spread(self._builder.extract_value(factors, index)) for index in range(7)
        )
        p, g = self._widened(param), self._widened(grad) * sign
        m = _Vector(self._builder, self._builder.load(self._at(ms, self._form.compute), align=1))
        if coupled:
            g = g + weight_decay * p
        p = p * shrink
        m = alpha * m + (beta * g) * g
        d = (m + eps).sqrt() if eps_inside_sqrt else m.sqrt() + eps
        p = p - (lr * g) / d
        self._builder.store(m.value, self._at(ms, self._form.compute), align=1)
        self._builder.store(self._narrowed(p), self._at(param, self._form.stored), align=1)

    def finite(self, address: ir.Value) -> ir.Value:
        """Whether no element at an address is infinite or NaN."""
        b, width = self._builder, self._width
        kind = ir.VectorType(ir.IntType(8 * self._form.stored_bytes), width)
        exponent = ir.Constant(kind, [self._form.exponent] * width)
        values = b.load(b.inttoptr(address, kind.as_pointer()), align=1)
        beyond = b.icmp_unsigned("==", b.and_(values, exponent), exponent)
        none = ir.IntType(width)(0)
        return b.icmp_unsigned("==", b.bitcast(beyond, none.type), none)

    def _at(self, address: ir.Value, element: ir.Type) -> ir.Value:
        return self._builder.inttoptr(address, ir.VectorType(element, self._width).as_pointer())

    def _read_ahead(self, address: ir.Value, element_bytes: int) -> None:
        pointer = ir.IntType(8).as_pointer()
        ahead = _I64(_LINES_AHEAD * self._width * element_bytes)
        prefetch = self._builder.module.declare_intrinsic(
            "llvm.prefetch", (pointer,), ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
        )
        where = self._builder.inttoptr(self._builder.add(address, ahead), pointer)
        read, into_every_cache, data = _I32(0), _I32(3), _I32(1)
        self._builder.call(prefetch, [where, read, into_every_cache, data])

    def _spread(self, scalar: ir.Value) -> _Vector:
        empty = ir.Constant(self._compute, ir.Undefined)
        first = self._builder.insert_element(empty, scalar, _I32(0))
        return _Vector(self._builder, self._builder.shuffle_vector(first, empty, self._i32(0)))

    def _i32(self, value: int) -> ir.Constant:
        return ir.Constant(ir.VectorType(_I32, self._width), [value] * self._width)

    def _widened(self, address: ir.Value) -> _Vector:
        """Stored elements in the compute type; exact."""
        b = self._builder
        value = b.load(self._at(address, self._form.stored), align=1)
        if self._form.stored == ir.IntType(16):
            bits = b.shl(b.zext(value, ir.VectorType(_I32, self._width)), self._i32(16))
            value = b.bitcast(bits, self._compute)
        elif self._form.stored != self._form.compute:
            value = b.fpext(value, self._compute)
        return _Vector(b, value)

    def _narrowed(self, vector: _Vector) -> ir.Value:
        """Computed values as they are stored, rounded to nearest even."""
        b, value, stored = self._builder, vector.value, self._form.stored
        if stored == self._form.compute:
            return value
        narrow = ir.VectorType(stored, self._width)
        if stored != ir.IntType(16):
            return b.fptrunc(value, narrow)
        bits = b.bitcast(value, ir.VectorType(_I32, self._width))
        odd = b.and_(b.lshr(bits, self._i32(16)), self._i32(1))
        rounded = b.lshr(b.add(bits, b.add(odd, self._i32(0x7FFF))), self._i32(16))
        is_nan = b.fcmp_unordered("uno", value, value)
        return b.trunc(b.select(is_nan, self._i32(0x7FC0), rounded), narrow)


class _Vector:
    """An LLVM value with Python's operators; each rounds once, and none is fused."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value

    def __add__(self, other: _Vector) -> _Vector:
        return _Vector(self.builder, self.builder.fadd(self.value, other.value))

    def __sub__(self, other: _Vector) -> _Vector:
        return _Vector(self.builder, self.builder.fsub(self.value, other.value))

    def __mul__(self, other: _Vector) -> _Vector:
        return _Vector(self.builder, self.builder.fmul(self.value, other.value))

    def __truediv__(self, other: _Vector) -> _Vector:
        return _Vector(self.builder, self.builder.fdiv(self.value, other.value))

    def sqrt(self) -> _Vector:
        kind = self.value.type
        bits = 64 if kind.element == ir.DoubleType() else 32
        root = self.builder.module.declare_intrinsic(
            f"llvm.sqrt.v{kind.count}f{bits}", (), ir.FunctionType(kind, [kind])
        )
        return _Vector(self.builder, self.builder.call(root, [self.value]))
