"""RMSprop updates in place: of one array or tensor, or of a list of them in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hogstream.kernels.backends import check_backend, select_backend
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable, make_tables
from hogstream.kernels.operands import ArrayLike, Operands, check_disjoint, check_operands


def rmsprop_(
    param: ArrayLike,
    grad: ArrayLike,
    ms: ArrayLike,
    *,
    grad_avg: ArrayLike | None = None,
    momentum_buffer: ArrayLike | None = None,
    lr: float = 0.01,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    lr_in_momentum: bool = False,
    eps_inside_sqrt: bool = True,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    """Updates ``param`` and ``ms`` in place by one step of RMSprop.

    ``ms = alpha*ms + ((1 - alpha)*grad)*grad``, then ``param -= (lr*grad) / sqrt(ms + eps)``: each
    operation rounded once, in this order, so that every backend gives the same bits. This is
    ChainerRL's ``RMSpropAsync``; the non-centered RMSProp of Mnih et al. 2016 (arXiv 1602.01783).

    Nothing is changed if an argument is refused.

    Args:
        param: Any shape; float16, bfloat16 (tensors only), float32 or float64. Contiguous, or a
            permutation of that. A NumPy array or a tensor.
        grad: Gradient, with the shape, device and memory layout of ``param``; any of these dtypes.
        ms: Running mean of squared gradients, in the compute type: float64 for float64
            parameters, else float32. Starts at zero.
        grad_avg: Running mean of gradients, as ``ms``, if ``centered``; else None.
        momentum_buffer: As ``ms``, if there is ``momentum``; else None. Starts at zero.
        lr: Learning rate, finite and >= 0; this and the numbers that follow must be ones that the
            compute type can hold: not rounded to infinity, or to 0 without being 0.
        alpha: Decay of ``ms``, in [0, 1].
        eps: Finite and >= 0.
        weight_decay: Finite and >= 0.
        momentum: Decay of ``momentum_buffer``, finite and >= 0.
        centered: Divide by the standard deviation, by way of ``grad_avg``.
        lr_in_momentum: ``lr`` multiplies what goes into ``momentum_buffer``, as in TensorFlow; if
            false, it multiplies the buffer, as in torch.
        eps_inside_sqrt: If false, divide by ``sqrt(ms) + eps``, as ``torch.optim.RMSprop``.
        decoupled_weight_decay: Shrink ``param`` by ``1 - lr*weight_decay`` instead of adding
            ``weight_decay*param`` to the gradient.
        maximize: Ascend the gradient.
        backend: ``"triton"``, ``"numba"`` or ``"numpy"``; None picks by device.

    Raises:
        TypeError: If an operand or number is of a wrong type or dtype.
        ValueError: If an operand does not fit, a number is out of range or more than the compute
            type can hold, or ``backend`` is unknown or cannot take these operands.
        RuntimeError: If ``backend`` is not available here.
    """
    hyperparameters = Hyperparameters(
        lr=lr,
        alpha=alpha,
        eps=eps,
        weight_decay=weight_decay,
        momentum=momentum,
        centered=centered,
        lr_in_momentum=lr_in_momentum,
        eps_inside_sqrt=eps_inside_sqrt,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )
    check_state(hyperparameters, grad_avg=grad_avg, momentum_buffer=momentum_buffer)
    operands = check_operands(param, grad, ms, grad_avg, momentum_buffer)
    check_disjoint([(Operands._fields, operands)])
    hyperparameters.check_held_by(operands.param.dtype)
    chosen = select_backend(backend, operands.param.device.type)
    note_changes([param, ms, grad_avg, momentum_buffer])
    chosen.update_(LaunchTable([operands]), hyperparameters)


def multi_tensor_rmsprop_(
    params: Sequence[ArrayLike],
    grads: Sequence[ArrayLike],
    mss: Sequence[ArrayLike],
    *,
    grad_avgs: Sequence[ArrayLike] | None = None,
    momentum_buffers: Sequence[ArrayLike] | None = None,
    lr: float = 0.01,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    lr_in_momentum: bool = False,
    eps_inside_sqrt: bool = True,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
    backend: str | None = None,
) -> None:
    """Updates every ``params[i]`` and ``mss[i]`` in place by one step of RMSprop, as ``rmsprop_``.

    There is one launch for each dtype and device, however many tensors there are. Every call checks
    all of them, and builds the table for the launch; ``hogstream.optim.RMSpropAsync`` keeps that
    table from step to step.

    Nothing is changed if an argument is refused.

    Args:
        params: Arrays or tensors as for ``rmsprop_``; shapes, dtypes and devices may differ.
        grads: Of the same length: one for each of ``params``. Two may share memory.
        mss: Of the same length: one for each of ``params``.
        grad_avgs: Of the same length, if ``centered``; else None.
        momentum_buffers: Of the same length, if there is ``momentum``; else None.
        lr: Learning rate, finite and >= 0; this and what follows is the same for all.
        alpha: Decay of ``ms``, in [0, 1].
        eps: Finite and >= 0.
        weight_decay: Finite and >= 0.
        momentum: Decay of ``momentum_buffer``, finite and >= 0.
        centered: Divide by the standard deviation, by way of ``grad_avg``.
        lr_in_momentum: ``lr`` multiplies what goes into ``momentum_buffer``, as in TensorFlow; if
            false, it multiplies the buffer, as in torch.
        eps_inside_sqrt: If false, divide by ``sqrt(ms) + eps``, as ``torch.optim.RMSprop``.
        decoupled_weight_decay: Shrink ``param`` by ``1 - lr*weight_decay`` instead of adding
            ``weight_decay*param`` to the gradient.
        maximize: Ascend the gradient.
        backend: ``"triton"``, ``"numba"`` or ``"numpy"``; None picks by device.

    Raises:
        TypeError: As for ``rmsprop_``, or if a list is not one; the message names the index.
        ValueError: As for ``rmsprop_``, or if lengths differ, or a parameter or ``ms`` overlaps
            another tensor of the lists.
        RuntimeError: If ``backend`` is not available here.
    """
    hyperparameters = Hyperparameters(
        lr=lr,
        alpha=alpha,
        eps=eps,
        weight_decay=weight_decay,
        momentum=momentum,
        centered=centered,
        lr_in_momentum=lr_in_momentum,
        eps_inside_sqrt=eps_inside_sqrt,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )
    check_state(hyperparameters, grad_avgs=grad_avgs, momentum_buffers=momentum_buffers)
    lists = {"params": params, "grads": grads, "mss": mss}
    lists |= {} if grad_avgs is None else {"grad_avgs": grad_avgs}
    lists |= {} if momentum_buffers is None else {"momentum_buffers": momentum_buffers}
    _check_lists(lists)
    check_backend(backend)
    none: list[None] = [None] * len(params)
    named = [
        _check_row(index, row)
        for index, row in enumerate(
            zip(params, grads, mss, grad_avgs or none, momentum_buffers or none, strict=True)
        )
    ]
    check_disjoint(named)
    tables = make_tables([operands for _, operands in named])
    for table in tables:
        hyperparameters.check_held_by(table.dtype)
    backends = [select_backend(backend, table.device.type) for table in tables]
    note_changes([*params, *mss, *(grad_avgs or ()), *(momentum_buffers or ())])
    for table, chosen in zip(tables, backends, strict=True):
        chosen.update_(table, hyperparameters)


def _check_row(index: int, row: tuple[Any, ...]) -> tuple[list[str], Operands]:
    names = [
        f"{name}[{index}]"
        for name in ("params", "grads", "mss", "grad_avgs", "momentum_buffers", "kahan_comps")
    ]
    param, grad, ms, grad_avg, momentum_buffer = row
    return names, check_operands(param, grad, ms, grad_avg, momentum_buffer, names=names)


def check_state(hyperparameters: Hyperparameters, **state: object) -> None:
    """Checks that there is what an update takes of state besides ``ms``, and no more."""
    switches = hyperparameters.switches
    wanted = ("centered", switches.centered), ("momentum", switches.momentum)
    for (name, given), (option, is_on) in zip(state.items(), wanted, strict=True):
        if is_on and given is None:
            raise ValueError(f"{name} must be given with {option}, got None")
        if not is_on and given is not None:
            raise ValueError(f"{name} must be None without {option}, got {type(given).__name__}")


def _check_lists(lists: dict[str, Sequence[ArrayLike]]) -> None:
    for name, arrays in lists.items():
        if not isinstance(arrays, (list, tuple)):
            raise TypeError(
                f"{name} must be a list or tuple of arrays or tensors, got {type(arrays).__name__}"
            )
        missing = [index for index, array in enumerate(arrays) if array is None]
        if missing:  # which to one update would mean that it needs none
            raise TypeError(
                f"{name}[{missing[0]}] must be a NumPy array or a torch tensor, got NoneType"
            )
    lengths = {name: len(arrays) for name, arrays in lists.items()}
    if len(set(lengths.values())) > 1:
        *names, last = lists
        raise ValueError(f"{', '.join(names)} and {last} must be of one length, got {lengths}")


def note_changes(changed: Sequence[ArrayLike | None]) -> None:
    """Tells autograd that tensors are written: before they are, as it may refuse."""
    torch.autograd.graph.increment_version(
        [array for array in changed if isinstance(array, torch.Tensor)]
    )
