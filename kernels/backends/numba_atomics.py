"""Access to memory, and calls, by address: for functions that Numba compiles.

Atomic access is to int64, and sequentially consistent: whatever was written before a store,
exchange or addition is seen by whoever reads its value.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_I64 = ir.IntType(64)
_EVERY_LEVEL = 3


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


def _float_load(_context: Any, address: types.Type) -> Any:
    """Reads a float64; not atomic."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.load(_at(builder, args[0]), align=8), ir.DoubleType())

    return types.float64(types.int64), emit


def _float_store(_context: Any, address: types.Type, value: types.Type) -> Any:
    """Writes a float64; not atomic."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        builder.store(builder.bitcast(args[1], _I64), _at(builder, args[0]), align=8)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.void(types.int64, types.float64), emit


def _floats_at(_context: Any, address: types.Type) -> Any:
    """The float32 at an address, by index; not atomic."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        return builder.inttoptr(args[0], ir.FloatType().as_pointer())

    return types.CPointer(types.float32)(types.int64), emit


def _plain_store(_context: Any, address: types.Type, value: types.Type) -> Any:
    """Writes an int64; not atomic."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        builder.store(args[1], _at(builder, args[0]), align=8)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.void(types.int64, types.int64), emit


def _call(_context: Any, function: types.Type, arguments: types.BaseTuple) -> Any:
    """Calls a function in C, by its address, that takes int64 and returns one."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        kind = ir.FunctionType(_I64, [_I64] * len(arguments))
        where = builder.inttoptr(args[0], kind.as_pointer())
        return builder.call(where, cgutils.unpack_tuple(builder, args[1]))

    return types.int64(types.int64, types.UniTuple(types.int64, len(arguments))), emit


def _local_bytes(_context: Any, size: Any) -> Any:
    """The address of so many bytes, a literal, that live until the function returns."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        kind = ir.ArrayType(_I64, -(-size.literal_value // 8))
        return builder.ptrtoint(cgutils.alloca_once(builder, kind), _I64)

    return types.int64(size), emit


def _prefetch(_context: Any, address: types.Type) -> Any:
    """Asks for the cache line at an address, which may be any."""

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        emit_prefetch(builder, args[0], _EVERY_LEVEL)
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    return types.void(types.int64), emit


def emit_prefetch(builder: ir.IRBuilder, address: ir.Value, locality: int) -> None:
    """Writes code that asks for the cache line at an address, which may be any.

    Args:
        builder: Where to write it.
        address: int64.
        locality: LLVM's: from 3, to have it in every level of caches, to 0.
    """
    pointer, word = ir.IntType(8).as_pointer(), ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
    prefetch = builder.module.declare_intrinsic("llvm.prefetch", (pointer,), kind)
    read, data = word(0), word(1)
    builder.call(prefetch, [builder.inttoptr(address, pointer), read, word(locality), data])


def _at(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, _I64.as_pointer())


# As seen by a type checker, an intrinsic still has its typing context as a parameter.
atomic_load: Any = intrinsic(_load)
atomic_store: Any = intrinsic(_store)
atomic_add: Any = intrinsic(_add)
atomic_exchange: Any = intrinsic(_exchange)
float_load: Any = intrinsic(_float_load)
float_store: Any = intrinsic(_float_store)
floats_at: Any = intrinsic(_floats_at)
plain_store: Any = intrinsic(_plain_store)
call: Any = intrinsic(_call)
prefetch: Any = intrinsic(_prefetch)
local_bytes: Any = intrinsic(prefer_literal=True)(_local_bytes)
