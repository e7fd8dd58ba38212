"""A step through torch's own operations, which autograd can differentiate."""

from __future__ import annotations

from typing import Any

import torch

from hogstream.kernels.formula import formula_over
from hogstream.kernels.hyperparameters import Factors, Hyperparameters
from hogstream.kernels.operands import COMPUTE_DTYPES, check_grad
from hogstream.optim.state import BUFFERS, as_real, check_step
from hogstream.optim.step_counts import counters_of

Group = dict[str, Any]

_formula = formula_over(
    sqrt=torch.sqrt, divide=torch.div, clamp=lambda x: torch.where(x < 0, 0.0, x)
)


def differentiable_step(
    groups: list[Group],
    state: dict[torch.Tensor, dict[str, torch.Tensor]],
    counts: list[torch.Tensor],
) -> None:
    """Updates every parameter that has a gradient, in place; ``lr`` may require a gradient.

    Args:
        groups: The optimizer's parameter groups, checked.
        state: Its state.
        counts: From ``new_counts``: where the state's steps are.

    Raises:
        TypeError: If a step cannot count.
        ValueError: If a gradient is sparse, or of another shape or device.
    """
    reached = [
        (f"param {index} in group {place}", group, param)
        for place, group in enumerate(groups)
        for index, param in enumerate(group["params"])
        if param.grad is not None
    ]
    for name, _, param in reached:
        check_step(f"step of {name}", state[param]["step"])
        check_grad(param, param.grad, f"grad of {name}", "its param")
    for _, group, param in reached:
        _update(param, state[param], group)
    with torch.no_grad():
        for counter in counters_of((state[param]["step"] for _, _, param in reached), counts):
            counter.add_one()


def _update(param: torch.Tensor, state: dict[str, torch.Tensor], group: Group) -> None:
    hyperparameters = Hyperparameters.from_group(group)
    switches = hyperparameters.switches
    real = as_real(param)
    compute = COMPUTE_DTYPES[real.dtype]
    wanted = (True, switches.centered, switches.momentum)
    buffers = [
        as_real(state[name]) if is_wanted else None
        for name, is_wanted in zip(BUFFERS[: len(wanted)], wanted, strict=True)
    ]
    factors = _factors(hyperparameters, group["lr"], compute)
    assert param.grad is not None
    grad = as_real(param.grad.resolve_conj())
    p = real.to(compute, copy=True)  # which autograd may keep, and the parameter changes
    p, *new = _formula.rmsprop(p, grad.to(compute), *buffers, factors, *switches.of_formula)
    for buffer, values in zip(buffers, new, strict=True):
        if buffer is not None:
            buffer.copy_(values)
    real.copy_(p)


def _factors(
    hyperparameters: Hyperparameters, lr: float | torch.Tensor, compute: torch.dtype
) -> tuple[Any, ...]:
    if not isinstance(lr, torch.Tensor):
        return hyperparameters.factors
    factors: Factors = hyperparameters.factors
    shrink: Any = factors.shrink
    if hyperparameters.decoupled_weight_decay:
        shrink = 1 - lr.to(torch.float64) * hyperparameters.weight_decay
    return tuple(
        each.to(compute).reshape(()) if isinstance(each, torch.Tensor) else each
        for each in factors._replace(lr=lr, shrink=shrink)  # type: ignore[arg-type]
    )
