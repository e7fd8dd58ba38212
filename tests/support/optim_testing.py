"""What the tests of the optimizer share: parameters, and steps along given gradients."""

from __future__ import annotations

import math

import torch
from torch.optim import Optimizer

from update_testing import normal


def parameters(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Parameters of standard normal values; the same at every call."""
    return [
        torch.nn.Parameter(normal(math.prod(shape), dtype, seed).reshape(shape))
        for seed, shape in enumerate(shapes)
    ]


def step_along(optimizer: Optimizer, first_seed: int, steps: int = 1) -> None:
    """Steps with gradients that depend on nothing but the seed, the step and the parameter's place.

    A parameter is given a new gradient of its own dtype and memory layout each time.
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(first_seed, first_seed + steps):
        for place, param in enumerate(params):
            values = normal(param.numel(), param.dtype, seed=1000 * step + place)
            param.grad = torch.empty_like(param).copy_(values.reshape(param.shape))
        optimizer.step()


def step_with(optimizer: Optimizer, reached: list[torch.nn.Parameter]) -> None:
    """Steps with gradients of one for some parameters of the first group, and none for others."""
    for param in optimizer.param_groups[0]["params"]:
        param.grad = None
    for param in reached:
        param.grad = torch.ones_like(param)
    optimizer.step()


def step_in_child(optimizer: Optimizer) -> None:
    """What another process does to a shared optimizer; here, where a spawned one can import it."""
    step_along(optimizer, first_seed=0, steps=2)


def accumulate_in_child(model: torch.nn.Module, optimizer: Optimizer) -> None:
    """Adds to the gradients that there are, as backward does, and steps."""
    for param in model.parameters():
        param.grad = torch.ones_like(param) if param.grad is None else param.grad.add_(1)
    optimizer.step()
