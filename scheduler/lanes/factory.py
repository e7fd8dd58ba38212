"""Which lanes a device has, opened; and what is compiled for them before."""

from __future__ import annotations

import torch

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from hogstream.kernels.race_counters import RaceCounters
from hogstream.scheduler.lanes.base import Deliver, Lanes, LaneSettings
from hogstream.scheduler.lanes.mutex import has_timed_lock


def open_lanes(settings: LaneSettings, count: int, depth: int, deliver: Deliver) -> Lanes:
    """Opens lanes on the device of the shared parameters: CUDA streams, or CPU threads.

    Args:
        settings: What is the same for all updates.
        count: How many lanes.
        depth: How many updates and snapshots may be in flight on each.
        deliver: Takes what has landed.

    Raises:
        ValueError: If there are no lanes for the device, or none that count races in this system.
        RuntimeError: If the device refuses; nothing is left open.
    """
    device = settings.shared.flat.device
    if device.type == "cuda":
        from hogstream.scheduler.lanes.cuda import CudaLanes

        return CudaLanes(settings, count, deliver)
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
    if _takes_compiled_loop(settings):
        from hogstream.scheduler.lanes import native

        native.warm_up(settings, hyperparameters)
        return
    shared = settings.shared
    spare = Operands(
        *(torch.zeros_like(each[:1]) for each in (shared.flat, shared.flat, shared.ms))
    )
    whole, device = LaunchTable([spare]), shared.flat.device
    if device.type != "cuda":
        settings.backend.update_(whole, hyperparameters)
        return
    verdict = torch.empty(1, dtype=torch.int32, device=device) if settings.check_finite else None
    if (races := settings.races) is not None:
        counters = RaceCounters.zeros(1, races.block, device)
        settings.backend.kernel(whole, hyperparameters, counters=counters, verdict=verdict)
        return
    for table in (whole, LaunchTable([spare, spare])):  # for updates of parts
        settings.backend.kernel(table, hyperparameters, verdict=verdict)


def _takes_compiled_loop(settings: LaneSettings) -> bool:
    """Whether CPU lanes run compiled code; not where the system lacks what that calls, as macOS."""
    return settings.backend.name == "numba" and has_timed_lock()
