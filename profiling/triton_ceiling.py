"""The memory traffic of an update, without its arithmetic, as a Triton kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_BLOCK = 1024


def update_shaped(param: torch.Tensor, grad: torch.Tensor, ms: torch.Tensor) -> None:
    """Reads three tensors of shape (n,) on a GPU and writes ``param`` and ``ms`` in place."""
    elements = param.numel()
    with torch.cuda.device(param.device):
        _update_shaped_kernel[(triton.cdiv(elements, _BLOCK),)](param, grad, ms, elements, _BLOCK)


@triton.jit
def _update_shaped_kernel(param_ptr, grad_ptr, ms_ptr, elements, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    g = tl.load(grad_ptr + offsets, mask)
    p = tl.load(param_ptr + offsets, mask)
    ms = tl.load(ms_ptr + offsets, mask)
    tl.store(ms_ptr + offsets, ms + g, mask)
    tl.store(param_ptr + offsets, p + g, mask)
