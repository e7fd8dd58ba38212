"""The update in Triton: fused kernels over one tensor or a table of them, compiled or interpreted.

This module needs Triton; ``backends`` imports it on first use.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import ELEMENTS, GRAD, LaunchTable
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED, RaceCounters

#: Elements that one program updates, by dtype of the parameters: two 128-bit accesses a thread to
#: ``ms``, one in float64, whose root and division take more registers.
BLOCK = {torch.float16: 1024, torch.bfloat16: 1024, torch.float32: 1024, torch.float64: 256}
#: How kernels are compiled: no operation is fused with another.
COMPILE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# The interpreter runs programs one by one, at a cost for each: fewer, larger ones.
_INTERPRETED_BLOCK = 1 << 16

#: How a parameter's dtype is stored, as Triton knows it; bfloat16 goes by its bits.
STORAGE = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.int16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

#: By dtype, an integer of its size, and the bits of an element's exponent: they are all set if the
#: element is infinite or NaN, and only then.
EXPONENTS = {
    torch.float16: (tl.int16, 0x7C00),
    torch.bfloat16: (tl.int16, 0x7F80),
    torch.float32: (tl.int32, 0x7F80_0000),
    torch.float64: (tl.int64, 0x7FF0_0000_0000_0000),
}

# What a compiled kernel depends on, and the kernel. No argument is specialised on, so this key is
# all: neither alignment, which kernels look at, nor lengths, nor hyperparameters recompile.
_compiled: dict[tuple[Any, ...], Any] = {}
_compiling = threading.Lock()  # Triton's compiler is not safe from several threads


def race_block(dtype: torch.dtype, device: torch.device) -> int:
    """How many elements one program updates; race counters count as many together.

    Args:
        dtype: Of the parameters.
        device: Where they are.
    """
    return BLOCK[dtype] if device.type == "cuda" else _INTERPRETED_BLOCK


def update_(
    table: LaunchTable,
    hyperparameters: Hyperparameters,
    lr_on_device: torch.Tensor | None = None,
    counters: RaceCounters | None = None,
    verdict: torch.Tensor | None = None,
) -> None:
    """Updates the parameters and ``ms`` of a table in place, in one launch on the current stream.

    A table of one update costs no copy to the device: its addresses are arguments.

    Args:
        table: Of tensors on one CUDA device, or on the CPU if Triton interprets.
        hyperparameters: The numbers and switches of the update.
        lr_on_device: In place of the number, where the kernel reads it: float64, shape (), on the
            device of the table.
        counters: To count the only update of the table with: for its elements, in blocks of
            ``race_block``, on its device.
        verdict: To be found first, by ``check_finite_``; if a gradient is not finite, the kernel
            leaves parameters, ``ms`` and counters alone.

    Raises:
        TypeError: If ``verdict`` is of another dtype.
        ValueError: If counters do not fit the table, or ``verdict`` is of another shape or device.
    """
    block = race_block(table.dtype, table.device)
    if counters is not None:
        _check_counters(counters, table, block)
    if verdict is not None:
        check_finite_(table, verdict)
    if table.elements == 0:
        return
    constants = {
        "STORAGE": STORAGE[table.dtype],
        "EPS_INSIDE_SQRT": hyperparameters.eps_inside_sqrt,
        "COUPLED": hyperparameters.coupled,
        "LR_ON_DEVICE": lr_on_device is not None,
        "CHECKED": verdict is not None,
        "BLOCK": block,
    }
    factors = _factors(hyperparameters, lr_on_device)
    with _programs(table, block) as (programs, where):
        arguments = [*where, *factors, 0 if verdict is None else verdict.data_ptr()]
        if table.updates == 1:
            arguments.append(0 if counters is None else counters.counts.data_ptr())
            constants["COUNTED"] = counters is not None
            _launch(rmsprop_kernel, programs, arguments, constants, table.device)
        else:
            _launch(multi_tensor_rmsprop_kernel, programs, arguments, constants, table.device)


def check_finite_(table: LaunchTable, verdict: torch.Tensor) -> None:
    """Finds whether the gradients of a table are finite, in one launch on the current stream.

    Args:
        table: Of tensors on one CUDA device, or on the CPU if Triton interprets.
        verdict: Becomes 1 if an element is infinite or NaN, else 0: int32, shape (1,), on the
            device of the table. Streams that run side by side need one each.

    Raises:
        TypeError: If ``verdict`` is of another dtype.
        ValueError: If ``verdict`` is of another shape or device.
    """
    if verdict.dtype != torch.int32:
        raise TypeError(f"verdict must be int32, got {verdict.dtype}")
    if verdict.shape != (1,) or verdict.device != table.device:
        raise ValueError(
            f"verdict must be of shape (1,) and on {table.device}, "
            f"got {tuple(verdict.shape)} on {verdict.device}"
        )
    verdict.zero_()
    if table.elements == 0:
        return
    block = race_block(table.dtype, table.device)
    bits, exponent = EXPONENTS[table.dtype]
    constants = {"BITS": bits, "EXPONENT": exponent, "BLOCK": block}
    with _programs(table, block) as (programs, where):
        if table.updates == 1:
            arguments = [where[GRAD], where[ELEMENTS], verdict.data_ptr()]
            _launch(finite_kernel, programs, arguments, constants, table.device)
        else:
            arguments = [*where, verdict.data_ptr()]
            _launch(multi_tensor_finite_kernel, programs, arguments, constants, table.device)


def _check_counters(counters: RaceCounters, table: LaunchTable, block: int) -> None:
    if table.updates != 1:
        raise ValueError(f"counters must be for a table of one update, got {table.updates}")
    fit = (table.elements, block, table.device)
    given = (counters.elements, counters.block, counters.counts.device)
    if given != fit:
        raise ValueError(
            "counters must be for {} elements in blocks of {} on {}, ".format(*fit)
            + "got {} in blocks of {} on {}".format(*given)
        )


@contextmanager
def _programs(table: LaunchTable, block: int) -> Iterator[tuple[int, list[int]]]:
    """How many programs to launch in this context, and what a kernel takes first.

    That is the addresses and length of a table's only update, or where the table is.
    """
    with torch.cuda.device(table.device) if table.device.type == "cuda" else nullcontext():
        if table.updates == 1:
            yield triton.cdiv(table.elements, block), table.columns[:, 0].tolist()
            return
        with table.on_device(block) as on:
            programs = on.blocks.shape[1]
            where = [on.columns.data_ptr(), table.updates, on.blocks.data_ptr(), programs]
            yield programs, where


def _launch(
    kernel: Any,
    programs: int,
    arguments: list[int],
    constants: dict[str, Any],
    device: torch.device,
) -> None:
    """Launches a compiled kernel that was kept, or else compiles it and keeps it."""
    key = (kernel, device, *constants.values())
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[programs, 1, 1](*arguments, *constants.values())
        return
    with _compiling:
        compiled = kernel[programs,](*arguments, **constants, **COMPILE_OPTIONS)
    if compiled is not None:  # the interpreter has nothing to keep
        _compiled[key] = compiled


def _factors(hyperparameters: Hyperparameters, lr_on_device: torch.Tensor | None) -> list[int]:
    """What the kernels take after the addresses, in their order."""
    h = hyperparameters
    scalars = h.scalars
    return [
        _bits(h.lr) if lr_on_device is None else lr_on_device.data_ptr(),
        _bits(scalars.alpha),
        _bits(scalars.beta),
        _bits(scalars.eps),
        _bits(scalars.weight_decay),
        _bits(h.weight_decay if h.decoupled_weight_decay else 0.0),
        _bits(scalars.sign),
    ]


def _bits(value: float) -> int:
    # Triton takes a Python float as float32. As the bits of a float64 it reaches the kernel whole.
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


_LANDED, _SURVIVED, _OVERWRITTEN = map(tl.constexpr, (LANDED, SURVIVED, OVERWRITTEN))
_FACTORS = ["lr", "alpha", "beta", "eps", "weight_decay", "decoupled_weight_decay", "sign"]


# Addresses and factors come as int64, the latter as the bits of float64.
@triton.jit(
    do_not_specialize=["param", "grad", "ms", "elements", *_FACTORS, "verdict", "counts"],
)
def rmsprop_kernel(
    param: tl.int64,
    grad: tl.int64,
    ms: tl.int64,
    elements: tl.int64,
    lr: tl.int64,
    alpha: tl.int64,
    beta: tl.int64,
    eps: tl.int64,
    weight_decay: tl.int64,
    decoupled_weight_decay: tl.int64,
    sign: tl.int64,
    verdict: tl.int64,
    counts: tl.int64,
    STORAGE: tl.constexpr,
    EPS_INSIDE_SQRT: tl.constexpr,
    COUPLED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    CHECKED: tl.constexpr,
    BLOCK: tl.constexpr,
    COUNTED: tl.constexpr,
):
    """Updates one block of one tensor; ``lr`` is an address if it is on the device.

    A program that counts reads the witness of its block, then the block, and writes the block, then
    the witness. Semantics of a device's memory as a whole, and barriers among the threads of the
    program, keep that order for whoever looks from another program.
    """
    factors = _floats(
        lr, alpha, beta, eps, weight_decay, decoupled_weight_decay, sign, LR_ON_DEVICE
    )
    block = tl.program_id(0).to(tl.int64)
    if CHECKED:  # noqa: SIM102 - known when the kernel is compiled, and the verdict is not
        if _is_nonzero(verdict):
            return
    if COUNTED:
        blocks = tl.num_programs(0).to(tl.int64)
        of_block = counts.to(tl.int64).to(tl.pointer_type(tl.int64)) + block
        # Adding nothing is a read that other memory is read after, in every version of Triton.
        version = tl.atomic_add(of_block + _LANDED * blocks, 0, sem="acquire")
        witness = tl.atomic_add(of_block + _SURVIVED * blocks, 0, sem="acquire")
        tl.debug_barrier()
    _update_block(
        param.to(tl.int64), grad.to(tl.int64), ms.to(tl.int64), elements.to(tl.int64), block,
        factors, STORAGE, EPS_INSIDE_SQRT, COUPLED, BLOCK,
    )  # fmt: skip
    if COUNTED:
        tl.debug_barrier()
        tl.atomic_xchg(of_block + _SURVIVED * blocks, witness + 1, sem="release")
        overlapping = tl.atomic_add(of_block + _LANDED * blocks, 1, sem="acq_rel") - version
        if overlapping != 0:
            tl.atomic_add(of_block + _OVERWRITTEN * blocks, overlapping, sem="relaxed")


@triton.jit(
    do_not_specialize=["columns", "updates", "blocks", "programs", *_FACTORS, "verdict"],
)
def multi_tensor_rmsprop_kernel(
    columns: tl.int64,
    updates: tl.int64,
    blocks: tl.int64,
    programs: tl.int64,
    lr: tl.int64,
    alpha: tl.int64,
    beta: tl.int64,
    eps: tl.int64,
    weight_decay: tl.int64,
    decoupled_weight_decay: tl.int64,
    sign: tl.int64,
    verdict: tl.int64,
    STORAGE: tl.constexpr,
    EPS_INSIDE_SQRT: tl.constexpr,
    COUPLED: tl.constexpr,
    LR_ON_DEVICE: tl.constexpr,
    CHECKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates one block of one tensor of a table, as ``DeviceTable`` lays it out."""
    factors = _floats(
        lr, alpha, beta, eps, weight_decay, decoupled_weight_decay, sign, LR_ON_DEVICE
    )
    param, grad, ms, elements, block = _block_of_table(columns, updates, blocks, programs)
    if CHECKED:  # noqa: SIM102 - known when the kernel is compiled, and the verdict is not
        if _is_nonzero(verdict):
            return
    _update_block(
        param, grad, ms, elements, block, factors, STORAGE, EPS_INSIDE_SQRT, COUPLED, BLOCK
    )


