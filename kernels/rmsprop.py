"""RMSprop updates in place: of one array or tensor, or of a list of them in one launch."""

from __future__ import annotations

from collections.abc import Sequence

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
    lr: float = 0.01,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
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
        grad: Gradient, with the shape, dtype, device and memory layout of ``param``.
        ms: Running mean of squared gradients, in the compute type: float64 for float64
            parameters, else float32. Starts at zero.
        lr: Learning rate, finite and >= 0; this and the numbers that follow must be ones that the
            compute type can hold: not rounded to infinity, or to 0 without being 0.
        alpha: Decay of ``ms``, in [0, 1).
        eps: Finite and >= 0.
        weight_decay: Finite and >= 0.
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
        eps_inside_sqrt=eps_inside_sqrt,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )
    operands = check_operands(param, grad, ms)
    check_disjoint([(Operands._fields, operands)])
    hyperparameters.check_held_by(operands.param.dtype)
    chosen = select_backend(backend, operands.param.device.type)
    _note_changes([param, ms])
    chosen.update_(LaunchTable([operands]), hyperparameters)


def multi_tensor_rmsprop_(
    params: Sequence[ArrayLike],
    grads: Sequence[ArrayLike],
    mss: Sequence[ArrayLike],
    *,
    lr: float = 0.01,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
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
        lr: Learning rate, finite and >= 0; this and what follows is the same for all.
        alpha: Decay of ``ms``, in [0, 1).
        eps: Finite and >= 0.
        weight_decay: Finite and >= 0.
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
        eps_inside_sqrt=eps_inside_sqrt,
        decoupled_weight_decay=decoupled_weight_decay,
        maximize=maximize,
    )
    _check_lists(params=params, grads=grads, mss=mss)
    check_backend(backend)
    named = []
    for index, (param, grad, ms) in enumerate(zip(params, grads, mss, strict=True)):
        names = (f"params[{index}]", f"grads[{index}]", f"mss[{index}]")
        named.append((names, check_operands(param, grad, ms, names)))
    check_disjoint(named)
    tables = make_tables([operands for _, operands in named])
    for table in tables:
        hyperparameters.check_held_by(table.dtype)
    backends = [select_backend(backend, table.device.type) for table in tables]
    _note_changes([*params, *mss])
    for table, chosen in zip(tables, backends, strict=True):
        chosen.update_(table, hyperparameters)


def _check_lists(**lists: Sequence[ArrayLike]) -> None:
    for name, arrays in lists.items():
        if not isinstance(arrays, (list, tuple)):
            raise TypeError(
                f"{name} must be a list or tuple of arrays or tensors, got {type(arrays).__name__}"
            )
    lengths = {name: len(arrays) for name, arrays in lists.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"params, grads and mss must be of one length, got {lengths}")


def _note_changes(changed: Sequence[ArrayLike]) -> None:
    """Tells autograd that tensors are written: before they are, as it may refuse."""
    torch.autograd.graph.increment_version(
        [array for array in changed if isinstance(array, torch.Tensor)]
    )
