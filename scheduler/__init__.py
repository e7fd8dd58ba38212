"""Asynchronous training: many workers, one set of parameters, a lane for each worker."""

from hogstream.scheduler.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from hogstream.scheduler.process_scheduler import ProcessScheduler
from hogstream.scheduler.run_report import RunReport
from hogstream.scheduler.shared_parameters import SharedParameters
from hogstream.scheduler.stream_scheduler import StreamScheduler
from hogstream.scheduler.timeline import Timeline
from hogstream.scheduler.worker_context import Worker, WorkerContext, WorkerError
from hogstream.scheduler.worker_process import ProcessDied
from hogstream.scheduler.workers import ModelWorker, SimulatedWorker

__all__ = [
    "Checkpoint",
    "ModelWorker",
    "ProcessDied",
    "ProcessScheduler",
    "RunReport",
    "SharedParameters",
    "SimulatedWorker",
    "StreamScheduler",
    "Timeline",
    "Worker",
    "WorkerContext",
    "WorkerError",
    "load_checkpoint",
    "save_checkpoint",
]
