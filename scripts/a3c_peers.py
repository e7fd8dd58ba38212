"""Trains CartPole by A3C with hogstream, by hand and with pfrl's own trainer, which take turns.

All have the same network, numbers and schedule of the learning rate, and a process for each worker.
For each seed a table says after how many seconds the mean score of the last 100 episodes first came
to some marks. pfrl 0.4 with gym 0.26 is not among the extras: where it is missing, it is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import time
from collections.abc import Mapping
from importlib.util import find_spec
from multiprocessing.connection import Connection
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from hogstream.profiling.results.gains import BY_HAND, CONTENDER
from hogstream.profiling.turns import in_turn
from hogstream.scheduler.schedules import Progress
from hogstream.workloads.a3c_workload import EPISODES
from hogstream.workloads.cartpole import CARTPOLE, CartPoleNetwork
from hogstream.workloads.training import Contender, Limit, Training

PFRL = "pfrl"
MARKS = (50.0, 100.0, 200.0, 300.0, 400.0, CARTPOLE.target.value)
STEPS = 10**9  # more than there is time for

#: Seconds at which each mark was first reached; those that were not are missing.
Firsts = Mapping[float, float]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--seconds", type=float, default=CARTPOLE.seconds, help="of a training")
    parser.add_argument("--processes", type=int, default=CARTPOLE.processes)
    options = parser.parse_args()
    ways = [CONTENDER, BY_HAND, PFRL]
    if find_spec(PFRL) is None:
        print("pfrl is left out, as it is not installed: pip install pfrl==0.4.0 gym==0.26.2")
        ways.remove(PFRL)
    for index, seed in enumerate(options.seeds):
        print(f"\nseed {seed:<10}" + "".join(f"{mark:>8g}" for mark in MARKS) + "    updates/s")
        for way in in_turn(ways, index):
            train = train_pfrl if way == PFRL else train_ours
            firsts, rate = train(way, seed, options.seconds, options.processes)
            told = [f"{firsts[mark]:7.1f}s" if mark in firsts else f"{'-':>8}" for mark in MARKS]
            print(f"{way:<15}" + "".join(told) + f"{rate:13,.0f}", flush=True)


def train_ours(way: str, seed: int, seconds: float, processes: int) -> tuple[Firsts, float]:
    """With the scheduler, or by hand; also how many updates/s that were."""
    contender = Contender(way, CARTPOLE.settings.with_policy(CONTENDER), processes)
    limit = Limit(None, seconds)
    training = Training(CARTPOLE, contender, torch.device("cpu"), limit, seed, None)
    asyncio.run(training.run())
    outcome = training.outcome
    assert outcome is not None
    firsts: dict[float, float] = {}
    for point in outcome.points:
        for mark in MARKS:
            if point.value >= mark:
                firsts.setdefault(mark, point.time)
    return firsts, outcome.report.updates / outcome.report.seconds


def train_pfrl(_: str, seed: int, seconds: float, processes: int) -> tuple[Firsts, float]:
    """With pfrl, in a process of its own: it forks, which one with threads had better not do."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_pfrl, args=(send, seed, seconds, processes))
    process.start()
    send.close()
    try:
        firsts, rate = receive.recv()
    except EOFError:
        raise RuntimeError("pfrl's training failed, and has said why") from None
    finally:
        process.join()
    return firsts, rate


class Scores:
    """The last scores of all processes, which are forked with it; ends the training in time.

    Attributes:
        stop: Set at the target, or after the time.
        updates: How many were made.
    """

    def __init__(self, seconds: float, processes: int) -> None:
        context = multiprocessing.get_context("fork")
        self.stop = context.Event()
        self.updates = context.Value("q", 0)
        self._seconds = seconds
        self._start, self._end = context.Value("d", 0.0), context.Value("d", 0.0)
        self._ready = context.Barrier(processes, action=self._begin)
        self._count = context.Value("q", 0)
        self._last = context.Array("d", EPISODES, lock=False)
        self._firsts = context.Array("d", len(MARKS), lock=False)

    def wait(self) -> None:
        """Until all processes are there; the clock starts then."""
        self._ready.wait(60.0)  # so that none waits for one that has failed

    def note(self, score: float) -> None:
        """Takes down the score of an episode that has ended."""
        with self._count.get_lock():
            now = time.perf_counter() - self._start.value
            self._last[self._count.value % EPISODES] = score
            self._count.value += 1
            mean = sum(self._last) / EPISODES if self._count.value >= EPISODES else 0.0
            for index, mark in enumerate(MARKS):
                if mean >= mark and not self._firsts[index]:
                    self._firsts[index] = now
            if mean >= CARTPOLE.target.value or now > self._seconds:
                self._end.value = self._end.value or now
                self.stop.set()

    def told(self) -> tuple[Firsts, float]:
        """What ``train_pfrl`` returns."""
        firsts = {mark: at for mark, at in zip(MARKS, self._firsts, strict=True) if at}
        return firsts, self.updates.value / self._end.value

    def _begin(self) -> None:
        self._start.value = time.perf_counter()


