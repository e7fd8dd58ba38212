"""Updates of rows of tables: what one costs, and lock-free against other policies.

Workers' steps are compiled: without the GIL they copy which rows come next, and their gradient.
This module needs Numba.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from hogstream.profiling.environment import describe_environment, free_memory
from hogstream.profiling.interruption import gather_until_interrupted
from hogstream.profiling.measure.row_kernels import measure_row_kernels
from hogstream.profiling.measure.runs import speed_of
from hogstream.profiling.measure.zipf import ZipfRows
from hogstream.profiling.results.confidence import Interval, spread_warnings
from hogstream.profiling.results.gains import ALONE, CONTENDER, gains_of
from hogstream.profiling.results.rows_schema import (
    RowBench,
    RowBenchSettings,
    RowKernel,
    RowRun,
)
from hogstream.profiling.turns import in_turn
from hogstream.profiling.wording import counted, size_name
from hogstream.scheduler import (
    NativeWorker,
    RunReport,
    SchedulerSettings,
    SharedParameters,
    StreamScheduler,
)

ROUNDS = 7
# Rows that are drawn beforehand; workers go through them again and again.
_DRAWN = 1 << 21
_WARM_UP_UPDATES = 1000
# Bytes an element of all tables, whose kernels take turns: the table, and its ms.
_KERNEL_BYTES = 8
# Bytes an element of one that workers share: as it is given, as it is shared, and its ms.
_SHARED_BYTES = 12
# Bytes a row: sums, ranks and what is meanwhile, and counters of races.
_ROW_BYTES = 48


@dataclass(frozen=True)
class Task:
    """What to measure.

    Attributes:
        rows: How many each table has.
        width: Their columns.
        zipf: Exponent of the distribution that workers' rows are drawn from.
        rows_per_update: How many rows a worker's update has.
        workers: Worker counts.
        policies: Of ``COMPILED_POLICIES``, measured in turn.
        seconds: Measured for each configuration, over all rounds.
        seed: Of rows and gradients.
    """

    rows: tuple[int, ...]
    width: int
    zipf: float
    rows_per_update: int
    workers: tuple[int, ...]
    policies: tuple[str, ...]
    seconds: float
    seed: int

    def steps(self) -> int:
        """How many times ``run_row_bench`` reports progress."""
        return 1 + len(self.rows) * (1 + len(self.workers) * (ROUNDS + 1))

    def variants(self, workers: int) -> dict[str, SchedulerSettings]:
        """How the scheduler runs for each who take turns: policies, and one worker alone."""
        settings = SchedulerSettings(workers=workers, backend="numba")
        variants = {policy: settings.with_policy(policy) for policy in self.policies}
        if workers > 1:
            variants[ALONE] = replace(settings.with_policy(CONTENDER), workers=1)
        return variants


def run_row_bench(task: Task, command: str, on_step: Callable[[str], None]) -> RowBench:
    """Measures everything.

    Args:
        task: What to measure.
        command: The command line that repeats it.
        on_step: Called before each of ``task.steps()`` steps with what is to be measured.

    Returns:
        The result. Interrupted, it is partial: sizes and worker counts whose rounds were not all
        made are left out.

    Raises:
        KeyboardInterrupt: If interrupted before workers came to a result.
        MeasurementError: If workers failed before there was any.
    """
    on_step("kernels alone")
    kernels = measure_row_kernels(task.rows, task.width, task.seed, ROUNDS)
    measured, end = gather_until_interrupted(_measure_all(task, on_step))
    results = [run for runs in measured for run in runs]
    return RowBench(
        command=command,
        environment=describe_environment(torch.device("cpu"), "numba"),
        partial=end.partial,
        error=end.error,
        warnings=spread_warnings(_timings(kernels, results)),
        settings=RowBenchSettings(
            width=task.width,
            zipf=task.zipf,
            rows_per_update=task.rows_per_update,
            rounds=ROUNDS,
            seconds=task.seconds,
            seed=task.seed,
        ),
        kernels=kernels,
        results=results,
    )


def check_memory(task: Task) -> None:
    """Checks that tables fit free memory.

    Raises:
        ValueError: If they do not.
    """
    kernels = _KERNEL_BYTES * task.width * sum(task.rows)
    shared = _SHARED_BYTES * task.width * max(task.rows)
    needed = max(kernels, shared) + _ROW_BYTES * max(task.rows)
    free = free_memory(torch.device("cpu"))
    if needed > free:
        sizes = ", ".join(map(size_name, task.rows))
        raise ValueError(
            f"must fit memory, of which {free / 1e9:.1f} GB are free, got {sizes}, which need "
            f"{needed / 1e9:.1f} GB with {counted(task.width, 'column')}"
        )


async def _measure_all(task: Task, on_step: Callable[[str], None]) -> AsyncIterator[list[RowRun]]:
    """Yields what all did at each size and worker count."""
    for rows in task.rows:
        async for runs in _measure_size(task, rows, on_step):  # one table at a time is in memory
            yield runs


async def _measure_size(
    task: Task, rows: int, on_step: Callable[[str], None]
) -> AsyncIterator[list[RowRun]]:
    on_step(f"{size_name(rows)} rows, drawing")
    table = _Table(task, rows, on_step)
    for workers in task.workers:
        yield await table.take_turns(workers)


class _Table:
    """A table whose rows workers update."""

    def __init__(self, task: Task, rows: int, on_step: Callable[[str], None]) -> None:
        generator = np.random.default_rng(task.seed)
        drawing = ZipfRows(rows, task.zipf, generator)
        each = max(_DRAWN // task.rows_per_update, 1)
        drawn = drawing.draw((each, task.rows_per_update))
        targets = generator.standard_normal(each, np.float32)
        self._task, self._on_step = task, on_step
        self._rows, self._same_row = rows, drawing.same_row
        self._shared = SharedParameters({"table": torch.ones(rows, task.width)})
        self._shared.ms.fill_(1.0)  # else its pages would come with the first updates
        self._shared.count_races(task.width)  # each row by itself
        self._worker = NativeWorker(
            self._shared,
            _pull_drawn_rows,
            (drawn, targets),
            {"table": task.rows_per_update},
            order=partial(_in_order, [np.arange(each)]),
        )

    async def take_turns(self, workers: int) -> list[RowRun]:
        """Measures policies in turn, for all rounds, and then counts their races."""
        variants = self._task.variants(workers)
        rounds: dict[str, list[RunReport]] = {name: [] for name in variants}
        where = f"{size_name(self._rows)} rows, {counted(workers, 'worker')}"
        for index in range(ROUNDS):
            self._on_step(f"{where}, round {index + 1}")
            for name in in_turn(list(variants), index):
                rounds[name].append(await self._run(variants[name]))
        self._on_step(f"{where}, counting races")
        races = {
            policy: await self._run(replace(variants[policy], telemetry=True))
            for policy in self._task.policies
        }
        return self._results(workers, rounds, races)

    async def _run(self, settings: SchedulerSettings) -> RunReport:
        seconds = self._task.seconds / ROUNDS
        async with StreamScheduler(self._shared, settings) as scheduler:
            await scheduler.run(self._worker, updates=_WARM_UP_UPDATES)
            return await scheduler.run(self._worker, seconds=seconds)

    def _results(
        self, workers: int, rounds: dict[str, list[RunReport]], races: dict[str, RunReport]
    ) -> list[RowRun]:
        speeds = {name: speed_of(reports) for name, reports in rounds.items()}
        results = []
        for name, reports in rounds.items():
            cost = races[name].to_dict() if name in races else {}
            results.append(
                RowRun(
                    rows=self._rows,
                    same_row=self._same_row,
                    workers=workers,
                    policy=name,
                    updates_per_second=speeds[name],
                    staleness=RunReport.joined(reports).to_dict()["staleness"]["mean"],
                    overlaps=cost.get("overwrites_per_update"),
                    lost_updates_fraction=cost.get("lost_updates_fraction"),
                    gains=gains_of(name, speeds),
                )
            )
        return results


def _in_order(parts: list[Any], _generator: np.random.Generator) -> list[Any]:
    """Samples as they were drawn: each by itself, so no order is better."""
    return parts


def _pull_drawn_rows(parameters: Any, samples: Any, state: Any) -> Any:
    """Copies the rows that were drawn, and how far they are from the sample's target.

    That is the gradient of half the squared distance. Targets are drawn, so that gradients never
    become as small as to be slow.
    """
    (table,), (drawn, targets) = parameters, samples
    rows, grads, target = state.rows[0], state.grads[0], targets[state.sample]
    for place in range(len(rows)):
        rows[place] = drawn[state.sample, place]
        row, grad = table[rows[place]], grads[place]
        for column in range(len(row)):
            grad[column] = row[column] - target
    return 0.0


def _timings(kernels: list[RowKernel], results: list[RowRun]) -> dict[str, Interval]:
    """All that was timed, by name."""
    timings = {}
    for kernel in kernels:
        which = "the same rows" if kernel.same_rows else "other rows each time"
        name = f"an update of {which} of {size_name(kernel.rows)}"
        timings[f"{name} on {counted(kernel.threads, 'thread')}"] = kernel.milliseconds.estimate
    for run in results:
        place = f"{size_name(run.rows)} rows with {counted(run.workers, 'worker')}"
        timings[f"{run.policy} at {place}"] = run.updates_per_second.estimate
    return timings
