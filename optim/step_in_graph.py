"""A step as an operator of a graph, for compilers that must have it there.

``step`` stays out of graphs: a compiled training step then takes 0.23 ms where it took 0.36 with
an operator in it that updates in place (an MLP of 10 tensors). But some compile what is inside
torch's own wrappers of a step, ``step.__wrapped__.__wrapped__``, as torch's tests do, and with
``fullgraph=True``. They find this one there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import Any

import torch

from hogstream.kernels.rmsprop import multi_tensor_rmsprop_
from hogstream.optim.state import BUFFERS, as_real

Tensors = list[torch.Tensor]

_NUMBERS = "alpha", "eps", "weight_decay", "momentum"
_SWITCHES = "centered", "lr_in_momentum", "eps_inside_sqrt", "decoupled_weight_decay", "maximize"
_NOT_IN_GRAPHS = "differentiable", "stochastic_rounding", "kahan_sum", "rowwise", "lazy_decay"
_KINDS = BUFFERS[:3]  # but for Kahan's
_BUFFERS = ", ".join(f"Tensor[] {name}s" for name in _KINDS)


def unwrapped_in_graphs(step: Callable[..., Any]) -> Callable[..., Any]:
    """Has ``step.__wrapped__``, and what that wraps, be a step for graphs."""

    @wraps(_step_in_graph)
    def without_hooks(optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
        return _step_in_graph(optimizer, closure)

    step.__wrapped__ = without_hooks  # type: ignore[attr-defined]
    return step


def _step_in_graph(optimizer: Any, closure: Callable[[], Any] | None = None) -> Any:
    """``RMSpropAsync.step`` of an optimizer that has all of its state, in what a compiler can read.

    Steps count up to 2^24, as torch's.

    Raises:
        NotImplementedError: If the optimizer is differentiable or capturable, clips, rounds
            otherwise than to nearest, or has state by rows.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    for group in optimizer.param_groups:
        # Not what the group says of ``capturable``, where compilers see True.
        asked = [name for name in _NOT_IN_GRAPHS if group[name]]
        is_scaled = getattr(optimizer, "found_inf", None) is not None
        if asked or optimizer.capturable or is_scaled or optimizer.max_grad_norm is not None:
            raise NotImplementedError(
                f"an optimizer has no step for graphs with {', '.join(_NOT_IN_GRAPHS)}, "
                "capturable, max_grad_norm or a loss scale: compile step itself, not what it wraps"
            )
        params = [
            param
            for param in group["params"]
            if param.grad is not None and (param.requires_grad or not optimizer.flat)
        ]
        states = [optimizer.state[param] for param in params]
        wanted = True, group["centered"], group["momentum"] != 0
        buffers = [
            [as_real(state[name]) for state in states] if is_wanted else []
            for name, is_wanted in zip(_KINDS, wanted, strict=True)
        ]
        if params:
            with torch.no_grad():
                reals = [as_real(param) for param in params]
                updated = torch.ops.hogstream.updated_by_rmsprop(
                    reals,
                    [as_real(param.grad) for param in params],
                    *buffers,
                    torch.as_tensor(group["lr"], dtype=torch.float64),
                    [float(group[name]) for name in _NUMBERS],
                    [group[name] for name in _SWITCHES],
                    optimizer.backend,
                )
                torch._foreach_copy_([*reals, *chain.from_iterable(buffers)], updated)
                torch._foreach_add_([state["step"] for state in states], 1)
    return loss


def _updated(
    params: Tensors,
    grads: Tensors,
    mss: Tensors,
    grad_avgs: Tensors,
    momentum_buffers: Tensors,
    lr: torch.Tensor,
    numbers: list[float],
    switches: list[bool],
    backend: str | None,
) -> Tensors:
    """The new parameters, then the new state: copies.

    Not updated in place: for tensors that share memory, such as those of ``flat``, Inductor updates
    copies instead, some of which get lost (torch 2.10 and 2.11).
    """
    options: dict[str, Any] = dict(zip((*_NUMBERS, *_SWITCHES), (*numbers, *switches), strict=True))
    grads = [_laid_out_as(param, grad) for param, grad in zip(params, grads, strict=True)]
    params, mss, grad_avgs, momentum_buffers = (
        [tensor.clone() for tensor in tensors]
        for tensors in (params, mss, grad_avgs, momentum_buffers)
    )
    multi_tensor_rmsprop_(
        params,
        grads,
        mss,
        grad_avgs=grad_avgs or None,
        momentum_buffers=momentum_buffers or None,
        lr=lr.item(),
        backend=backend,
        **options,
    )
    return [*params, *mss, *grad_avgs, *momentum_buffers]


def _laid_out_as(param: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    return (
        grad
        if grad.stride() == param.stride()
        else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
    )


def _like_updated(params: Tensors, _: Tensors, *buffers: Any) -> Tensors:
    return [torch.empty_like(tensor) for tensor in chain(params, *buffers[: len(_KINDS)])]


_operator = torch.library.custom_op(
    "hogstream::updated_by_rmsprop",
    _updated,
    mutates_args=(),
    schema=f"(Tensor[] params, Tensor[] grads, {_BUFFERS}, "
    "Tensor lr, float[] numbers, bool[] switches, str? backend) -> Tensor[]",
)
_operator.register_fake(_like_updated)
