"""Asynchronous training: many workers, one set of parameters, a lane for each worker."""

from typing import TYPE_CHECKING, Any

from hogstream.scheduler.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from hogstream.scheduler.checks import SettingError
from hogstream.scheduler.context import Worker, WorkerContext, WorkerError
from hogstream.scheduler.lanes.cuda_events import cuda_event_done
from hogstream.scheduler.parameters import SharedParameters
from hogstream.scheduler.processes.process import ProcessDied
from hogstream.scheduler.processes.scheduler import ProcessScheduler
from hogstream.scheduler.report import RunReport
from hogstream.scheduler.scheduler import StreamScheduler
from hogstream.scheduler.schedules import LinearDecay, Progress
from hogstream.scheduler.settings import SchedulerSettings
from hogstream.scheduler.tracing.timeline import Timeline
from hogstream.scheduler.workers import ModelWorker, SimulatedWorker

if TYPE_CHECKING:
    from hogstream.scheduler.workers.native_worker import NativeWorker

__all__ = [
    "Checkpoint",
    "LinearDecay",
    "ModelWorker",
    "NativeWorker",
    "ProcessDied",
    "ProcessScheduler",
    "Progress",
    "RunReport",
    "SchedulerSettings",
    "SettingError",
    "SharedParameters",
    "SimulatedWorker",
    "StreamScheduler",
    "Timeline",
    "Worker",
    "WorkerContext",
    "WorkerError",
    "cuda_event_done",
    "load_checkpoint",
    "save_checkpoint",
]


def __getattr__(name: str) -> Any:
    """What needs Numba is imported when it is first asked for."""
    if name != "NativeWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hogstream.scheduler.workers.native_worker import NativeWorker

    return NativeWorker
