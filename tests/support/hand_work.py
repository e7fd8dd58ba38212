"""Plain loops for processes by hand: functions of a module, which a spawned process can import."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from typing import Any

import numpy as np
import torch

from hogstream.profiling.measure.by_hand import HandRun


def tell_of_itself(run: HandRun) -> None:
    """Sends what it is and has, and adds 1 to the model under the lock at each update."""
    about = {
        "process": (run.process, run.processes),
        "extra": run.extra.item(),
        "threads": torch.get_num_threads(),
        "random": (torch.rand(()).item(), random.random(), np.random.random()),  # noqa: NPY002
    }
    weight = next(run.model.parameters())
    while run.going():
        run.send(about)
        with run.lock, torch.no_grad():
            weight.add_(1)
        run.landed(float(run.process))


def do_as_told(run: HandRun) -> None:
    """What ``run.extra`` has for this process: to fail, die, or hang."""
    told = run.extra[run.process]
    while run.going():
        if told == "fail":
            raise LookupError("no such batch")
        if told == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if told == "hang":
            threading.Event().wait()
        time.sleep(1e-3)
        run.landed()


class OneProcess:
    """A run in this process, of so many updates."""

    process, processes = 0, 1

    def __init__(self, model: torch.nn.Module, updates: int) -> None:
        self.model, self.updates = model, updates
        self.losses: list[float | None] = []
        self.sent: list[Any] = []
        self.lock = multiprocessing.Lock()
        self.held: list[bool] = []

    def going(self) -> bool:
        return len(self.losses) < self.updates

    def landed(self, loss: float | None = None) -> None:
        self.losses.append(loss)

    def send(self, value: Any) -> None:
        self.sent.append(value)


def first_weight(model: torch.nn.Module) -> float:
    """The first number of the first parameter."""
    return next(model.parameters()).flatten()[0].item()


def line_and_batches(run: HandRun) -> tuple[Any, Any]:
    """Mean square of a line's error, and two batches in a list."""

    def loss(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(batch), 3 * batch)

    return loss, [torch.ones(4, 1), torch.full((4, 1), 2.0)]


def nothing_left(run: HandRun) -> tuple[Any, Any]:
    """Batches that have run out."""
    return None, iter(())
