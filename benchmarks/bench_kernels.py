"""One update: by size and backend, by dtype, and of many tensors at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hogstream.kernels import available_backends, multi_tensor_rmsprop_, rmsprop_
from hogstream.kernels.operands import COMPUTE_DTYPES

Time = Callable[[Callable[[], object]], None]

SIZES = [1 << 12, 1 << 16, 1 << 20, 1 << 24]
BACKENDS = ["numba", "numpy", "triton"]


def _operands(
    elements: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    param, grad = (torch.randn(elements).to(device, dtype) for _ in range(2))
    return param, grad, torch.zeros(elements, dtype=COMPUTE_DTYPES[dtype], device=device)


def _skip_unless_here(backend: str, device: torch.device) -> None:
    missing = available_backends()[backend]
    if missing is None and (backend == "triton") != (device.type == "cuda"):
        missing = f"it does not take tensors on {device}"
    if missing is not None:
        pytest.skip(f"{backend}: {missing}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("elements", SIZES)
def bench_update(
    time: Time, benchmark: Any, device: torch.device, backend: str, elements: int
) -> None:
    """One tensor in float32."""
    _skip_unless_here(backend, device)
    benchmark.group = f"update of {elements:,} float32"
    param, grad, ms = _operands(elements, torch.float32, device)
    time(lambda: rmsprop_(param, grad, ms, backend=backend))


@pytest.mark.parametrize("dtype", list(COMPUTE_DTYPES), ids=lambda each: str(each).split(".")[1])
def bench_dtype(time: Time, benchmark: Any, device: torch.device, dtype: torch.dtype) -> None:
    """The device's own backend, by dtype."""
    benchmark.group = "update of 1,048,576 elements"
    param, grad, ms = _operands(1 << 20, dtype, device)
    time(lambda: rmsprop_(param, grad, ms))


@pytest.mark.parametrize("tensors", [1, 16, 256])
def bench_list(time: Time, benchmark: Any, device: torch.device, tensors: int) -> None:
    """As many elements in more tensors: what the checks and the table cost."""
    benchmark.group = "update of 262,144 float32 in some tensors"
    operands = [_operands((1 << 18) // tensors, torch.float32, device) for _ in range(tensors)]
    params, grads, mss = (list(each) for each in zip(*operands, strict=True))
    time(lambda: multi_tensor_rmsprop_(params, grads, mss))
