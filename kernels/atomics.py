"""Access to memory by address, for functions that Numba compiles.

Atomic ones take int64 and are sequentially consistent: whatever was written before a store,
exchange or addition is seen by whoever reads its value.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I64 = ir.IntType(64)


def _load(_context: Any, address: types.Type) -> Any:
    """Reads an int64."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.load_atomic(_at(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), emit


def _store(_context: Any, address: types.Type, value: types.Type) -> Any:
    """Writes an int64."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        builder.store_atomic(args[1], _at(builder, args[0]), "seq_cst", 8)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.void(types.int64, types.int64), emit


def _add(_context: Any, address: types.Type, value: types.Type) -> Any:
    """Adds to an int64, and returns what it was before."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("add", _at(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


def _exchange(_context: Any, address: types.Type, value: types.Type) -> Any:
    """Writes an int64, and returns what it was before."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.atomic_rmw("xchg", _at(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


def _float_at(_context: Any, address: types.Type) -> Any:
    """Reads a float64; not atomic."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.load(builder.inttoptr(args[0], ir.DoubleType().as_pointer()), align=8)

    return types.float64(types.int64), emit


def _at(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, _I64.as_pointer())


# As seen by a type checker, an intrinsic still has its typing context as a parameter.
atomic_load: Any = intrinsic(_load)
atomic_store: Any = intrinsic(_store)
atomic_add: Any = intrinsic(_add)
atomic_exchange: Any = intrinsic(_exchange)
float_at: Any = intrinsic(_float_at)
