"""Memory for what workers share, with errors that say what did not fit and where."""

from __future__ import annotations

import math

import torch


def allocate_zeros(
    what: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A tensor of zeros.

    Args:
        what: What errors call it, such as ``"ms"``.
        shape: Its shape.
        dtype: Its dtype.
        device: Where it is to lie.

    Raises:
        MemoryError: If it does not fit; the message says how much was asked, and where.
    """
    try:
        return torch.zeros(shape, dtype=dtype, device=device)
    except RuntimeError as error:  # torch has no class of its own for a CPU
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "memory" not in str(error):
            raise
        asked = math.prod(shape) * dtype.itemsize
        raise MemoryError(f"{what} needs {asked:,} bytes on {device}{_free(device)}") from error


def _free(device: torch.device) -> str:
    if device.type != "cuda":
        return ", more than it can give"
    free, total = torch.cuda.mem_get_info(device)
    return f", of whose {total:,} bytes {free:,} are free"
