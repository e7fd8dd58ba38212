"""A3C on CartPole: processes play, each with an environment of its own, and share the network."""

import asyncio
import sys
from typing import Any

import torch

from hogstream.scheduler import ProcessScheduler, SharedParameters
from hogstream.scheduler.schedules import LinearDecay
from hogstream.workloads.a3c import A3C, A3CWorker, Episode

PROCESSES = 2
UPDATES = int(sys.argv[1]) if len(sys.argv) > 1 else 40_000  # solved after some 30,000


class Network(torch.nn.Module):
    """A policy and values, each with a hidden layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = torch.nn.Sequential(
            torch.nn.Linear(4, 128), torch.nn.Tanh(), torch.nn.Linear(128, 2)
        )
        self.values = torch.nn.Sequential(
            torch.nn.Linear(4, 128), torch.nn.Tanh(), torch.nn.Linear(128, 1)
        )

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of actions, and values, of observations of shape (steps, 4)."""
        return self.policy(observations), self.values(observations)[:, 0]


def make_environment() -> Any:
    """Any of gymnasium's with discrete actions."""
    import gymnasium

    return gymnasium.make("CartPole-v1")


def make_worker(shared: SharedParameters, process: int) -> A3CWorker:
    """Called in each process, whose random numbers are seeded otherwise than another's."""
    numbers = A3C(t_max=20, gamma=0.98, entropy=0.01, reward_scale=0.05, max_grad_norm=40.0)
    return A3CWorker(shared, Network, make_environment, numbers)


async def main() -> None:
    """Trains, says how good the policy is now and then, and stops when it is good enough."""
    torch.manual_seed(0)
    shared = SharedParameters.from_module(Network())
    scores: list[float] = []

    def note(worker: int, episode: Episode) -> None:
        scores.append(episode.score)
        mean = sum(scores[-100:]) / len(scores[-100:])
        if len(scores) % 100 == 0:
            print(f"{len(scores)} episodes: {mean:.0f} steps on average of the last hundred")
        if len(scores) >= 100 and mean >= 475:
            scheduler.stop()

    scheduler = ProcessScheduler(
        shared, processes=PROCESSES, read="snapshot", lr=3e-3, alpha=0.99, eps=0.1
    )
    async with scheduler:
        report = await scheduler.run(
            make_worker,
            updates=UPDATES,
            on_result=note,
            lr_schedule=LinearDecay(3e-3, updates=40_000),
        )
    print(f"{report.updates} updates, {len(scores)} episodes, the longest {max(scores):.0f} steps")


if __name__ == "__main__":
    asyncio.run(main())
