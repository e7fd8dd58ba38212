"""A3C as a workload: with the scheduler, and by hand as people write it."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.profiling.measure.by_hand import HandRun
from hogstream.scheduler import SchedulerSettings, SharedParameters
from hogstream.scheduler.schedules import LinearDecay, Progress
from hogstream.workloads.a3c import A3C, A3CWorker, Episode, MakeEnvironment, Player
from hogstream.workloads.workload import Target

#: A score is the mean of so many episodes, the last that have ended.
EPISODES = 100


@dataclass(frozen=True)
class A3CWorkload:
    """A ``Workload`` that plays: each worker in a process of its own, as Python runs environments.

    Attributes:
        name: What it is called in tables.
        make_network: Returns a new network, as ``Player`` takes it.
        make_environment: Returns a new environment.
        numbers: Of the algorithm.
        hyperparameters: Of shared RMSProp.
        lr_schedule: The learning rate in the course of a training.
        target: The mean score of ``EPISODES`` episodes to reach.
        seconds: When a training that has not reached it is given up, > 0.
        processes: Over how many processes workers are spread, if nothing else is asked for.
    """

    name: str
    make_network: Callable[[], nn.Module]
    make_environment: MakeEnvironment
    numbers: A3C
    hyperparameters: Hyperparameters
    lr_schedule: LinearDecay
    target: Target
    seconds: float
    processes: int = 2

    @property
    def settings(self) -> SchedulerSettings:
        """One worker a process, which reads a copy of the parameters for each rollout."""
        return SchedulerSettings(workers=1, read="snapshot", hyperparameters=self.hyperparameters)

    @property
    def by_hand(self) -> A3CByHand:
        """The same with ``torch.optim.RMSprop`` over shared state, under a lock."""
        return A3CByHand(self)

    def model(self, device: torch.device) -> nn.Module:
        """A new network."""
        return self.make_network().to(device)

    def worker(self, shared: SharedParameters, process: int) -> A3CWorker:
        """Plays in environments of its own."""
        return A3CWorker(shared, self.make_network, self.make_environment, self.numbers)

    def evaluate(self, model: nn.Module, results: Sequence[Episode]) -> float:
        """The mean score of the last episodes; NaN before there are as many."""
        if len(results) < EPISODES:
            return float("nan")
        return sum(episode.score for episode in results[-EPISODES:]) / EPISODES


@dataclass(frozen=True)
class A3CByHand:
    """A3C as one writes it with ``torch.multiprocessing``, torch's RMSprop and a lock.

    All processes have one state, as the paper's shared RMSProp. Torch has ``eps`` outside of the
    root, so it is given the root of ours: the smallest gradients have the same steps then.

    Attributes:
        of: What is trained.
        square_avg: The state, flat, in shared memory.
    """

    of: A3CWorkload
    square_avg: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        elements = sum(each.numel() for each in self.of.make_network().parameters())
        object.__setattr__(self, "square_avg", torch.zeros(elements).share_memory_())

    def __call__(self, run: HandRun) -> None:
        """The loop of a process."""
        shared = list(run.model.parameters())
        sizes = [each.numel() for each in shared]
        numbers = self.of.hyperparameters
        optimizer = torch.optim.RMSprop(
            shared, lr=numbers.lr, alpha=numbers.alpha, eps=numbers.eps**0.5
        )
        for parameter, average in zip(shared, self.square_avg.split(sizes), strict=True):
            state = {"step": torch.tensor(0.0), "square_avg": average.view_as(parameter)}
            optimizer.state[parameter] = state
        player = Player(copy.deepcopy(run.model), self.of.make_environment, self.of.numbers)
        made, start = 0, time.perf_counter()
        while run.going():
            player.network.load_state_dict(run.model.state_dict())
            grad, loss = player.gradient()
            for parameter, part in zip(shared, grad.split(sizes), strict=True):
                parameter.grad = part.view_as(parameter)
            progress = Progress(made * run.processes, time.perf_counter() - start)
            optimizer.param_groups[0]["lr"] = self.of.lr_schedule(progress)
            with run.lock:
                optimizer.step()
            made += 1
            run.landed(loss)
            if player.ended is not None:
                run.send(player.ended)
