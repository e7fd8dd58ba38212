"""Row-wise updates against FBGEMM's CPU kernel of ``ROWWISE_RMSPROP_AR``.

    python scripts/fbgemm_rows.py FOLDER   # of an unpacked wheel of fbgemm-gpu-cpu 1.9.0

Its library asks for two functions of a later torch, which only its autograd wrappers call. Where
torch has none, they are defined to abort: that takes a C compiler, ``cc``.

FBGEMM has epsilon outside of the root, and its ``ema_beta`` is our ``alpha``: ``rowwise=True`` with
``eps_inside_sqrt=False`` and no decay is the same, but for rounding. It takes ``1 - alpha`` in
float32, which is inexact for most. Its staleness acts on weight decay alone, and not on ``ms``.
"""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path

import torch

from hogstream.kernels import sparse_rmsprop_

_LIBRARY = "fbgemm_gpu/fbgemm_gpu_tbe_training_backward.so"
_KERNEL = "split_embedding_nobag_backward_codegen_rowwise_rmsprop_ar_cpu"
_LR, _ROWS, _UPDATES = 0.01, 300, 50
_MISSING_MOST = 8


def load(library: str, folder: str) -> ctypes.CDLL:
    """Loads a library, with what torch lacks defined to abort.

    Raises:
        OSError: If it lacks something else.
    """
    for number in range(_MISSING_MOST):
        try:
            return ctypes.CDLL(library)
        except OSError as error:
            missing = re.search(r"undefined symbol: (\w+)", str(error))
            if missing is None:
                raise
        code = f"void abort(void); void {missing[1]}(void) {{ abort(); }}"
        stub = f"{folder}/stub{number}.so"
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-xc", "-", "-o", stub], input=code, text=True, check=True
        )
        ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
    raise OSError(f"{library} lacks too much of torch {torch.__version__}")


def update_by_fbgemm(
    table: torch.Tensor,
    rows: torch.Tensor,
    grads: torch.Tensor,
    ms: torch.Tensor,
    alpha: float,
    eps: float,
) -> None:
    """One update of one table in place."""
    none, first = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    touched = torch.zeros(len(table))
    getattr(torch.ops.fbgemm, _KERNEL)(
        grads, table.view(-1), none, first, table.shape[1], torch.tensor([0, len(table)]), 63,
        rows, torch.arange(len(rows) + 1), False, ms, none, first, touched, none, first,
        torch.tensor(_LR), eps, 0.0, 1, alpha, 0.0,
    )  # fmt: skip


def differences(alpha: float, eps: float, width: int, seed: int) -> tuple[float, float]:
    """After some updates: of parameters, over the largest; of mean squares, each over its own."""
    torch.manual_seed(seed)
    ours, ms = torch.randn(_ROWS, width), torch.zeros(_ROWS)
    theirs, their_ms = ours.clone(), ms.clone()
    for _ in range(_UPDATES):
        rows = torch.randint(_ROWS, (_ROWS,))
        grads = torch.randn(len(rows), width) * 10.0 ** torch.randint(-3, 2, (len(rows), 1))
        options = {"alpha": alpha, "eps": eps, "eps_inside_sqrt": False}
        sparse_rmsprop_(ours, rows, grads, ms, rowwise=True, lr=_LR, **options)  # type: ignore[arg-type]
        update_by_fbgemm(theirs, rows, grads, their_ms, alpha, eps)
    of_params = (ours - theirs).abs().max() / theirs.abs().max()
    seen = their_ms > 0
    return of_params.item(), ((ms - their_ms).abs() / their_ms)[seen].max().item()


def main() -> None:
    """Prints the largest differences for some decays."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kept = load(str(Path(sys.argv[1], _LIBRARY)), folder)
    for alpha in (0.9375, 0.9, 0.99, 0.999):
        found = [
            differences(alpha, eps, width, seed)
            for seed, (eps, width) in enumerate(product((1e-8, 0.1), (4, 64, 500)))
        ]
        of_params, of_ms = map(max, zip(*found, strict=True))
        print(f"alpha {alpha}: parameters {of_params:.1e}, mean squares {of_ms:.1e}")
    assert kept


if __name__ == "__main__":
    main()
