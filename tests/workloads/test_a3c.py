"""A3C: returns and losses against the paper's equations, and workers that play."""

from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from hand_work import OneProcess
from hogstream.scheduler import SharedParameters, StreamScheduler
from hogstream.workloads.a3c import A3C, Episode, Player, Rollout, a3c_loss, n_step_returns
from hogstream.workloads.a3c_workload import A3CByHand, A3CWorkload
from hogstream.workloads.cartpole import CARTPOLE, CartPoleNetwork

pytest.importorskip("gymnasium")


def test_returns_are_those_of_a_case_by_hand() -> None:
    returns = n_step_returns([1.0, 0.0, 2.0], ahead=8.0, gamma=0.5)
    assert returns.tolist() == [1 + 0.5 * (0 + 0.5 * (2 + 0.5 * 8)), 0 + 0.5 * 6, 2 + 0.5 * 8]


def test_gradient_is_that_of_the_papers_equations() -> None:
    """In float64, written out step by step: what is summed there is the loss here."""
    torch.manual_seed(0)
    network = CartPoleNetwork().double()
    numbers = A3C(entropy=0.3, value=0.7)
    rollout = Rollout(
        torch.randn(5, 4, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1]), [1.0] * 5, None
    )
    returns = torch.randn(5, dtype=torch.float64)
    a3c_loss(network, rollout, returns, numbers).backward()
    mine = [each.grad.clone() for each in network.parameters() if each.grad is not None]
    network.zero_grad()
    for t in range(5):
        logits, value = network(rollout.observations[t : t + 1])
        p = logits[0].softmax(0)
        advantage = returns[t] - value[0]
        entropy = sum(-p[a] * p[a].log() for a in range(2))
        gains = p[rollout.actions[t]].log() * advantage.item() + 0.3 * entropy
        (-gains).backward(retain_graph=True)
        (0.7 * advantage**2).backward()
    theirs = [each.grad for each in network.parameters()]
    assert len(mine) == 8
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, other)


