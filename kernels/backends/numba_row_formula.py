"""What an update does to one row, in the language of LLVM.

This module needs Numba.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hogstream.kernels.backends.numba_formula import (
    emit_update,
    formula,
    load_param,
    written_by,
)
from hogstream.kernels.backends.numba_vectors import (
    CACHE_LINE,
    FORMATS,
    Emitter,
    Format,
    Vector,
)
from hogstream.kernels.formula import LANES
from hogstream.kernels.hyperparameters import Switches
from hogstream.kernels.launch_table import GRAD, KAHAN_COMP, MS, PARAM
from hogstream.kernels.row_table import KEY, ORDER, WIDTH

# Vectors of so many elements for what is less than a cache line.
_NARROW = 4
_I32, _I64 = ir.IntType(32), ir.IntType(64)


class _Row(NamedTuple):
    """One row's part of an update, in LLVM's language: int64 each."""

    builder: ir.IRBuilder
    fields: ir.Value
    index: ir.Value  # of the row in the table
    position: ir.Value  # of its first gradient
    count: ir.Value  # of its gradients

    @classmethod
    def of(cls, builder: ir.IRBuilder, fields: ir.Value, place: ir.Value) -> _Row:
        return cls(builder, fields, *cgutils.unpack_tuple(builder, place))

    def field(self, index: int) -> ir.Value:
        return self.load(self.builder.add(self.fields, _I64(8 * index)))

    def load(self, address: ir.Value) -> ir.Value:
        return self.builder.load(self.builder.inttoptr(address, _I64.as_pointer()), align=8)

    def columns(self, form: Format) -> Iterator[tuple[int, ir.Value, ir.Value]]:
        """Loops over its elements, as many at once as there may be; in each, code is written.

        Yields:
            How many at once, how many elements the loop has come to, and the first one's place.
        """
        b, start, width = self.builder, _I64(0), self.field(WIDTH)
        for step in (CACHE_LINE // form.compute_bytes, _NARROW, 1):
            end = b.and_(width, _I64(-step))
            with cgutils.for_range_slice(b, start, end, _I64(step)) as (column, _):
                yield step, column, b.add(b.mul(self.index, width), column)
            start = end

    def addresses(
        self, emitter: Emitter, place: ir.Value, rows: Iterable[int]
    ) -> dict[int, ir.Value]:
        """Where an element of the table is, and of its state, by the rows of a launch table."""
        stored, computed = emitter.form.stored_bytes, emitter.form.compute_bytes
        sizes = dict.fromkeys(rows, computed) | {PARAM: stored, KAHAN_COMP: stored}
        return {row: emitter.place(self.field(row), place, sizes[row]) for row in rows}

    def gradient(self, of_grad: Emitter, column: ir.Value) -> Vector:
        """Some elements of the sum of its gradients, added in their order."""
        b, width = self.builder, self.field(WIDTH)
        order = b.add(self.field(ORDER), b.mul(self.position, _I64(8)))

        def loaded(number: ir.Value) -> Vector:
            at = self.load(b.add(order, b.mul(number, _I64(8))))
            index = b.add(b.mul(at, width), column)
            address = of_grad.place(self.field(GRAD), index, of_grad.form.stored_bytes)
            return of_grad.load_stored(address)

        first = loaded(_I64(0))
        total = cgutils.alloca_once_value(b, first.value)
        with cgutils.for_range_slice(b, _I64(1), self.count, _I64(1)) as (number, _):
            b.store((Vector(b, b.load(total)) + loaded(number)).value, total)
        return Vector(b, b.load(total))


def _emitters(
    builder: ir.IRBuilder, dtype: Any, grad_dtype: Any, width: int
) -> tuple[Emitter, Emitter]:
    """Those of a parameter's elements, and of its gradients'."""
    form = FORMATS[dtype.literal_value]
    of_grad = FORMATS[grad_dtype.literal_value]._replace(
        compute=form.compute, compute_bytes=form.compute_bytes
    )
    return Emitter(builder, form, width), Emitter(builder, of_grad, width)


def _update_row_intrinsic(
    _context: Any,
    fields: types.Type,  # address: int64
    place: types.Type,  # the row, the position of its first gradient, how many it has: int64 each
    factors: types.Type,  # as ``Factors``: a tuple of eight of the compute type
    ms: types.Type,  # the row's mean square, if ROWWISE: of the compute type
    left: types.Type,  # what is left of its state, if LAZY: the same
    dtype: Any,  # name of the parameter's: literal
    grad_dtype: Any,  # name of the gradients': literal
    switches: Any,  # ``Switches.bits``: literal
    rowwise: Any,  # literal
    lazy: Any,  # literal
) -> Any:
    """Updates one row."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        row, of = _Row.of(builder, *args[:2]), Switches.of_bits(switches.literal_value)
        written = [each for each in written_by(of) if each != MS or not rowwise.literal_value]
        for width, column, place in row.columns(FORMATS[dtype.literal_value]):
            emitter, of_grad = _emitters(builder, dtype, grad_dtype, width)
            emit_update(
                emitter,
                row.addresses(emitter, place, written),
                row.gradient(of_grad, column),
                [emitter.spread(each) for each in cgutils.unpack_tuple(builder, args[2])],
                (place, row.field(KEY)),
                of,
                ms=emitter.spread(args[3]) if rowwise.literal_value else None,
                left=emitter.spread(args[4]) if lazy.literal_value else None,
            )
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    arguments = (fields, place, factors, ms, left, dtype, grad_dtype, switches, rowwise, lazy)
    return types.void(*arguments), emit


def _squares_intrinsic(
    _context: Any,
    fields: types.Type,  # this and what follows as for ``update_row``
    place: types.Type,
    factors: types.Type,
    dtype: Any,
    grad_dtype: Any,
    switches: Any,
) -> Any:
    """The sum of the squares of a row's gradient, lane by lane, then half of the lanes to half."""
    form = FORMATS[dtype.literal_value]
    result = types.float64 if dtype.literal_value == "float64" else types.float32

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        row, of = _Row.of(builder, *args[:2]), Switches.of_bits(switches.literal_value)
        lanes = ir.VectorType(form.compute, LANES)
        sums = cgutils.alloca_once(builder, lanes)
        builder.store(ir.Constant(lanes, [0.0] * LANES), sums)
        for width, column, place in row.columns(form):
            emitter, of_grad = _emitters(builder, dtype, grad_dtype, width)
            at = row.addresses(emitter, place, [PARAM, KAHAN_COMP])
            spread = [emitter.spread(each) for each in cgutils.unpack_tuple(builder, args[2])]
            p = load_param(emitter, at, of) if of.coupled else None
            g = formula.gradient(p, row.gradient(of_grad, column), spread, of.coupled)
            lane = builder.and_(column, _I64(LANES - 1))
            address = emitter.place(builder.ptrtoint(sums, _I64), lane, form.compute_bytes)
            emitter.store_computed(emitter.load_computed(address) + g * g, address)
        total = builder.load(sums)
        for half in (LANES >> shift for shift in range(1, LANES.bit_length())):
            low, high = (
                builder.shuffle_vector(total, total, ir.Constant(ir.VectorType(_I32, half), which))
                for which in ([*range(half)], [*range(half, 2 * half)])
            )
            total = builder.fadd(low, high)
        return builder.extract_element(total, _I32(0))

    return result(fields, place, factors, dtype, grad_dtype, switches), emit


update_row: Any = intrinsic(prefer_literal=True)(_update_row_intrinsic)
squares: Any = intrinsic(prefer_literal=True)(_squares_intrinsic)
