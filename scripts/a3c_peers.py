"""Trains CartPole by A3C with hogstream, by hand and with pfrl's own trainer, which take turns.

All have the same network, numbers and schedule of the learning rate, and a process for each worker.
The result is as that of ``hogstream train cartpole``. pfrl 0.4 with gym 0.26 is not among the
extras: where it is missing, it is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import shlex
import sys
import time
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import nn

from hogstream.profiling.measure.by_hand import HandReport
from hogstream.profiling.report import plots, sentences
from hogstream.profiling.results.files import write_result
from hogstream.profiling.results.gains import BY_HAND, CONTENDER
from hogstream.scheduler.schedules import Progress
from hogstream.workloads.a3c_workload import EPISODES
from hogstream.workloads.cartpole import CARTPOLE, CartPoleNetwork
from hogstream.workloads.rounds import TrainSettings, train
from hogstream.workloads.training import Contender, Limit, Outcome, Training, as_run_report
from hogstream.workloads.watch import Point
from hogstream.workloads.workload import Workload

PFRL = "pfrl"
STEPS = 10**9  # more than there is time for
MOST_EPISODES = 200_000  # that are told; instead of more, the last


def main() -> None:
    """Measures, and writes a result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=CARTPOLE.seconds, help="of a training")
    parser.add_argument("--processes", type=int, default=CARTPOLE.processes)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--plot", type=Path, required=True, help="a .png, .svg or .pdf")
    asked = parser.parse_args()
    if find_spec(PFRL) is None:
        print("pfrl is left out, as it is not installed: pip install pfrl==0.4.0 gym==0.26.2")
    settings = PeerSettings(
        device=torch.device("cpu"),
        backend="numba",
        policies=[CONTENDER],
        beside=True,
        processes=asked.processes,
        limit=Limit(None, asked.seconds),
        rounds=asked.rounds,
        seed=0,
        scheduling=CARTPOLE.settings,
    )
    command = shlex.join(["python", *sys.argv])
    measured = train(CARTPOLE, settings, command, print, make_training=make_training)
    write_result(measured, asked.json)
    plots.write_training(measured, asked.plot)
    print("\n".join(sentences.of_train(measured)))


class PeerSettings(TrainSettings):
    """How all train; among them is pfrl, where it is installed."""

    def contenders(self, workload: Workload) -> list[Contender]:
        """Lock-free, by hand, and pfrl."""
        several = [
            each for each in super().contenders(workload) if each.name in (CONTENDER, BY_HAND)
        ]
        if find_spec(PFRL) is not None:
            several.append(Contender(PFRL, self.scheduling, self.processes))
        return several


def make_training(
    workload: Workload, contender: Contender, device: torch.device, limit: Limit, *more: Any
) -> Training:
    """A training of whoever it is."""
    kind = PfrlTraining if contender.name == PFRL else Training
    return kind(workload, contender, device, limit, *more)


class Told(NamedTuple):
    """What a training of pfrl has come to: times are seconds since its start.

    Attributes:
        updates: How many were made.
        seconds: How long it took.
        points: When an episode ended, after how many updates, and the mean score of the last.
    """

    updates: int
    seconds: float
    points: list[Point]


class PfrlTraining(Training):
    """A training by pfrl."""

    async def run(self) -> None:
        """Trains until the target or the limit.

        Raises:
            RuntimeError: If it failed.
        """
        contender, seconds = self.contender, self._limit.seconds
        assert seconds is not None
        told = await asyncio.to_thread(train_pfrl, self._seed, seconds, contender.processes)
        made = [told.updates // contender.processes] * contender.processes
        made[0] += told.updates - sum(made)
        report = HandReport(made, told.seconds, partial=False, torch_threads=1)
        end = told.points[-1]
        self.outcome = Outcome(
            report=as_run_report(PFRL, report, CARTPOLE.model(self._device)),
            whole=True,
            reached=CARTPOLE.target.is_reached_by(end.value),
            end=end,
            points=told.points,
            losses=[],
            evaluating=0.0,
        )


def train_pfrl(seed: int, seconds: float, processes: int) -> Told:
    """Trains in a process of its own: pfrl forks, which one with threads had better not do."""
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_pfrl, args=(send, seed, seconds, processes))
    process.start()
    send.close()
    try:
        return Told(*receive.recv())
    except EOFError:
        raise RuntimeError("pfrl's training failed, and has said why") from None
    finally:
        process.join()


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
        self._points = context.Array("d", len(Point._fields) * MOST_EPISODES, lock=False)

    def wait(self) -> None:
        """Until all processes are there; the clock starts then."""
        self._ready.wait(60.0)  # so that none waits for one that has failed

    def note(self, score: float) -> None:
        """Takes down the score of an episode that has ended."""
        with self._count.get_lock():
            if self.stop.is_set():
                return
            now, count = time.perf_counter() - self._start.value, self._count.value
            self._last[count % EPISODES] = score
            self._count.value = count + 1
            mean = sum(self._last) / EPISODES if count + 1 >= EPISODES else math.nan
            width, row = len(Point._fields), min(count, MOST_EPISODES - 1)
            self._points[width * row : width * (row + 1)] = now, self.updates.value, mean
            if mean >= CARTPOLE.target.value or now > self._seconds:
                self._end.value = now
                self.stop.set()

    def told(self) -> Told:
        """What has come of it."""
        width = len(Point._fields)
        count = min(self._count.value, MOST_EPISODES)
        rows = (self._points[width * row : width * (row + 1)] for row in range(count))
        points = [Point(at, int(updates), value) for at, updates, value in rows]
        return Told(self.updates.value, self._end.value, points)

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
    end.send(tuple(scores.told()))


if __name__ == "__main__":
    main()
