"""``hogstream decide``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from hogstream.cli import options
from hogstream.cli.console import print_table, print_text, steps
from hogstream.cli.named import named
from hogstream.cli.output import command_line, deliver
from hogstream.cli.tables import console_table
from hogstream.profiling.measure import decision as job
from hogstream.profiling.measure.ways import kinds_of
from hogstream.profiling.report import deciding
from hogstream.profiling.results.files import write_result
from hogstream.scheduler import SettingError


@click.command()
@click.argument("make", metavar="MODULE:MAKE")
@click.option(
    "--workers",
    type=options.worker_counts,
    metavar="N,N,...",
    show_default="as many as cores, from 2 to 16",
    help="How many workers, such as 2,4.",
)
@click.option(
    "--seconds",
    type=options.number_above_zero,
    metavar="SECONDS",
    default=job.SECONDS,
    show_default=True,
    help="How long to measure, besides the start of processes.",
)
@click.option(
    "--lr",
    type=options.number_from_zero,
    metavar="LR",
    default=job.LR,
    show_default=True,
    help="Learning rate of all.",
)
@click.option(
    "--processes/--no-processes",
    default=True,
    show_default=True,
    help="Whether to measure other processes as well as threads.",
)
@options.JSON
def decide(
    make: str,
    workers: tuple[int, ...] | None,
    seconds: float,
    lr: float,
    processes: bool,
    json_file: Path | None,
) -> None:
    """Say which way to train your own model is the fastest, and what it costs.

    MAKE is a function of a module of yours, and takes no arguments. It returns a model, a loss that
    maps the model and a batch to a scalar, and batches: any iterable, begun anew when it ends.
    """
    made_by = named("MAKE", make)
    counts = workers or job.default_workers()
    total = (1 + job.ROUNDS) * len(kinds_of(counts, processes=processes))
    with steps(total) as progress:
        try:
            result = job.decide(
                made_by,
                workers=counts,
                seconds=seconds,
                lr=lr,
                processes=processes,
                command=command_line(),
                on_step=progress.begin,
            )
        except SettingError as error:
            raise click.BadParameter(error.reason, param_hint="'MAKE'") from error

    def show() -> None:
        for table in deciding.tables(result):
            print_table(console_table(table))
        for sentence in deciding.said(result):
            print_text(sentence)

    deliver(result, show, (json_file, partial(write_result, result)))
