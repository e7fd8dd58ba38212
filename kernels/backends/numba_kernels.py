"""The update in Numba: one pass over memory on a CPU thread, without the GIL.

The kernel works on one cache line of ``ms`` at a time and asks for the lines that follow: left to
itself, LLVM makes loops in which roots and divisions keep reads from being under way early enough
(measured in ``docs/speed-notes.md``).

This module needs Numba; ``select`` imports it when it is first asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from hogstream.kernels.backends.numba_atomics import (
    atomic_add,
    atomic_load,
    atomic_store,
    prefetch,
)
from hogstream.kernels.backends.numba_compile import cfunc, part
from hogstream.kernels.backends.numba_formula import emit_update, written_by
from hogstream.kernels.backends.numba_pieces import (
    ARGUMENT,
    COLUMNS,
    UPDATES,
    Kernel,
    in_update,
    run_alone,
    run_in_pieces,
    take_piece,
)
from hogstream.kernels.backends.numba_vectors import (
    CACHE_LINE,
    FORMATS,
    Emitter,
    Vector,
    factors_at,
    finite,
)
from hogstream.kernels.hyperparameters import Factors, Hyperparameters, Switches
from hogstream.kernels.launch_table import (
    ELEMENTS,
    GRAD,
    GRAD_AVG,
    KAHAN_COMP,
    MOMENTUM_BUFFER,
    MS,
    PARAM,
    LaunchTable,
)
from hogstream.kernels.operands import DTYPE_NAMES
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED
from hogstream.kernels.rounding import PLACES

# Cache lines of a gradient that are looked at together: 2 and 8 do nearly as well.
_FINITE_LINES = 4
# Elements that race counters count together: 2^10 to 2^15 cost as little.
_RACE_BLOCK = 1 << 13
# Small tensors are asked for when the kernel is at the one so many places before.
_UPDATES_AHEAD = 4
_I64 = ir.IntType(64)
# Where the key of a step is, in bytes behind the factors.
_KEY = 8 * len(Factors._fields)


def update_(table: LaunchTable, hyperparameters: Hyperparameters, key: int = 0) -> None:
    """Updates the parameters and ``ms`` of a table in place, in one pass, on the calling thread.

    Args:
        table: Of tensors on the CPU.
        hyperparameters: The numbers and switches of the update.
        key: Of the step, from ``key_of_step``, for stochastic rounding.
    """
    kernel, argument = _kernel_of(table, hyperparameters, key)
    run_alone(kernel, table, ctypes.addressof(argument))


def update_in_pieces_(table: LaunchTable, hyperparameters: Hyperparameters, key: int = 0) -> None:
    """The same on all threads that the update is worth.

    Args:
        table: Of tensors on the CPU.
        hyperparameters: The numbers and switches of the update.
        key: Of the step, from ``key_of_step``, for stochastic rounding.
    """
    kernel, argument = _kernel_of(table, hyperparameters, key)
    run_in_pieces(kernel, table, ctypes.addressof(argument))


def _kernel_of(
    table: LaunchTable, hyperparameters: Hyperparameters, key: int
) -> tuple[Kernel, Any]:
    """What updates a table, and what it takes besides: ``Factors`` in float64, and the key."""
    kernel = _kernel(table.dtype, table.grad_dtype, hyperparameters.switches)
    argument = hyperparameters.in_memory
    if key:
        argument = type(argument)(*argument)  # others may update with other keys
        ctypes.c_uint64.from_buffer(argument, _KEY).value = key
    return kernel, argument


def race_block(dtype: torch.dtype, device: torch.device) -> int:
    """How many elements race counters count together: as many for all dtypes."""
    return _RACE_BLOCK


@cache
def _kernel(of_params: torch.dtype, of_grads: torch.dtype, of: Switches) -> Kernel:
    """Takes pieces of a job of ``numba_pieces``, with the argument of ``_kernel_of``."""
    of = of.of_dtype(of_params)
    rows, switches = (GRAD, *written_by(of)), of.bits
    dtype, grad_dtype = DTYPE_NAMES[of_params], DTYPE_NAMES[of_grads]
    stored_bytes, compute_bytes = FORMATS[dtype].stored_bytes, FORMATS[dtype].compute_bytes
    grad_bytes = FORMATS[grad_dtype].stored_bytes

    @cfunc(types.void(types.int64))
    def kernel(job: int) -> None:
        factors = factors_at(atomic_load(job + 8 * ARGUMENT), dtype)
        key = atomic_load(atomic_load(job + 8 * ARGUMENT) + _KEY)
        columns, updates = atomic_load(job + 8 * COLUMNS), atomic_load(job + 8 * UPDATES)
        share, start, stop = take_piece(job)
        while start < stop:
            first = 0
            for update in range(updates):
                ahead = columns + 8 * min(update + _UPDATES_AHEAD, updates - 1)
                for row in rows:
                    prefetch(atomic_load(ahead + 8 * row * updates))
                param = atomic_load(columns + 8 * (PARAM * updates + update))
                grad = atomic_load(columns + 8 * (GRAD * updates + update))
                ms = atomic_load(columns + 8 * (MS * updates + update))
                grad_avg = atomic_load(columns + 8 * (GRAD_AVG * updates + update))
                buffer = atomic_load(columns + 8 * (MOMENTUM_BUFFER * updates + update))
                comp = atomic_load(columns + 8 * (KAHAN_COMP * updates + update))
                elements = atomic_load(columns + 8 * (ELEMENTS * updates + update))
                begin, end, length = in_update(job, share, start - first, stop - first, elements)
                first += length
                if begin >= end:
                    continue
                _update(
                    param + begin * stored_bytes,
                    grad + begin * grad_bytes,
                    ms + begin * compute_bytes,
                    grad_avg + begin * compute_bytes,
                    buffer + begin * compute_bytes,
                    comp + begin * stored_bytes,
                    end - begin,
                    factors,
                    update * PLACES + begin,
                    key,
                    dtype,
                    grad_dtype,
                    switches,
                )
            share, start, stop = take_piece(job)

    return Kernel.of(kernel)


@cache
def update_function(dtype: str, of: Switches) -> Any:
    """One update as other compiled code calls it, with race counters or without.

    A function in C, called by its address: one that Numba compiles into its callers would not be
    kept in its cache together with them.

    Args:
        dtype: Of the parameter: ``float16``, ``bfloat16``, ``float32`` or ``float64``.
        of: What its code depends on; it rounds to nearest.

    Returns:
        ``update(param, grad, ms, grad_avg, buffer, elements, factors, counts, blocks,
        block_elements, flat)``, a ``CFunc`` of Numba. All arguments are int64, and it returns 0.
        The first five are addresses, ``factors`` that of ``Hyperparameters.factors`` as eight
        float64, each rounded here. ``counts`` is the address of ``RaceCounters.counts``, for
        ``blocks`` blocks of ``block_elements`` elements from ``flat`` on, the address of a
        parameter of which ``param`` is a part or all. It is 0 to count no races; what follows it is
        of no account then.
    """
    switches = of.bits
    stored_bytes, compute_bytes = FORMATS[dtype].stored_bytes, FORMATS[dtype].compute_bytes

    @cfunc(types.int64(*[types.int64] * 11))
    def update(
        param: int,  # address: as stored, (elements,)
        grad: int,  # address: as stored, (elements,)
        ms: int,  # address: compute type, (elements,)
        grad_avg: int,  # the same, if centered
        buffer: int,  # the same, if there is momentum
        elements: int,
        factors: int,  # address of ``Factors``: float64, (8,)
        counts: int,  # address of ``RaceCounters.counts``, or 0: int64, (3, blocks)
        blocks: int,
        block_elements: int,  # of each block but for the last
        flat: int,  # address of what is counted, as stored: param is a part of it, or all
    ) -> int:
        rounded = factors_at(factors, dtype)
        before = (param - flat) // stored_bytes  # elements
        if counts == 0:
            before, block_elements = 0, elements
        first = 0
        while first < elements:
            block = (before + first) // block_elements
            stop = min((block + 1) * block_elements - before, elements)
            version = witness = 0
            if counts != 0:
                version, witness = begin_block(counts, blocks, block)
            _update(
                param + first * stored_bytes,
                grad + first * stored_bytes,
                ms + first * compute_bytes,
                grad_avg + first * compute_bytes,
                buffer + first * compute_bytes,
                0,
                stop - first,
                rounded,
                0,
                0,
                dtype,
                dtype,
                switches,
            )
            if counts != 0:
                end_block(counts, blocks, block, version, witness)
            first = stop
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
    stored_bytes = FORMATS[dtype].stored_bytes
    block = _FINITE_LINES * CACHE_LINE // stored_bytes

    @cfunc(types.int64(types.int64, types.int64))
    def all_finite(grad: int, elements: int) -> int:
        for _ in range(elements // block):
            if not finite(grad, dtype, block):
                return 0
            grad += block * stored_bytes
        for _ in range(elements % block):
            if not finite(grad, dtype, 1):
                return 0
            grad += stored_bytes
        return 1

    return all_finite


@part
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


@part
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


def _update_intrinsic(
    _context: Any,
    param: types.Type,  # address: int64
    grad: types.Type,  # the same
    ms: types.Type,  # the same
    grad_avg: types.Type,  # the same; of no account, as what follows, if there is none
    buffer: types.Type,  # the same
    comp: types.Type,  # the same
    elements: types.Type,  # how many there are: int64
    factors: types.Type,  # as ``Factors``: a tuple of eight of the compute type
    place: types.Type,  # of the first element, for stochastic rounding: int64
    key: types.Type,  # of the step: int64
    dtype: Any,  # name of the parameter's: literal
    grad_dtype: Any,  # name of the gradient's: literal
    switches: Any,  # ``Switches.bits``: literal
) -> Any:
    """Updates so many elements at some addresses: a cache line of ``ms`` at a time, then the rest.

    Not a compiled function in the closure of its callers: those would never be read back from
    Numba's cache.
    """

    def emit(_context: Any, builder: ir.IRBuilder, _signature: Any, args: Any) -> ir.Value:
        *addresses, elements, factors, place, key = args[:10]
        form, bits = FORMATS[dtype.literal_value], switches.literal_value
        of_grad = FORMATS[grad_dtype.literal_value]._replace(
            compute=form.compute, compute_bytes=form.compute_bytes
        )
        line = CACHE_LINE // form.compute_bytes
        whole = builder.and_(elements, _I64(-line))
        for width, first, end in ((line, _I64(0), whole), (1, whole, elements)):
            emitters = Emitter(builder, form, width), Emitter(builder, of_grad, width)
            spread = [emitters[0].spread(each) for each in cgutils.unpack_tuple(builder, factors)]
            with cgutils.for_range_slice(builder, first, end, _I64(width)) as (index, _):
                where = builder.add(place, index), key
                _emit_update(emitters, addresses, index, spread, where, Switches.of_bits(bits))
        return ir.Constant(ir.IntType(8).as_pointer(), None)

    arguments = (
        *(param, grad, ms, grad_avg, buffer, comp, elements),
        *(factors, place, key, dtype, grad_dtype, switches),
    )
    return types.void(*arguments), emit


def _emit_update(
    emitters: tuple[Emitter, Emitter],  # of all but gradients, and of these
    addresses: Sequence[ir.Value],
    index: ir.Value,  # of the first element
    factors: list[Vector],
    where: tuple[ir.Value, ir.Value],  # its place, and the key of the step
    switches: Switches,
) -> None:
    emitter, of_grad = emitters
    stored, computed = emitter.form.stored_bytes, emitter.form.compute_bytes
    sizes = (stored, of_grad.form.stored_bytes, computed, computed, computed, stored)
    at = {
        row: emitter.place(addresses[row], index, sizes[row])
        for row in (GRAD, *written_by(switches))
    }
    if emitter.width > 1:
        for row, address in at.items():
            emitter.read_ahead(address, sizes[row])
    g = of_grad.load_stored(at[GRAD])
    emit_update(emitter, at, g, factors, where, switches)


_update: Any = intrinsic(prefer_literal=True)(_update_intrinsic)
