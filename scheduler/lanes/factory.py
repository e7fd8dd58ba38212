"""Which lanes a device has, opened; and what is compiled for them before."""

from __future__ import annotations

import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from hogstream.scheduler.lanes import cuda_device
from hogstream.scheduler.lanes.base import Deliver, Lanes, LaneSettings
from hogstream.scheduler.lanes.mutex import has_timed_lock
from hogstream.scheduler.update_state import UpdateState


def open_lanes(settings: LaneSettings, count: int, depth: int, deliver: Deliver) -> Lanes:
    """Opens lanes on the device of the shared parameters: CUDA streams, or CPU threads.

    Args:
        settings: What is the same for all updates.
        count: How many lanes.
        depth: How many updates and snapshots may be in flight on each.
        deliver: Takes what has landed.

    Raises:
        ValueError: If there are no lanes for the device, or none that count races in this system.
        RuntimeError: If the device refuses, or Numba is missing on a GPU; nothing is left open.
    """
    device = settings.shared.flat.device
    if (gpu := cuda_device.gpu_of(device)) is not None:
        from hogstream.scheduler.lanes.cuda import CudaLanes

        return CudaLanes(settings, gpu, count, depth, deliver)
    if device.type != "cpu":
        raise ValueError(f"shared must be on a CUDA or CPU device, got {device}")
    if _takes_compiled_loop(settings):
        from hogstream.scheduler.lanes.native import NativeLanes

        return NativeLanes(settings, count, depth, deliver)
    if settings.races is not None:
        raise ValueError("telemetry must be off: this system cannot run the loop that counts races")
    from hogstream.scheduler.lanes.threads import ThreadLanes

    return ThreadLanes(settings, count, deliver)


def warm_up(settings: LaneSettings, hyperparameters: Hyperparameters) -> None:
    """Compiles whatever lanes need for updates of this form, before any worker can need it."""
    device = settings.shared.flat.device
    if (gpu := cuda_device.gpu_of(device)) is not None:
        from hogstream.scheduler.lanes import cuda

        cuda.warm_up(settings, gpu, hyperparameters)
    elif _takes_compiled_loop(settings):
        from hogstream.scheduler.lanes import native

        native.warm_up(settings, hyperparameters)
    elif device.type == "cpu":
        shared = settings.shared
        state = (shared.ms,) * len(UpdateState._fields)
        spare = Operands(
            *(torch.zeros_like(each[:1]) for each in (shared.flat, shared.flat, *state))
        )
        settings.backend.update_(LaunchTable([spare]), hyperparameters)


def _takes_compiled_loop(settings: LaneSettings) -> bool:
    """Whether CPU lanes run compiled code; not where the system lacks what that calls, as macOS."""
    return settings.backend.name == "numba" and has_timed_lock()
