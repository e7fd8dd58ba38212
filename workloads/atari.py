"""Atari as the paper has it: what an agent sees of a game, and the network that plays it.

The paper is Mnih et al. 2016 (arXiv 1602.01783), which takes both from Mnih et al. 2013 (arXiv
1312.5602). ale-py brings the games.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

SIDE, STACK, SKIP = 84, 4, 4
NOOPS = 30

Frame = npt.NDArray[np.uint8]


class Atari:
    """A game, of which every fourth frame is seen, with what there was a moment ago.

    An observation is float32 in [0, 1], of shape (4, 84, 84): the last four frames that were seen,
    the newest last, each in grey, scaled down, and the brighter of two at each point, as some
    things are drawn in every other frame only. An action is held for four frames, and their rewards
    are added.
    """

    def __init__(self, game: str) -> None:
        """Opens it.

        Args:
            game: As gymnasium calls it, such as ``"ALE/Pong-v5"``.
        """
        import ale_py
        import gymnasium

        gymnasium.register_envs(ale_py)
        self._game = gymnasium.make(
            game, obs_type="grayscale", frameskip=1, repeat_action_probability=0.0
        )
        self._random = np.random.default_rng(0)
        self._seen = torch.zeros(STACK, SIDE, SIDE)

    def reset(self, seed: int | None = None) -> tuple[torch.Tensor, dict[str, Any]]:
        """Begins an episode, in which nothing is done for up to 30 frames.

        Args:
            seed: Of this and all later episodes; None to go on.
        """
        if seed is not None:
            self._random = np.random.default_rng(seed)
        frame, told = self._game.reset(seed=seed)
        for _ in range(int(self._random.integers(NOOPS + 1))):
            frame, _, terminated, truncated, _ = self._game.step(0)
            if terminated or truncated:
                frame, told = self._game.reset()
        self._seen = _seen(frame).expand(STACK, SIDE, SIDE).clone()
        return self._seen, told

    def step(self, action: int) -> tuple[torch.Tensor, float, bool, bool, dict[str, Any]]:
        """Holds an action for four frames, or until the episode ends."""
        rewards = 0.0
        frames: list[Frame] = []
        terminated = truncated = False
        told: dict[str, Any] = {}
        while len(frames) < SKIP and not (terminated or truncated):
            frame, reward, terminated, truncated, told = self._game.step(action)
            frames.append(frame)
            rewards += float(reward)
        brighter = np.maximum(*frames[-2:]) if len(frames) > 1 else frames[-1]
        self._seen = torch.cat([self._seen[1:], _seen(brighter)[None]])
        return self._seen, rewards, terminated, truncated, told


def _seen(frame: Frame) -> torch.Tensor:
    """A frame of any size, scaled to shape (84, 84), in [0, 1]."""
    grey = torch.from_numpy(frame)[None, None].float() / 255
    return functional.interpolate(grey, (SIDE, SIDE), mode="bilinear", antialias=True)[0, 0]


class AtariNetwork(nn.Module):
    """The paper's: 16 filters of 8x8, 32 of 4x4, 256 units, and from them a policy and a value."""

    def __init__(self, actions: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(STACK, 16, 8, stride=4), nn.ReLU()),
            *(nn.Conv2d(16, 32, 4, stride=2), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 9 * 9, 256), nn.ReLU()),
        )
        self.policy = nn.Linear(256, actions)
        self.values = nn.Linear(256, 1)

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits, (n, actions), and values, (n,), of observations, shape (n, 4, 84, 84)."""
        body = self.body(observations)
        return self.policy(body), self.values(body)[:, 0]