class Corridor:
    """Ends after three steps for good, or is cut off; a reward of 5 for each action 1."""

    def __init__(self, *, cut: bool = False) -> None:
        self.cut = cut
        self.seeds: list[int | None] = []

    def reset(self, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        self.seeds.append(seed)
        self.at = 0
        return np.zeros(4, np.float32), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.at += 1
        ends = self.at == 3
        seen = np.full(4, self.at, np.float32)
        return seen, 5.0 * action, ends and not self.cut, ends and self.cut, {}


class Sure(torch.nn.Module):
    """Always takes action 1, and values each state at 100 times a parameter, which is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def forward(self, observations: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.tensor([[-math.inf, 0.0]]).expand(len(observations), 2).nan_to_num()
        return logits + 0 * self.one, (100 * self.one).expand(len(observations))


def played(numbers: A3C, *, cut: bool, updates: int) -> tuple[list[float], list[Episode]]:
    """The losses and episodes of one worker that plays the corridor."""
    workload = replace(
        CARTPOLE, make_network=Sure, make_environment=lambda: Corridor(cut=cut), numbers=numbers
    )
    losses: list[float] = []
    episodes: list[Episode] = []

    async def play() -> None:
        shared = SharedParameters.from_module(workload.model(torch.device("cpu")))
        settings = replace(workload.settings, backend="numpy")
        async with StreamScheduler(shared, settings, lr=0.0) as scheduler:
            await scheduler.run(
                workload.worker(shared, 0),
                updates=updates,
                on_loss=lambda _, loss: losses.append(loss),
                on_result=lambda _, episode: episodes.append(episode),
            )

    asyncio.run(play())
    return losses, episodes


@pytest.mark.parametrize(
    ("numbers", "cut", "returns"),
    [
        # Two steps, what lies ahead is worth 100; then the last one of the episode.
        (A3C(t_max=2, gamma=0.5), False, [[5 + 0.5 * 55, 55], [5]]),
        (A3C(t_max=2, gamma=0.5), True, [[5 + 0.5 * 55, 55], [5 + 50]]),
        (A3C(t_max=9, gamma=0.5, clip_rewards=True), False, [[1.75, 1.5, 1]]),
        (A3C(t_max=9, gamma=0.5, reward_scale=2), False, [[17.5, 15, 10]]),
    ],
)
def test_worker_learns_from_what_it_has_played(
    numbers: A3C, cut: bool, returns: list[list[float]]
) -> None:
    """With a sure policy the loss is half the squares of returns less 100, and no entropy."""
    losses, episodes = played(numbers, cut=cut, updates=2 * len(returns))
    wanted = [sum((each - 100) ** 2 for each in some) / 2 / len(some) for some in returns]
    assert losses == pytest.approx(wanted * 2)
    assert episodes == [Episode(15.0, 3)] * 2


def test_gradient_is_clipped() -> None:
    for numbers, norm in ((A3C(), 40.0), (A3C(max_grad_norm=1e9), 100 * 85 + 100 * 90 + 100 * 95)):
        grad, _ = Player(Sure(), Corridor, replace(numbers, gamma=1.0)).gradient()
        assert abs(float(grad)) == pytest.approx(norm)


def test_score_is_that_of_the_last_hundred_episodes() -> None:
    episodes = [Episode(8.0, 1)] * 50 + [Episode(4.0, 1)] * 50
    model = CartPoleNetwork()
    assert math.isnan(CARTPOLE.evaluate(model, episodes[1:]))
    assert CARTPOLE.evaluate(model, episodes) == 6.0
    assert CARTPOLE.evaluate(model, episodes + [Episode(4.0, 1)] * 50) == 4.0


def test_training_by_hand_plays_as_the_worker_does() -> None:
    """It moves all parameters and the shared state, and sends what episodes came to."""
    workload: A3CWorkload = CARTPOLE
    model = workload.model(torch.device("cpu")).share_memory()
    before = [each.clone() for each in model.parameters()]
    by_hand: A3CByHand = workload.by_hand
    run: Any = OneProcess(model, 12)
    by_hand(run)
    assert len(run.losses) == 12
    assert all(math.isfinite(each) for each in run.losses)
    assert run.sent
    assert all(episode.score == episode.steps for episode in run.sent)
    assert by_hand.square_avg.is_shared()
    assert by_hand.square_avg.count_nonzero() > 0
    for now, then in zip(model.parameters(), before, strict=True):
        assert not torch.equal(now, then)


@pytest.mark.slow
def test_pong_is_seen_as_the_paper_has_it() -> None:
    pytest.importorskip("ale_py")
    from hogstream.workloads.pong import PONG

    game = PONG.make_environment()
    first, _ = game.reset(seed=1)
    assert (first.shape, first.dtype) == ((4, 84, 84), torch.float32)
    assert first.min() >= 0
    assert first.max() <= 1
    rewards = 0.0
    for _ in range(100):
        before = first
        first, reward, terminated, _, _ = game.step(2)
        assert torch.equal(first[:-1], before[1:])
        rewards += reward
        assert not terminated
    assert rewards < 0  # who does not follow the ball loses points
    again, _ = game.reset(seed=1)
    assert again.shape == (4, 84, 84)


@pytest.mark.slow
def test_newest_of_four_frames_is_the_brighter_of_two() -> None:
    """Beside the game itself, frame by frame: where something moves, both of its places are seen.

    What is lit up in all of the picture hardly depends on how that is scaled down.
    """
    pytest.importorskip("ale_py")
    import gymnasium

    from hogstream.workloads.pong import PONG

    ours = PONG.make_environment()
    ours.reset(seed=0)
    game = gymnasium.make(
        "ALE/Pong-v5", obs_type="grayscale", frameskip=1, repeat_action_probability=0.0
    )
    game.reset(seed=0)
    for _ in range(np.random.default_rng(0).integers(31)):
        game.step(0)
    moved = 0.0
    for _ in range(40):
        frames = [np.asarray(game.step(3)[0], np.float64) / 255 for _ in range(4)]
        seen = float(ours.step(3)[0][-1].mean())
        both, last = (each.mean() for each in (np.maximum(frames[2], frames[3]), frames[3]))
        assert abs(seen - both) < 1e-4
        moved = max(moved, both - last)
    assert moved > 3e-4


@pytest.mark.slow
def test_pong_is_trained() -> None:
    pytest.importorskip("ale_py")
    from hogstream.workloads.pong import PONG

    async def play() -> int:
        shared = SharedParameters.from_module(PONG.model(torch.device("cpu")))
        async with StreamScheduler(shared, PONG.settings) as scheduler:
            report = await scheduler.run(PONG.worker(shared, 0), updates=5)
        return report.updates

    assert asyncio.run(play()) == 5
