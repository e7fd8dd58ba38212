"""``hogstream bench``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import torch

from hogstream.cli import options
from hogstream.cli.bench_rows import with_rows
from hogstream.cli.console import print_table, print_text, steps
from hogstream.cli.output import (
    check_distinct,
    command_line,
    deliver,
    traced,
)
from hogstream.cli.pictures import page, plots
from hogstream.cli.scheduler_options import (
    make_settings,
    policies_over,
    scheduling_options,
)
from hogstream.cli.tables import console_table
from hogstream.profiling.measure import bench as job
from hogstream.profiling.report import rows, sentences
from hogstream.profiling.results import last
from hogstream.profiling.results.files import ResultFile, write_result
from hogstream.profiling.results.gains import BASELINES, CONTENDER
from hogstream.profiling.results.schema import Bench
from hogstream.scheduler import SchedulerSettings
from hogstream.scheduler.policies import ALLOWED_DENSE, select_policy

_DEPTH = 8
_SWEEP_DEFAULTS = {
    "elements": "2^10,2^12,2^14,2^16,2^18,2^20,2^22,2^24",
    "workers": "1,2,4,8,16",
    "seconds": "1",
}


def _set_sweep_defaults(context: click.Context, _: click.Parameter, sweep: bool) -> bool:
    """Other defaults for what is not given; eager, so that it comes before they are used."""
    if sweep:
        context.default_map = _SWEEP_DEFAULTS
    return sweep


@click.command()
@click.option(
    "--sweep",
    is_flag=True,
    is_eager=True,
    callback=_set_sweep_defaults,
    help="Show where lock-free pays and where not: sizes from 2^10 to 2^24, up to 16 workers, and "
    "1 second each, unless you say otherwise.",
)
@options.DEVICE
@options.BACKEND
@click.option("--dtype", type=click.Choice(options.DTYPES), default="float32", show_default=True)
@click.option(
    "--workers",
    type=options.worker_counts,
    metavar="N,N,...",
    default="1,2,4,8",
    show_default=True,
    help="Worker counts.",
)
@click.option(
    "--elements",
    type=options.sizes,
    metavar="N,N,...",
    default="2^16,2^20",
    show_default=True,
    help="Sizes of the shared parameters.",
)
@click.option(
    "--policies",
    type=options.policies,
    metavar="POLICY,...",
    help=f"What an update waits for: each {ALLOWED_DENSE}.  [default: "
    f"{','.join(policies_over(1))}; over processes {','.join(policies_over(2))}]",
)
@options.PROCESSES
@scheduling_options(depth=str(_DEPTH))
@click.option(
    "--seconds",
    type=options.number_above_zero,
    metavar="SECONDS",
    default=3.0,
    show_default=True,
    help=f"Time for each policy, worker count and size, in {job.ROUNDS} rounds.",
)
@click.option(
    "--think-time",
    type=options.number_from_zero,
    metavar="SECONDS",
    default=0.0,
    show_default=True,
    help="Median seconds that a worker thinks before it submits.",
)
@click.option(
    "--think-spread",
    type=options.number_from_zero,
    metavar="SIGMA",
    default=0.0,
    show_default=True,
    help="Sigma of the log-normal think times; 0 is constant, 1 makes stragglers.",
)
@click.option(
    "--today",
    is_flag=True,
    help="Measure what people run today as well, in the same rounds: threads and processes with "
    "torch.optim.RMSprop, with and without a lock.",
)
@options.SEED
@options.JSON
@options.TRACE
@click.option(
    "--report", type=options.page_file, metavar="FILE", help="Write an HTML report to this file."
)
@options.plot_option("a heat map of the gain")
@with_rows
def bench(
    sweep: bool,
    device: torch.device,
    backend: str | None,
    dtype: str,
    workers: tuple[int, ...],
    elements: tuple[int, ...],
    policies: tuple[str, ...] | None,
    processes: int,
    scheduling: dict[str, Any],
    seconds: float,
    think_time: float,
    think_spread: float,
    today: bool,
    seed: int,
    json_file: Path | None,
    trace: Path | None,
    report: Path | None,
    plot: Path | None,
) -> None:
    """Measure lock-free updates against locks, and what people run today.

    Simulated workers submit ready gradients as fast as they land. Policies take turns, so that
    drift of the machine strikes them alike.
    """
    check_distinct({"--json": json_file, "--trace": trace, "--report": report, "--plot": plot})
    policies = policies or policies_over(processes)
    _check_dense(policies)
    if sweep or plot is not None:
        _check_compares(policies, processes * max(workers))
    if trace is not None and len(policies) * len(workers) * len(elements) > 1:
        raise click.UsageError(
            "--trace needs one policy, one worker count and one size: give one of each"
        )
    resolved = options.resolve_backend(backend, device)
    settings = job.BenchSettings(
        device=device,
        backend=resolved,
        dtype=getattr(torch, dtype),
        workers=workers,
        elements=elements,
        policies=policies,
        processes=processes,
        scheduling=make_settings(
            SchedulerSettings(workers=1, depth=_DEPTH),
            scheduling,
            policies,
            workers,
            processes,
            device,
            resolved,
        ),
        seconds=seconds,
        think_time=think_time,
        think_spread=think_spread,
        seed=seed,
        sweep=sweep,
        today=today,
    )
    try:
        job.check_memory(settings)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--elements'") from None
    with traced(trace) as timeline, steps(settings.steps()) as progress:
        result = job.run_bench(settings, command_line(), progress.begin, timeline)
    last.keep(result)

    def show() -> None:
        for table in _tables(result):
            print_table(console_table(table))
        for sentence in sentences.of_bench(result):
            print_text(sentence)

    deliver(
        result,
        show,
        (json_file, partial(write_result, result)),
        (trace, None if timeline is None else timeline.write),
        (report, lambda path: page().write_page([ResultFile("", result)], path)),
        (plot, lambda path: plots().write_gains(result, path)),
    )


def _tables(bench: Bench) -> list[rows.Table]:
    """The kernels alone, then what policies did: of a sweep what lock-free gains, else all."""
    if bench.settings.sweep:
        return [rows.kernels(bench), *rows.gains(bench)]
    return [rows.kernels(bench), *rows.results(bench)]


def _check_dense(policies: tuple[str, ...]) -> None:
    for policy in policies:
        if select_policy(policy).row_locked:
            raise click.BadParameter(
                f"each must be {ALLOWED_DENSE}: updates here are of all rows, got {policy!r}",
                param_hint="'--policies'",
            )


def _check_compares(policies: tuple[str, ...], most_workers: int) -> None:
    if most_workers == 1:
        raise click.BadParameter(
            "--sweep and --plot show what several workers gain, got 1",
            param_hint="'--workers'",
        )
    if CONTENDER not in policies or not set(BASELINES) & set(policies):
        raise click.BadParameter(
            f"--sweep and --plot need {CONTENDER} and {' or '.join(BASELINES)}, "
            f"got '{','.join(policies)}'",
            param_hint="'--policies'",
        )
