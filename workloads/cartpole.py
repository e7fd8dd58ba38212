"""A3C on CartPole-v1 of gymnasium: a pole is kept upright for up to 500 steps, from 4 numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.scheduler.schedules import LinearDecay
from hogstream.workloads.a3c import A3C
from hogstream.workloads.a3c_workload import A3CWorkload
from hogstream.workloads.workload import Target

HIDDEN = 128
UPDATES = 40_000
LEARNING_RATE = 3e-3


class CartPoleNetwork(nn.Module):
    """A policy and values, each with a hidden layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = nn.Sequential(nn.Linear(4, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2))
        self.values = nn.Sequential(nn.Linear(4, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, shape (n, 2), and values, shape (n,), of observations, shape (n, 4)."""
        return self.policy(observations), self.values(observations)[:, 0]


def make_environment() -> Any:
    """One of gymnasium's."""
    import gymnasium

    return gymnasium.make("CartPole-v1", disable_env_checker=True)


CARTPOLE = A3CWorkload(
    name="cartpole",
    make_network=CartPoleNetwork,
    make_environment=make_environment,
    # As the paper, but for a reward of 0.05 and not 1, so that returns are of the size that they
    # are of in its games; and a gamma and a learning rate for episodes of 500 steps.
    numbers=A3C(t_max=20, gamma=0.98, reward_scale=0.05),
    hyperparameters=Hyperparameters(lr=LEARNING_RATE, alpha=0.99, eps=0.1),
    lr_schedule=LinearDecay(LEARNING_RATE, updates=UPDATES),
    target=Target("mean score of 100 episodes", 475.0),
    seconds=300.0,
)
