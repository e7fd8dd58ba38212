"""A3C on Atari's Pong, with the paper's preprocessing, network and numbers."""

from __future__ import annotations

from functools import partial

from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.scheduler.schedules import LinearDecay
from hogstream.workloads.a3c import A3C
from hogstream.workloads.a3c_workload import A3CWorkload
from hogstream.workloads.atari import Atari, AtariNetwork
from hogstream.workloads.workload import Target

ACTIONS = 6
LEARNING_RATE = 7e-4

PONG = A3CWorkload(
    name="pong",
    make_network=partial(AtariNetwork, ACTIONS),
    make_environment=partial(Atari, "ALE/Pong-v5"),
    numbers=A3C(t_max=5, clip_rewards=True),
    hyperparameters=Hyperparameters(lr=LEARNING_RATE, alpha=0.99, eps=0.1),
    lr_schedule=LinearDecay(LEARNING_RATE, updates=16_000_000),  # 80 million decisions
    target=Target("mean score of 100 episodes", 18.0),
    seconds=24 * 3600.0,
)
