"""``hogstream bench``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import torch

from hogstream.profiling import bench as job
from hogstream.profiling import options, summary
from hogstream.profiling.console import print_table, print_text, steps
from hogstream.profiling.outputs import (
    check_distinct,
    command_line,
    finish,
    write_files,
    write_json,
)
from hogstream.profiling.report import write_report
from hogstream.scheduler.policies import POLICIES


@click.command()
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
    default=",".join(POLICIES),
    show_default=True,
    help="What an update waits for.",
)
@click.option(
    "--depth",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How many updates of one worker may be in flight.",
)
@click.option(
    "--seconds",
    type=options.seconds_above_zero,
    metavar="SECONDS",
    default=3.0,
    show_default=True,
    help="Time for each policy, worker count and size, in five rounds.",
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
@options.SEED
@options.JSON
@click.option(
    "--report", type=options.output_file, metavar="FILE", help="Write an HTML report to this file."
)
def bench(
    device: torch.device,
    backend: str | None,
    dtype: str,
    workers: tuple[int, ...],
    elements: tuple[int, ...],
    policies: tuple[str, ...],
    depth: int,
    seconds: float,
    think_time: float,
    think_spread: float,
    seed: int,
    json_file: Path | None,
    report: Path | None,
) -> None:
    """Measure lock-free updates against locked and ordered ones.

    Simulated workers submit ready gradients as fast as they land. Policies take turns, so that
    drift of the machine strikes them alike.
    """
    settings = job.BenchSettings(
        device=device,
        backend=options.resolve_backend(backend, device),
        dtype=getattr(torch, dtype),
        workers=workers,
        elements=elements,
        policies=policies,
        depth=depth,
        seconds=seconds,
        think_time=think_time,
        think_spread=think_spread,
        seed=seed,
    )
    check_distinct({"--json": json_file, "--report": report})
    try:
        job.check_memory(settings)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--elements'") from None
    with steps(settings.steps()) as progress:
        result = job.run_bench(settings, progress.begin)
    result["command"] = command_line()
    written = write_files(
        (json_file, partial(write_json, result)),
        (report, partial(write_report, result)),
    )
    print_table(summary.kernels_table(result))
    print_table(summary.results_table(result))
    for sentence in summary.sentences(result):
        print_text(sentence)
    finish(result, written)
