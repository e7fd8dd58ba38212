"""The update in Triton: one fused kernel over flat tensors, compiled or interpreted.

This module needs Triton; ``backends`` imports it on first use.
"""

from __future__ import annotations

import struct
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from hogstream.kernels.hyperparameters import Hyperparameters

BLOCK = 1024
# The interpreter runs programs one by one, at a cost for each: fewer, larger ones.
_INTERPRETED_BLOCK = 1 << 16


def update_(
    param: torch.Tensor, grad: torch.Tensor, ms: torch.Tensor, hyperparameters: Hyperparameters
) -> None:
    """Updates ``param`` and ``ms`` in place, in one launch on the current stream.

    Args:
        param: Shape (n,); float16, float32, float64, or the bits of bfloat16 as int16.
        grad: Shape and dtype of ``param``.
        ms: Shape (n,); float64 for float64 parameters, else float32.
        hyperparameters: The numbers and switches of the update.
    """
    elements = param.numel()
    if elements == 0:
        return
    block = BLOCK if param.is_cuda else _INTERPRETED_BLOCK
    with torch.cuda.device(param.device) if param.is_cuda else nullcontext():
        rmsprop_kernel[(triton.cdiv(elements, block),)](
            param,
            grad,
            ms,
            elements,
            *(_bits(factor) for factor in hyperparameters.scalars()),
            EPS_INSIDE_SQRT=hyperparameters.eps_inside_sqrt,
            COUPLED=hyperparameters.coupled,
            BLOCK=block,
            enable_fp_fusion=False,
        )


def _bits(value: float) -> int:
    # Triton takes a Python float as float32. As the bits of a float64 it reaches the kernel whole.
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


_FACTORS = ("lr", "alpha", "beta", "eps", "weight_decay", "shrink", "sign")


# A factor must never be specialised on: changing it must not recompile.
@triton.jit(do_not_specialize=_FACTORS)
def rmsprop_kernel(
    param_ptr,
    grad_ptr,
    ms_ptr,
    elements,
    lr: tl.int64,
    alpha: tl.int64,
    beta: tl.int64,
    eps: tl.int64,
    weight_decay: tl.int64,
    shrink: tl.int64,
    sign: tl.int64,
    EPS_INSIDE_SQRT: tl.constexpr,
    COUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Updates one block; factors are the bits of float64 values, as ``update_`` passes them."""
    compute: tl.constexpr = ms_ptr.dtype.element_ty
    storage: tl.constexpr = param_ptr.dtype.element_ty
    lr = lr.to(tl.int64).to(tl.float64, bitcast=True).to(compute)
    alpha = alpha.to(tl.int64).to(tl.float64, bitcast=True).to(compute)
    beta = beta.to(tl.int64).to(tl.float64, bitcast=True).to(compute)
    eps = eps.to(tl.int64).to(tl.float64, bitcast=True).to(compute)
    weight_decay = weight_decay.to(tl.int64).to(tl.float64, bitcast=True).to(compute)
    shrink = shrink.to(tl.int64).to(tl.float64, bitcast=True).to(compute)
    sign = sign.to(tl.int64).to(tl.float64, bitcast=True).to(compute)

    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    p = tl.load(param_ptr + offsets, mask)
    g = tl.load(grad_ptr + offsets, mask)
    ms = tl.load(ms_ptr + offsets, mask)
    if storage == tl.int16:  # bfloat16 by its bits: the interpreter's own conversions are wrong
        p = (p.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        g = (g.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    p = p.to(compute)
    g = g.to(compute) * sign
    if COUPLED:
        g = g + weight_decay * p
    p = p * shrink
    ms = alpha * ms + (beta * g) * g
    if compute == tl.float64:  # sqrt and / are exact in float64, and sqrt_rn and div_rn lack it
        d = tl.sqrt(ms + eps) if EPS_INSIDE_SQRT else tl.sqrt(ms) + eps
        p = p - (lr * g) / d
    else:
        d = tl.sqrt_rn(ms + eps) if EPS_INSIDE_SQRT else tl.sqrt_rn(ms) + eps
        p = p - tl.div_rn(lr * g, d)
    if storage == tl.int16:  # round to nearest even
        bits = p.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        narrow = tl.where(p != p, 0x7FC0, rounded).to(tl.int16)
    else:
        narrow = p.to(storage)
    tl.store(ms_ptr + offsets, ms, mask)
    tl.store(param_ptr + offsets, narrow, mask)
