"""Marks what a profiler is to capture."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def captured(device: torch.device) -> Iterator[None]:
    """Starts and stops CUDA's profilers around what is measured.

    Tools that were told to wait for it (``nsys --capture-range=cudaProfilerApi``,
    ``ncu --profile-from-start off``) leave out compiling, warming up and checking. Without such a
    tool it costs two waits for the device, on the CPU nothing. Nsight Systems captures the first
    such range only, so put one around everything.

    Args:
        device: Where the measurement runs.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize(device)
    torch.cuda.profiler.start()
    try:
        yield
    finally:
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()
