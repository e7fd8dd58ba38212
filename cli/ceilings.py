"""``hogstream ceilings``."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click
import torch

from hogstream.cli import options
from hogstream.cli.console import print_table, print_text
from hogstream.cli.output import command_line, deliver
from hogstream.cli.tables import console_table
from hogstream.profiling.ceilings.cache import cache_file
from hogstream.profiling.ceilings.machine import (
    ceiling_warnings,
    machine_ceilings,
    when_measured,
)
from hogstream.profiling.environment import describe_environment
from hogstream.profiling.report import rows
from hogstream.profiling.results.files import write_result
from hogstream.profiling.results.schema import MachineCeilings


@click.command("ceilings")
@options.DEVICE
@click.option("--fresh", is_flag=True, help="Measure again; what is higher is remembered.")
@options.JSON
def show_ceilings(device: torch.device, fresh: bool, json_file: Path | None) -> None:
    """Say what this machine can do.

    It is measured once, in ten seconds or so, and remembered in the user's cache folder, for each
    version of hogstream and of what it runs on. It only rises: what is measured higher later, or
    what bench, train or compare reaches, takes its place, as the machine was busy before.

    Bandwidths are with all cores, over half of each level of caches, and beyond them: of copies,
    and of the traffic of updates without arithmetic. A launch is of next to nothing, down one lane.
    A turn is one wait of a coroutine on the event loop. Intervals are 95 % confidence intervals of
    the medians.
    """
    ceilings = machine_ceilings(device, fresh=fresh)
    result = MachineCeilings(
        command=command_line(),
        environment=describe_environment(device, options.resolve_backend(None, device)),
        ceilings=ceilings,
    )

    def show() -> None:
        for table in (rows.levels(ceilings), rows.rates(ceilings)):
            print_table(console_table(table))
        print_text(when_measured(ceilings))
        for sentence in ceiling_warnings(ceilings):
            print_text(sentence)
        path = cache_file(device)
        if path is not None and path.exists():
            click.echo(f"kept in {path}")

    deliver(result, show, (json_file, partial(write_result, result)))
