"""What a command leaves behind: what it prints, files, and how it ends."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path

import click

from hogstream.cli.console import print_text
from hogstream.profiling.errors import MeasurementError
from hogstream.profiling.report.sentences import interruption
from hogstream.profiling.results.files import AnyResult
from hogstream.profiling.results.records import Measurement
from hogstream.scheduler import Timeline

Write = Callable[[Path], object]


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
    """A timeline to be written to a file, which is done here if the block fails; None without."""
    timeline = None if path is None else Timeline()
    try:
        yield timeline
    except BaseException:
        if timeline is not None:
            write_files((path, timeline.write))
        raise


def deliver(
    result: AnyResult,
    show: Callable[[], object],
    *files: tuple[Path | None, Write | None],
    raw: bool = False,
) -> None:
    """Prints what a command found out and writes it to files, whatever fails of that.

    Args:
        result: What it found out.
        show: Prints it.
        files: A path, None if it was not asked for, and what writes to it.
        raw: Whether what is printed is for a program: then nothing is added to it.

    Raises:
        OSError: If it could not be printed.
        click.exceptions.Exit: If a file could not be written, which was said.
        click.Abort: If the measurement was interrupted, which ends the command as such.
        MeasurementError: If it was cut short by a failure.
    """
    measured = result if isinstance(result, Measurement) else None
    try:
        show()
        for sentence in interruption(measured) if measured else ():
            print_text(sentence)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(f"cannot write to standard output: {error.strerror}") from error
    finally:
        written = write_files(*files)
    for path in written:
        click.echo(f"wrote {path}", err=raw)
    if len(written) < sum(path is not None for path, _ in files):
        raise click.exceptions.Exit(1)
    if measured is not None and measured.error is not None:
        raise MeasurementError(measured.error)
    if measured is not None and measured.partial:
        raise click.Abort


def write_files(*files: tuple[Path | None, Write | None]) -> list[Path]:
    """Writes files: one that cannot be written, which is said, keeps none of the others from it.

    Args:
        files: A path, None if it was not asked for, and what writes to it.

    Returns:
        Those that were written.
    """
    written = []
    for path, write in files:
        if path is None or write is None:
            continue
        try:
            write(path)
        except OSError as error:
            said = f"hogstream: cannot write {path}: {error.strerror or error}"
            print(said, file=sys.stderr)
        else:
            written.append(path)
    return written
