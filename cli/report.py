"""``hogstream report``."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import click

from hogstream.cli import options
from hogstream.cli.console import print_text
from hogstream.cli.output import write_files
from hogstream.cli.pictures import page
from hogstream.profiling.report import sentences
from hogstream.profiling.results import last
from hogstream.profiling.results.diff import diff_runs
from hogstream.profiling.results.files import KINDS, BadResultError, ResultFile, read_result


@click.command()
@click.argument("files", metavar="[FILE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--output",
    type=options.page_file,
    metavar="FILE",
    default="report.html",
    show_default=True,
    help="Where to write it.",
)
def report(files: tuple[Path, ...], output: Path) -> None:
    """Write a report that opens in a browser, offline.

    Each FILE is the JSON output of bench, train or compare. Of two of one kind it shows the diff:
    the second against the first. Without FILE: the last result of bench and of train on this
    machine.
    """
    paths = files or tuple(filter(None, map(last.last, ("bench", "train"))))
    if not paths:
        raise click.UsageError(
            "there is no last result on this machine: run hogstream bench, or name a FILE"
        )
    for path in files:
        if path.resolve() == output.resolve():
            raise click.UsageError(f"FILE and --output must be different files, got '{path}' twice")
    results = _read(paths)
    if len({path.resolve() for path in paths}) < len(paths):
        raise click.UsageError(f"each FILE must be another one, got '{paths[0]}' twice")
    for kind in KINDS:
        alike = [result for result in results if result.kind == kind]
        if len(alike) == 2:
            for sentence in sentences.of_diff(diff_runs(*alike)):
                print_text(_plain(sentence))
    if not write_files((output, partial(page().write_page, results))):
        raise click.exceptions.Exit(1)
    click.echo(f"wrote {output}")


def _plain(text: str) -> str:
    """Text that a terminal shows as it is: names out of files may hold anything."""
    return "".join(each if each.isprintable() else "?" for each in text)


def _read(paths: tuple[Path, ...]) -> list[ResultFile]:
    try:
        results = [read_result(path) for path in paths]
    except BadResultError as error:
        raise click.UsageError(str(error)) from None
    for kind, count in Counter(result.kind for result in results).items():
        if count > 2:
            third = [result.name for result in results if result.kind == kind][2]
            raise click.UsageError(f"{third}: is the third of hogstream {kind}: a diff is of two")
    return results
