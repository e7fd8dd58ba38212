"""``hogstream ceilings``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from rich.table import Table

from hogstream.profiling import options
from hogstream.profiling.ceiling_cache import cache_file
from hogstream.profiling.ceilings import ceiling_warnings, machine_ceilings
from hogstream.profiling.console import figure, new_table, print_table, print_text
from hogstream.profiling.environment import SCHEMA, describe_environment
from hogstream.profiling.outputs import command_line, finish, write_files, write_json
from hogstream.profiling.rates import COPY, LAUNCHES, TURNS, UPDATE_SHAPED


@click.command("ceilings")
@options.DEVICE
@click.option("--fresh", is_flag=True, help="Measure anew, and remember that.")
@options.JSON
def show_ceilings(device: torch.device, fresh: bool, json_file: Path | None) -> None:
    """Say what this machine can do.

    It is measured once, in ten seconds or so, and remembered in the user's cache folder, for each
    version of hogstream and of what it runs on.

    Bandwidths are with all cores, over half of each level of caches, and beyond them: of copies,
    and of the traffic of updates without arithmetic. A launch is of next to nothing, down one lane.
    A turn is one wait of a coroutine on the event loop. In brackets: 95 % confidence intervals of
    the medians.
    """
    ceilings = machine_ceilings(device, fresh=fresh)
    result = {
        "schema": SCHEMA,
        "command": command_line(),
        "environment": describe_environment(device, options.resolve_backend(None, device)),
        "ceilings": ceilings,
    }
    write_files((json_file, partial(write_json, result)))
    print_table(_level_table(ceilings["levels"]))
    print_table(_rate_table(ceilings))
    print_text(f"Measured at {ceilings['measured']}.")
    for sentence in ceiling_warnings(ceilings):
        print_text(sentence)
    path = cache_file(device)
    if path is not None and path.exists():
        click.echo(f"kept in {path}")
    finish(result, json_file)


def _level_table(levels: list[dict[str, Any]]) -> Table:
    table = new_table(
        "Memory", "level", "KiB used", "threads", "copy GB/s", "", "update-shaped GB/s", ""
    )
    for level in levels:
        table.add_row(
            level["level"],
            figure(level["bytes"] / 1024),
            figure(level["threads"]),
            *_cells(level[COPY], 1),
            *_cells(level[UPDATE_SHAPED], 1),
        )
    return table


def _rate_table(ceilings: dict[str, Any]) -> Table:
    table = new_table("Host", "", "median", "")
    table.add_row("launches/s", *_cells(ceilings[LAUNCHES], 0))
    table.add_row("event loop turns/s", *_cells(ceilings[TURNS], 0))
    return table


def _cells(rate: dict[str, Any] | None, digits: int) -> tuple[str, str]:
    """Median and interval; a dash for what was not measured."""
    if rate is None:
        return "-", ""
    low, high = (figure(end, digits) for end in rate["interval"])
    return figure(rate["median"], digits), f"[{low} to {high}]"
