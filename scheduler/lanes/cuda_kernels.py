"""The kernels of the update as the loop of CUDA lanes launches them, and as a graph does.

This module needs Triton, for its kernels' constants.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from hogstream.kernels.backends.triton_launch import EXPONENTS, STORAGE, switch_constants
from hogstream.kernels.hyperparameters import Switches
from hogstream.scheduler.lanes.base import LaneSettings
from hogstream.scheduler.lanes.cuda_device import CudaDevice, Function
from hogstream.scheduler.lanes.cuda_launch import KERNEL


class UpdateKernels(NamedTuple):
    """What an update launches.

    Attributes:
        update: The kernel of the update.
        finite: That which looks at its gradient first; None if nobody asks.
        block: How many elements a program of either takes.
    """

    update: Function
    finite: Function | None
    block: int

    def words(self) -> Any:
        """As the loop reads them: int64, shape (``KERNEL``,)."""
        words = np.zeros(KERNEL, np.int64)
        words[:3] = self.update
        if self.finite is not None:
            words[3:6] = self.finite
        words[6] = self.block
        return words


def update_kernels(device: CudaDevice, settings: LaneSettings, switches: Switches) -> UpdateKernels:
    """The kernels of updates, compiled and loaded when they are first asked for.

    Args:
        device: Where.
        settings: What is the same for all updates.
        switches: Of the updates.
    """
    dtype, race_block = settings.shared.flat.dtype, settings.backend.race_block
    assert race_block is not None
    block = race_block(dtype, settings.shared.flat.device)
    constants = {
        "STORAGE": STORAGE[dtype],
        "GRAD_STORAGE": STORAGE[dtype],
        **switch_constants(switches),
        "SCALED": False,
        "LR_ON_DEVICE": False,
        "CHECKED": settings.check_finite,
        "BLOCK": block,
        "COUNTED": settings.races is not None,
    }
    update = device.function("rmsprop_kernel", constants)
    if not settings.check_finite:
        return UpdateKernels(update, None, block)
    bits, exponent = EXPONENTS[dtype]
    constants = {"BITS": bits, "EXPONENT": exponent, "BLOCK": block}
    return UpdateKernels(update, device.function("finite_kernel", constants), block)
