"""Sets what ``decide`` predicts of three models against what long runs then measure.

In some rounds, in turn, each way is opened again, alone, and trains for a while. A table says how
many updates/s were predicted, and how many there were. For a machine with nothing else to do: some
16 minutes.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from hogstream.profiling import decide
from hogstream.profiling.measure.problem import Make, checked_problem
from hogstream.profiling.measure.ways import Kind, way_of
from hogstream.profiling.results.records import Ratio
from hogstream.profiling.results.schema import Decision, Way
from hogstream.profiling.results.verdict import times
from hogstream.profiling.turns import in_turn
from model_rates import Recurrent

ROUNDS = 3

Batch = tuple[torch.Tensor, torch.Tensor]


def classify(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Cross entropy."""
    return functional.cross_entropy(model(batch[0]), batch[1])


def points(*shape: int) -> Iterator[Batch]:
    """Random points, and which of the first ten coordinates is the largest."""
    while True:
        x = torch.randn(*shape)
        yield x, x.flatten(1)[:, -10:].argmax(dim=1)


def linear() -> Any:
    """A large linear layer and few points: the update is most of an iteration."""
    return nn.Linear(4096, 256), classify, points(4, 4096)


def mlp() -> Any:
    """An MLP, whose update is a small part."""
    layers = nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    return nn.Sequential(*layers), classify, points(64, 64)


def lstm() -> Any:
    """Small operations one after the other: Python is much of an iteration."""
    return Recurrent(), classify, points(16, 20, 16)


MODELS: dict[str, Make] = {"linear": linear, "mlp": mlp, "lstm": lstm}


async def long_run(make: Make, way: Way, lr: float, seconds: float) -> float:
    """Updates/s of a way that is run alone."""
    kind = Kind(way.run_by, way.policy, way.workers)
    async with way_of(kind, checked_problem(make), make, lr) as opened:
        await opened.turn(min(1.0, seconds))  # in which what is needed once is made
        return float((await opened.turn(seconds)).updates_per_second)


def long_runs(make: Make, decision: Decision, seconds: float) -> dict[str, float]:
    """Updates/s of each way by name, the median of the rounds, which have so many seconds."""
    rates: dict[str, list[float]] = {way.name: [] for way in decision.results}
    for index in range(ROUNDS):
        for way in in_turn(decision.results, index):
            ran = long_run(make, way, decision.settings.lr, seconds / ROUNDS)
            rates[way.name].append(asyncio.run(ran))
    return {name: median(each) for name, each in rates.items()}


def compare(name: str, decision: Decision, seconds: float) -> None:
    """Prints prediction against measurement: each way's, and the answer's."""
    measured = long_runs(MODELS[name], decision, seconds)
    print(f"\n### {name}\n\n{decision.answer}\n")
    print("| way | predicted updates/s | 95 % | long runs | over the prediction |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for way in decision.results:
        speed, rate = way.updates_per_second, measured[way.name]
        interval = "-" if speed.interval is None else "{:,.0f} to {:,.0f}".format(*speed.interval)
        told = f"{rate:,.0f} | {rate / speed.median:.2f}x"
        print(f"| {way.name} | {speed.median:,.0f} | {interval} | {told} |")
    use = decision.results[decision.use]
    if decision.next_best is not None and decision.gain is not None:
        other = decision.results[decision.next_best]
        ratio = measured[use.name] / measured[other.name]
        print(
            f"\n{use.name} over {other.name}: predicted {times(decision.gain)}, in long runs "
            f"{ratio:.2f} times. Fastest in long runs: {max(measured, key=measured.__getitem__)}."
        )
    for cost in decision.under_lock:
        for spread_over in ("threads", "processes"):
            rates = [
                measured.get(f"{policy} over {spread_over} with {cost.workers} workers")
                for policy in ("lock-free", "locked")
            ]
            if rates[0] and rates[1]:
                most = Ratio(cost.most_gain.median, cost.most_gain.interval)
                print(
                    f"\nLock-free over locked, {spread_over}: at most {times(most)} by Amdahl's "
                    f"law, {rates[0] / rates[1]:.2f} times in long runs.",
                    flush=True,
                )


def main() -> None:
    """Decides for each model, and runs each way for long."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(MODELS), help="which, such as mlp,lstm")
    parser.add_argument("--decide-seconds", type=float, default=60.0, help="of each decide")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each way's long runs")
    parser.add_argument("--no-processes", action="store_true", help="leave processes out")
    given = parser.parse_args()
    for name in given.models.split(","):
        decision = decide(
            MODELS[name], seconds=given.decide_seconds, processes=not given.no_processes
        )
        compare(name, decision, given.seconds)


if __name__ == "__main__":
    main()
