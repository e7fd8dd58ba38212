"""Workers that are ready to run: of a model, and simulated ones for benchmarks."""

from hogstream.scheduler.workers.model_worker import ModelWorker
from hogstream.scheduler.workers.simulated_worker import SimulatedWorker

__all__ = ["ModelWorker", "SimulatedWorker"]
