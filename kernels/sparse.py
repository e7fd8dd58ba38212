"""RMSprop updates in place of some rows of a table, such as an embedding's."""

from __future__ import annotations

import torch

from hogstream.kernels.backends.select import RowBackend, select_row_backend
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.operands import ArrayLike
from hogstream.kernels.rmsprop import check_state, note_changes
from hogstream.kernels.rows import RowUpdate, check_row_operands, check_row_options


def sparse_rmsprop_(
    param: ArrayLike,
    rows: ArrayLike,
    grads: ArrayLike,
    ms: ArrayLike,
    *,
    lazy_decay: bool = False,
    rowwise: bool = False,
    last_update: ArrayLike | None = None,
    number: int | None = None,
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
    verdict: torch.Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Updates some rows of ``param`` and its state in place by one step of RMSprop.

    Gradients of the same row are summed first, in the compute type and in the order in which they
    stand. Then each row is updated as by ``rmsprop_``. No other row is read or written: the cost
    follows ``rows``, not the table. So weight decay reaches the rows that are touched, and state of
    all others stays as it is, as in TensorFlow's ``SparseApplyRMSProp``. All backends give the same
    bits.

    Nothing is changed if an argument is refused. Of no rows, or of rows without elements, nothing
    is: neither ``last_update``.

    Args:
        param: The table: shape (N, D), contiguous; float16, bfloat16 (tensors only), float32 or
            float64. A NumPy array or a tensor, as all that follow.
        rows: Which rows, in any order and as often as may be: int32 or int64, shape (k,).
        grads: Their gradients: shape (k, D), contiguous; any of the dtypes of ``param``.
        ms: Running mean of squared gradients, in the compute type: float64 for float64
            parameters, else float32. Shape (N, D), or (N,) if ``rowwise``. Starts at zero.
        lazy_decay: ``ms``, and ``grad_avg``, of a row decay by ``alpha**passed`` before it is
            updated, for the updates that have passed it by: as if each had brought a gradient of 0.
        rowwise: One ``ms`` for each row: of the mean of the squares over the row.
        last_update: Which update touched each row last: int64, shape (N,), if ``lazy_decay``; else
            None. Starts at zero.
        number: Of this update, from 1, if ``lazy_decay``; else None.
        grad_avg: Running mean of gradients, as ``ms``, if ``centered``; else None.
        momentum_buffer: As ``param``, in the compute type, if there is ``momentum``; else None.
        lr: Learning rate, finite and >= 0; this and what follows as for ``rmsprop_``.
        alpha: Decay of ``ms``, in [0, 1].
        eps: Finite and >= 0.
        weight_decay: Finite and >= 0.
        momentum: Decay of ``momentum_buffer``, finite and >= 0; 0 with ``lazy_decay``.
        centered: Divide by the standard deviation; not with ``rowwise``.
        lr_in_momentum: ``lr`` multiplies what goes into ``momentum_buffer``.
        eps_inside_sqrt: If false, divide by ``sqrt(ms) + eps``.
        decoupled_weight_decay: Shrink rows by ``1 - lr*weight_decay``.
        maximize: Ascend the gradient.
        verdict: On a GPU, where the kernel puts 1 if a row is not in the table, and then changes
            nothing; else 0: int32, shape (1,), on that GPU. If None, the call waits for that, and
            raises. On a CPU, where rows are checked first, None.
        backend: ``"triton"``, ``"numba"`` or ``"numpy"``; None picks by device.

    Raises:
        TypeError: If an operand, switch or number is of a wrong type or dtype.
        ValueError: If an operand does not fit, a number is out of range or more than the compute
            type can hold, options do not go together, or ``backend`` is unknown or cannot take
            these operands.
        IndexError: If a row is not in the table; on a GPU, only if ``verdict`` is None.
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
    check_row_options(hyperparameters, rowwise=rowwise, lazy_decay=lazy_decay)
    check_state(hyperparameters, grad_avg=grad_avg, momentum_buffer=momentum_buffer)
    number = _checked_number(lazy_decay, last_update, number)
    operands = check_row_operands(
        param,
        rows,
        grads,
        ms,
        grad_avg=grad_avg,
        momentum_buffer=momentum_buffer,
        last_update=last_update,
        rowwise=rowwise,
    )
    hyperparameters.check_held_by(operands.param.dtype)
    device = operands.param.device
    if device.type == "cpu" and verdict is not None:
        raise ValueError(f"verdict must be None on a CPU, got {type(verdict).__name__}")
    chosen = select_row_backend(backend, device.type)
    note_changes([param, ms, grad_avg, momentum_buffer, last_update])
    update = RowUpdate.of(operands, number)
    if device.type == "cpu":
        chosen.update_(update, hyperparameters)
    else:
        _update_on_device(chosen, update, hyperparameters, verdict)


def _update_on_device(
    chosen: RowBackend,
    update: RowUpdate,
    hyperparameters: Hyperparameters,
    verdict: torch.Tensor | None,
) -> None:
    """Updates rows of which the kernel finds whether they are in the table."""
    table = update.operands.param
    found = torch.empty(1, dtype=torch.int32, device=table.device) if verdict is None else verdict
    chosen.update_(update, hyperparameters, verdict=found)
    if verdict is None and found.item():
        raise IndexError(f"rows must be >= 0 and < {len(table)}, the rows of the table")


def _checked_number(lazy_decay: bool, last_update: ArrayLike | None, number: int | None) -> int:
    for name, given in (("last_update", last_update), ("number", number)):
        if lazy_decay and given is None:
            raise ValueError(f"{name} must be given with lazy_decay, got None")
        if not lazy_decay and given is not None:
            raise ValueError(f"{name} must be None without lazy_decay, got {type(given).__name__}")
    if number is None:
        return 1
    if isinstance(number, bool) or not isinstance(number, int):
        raise TypeError(f"number must be an integer >= 1, got {number!r}")
    if not 1 <= number < 1 << 63:
        raise ValueError(f"number must be >= 1 and < 2**63, got {number}")
    return number
