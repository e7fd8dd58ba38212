"""Asynchronous advantage actor-critic, A3C (Mnih et al. 2016, arXiv 1602.01783, algorithm S3).

Each worker plays an environment of its own with the policy as it read it, for some steps or to the
end of an episode, makes one gradient of what it has seen, and submits that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from hogstream.scheduler import SharedParameters, WorkerContext

#: Makes an environment of gymnasium, with discrete actions.
MakeEnvironment = Callable[[], Any]


@dataclass(frozen=True)
class A3C:
    """The numbers of the algorithm; the learning rate is the scheduler's.

    Attributes:
        t_max: Steps of a rollout at most.
        gamma: By which a reward counts less for each step that it lies ahead.
        entropy: Weight of the policy's entropy, which keeps it exploring.
        value: Weight of the squared error of values.
        clip_rewards: Whether rewards are cut off at -1 and 1, as the paper does on Atari.
        reward_scale: By which rewards are multiplied then.
        max_grad_norm: Gradients of a greater norm are scaled down to it.
    """

    t_max: int = 20
    gamma: float = 0.99
    entropy: float = 0.01
    value: float = 0.5
    clip_rewards: bool = False
    reward_scale: float = 1.0
    max_grad_norm: float = 40.0


class Episode(NamedTuple):
    """What a worker sends when an episode has ended.

    Attributes:
        score: The sum of its rewards, as the environment gave them.
        steps: How many there were.
    """

    score: float
    steps: int


class Rollout(NamedTuple):
    """Some steps that follow each other in one episode.

    Attributes:
        observations: Shape (steps, ...).
        actions: int64, shape (steps,).
        rewards: Of each step.
        last: The observation after them; None if the episode has ended there for good, and nothing
            is to be gained any more.
    """

    observations: torch.Tensor
    actions: torch.Tensor
    rewards: Sequence[float]
    last: torch.Tensor | None


class Player:
    """An environment that is played by a network, rollout after rollout.

    Attributes:
        network: Maps observations, shape (steps, ...), to logits of actions, shape (steps,
            actions), and values, shape (steps,).
        ended: The episode that the last rollout has ended, if it has.
    """

    def __init__(self, network: nn.Module, make_environment: MakeEnvironment, numbers: A3C) -> None:
        """Begins the first episode; it is seeded by torch's default generator."""
        self.network = network
        self.ended: Episode | None = None
        self._numbers = numbers
        self._environment = make_environment()
        self._parameters = list(network.parameters())
        self._score, self._steps = 0.0, 0
        seed = int(torch.randint(1 << 31, ()))
        self._observation = _copied(self._environment.reset(seed=seed)[0])

    def gradient(self) -> tuple[torch.Tensor, float]:
        """The gradient of a new rollout, flat, and its loss a step."""
        rollout = self._play()
        with torch.no_grad():
            ahead = 0.0 if rollout.last is None else self.network(rollout.last[None])[1].item()
        returns = n_step_returns(rollout.rewards, ahead, self._numbers.gamma)
        loss = a3c_loss(self.network, rollout, returns, self._numbers)
        for parameter in self._parameters:
            parameter.grad = None
        loss.backward()
        grad = torch.cat(
            [
                (torch.zeros_like(each) if each.grad is None else each.grad).reshape(-1)
                for each in self._parameters
            ]
        )
        norm = float(torch.linalg.vector_norm(grad))
        if norm > self._numbers.max_grad_norm:
            grad *= self._numbers.max_grad_norm / norm
        return grad, loss.item() / len(rollout.rewards)

    def _play(self) -> Rollout:
        observations: list[torch.Tensor] = []
        actions: list[int] = []
        rewards: list[float] = []
        terminated = truncated = False
        self.ended = None
        while len(rewards) < self._numbers.t_max and not (terminated or truncated):
            with torch.inference_mode():
                logits, _ = self.network(self._observation[None])
                action = int(torch.multinomial(logits[0].softmax(0), 1))
            observations.append(self._observation)
            actions.append(action)
            seen, reward, terminated, truncated, _ = self._environment.step(action)
            self._observation = _copied(seen)
            self._score += float(reward)
            self._steps += 1
            rewards.append(self._worth(float(reward)))
        last = None if terminated else self._observation
        if terminated or truncated:
            self.ended = Episode(self._score, self._steps)
            self._score, self._steps = 0.0, 0
            self._observation = _copied(self._environment.reset()[0])
        return Rollout(torch.stack(observations), torch.tensor(actions), rewards, last)

    def _worth(self, reward: float) -> float:
        """What a reward counts in returns."""
        if self._numbers.clip_rewards:
            reward = max(-1.0, min(reward, 1.0))
        return reward * self._numbers.reward_scale


def _copied(seen: Any) -> torch.Tensor:
    """An observation that stays, whatever the environment does with its own."""
    return torch.as_tensor(seen).clone()


def n_step_returns(rewards: Sequence[float], ahead: float, gamma: float) -> torch.Tensor:
    """What each step has gained in the end: ``R_t = r_t + gamma * R_(t+1)``.

    Args:
        rewards: Of each step.
        ahead: The return after the last.
        gamma: Discount of a step.

    Returns:
        float32, shape (steps,).
    """
    returns = []
    for reward in reversed(rewards):
        ahead = reward + gamma * ahead
        returns.append(ahead)
    return torch.tensor(returns[::-1])


def a3c_loss(
    network: nn.Module, rollout: Rollout, returns: torch.Tensor, numbers: A3C
) -> torch.Tensor:
    """The loss of a rollout, summed over its steps as the paper sums gradients.

    Of each step: ``-log p(action) * (R - V) - entropy * H(p) + value * (R - V)^2``, in which the
    advantage ``R - V`` of the first term counts as a constant.
    """
    logits, values = network(rollout.observations)
    log_p = functional.log_softmax(logits, dim=1)
    advantages = returns - values
    taken = log_p.gather(1, rollout.actions[:, None])[:, 0]
    entropies = -(log_p.exp() * log_p).sum(dim=1)
    policy = -(taken * advantages.detach()) - numbers.entropy * entropies
    loss: torch.Tensor = (policy + numbers.value * advantages.square()).sum()
    return loss


class A3CWorker:
    """Makes a gradient of each rollout, and sends each ``Episode`` when it has ended."""

    def __init__(
        self,
        shared: SharedParameters,
        make_network: Callable[[], nn.Module],
        make_environment: MakeEnvironment,
        numbers: A3C,
    ) -> None:
        """Starts nothing.

        Args:
            shared: The parameters, of a network like those that are made here.
            make_network: Called for each worker.
            make_environment: The same.
            numbers: Of the algorithm.
        """
        self._shared = shared
        self._make_network = make_network
        self._make_environment = make_environment
        self._numbers = numbers
        self._players: dict[int, tuple[torch.Tensor, Player]] = {}

    async def __call__(self, context: WorkerContext) -> None:
        """One iteration: a rollout, its gradient, the update."""
        player = self._player(context)
        grad, loss = await context.run_blocking(player.gradient)
        await context.submit(grad, loss=loss)
        if player.ended is not None:
            context.send(player.ended)

    def _player(self, context: WorkerContext) -> Player:
        """The worker's, whose network has the parameters that this context reads."""
        flat, player = self._players.get(context.index, (None, None))
        if player is None:
            player = Player(self._make_network(), self._make_environment, self._numbers)
        if flat is not context.flat:
            self._shared.attach(player.network, context.parameters)
            self._players[context.index] = context.flat, player
        return player
