"""What a command leaves behind: files, what it says of them, and how it ends."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import click

from hogstream.cli.console import print_text
from hogstream.profiling.interruption import MeasurementError
from hogstream.profiling.report.sentences import interruption
from hogstream.profiling.results.files import AnyResult
from hogstream.profiling.results.records import Measurement
from hogstream.scheduler import Timeline


def check_distinct(paths: dict[str, Path | None]) -> None:
    """Checks that no file is to be written twice.

    Args:
        paths: By option.

    Raises:
        click.UsageError: If two are the same file.
    """
    given = {option: path for option, path in paths.items() if path is not None}
    for (option, path), (other, other_path) in combinations(given.items(), 2):
        if path.resolve() == other_path.resolve():
            raise click.UsageError(
                f"{option} and {other} must be different files, got '{path}' twice"
            )


def command_line() -> str:
    """The command that repeats this run."""
    return shlex.join(["hogstream", *sys.argv[1:]])


@contextmanager
def traced(path: Path | None) -> Iterator[Timeline | None]:
    """A timeline that is written to a file at the end, whatever happens; None without a file."""
    timeline = None if path is None else Timeline()
    try:
        yield timeline
    finally:
        if timeline is not None and path is not None:
            timeline.write(path)


def write_files(*files: tuple[Path | None, Callable[[Path], object]]) -> None:
    """Writes the files that were asked for: before anything is printed, which may fail.

    Args:
        files: A path, None if it was not asked for, and what writes to it.
    """
    for path, write in files:
        if path is not None:
            write(path)


def finish(result: AnyResult, *written: Path | None) -> None:
    """Says whether the result is whole and what was written.

    Args:
        result: What the command found out.
        written: Files; None for what was not asked for.

    Raises:
        click.Abort: If it was interrupted, which ends the command as such.
        MeasurementError: If it was cut short by a failure.
    """
    measured = result if isinstance(result, Measurement) else None
    if measured is not None:
        for sentence in interruption(measured):
            print_text(sentence)
    for path in filter(None, written):
        click.echo(f"wrote {path}")
    if measured is not None and measured.error is not None:
        raise MeasurementError(measured.error)
    if measured is not None and measured.partial:
        raise click.Abort
