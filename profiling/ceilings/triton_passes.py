"""What a GPU can do, as Triton kernels: copies, and updates without arithmetic."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

from hogstream.kernels.backends.triton_cache import ensure_folder

BLOCK = 1024
#: How kernels are compiled: no load is made ahead of the stores before it.
COMPILE_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


def update_shaped(
    param: torch.Tensor, grad: torch.Tensor, ms: torch.Tensor, passes: int = 1
) -> None:
    """Reads three float32 tensors of shape (n,) and writes ``param`` and ``ms`` in place.

    ``grad`` is added to both, once a pass; all passes are one launch. They go to the device's L2
    each time. Nothing keeps passes apart, so a GPU may lose additions of all but one.
    """
    _launch(_update_shaped_kernel, (param, grad, ms), passes)


def copy(target: torch.Tensor, source: torch.Tensor, passes: int = 1) -> None:
    """Copies a tensor of shape (n,), so many times in one launch."""
    _launch(_copy_kernel, (target, source), passes)


def _launch(kernel: Any, tensors: tuple[torch.Tensor, ...], passes: int) -> None:
    ensure_folder()
    elements, device = tensors[0].numel(), tensors[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():  # interpreted
        kernel[(triton.cdiv(elements, BLOCK),)](
            *tensors, elements, passes, BLOCK, **COMPILE_OPTIONS
        )


# Kernels count their passes: ``range(passes)`` fails in Triton 3.6's interpreter with NumPy 2.5.
@triton.jit(do_not_specialize=["passes"])
def _update_shaped_kernel(
    param_ptr,  # float32, (elements,)
    grad_ptr,  # float32, (elements,)
    ms_ptr,  # float32, (elements,)
    elements,
    passes,  # how often to go over them
    BLOCK: tl.constexpr,  # elements that one program takes in a pass: a power of 2
):
    step = 0
    while step < passes:
        offsets = _offsets(step, BLOCK)
        mask = offsets < elements
        g = tl.load(grad_ptr + offsets, mask, cache_modifier=".cg")
        p = tl.load(param_ptr + offsets, mask, cache_modifier=".cg")
        ms = tl.load(ms_ptr + offsets, mask, cache_modifier=".cg")
        tl.store(ms_ptr + offsets, ms + g, mask)
        tl.store(param_ptr + offsets, p + g, mask)
        step += 1


@triton.jit(do_not_specialize=["passes"])
def _copy_kernel(
    target_ptr,  # any dtype, (elements,)
    source_ptr,  # the same
    elements,
    passes,  # how often to copy them
    BLOCK: tl.constexpr,  # elements that one program takes in a pass: a power of 2
):
    step = 0
    while step < passes:
        offsets = _offsets(step, BLOCK)
        mask = offsets < elements
        copied = tl.load(source_ptr + offsets, mask, cache_modifier=".cg")
        tl.store(target_ptr + offsets, copied, mask)
        step += 1


@triton.jit
def _offsets(step, BLOCK: tl.constexpr):
    """Those of a program's block in a pass: another one each time, so that none stays in it."""
    block = (tl.program_id(0) + step) % tl.num_programs(0)
    return block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