@triton.jit(do_not_specialize=["grad", "elements", "verdict"])
def finite_kernel(
    grad: tl.int64,
    elements: tl.int64,
    verdict: tl.int64,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sets the verdict if one block of one gradient is not finite."""
    block = tl.program_id(0).to(tl.int64)
    _check_block(grad.to(tl.int64), elements.to(tl.int64), block, verdict, BITS, EXPONENT, BLOCK)


@triton.jit(do_not_specialize=["columns", "updates", "blocks", "programs", "verdict"])
def multi_tensor_finite_kernel(
    columns: tl.int64,
    updates: tl.int64,
    blocks: tl.int64,
    programs: tl.int64,
    verdict: tl.int64,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sets the verdict if one block of one gradient of a table is not finite."""
    _, grad, _, elements, block = _block_of_table(columns, updates, blocks, programs)
    _check_block(grad, elements, block, verdict, BITS, EXPONENT, BLOCK)


@triton.jit
def _block_of_table(columns, updates, blocks, programs):
    """The update and the block that this program works on, as ``DeviceTable`` lays them out."""
    program = tl.program_id(0).to(tl.int64)
    block_ptr = blocks.to(tl.int64).to(tl.pointer_type(tl.int32)) + program
    column = columns.to(tl.int64).to(tl.pointer_type(tl.int64)) + tl.load(block_ptr)
    block = tl.load(block_ptr + programs).to(tl.int64)
    param = tl.load(column)
    grad = tl.load(column + updates)
    ms = tl.load(column + 2 * updates)
    elements = tl.load(column + 3 * updates)
    return param, grad, ms, elements, block


@triton.jit
def _is_nonzero(verdict):
    return tl.load(verdict.to(tl.int64).to(tl.pointer_type(tl.int32))) != 0


@triton.jit
def _check_block(
    grad,
    elements,
    block,
    verdict,
    BITS: tl.constexpr,
    EXPONENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sets the verdict if an element of [block * BLOCK, (block + 1) * BLOCK) is not finite."""
    start = block * BLOCK
    grad_ptr = grad.to(tl.pointer_type(BITS)) + start
    offsets = tl.arange(0, BLOCK)
    if (grad % 16 == 0) & (start + BLOCK <= elements):  # for accesses of 128 bits
        bits = tl.load(tl.multiple_of(grad_ptr, 16) + offsets)
    else:
        bits = tl.load(grad_ptr + offsets, offsets < elements - start, 0)
    verdict_ptr = verdict.to(tl.int64).to(tl.pointer_type(tl.int32)) + tl.zeros_like(offsets)
    tl.store(verdict_ptr, 1, (bits & EXPONENT) == EXPONENT)


@triton.jit
def _floats(
    lr, alpha, beta, eps, weight_decay, decoupled_weight_decay, sign, LR_ON_DEVICE: tl.constexpr
):
    """The factors of an update as float64, with ``shrink`` for the last but one."""
    if LR_ON_DEVICE:
        lr = tl.load(lr.to(tl.int64).to(tl.pointer_type(tl.float64)))
    else:
        lr = _as_float64(lr)
    shrink = 1.0 - lr * _as_float64(decoupled_weight_decay)
    return (
        lr,
        _as_float64(alpha),
        _as_float64(beta),
        _as_float64(eps),
        _as_float64(weight_decay),
        shrink,
        _as_float64(sign),
    )


@triton.jit
def _as_float64(bits):
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit
def _update_block(
    param,
    grad,
    ms,
    elements,
    block,
    factors,
    STORAGE: tl.constexpr,
    EPS_INSIDE_SQRT: tl.constexpr,
    COUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates elements [block * BLOCK, (block + 1) * BLOCK) of a tensor, or what it has of them."""
    compute: tl.constexpr = tl.float64 if tl.float64 == STORAGE else tl.float32
    start = block * BLOCK
    param_ptr = param.to(tl.pointer_type(STORAGE)) + start
    grad_ptr = grad.to(tl.pointer_type(STORAGE)) + start
    ms_ptr = ms.to(tl.pointer_type(compute)) + start
    if ((param | grad | ms) % 16 == 0) & (start + BLOCK <= elements):
        # Full and aligned: without a mask, and with this hint, accesses are of 128 bits.
        param_ptr = tl.multiple_of(param_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        ms_ptr = tl.multiple_of(ms_ptr, 16)
        _update_chunk(
            param_ptr, grad_ptr, ms_ptr, None, 0, factors, EPS_INSIDE_SQRT, COUPLED, BLOCK
        )
    else:
        # Each element has an address and a mask of its own: a few at a time, to save registers.
        CHUNK: tl.constexpr = BLOCK // (2 if tl.float64 == STORAGE else 4)
        for first in range(0, BLOCK, CHUNK):
            _update_chunk(
                param_ptr, grad_ptr, ms_ptr, elements - start, first, factors,
                EPS_INSIDE_SQRT, COUPLED, CHUNK,
            )  # fmt: skip


@triton.jit
def _update_chunk(
    param_ptr,
    grad_ptr,
    ms_ptr,
    elements,
    first,
    factors,
    EPS_INSIDE_SQRT: tl.constexpr,
    COUPLED: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Updates CHUNK elements from ``first``, or those below ``elements`` if that is not None."""
    offsets = first + tl.arange(0, CHUNK)
    mask = None if elements is None else offsets < elements
    p = tl.load(param_ptr + offsets, mask)
    g = tl.load(grad_ptr + offsets, mask)
    ms = tl.load(ms_ptr + offsets, mask)
    p, ms = _update_elements(p, g, ms, factors, EPS_INSIDE_SQRT, COUPLED)
    tl.store(ms_ptr + offsets, ms, mask)
    tl.store(param_ptr + offsets, p, mask)


@triton.jit
def _update_elements(p, g, ms, factors, EPS_INSIDE_SQRT: tl.constexpr, COUPLED: tl.constexpr):
    """The formula, on elements as they are stored; each factor is rounded once."""
    storage: tl.constexpr = p.dtype
    compute: tl.constexpr = ms.dtype
    lr = factors[0].to(compute)
    eps = factors[3].to(compute)
    if storage == tl.int16:  # bfloat16 by its bits: the interpreter's own conversions are wrong
        p = (p.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        g = (g.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    p = p.to(compute)
    g = g.to(compute) * factors[6].to(compute)
    if COUPLED:
        g = g + factors[4].to(compute) * p
    p = p * factors[5].to(compute)
    ms = factors[1].to(compute) * ms + (factors[2].to(compute) * g) * g
    if compute == tl.float64:  # sqrt and / are exact in float64, and sqrt_rn and div_rn lack it
        d = tl.sqrt(ms + eps) if EPS_INSIDE_SQRT else tl.sqrt(ms) + eps
        p = p - (lr * g) / d
    else:
        d = tl.sqrt_rn(ms + eps) if EPS_INSIDE_SQRT else tl.sqrt_rn(ms) + eps
        p = p - tl.div_rn(lr * g, d)
    if storage == tl.int16:  # round to nearest even
        bits = p.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        p = tl.where(p != p, 0x7FC0, rounded).to(tl.int16)
    else:
        p = p.to(storage)
    return p, ms