class OldEnvironment:
    """CartPole as pfrl wants environments: with gym's old ``reset`` and ``step``.

    Rewards are scaled as ours are; scores are of those that were not.
    """

    def __init__(self, scores: Scores) -> None:
        self._scores = scores
        self._environment = CARTPOLE.make_environment()
        self._seed: int | None = int(torch.randint(1 << 31, ()))
        self._score = 0.0

    def reset(self) -> Any:
        """The first observation of a new episode."""
        if self._seed is not None:
            self._scores.wait()
        seen, _ = self._environment.reset(seed=self._seed)
        self._seed, self._score = None, 0.0
        return seen

    def step(self, action: Any) -> tuple[Any, float, bool, dict[str, Any]]:
        """Observation, reward, whether the pole has fallen, and whether a reset is needed."""
        seen, reward, terminated, truncated, _ = self._environment.step(int(action))
        self._score += reward
        if terminated or truncated:
            self._scores.note(self._score)
        scaled = reward * CARTPOLE.numbers.reward_scale
        return seen, scaled, terminated, {"needs_reset": truncated}

    def close(self) -> None:
        """Ends it."""
        self._environment.close()


class PfrlNetwork(nn.Module):
    """Our network, as pfrl wants it: a distribution of actions, and values of shape (n, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = CartPoleNetwork()

    def forward(self, x: torch.Tensor) -> tuple[torch.distributions.Distribution, torch.Tensor]:
        """Of observations, shape (n, 4)."""
        logits, values = self.network(x)
        return torch.distributions.Categorical(logits=logits), values[:, None]


def _pfrl(end: Connection, seed: int, seconds: float, processes: int) -> None:
    """Trains with pfrl, and sends what came of it."""
    import pfrl

    multiprocessing.set_start_method("fork", force=True)  # pfrl gives its processes closures
    numbers, hyperparameters = CARTPOLE.numbers, CARTPOLE.hyperparameters
    scores = Scores(seconds, processes)
    torch.manual_seed(seed)

    def anneal(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Before each step: counts it, and sets its learning rate."""
        with scores.updates.get_lock():
            made = scores.updates.value
            scores.updates.value += 1
        optimizer.param_groups[0]["lr"] = CARTPOLE.lr_schedule(Progress(made, 0.0))

    def make_agent(process: int) -> Any:
        model = PfrlNetwork()
        optimizer = pfrl.optimizers.SharedRMSpropEpsInsideSqrt(
            model.parameters(),
            lr=hyperparameters.lr,
            alpha=hyperparameters.alpha,
            eps=hyperparameters.eps,
        )
        optimizer.register_step_pre_hook(anneal)
        return pfrl.agents.A3C(
            model,
            optimizer,
            t_max=numbers.t_max,
            gamma=numbers.gamma,
            beta=numbers.entropy,
            v_loss_coef=2 * numbers.value,  # pfrl halves the squared error
            max_grad_norm=numbers.max_grad_norm,
        )

    def make_environment(process: int, test: bool) -> OldEnvironment:
        torch.set_num_threads(1)
        return OldEnvironment(scores)

    with TemporaryDirectory() as folder:
        pfrl.experiments.train_agent_async(
            folder,
            processes,
            make_environment,
            steps=STEPS,
            eval_interval=None,
            make_agent=make_agent,
            random_seeds=[processes * seed + index for index in range(processes)],
            stop_event=scores.stop,
        )
    end.send(scores.told())


if __name__ == "__main__":
    main()
