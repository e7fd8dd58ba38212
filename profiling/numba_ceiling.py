"""The memory traffic of an update, without its arithmetic, as a Numba kernel."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hogstream.kernels.atomics import atomic_add
from hogstream.kernels.cpu_threads import Pieces
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.numba_backend import await_done

Int64s = npt.NDArray[np.int64]

_LINE = 16  # elements: one cache line of each array, as the update's own kernel goes
_AHEAD_BYTES = 1024


def update_shaped(table: LaunchTable, pieces: Pieces) -> bool:
    """Reads three float32 arrays and writes two of them in place, going as the update goes.

    Args:
        table: Of one update.
        pieces: Shared with other threads; what is left of a cache line at the end is not touched.

    Returns:
        Whether all is done: if not, other threads are still at it.
    """
    done: bool = _update_shaped(table.columns, pieces.counters, pieces.size, pieces.elements)
    return done


@numba.njit(nogil=True)
def _update_shaped(columns: Int64s, counters: Int64s, size: int, elements: int) -> bool:
    taken, done = counters.ctypes.data, counters.ctypes.data + 64
    start = atomic_add(taken, size)
    while start < elements:
        stop = min(start + size, elements)
        param = columns[0, 0] + 4 * start
        grad = columns[1, 0] + 4 * start
        ms = columns[2, 0] + 4 * start
        for _ in range((stop - start) // _LINE):
            _add_line(param, grad, ms)
            param += 4 * _LINE
            grad += 4 * _LINE
            ms += 4 * _LINE
        atomic_add(done, stop - start)
        start = atomic_add(taken, size)
    return await_done(done, elements)


def _add_line_intrinsic(
    _context: Any, param: types.Type, grad: types.Type, ms: types.Type
) -> tuple[Any, Any]:
    """Adds a line of ``grad`` to one of ``param`` and one of ``ms``, with later ones asked for."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        i8, i32, i64 = (ir.IntType(bits) for bits in (8, 32, 64))
        line = ir.VectorType(ir.FloatType(), _LINE).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [i8.as_pointer(), i32, i32, i32])
        prefetch = builder.module.declare_intrinsic("llvm.prefetch", (i8.as_pointer(),), kind)
        for address in args:
            ahead = builder.inttoptr(builder.add(address, i64(_AHEAD_BYTES)), i8.as_pointer())
            builder.call(prefetch, [ahead, i32(0), i32(3), i32(1)])
        p, g, m = (builder.inttoptr(address, line) for address in args)
        added = builder.load(g, align=4)
        for target in (m, p):
            builder.store(builder.fadd(builder.load(target, align=4), added), target, align=4)
        return ir.Constant(i8.as_pointer(), None)

    return types.void(param, grad, ms), emit


_add_line: Any = intrinsic(_add_line_intrinsic)
