"""Runs one worker under each policy, in turns, and says what lock-free gains and costs."""

import asyncio
from statistics import mean, median

import torch

from hogstream.profiling.results.confidence import ratio_interval
from hogstream.scheduler import RunReport, SharedParameters, SimulatedWorker, StreamScheduler

POLICIES = ("lock-free", "locked", "ordered")
WORKERS, ELEMENTS, ROUNDS, SECONDS = 4, 1 << 16, 5, 0.1  # to measure, a second each


async def run(policy: str) -> RunReport:
    """One turn. Put a ``ModelWorker`` of your model in the place of the simulated one."""
    shared = SharedParameters({"flat": torch.zeros(ELEMENTS)})
    gradients = [torch.randn(ELEMENTS) for _ in range(2 * WORKERS)]
    worker = SimulatedWorker(gradients, workers=WORKERS)
    async with StreamScheduler(shared, workers=WORKERS, policy=policy, depth=2) as scheduler:
        return await scheduler.run(worker, seconds=SECONDS)


async def main() -> None:
    """Measures, and prints a table."""
    reports: dict[str, list[RunReport]] = {policy: [] for policy in POLICIES}
    for number in range(ROUNDS):
        first = number % len(POLICIES)  # each goes first in its turn
        for policy in POLICIES[first:] + POLICIES[:first]:
            reports[policy].append(await run(policy))
    speeds = {name: [each.updates_per_second for each in of] for name, of in reports.items()}
    print(f"{'policy':<10} {'updates/s':>10} {'staleness':>10}")
    for policy in POLICIES:
        staleness = mean(each.to_dict()["staleness"]["mean"] for each in reports[policy])
        print(f"{policy:<10} {median(speeds[policy]):>10,.0f} {staleness:>10.1f}")
    stronger = max(POLICIES[1:], key=lambda policy: median(speeds[policy]))
    gain = ratio_interval(speeds["lock-free"], speeds[stronger], paired=True)
    if gain is not None:  # None if the baseline stood still in a round
        interval = f"95 %: {gain.low:.2f} to {gain.high:.2f}"
        print(f"gain of lock-free over {stronger}: {gain.median:.2f}x ({interval})")


if __name__ == "__main__":
    asyncio.run(main())
