"""One ``step()``: what each tensor costs the host, and what a model's tensors cost in all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from hogstream.optim import RMSpropAsync
from hogstream.profiling.measure.shapes import resnet50

Time = Callable[[Callable[[], object]], None]

MAKE: dict[str, Callable[[Any], Optimizer]] = {
    "list": RMSpropAsync,
    "flat": lambda params: RMSpropAsync(params, flat=True),
    "torch_foreach": lambda params: torch.optim.RMSprop(params, foreach=True),
}


def _made(name: str, sizes: list[tuple[int, ...]], device: torch.device) -> Optimizer:
    """An optimizer whose parameters have gradients."""
    params = [torch.nn.Parameter(torch.randn(size, device=device)) for size in sizes]
    optimizer = MAKE[name](params)
    for param in params:
        grad = torch.randn_like(param)
        param.grad = grad if param.grad is None else param.grad.copy_(grad)
    return optimizer


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("tensors", [10, 100, 1000])
def bench_step(time: Time, benchmark: Any, device: torch.device, name: str, tensors: int) -> None:
    """Tensors so small that it is the host's time."""
    benchmark.group = f"step of {tensors:,} tensors of 64"
    time(_made(name, [(64,)] * tensors, device).step)


@pytest.mark.parametrize("tensors", [10, 100, 1000])
def bench_step_along_new_gradients(
    time: Time, benchmark: Any, device: torch.device, tensors: int
) -> None:
    """Gradients lie elsewhere than at the step before, as after ``zero_grad``."""
    benchmark.group = f"step of {tensors:,} tensors of 64"
    optimizer = _made("list", [(64,)] * tensors, device)
    params = optimizer.param_groups[0]["params"]
    grads = [[torch.randn_like(param) for param in params] for _ in range(2)]

    def step() -> None:
        grads.reverse()
        for param, grad in zip(params, grads[0], strict=True):
            param.grad = grad
        optimizer.step()

    time(step)


@pytest.mark.parametrize("name", MAKE)
def bench_resnet50(time: Time, benchmark: Any, device: torch.device, name: str) -> None:
    """25.6M parameters in 161 tensors."""
    benchmark.group = "step of ResNet-50"
    time(_made(name, list(resnet50().tensors), device).step)
