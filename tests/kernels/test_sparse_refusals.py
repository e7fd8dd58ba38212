"""What an update of rows refuses, before anything has changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hogstream.kernels import sparse_rmsprop_

INT64 = torch.int64


def operands() -> dict[str, Any]:
    """Those of an update that is not refused: 3 of 4 rows of 2 elements."""
    return {
        "param": torch.ones(4, 2),
        "rows": torch.tensor([3, 0, 3]),
        "grads": torch.ones(3, 2),
        "ms": torch.ones(4, 2),
    }


LAZY: dict[str, Any] = {"lazy_decay": True, "last_update": torch.zeros(4, dtype=INT64), "number": 1}

REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    # Rows
    ({"rows": torch.tensor([0, 4, -1])}, IndexError, "rows must be >= 0 and < 4.* got 4 at 1"),
    ({"rows": torch.tensor([0, 3, -1])}, IndexError, "rows must be >= 0 and < 4.* got -1 at 2"),
    ({"rows": torch.tensor([0, 1 << 40, 0])}, IndexError, "got 1099511627776 at 1"),
    ({"rows": torch.tensor([0, 1])}, ValueError, r"grads must .* shape \(2, 2\), got .*\(3, 2\)"),
    ({"rows": torch.zeros(3)}, TypeError, "rows must be int32 or int64, got float32"),
    ({"rows": torch.zeros(3, dtype=torch.bool)}, TypeError, "rows must .* got bool"),
    ({"rows": np.zeros(3, np.int16)}, TypeError, "rows must be native int32 or int64, got int16"),
    ({"rows": [0, 1, 2]}, TypeError, "rows must be a NumPy array or a torch tensor, got list"),
    ({"rows": torch.zeros(3, 1, dtype=INT64)}, ValueError, r"rows must .* \(k,\), got .*\(3, 1\)"),
    ({"rows": torch.zeros(6, dtype=INT64)[::2]}, ValueError, "rows must .*contiguous.*\\(2,\\)"),
    ({"rows": np.zeros(6, np.int64)[::-2]}, ValueError, "rows must be contiguous"),
    ({"rows": torch.zeros(3, dtype=INT64, device="meta")}, ValueError, "rows must be on cpu"),
    # Gradients
    ({"grads": torch.ones(3, 3)}, ValueError, r"grads must .* \(3, 2\), got strided, \(3, 3\)"),
    ({"grads": torch.ones(3, 2, dtype=INT64)}, TypeError, "grads must be float16.* got int64"),
    ({"grads": torch.ones(2, 3).T}, ValueError, r"grads must be contiguous.* \(1, 3\)"),
    ({"grads": torch.ones(3, 2, device="meta")}, ValueError, "grads must be on cpu .*got meta"),
    ({"grads": torch.ones(3, 2).to_sparse()}, ValueError, "grads must be dense .*sparse_coo"),
    ({"grads": torch._neg_view(torch.ones(3, 2))}, ValueError, "grads must .*negated"),
    # The table and its state
    ({"param": torch.ones(8)}, ValueError, r"param must have shape \(N, D\), got \(8,\)"),
    ({"param": torch.ones(2, 4).T}, ValueError, r"param must be contiguous.* \(1, 4\)"),
    ({"param": torch.ones(4, 2, dtype=INT64)}, TypeError, "param must be float16.* got int64"),
    ({"ms": torch.ones(4)}, ValueError, r"ms must .* \(4, 2\), got strided, \(4,\)"),
    ({"rowwise": True}, ValueError, r"ms must .* \(4,\), got strided, \(4, 2\)"),
    ({"ms": torch.ones(4, 2, dtype=torch.float64)}, TypeError, "ms must be float32, got float64"),
    ({"ms": np.ones((4, 2), np.float64)}, TypeError, "ms must be float32, got float64"),
    # Options
    ({"centered": True}, ValueError, "grad_avg must be given with centered, got None"),
    ({"momentum": 0.9}, ValueError, "momentum_buffer must be given with momentum, got None"),
    (
        {"centered": True, "rowwise": True},
        ValueError,
        "centered must be False with rowwise=True.* got True",
    ),
    ({**LAZY, "momentum": 0.9}, ValueError, "momentum must be 0 with lazy_decay=True.* got 0.9"),
    ({**LAZY, "last_update": None}, ValueError, "last_update must be given with lazy_decay"),
    ({**LAZY, "number": None}, ValueError, "number must be given with lazy_decay, got None"),
    ({**LAZY, "number": 0}, ValueError, r"number must be >= 1 and < 2\*\*63, got 0"),
    ({**LAZY, "number": 1.0}, TypeError, "number must be an integer >= 1, got 1.0"),
    ({**LAZY, "lazy_decay": False}, ValueError, "last_update must be None without lazy_decay"),
    ({"number": 3}, ValueError, "number must be None without lazy_decay, got int"),
    (
        {**LAZY, "last_update": torch.zeros(4, dtype=torch.int32)},
        TypeError,
        "last_update must be int64, got int32",
    ),
    ({"rowwise": 1}, TypeError, "rowwise must be True or False, got 1"),
    ({"lazy_decay": None}, TypeError, "lazy_decay must be True or False, got None"),
    ({"lr": -1.0}, ValueError, "lr must be a finite number >= 0, got -1.0"),
    ({"eps": 1e-60}, ValueError, "eps must be a number that float32"),
    ({"backend": "cuda"}, ValueError, "backend must be one of"),
    ({"verdict": torch.zeros(1, dtype=torch.int32)}, ValueError, "verdict must be None on a CPU"),
]


@pytest.mark.parametrize(("changed", "error", "message"), REFUSED)
def test_nothing_changes(changed, error, message):
    given = operands() | changed
    kept = {name: each for name, each in given.items() if name in ("param", "ms", "last_update")}
    before = {
        name: each.clone() if isinstance(each, torch.Tensor) else each.copy()
        for name, each in kept.items()
        if each is not None
    }
    positional = [given.pop(name) for name in ("param", "rows", "grads", "ms")]
    with pytest.raises(error, match=message):
        sparse_rmsprop_(*positional, **given)
    for name, each in before.items():
        assert (kept[name] == each).all()


def test_shared_memory_is_refused():
    memory = torch.ones(16)
    param, ms = memory[:8].view(4, 2), memory[4:12].view(4, 2)
    with pytest.raises(ValueError, match="param and ms must not overlap in memory"):
        sparse_rmsprop_(param, torch.tensor([0]), torch.ones(1, 2), ms)


def test_a_read_only_table_is_refused():
    param = np.ones((4, 2), np.float32)
    param.flags.writeable = False
    with pytest.raises(ValueError, match="param must be writable"):
        sparse_rmsprop_(param, np.zeros(1, np.int64), np.ones((1, 2), np.float32), param.copy())
