"""``hogstream bench --rows``: updates of some rows of tables, in place of dense ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click
import torch
from click.core import ParameterSource

from hogstream.cli import options
from hogstream.cli.console import print_table, print_text, steps
from hogstream.cli.output import command_line, deliver
from hogstream.cli.tables import console_table
from hogstream.kernels.backends.select import select_row_backend
from hogstream.profiling.report import row_bench
from hogstream.profiling.results.files import write_result
from hogstream.scheduler.policies import COMPILED_POLICIES

Command = Callable[..., None]

_OWN = ("width", "zipf", "rows_per_update")
_SHARED = ("workers", "policies", "seconds", "seed", "json_file")
# What may be said too, as it is so.
_AS_IT_IS = {"device": torch.device("cpu"), "backend": "numba", "dtype": "float32", "processes": 1}


def with_rows(command: Command) -> Command:
    """Adds ``--rows``, with which a command is another one, and what goes with it.

    Either refuses the options of the other.
    """

    @wraps(command)
    def run(
        rows: tuple[int, ...] | None, width: int, zipf: float, rows_per_update: int, **values: Any
    ) -> None:
        if rows is None:
            _check_without_rows()
            command(**values)
            return
        _check_with_rows()
        shared = {name: values[name] for name in _SHARED}
        _bench_rows(rows=rows, width=width, zipf=zipf, rows_per_update=rows_per_update, **shared)

    decorated: Command = run
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


_OPTIONS = (
    click.option(
        "--rows",
        type=options.row_counts,
        metavar="N,N,...",
        help="Measure updates of some rows of tables of so many, such as 10^4,10^6, on a CPU: what "
        "one costs, and what lock-free gains.",
    ),
    click.option(
        "--width",
        type=click.IntRange(1),
        default=64,
        show_default=True,
        help="Columns of tables, with --rows.",
    ),
    click.option(
        "--zipf",
        type=options.number_from_zero,
        metavar="EXPONENT",
        default=1.0,
        show_default=True,
        help="Of the Zipf distribution that workers' rows are drawn from, with --rows: the "
        "greater, the more conflicts; 0 is uniform.",
    ),
    click.option(
        "--rows-per-update",
        type=click.IntRange(1, 1024),
        default=2,
        show_default=True,
        help="Rows of a worker's update, with --rows.",
    ),
)


def _check_without_rows() -> None:
    for parameter in _given():
        if parameter.name in _OWN:
            raise click.UsageError(f"{parameter.opts[0]} needs --rows")


def _check_with_rows() -> None:
    values = click.get_current_context().params
    for parameter in _given():
        name = parameter.name
        if name in ("rows", *_OWN, *_SHARED):
            continue
        option = parameter.opts[0]
        if name not in _AS_IT_IS:
            raise click.UsageError(f"{option} does not go with --rows")
        if values[name] != _AS_IT_IS[name]:
            raise click.UsageError(
                f"{option} must be {_AS_IT_IS[name]} with --rows, got {values[name]}"
            )


def _given() -> list[click.Parameter]:
    """The options that were given."""
    context = click.get_current_context()
    default = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return [
        parameter
        for parameter in context.command.params
        if context.get_parameter_source(str(parameter.name)) not in default
    ]


def _bench_rows(
    *,
    rows: tuple[int, ...],
    width: int,
    zipf: float,
    rows_per_update: int,
    workers: tuple[int, ...],
    policies: tuple[str, ...] | None,
    seconds: float,
    seed: int,
    json_file: Path | None,
) -> None:
    try:
        select_row_backend("numba", "cpu")
    except RuntimeError as error:
        raise click.UsageError(f"--rows: {error}") from error
    from hogstream.profiling.measure import rows as job  # which needs Numba

    for policy in policies or ():
        if policy not in COMPILED_POLICIES:
            raise click.BadParameter(
                f"each must be one of {', '.join(COMPILED_POLICIES)} with --rows, got '{policy}'",
                param_hint="'--policies'",
            )
    task = job.Task(
        rows=rows,
        width=width,
        zipf=zipf,
        rows_per_update=rows_per_update,
        workers=workers,
        policies=policies or COMPILED_POLICIES,
        seconds=seconds,
        seed=seed,
    )
    try:
        job.check_memory(task)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--rows'") from None
    with steps(task.steps()) as progress:
        result = job.run_row_bench(task, command_line(), progress.begin)

    def show() -> None:
        for table in (row_bench.kernels(result), row_bench.policies(result)):
            print_table(console_table(table))
        for sentence in row_bench.said(result):
            print_text(sentence)

    deliver(result, show, (json_file, partial(write_result, result)))
