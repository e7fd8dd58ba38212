"""Marks what a profiler is to capture, and what runs under one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Set in the environment of what runs under a profiler, whose metrics are spoilt by it.
PROFILED = "HOGSTREAM_PROFILED"


def is_profiled() -> bool:
    """Whether a profiler spoils what is measured: then nothing of it is kept for later."""
    return PROFILED in os.environ


@contextmanager
def profiled() -> Iterator[None]:
    """Says so of what runs in the block."""
    before = os.environ.get(PROFILED)
    os.environ[PROFILED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PROFILED]


@contextmanager
def captured(device: torch.device) -> Iterator[None]:
    """Starts and stops CUDA's profilers around what is measured.

    Tools that were told to wait for it (``nsys --capture-range=cudaProfilerApi``,
    ``ncu --profile-from-start off``) leave out what comes before, such as ceilings and kernels
    alone; schedulers compile nothing new within, but warm up. Without such a tool it costs two
    waits for the device, on the CPU nothing. Nsight Systems captures the first such range only, so
    put one around everything.

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
