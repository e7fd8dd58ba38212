"""Buffers of a module, such as running statistics: those that are shared, and workers' own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hogstream.scheduler.memory import allocate_zeros

Buffers = Mapping[str, torch.Tensor]


def buffers_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's own buffers by name, tied ones once, but for sparse ones."""
    return {
        name: buffer for name, buffer in module.named_buffers() if buffer.layout == torch.strided
    }


def make_rows(buffers: Buffers, workers: int) -> dict[str, torch.Tensor]:
    """A row of each buffer for each worker, shape (workers, *shape): copies of it.

    Raises:
        MemoryError: If they do not fit the device.
    """
    rows = {
        name: allocate_zeros(
            f"worker_buffers of {name}", (workers, *buffer.shape), buffer.dtype, buffer.device
        )
        for name, buffer in buffers.items()
    }
    fill_rows(rows, buffers)
    return rows


def fill_rows(rows: Buffers, buffers: Buffers) -> None:
    """Copies each buffer into all its rows."""
    with torch.no_grad():
        for name, buffer in buffers.items():
            rows[name].copy_(buffer.expand_as(rows[name]))


def average_rows(rows: Buffers, buffers: Buffers, updates: Sequence[int]) -> None:
    """Writes what workers have made of their rows into the buffers.

    That is the mean, for floating-point and complex ones, over the workers that had an update;
    for others, which have no mean, the row of the worker that had most.

    Args:
        rows: Of shape (workers, *shape) each.
        buffers: By the same names.
        updates: How many updates each worker had; if none had any, nothing changes.
    """
    taking_part = [worker for worker, count in enumerate(updates) if count]
    if not taking_part:
        return
    most = max(taking_part, key=lambda worker: updates[worker])
    with torch.no_grad():
        for name, buffer in buffers.items():
            if buffer.is_complex() or buffer.is_floating_point():
                wide = torch.complex128 if buffer.is_complex() else torch.float64
                buffer.copy_(rows[name][taking_part].to(wide).mean(dim=0))
            else:
                buffer.copy_(rows[name][most])
