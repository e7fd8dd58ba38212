"""What a command leaves behind: files, what it says of them, and how it ends."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import click

from hogstream.profiling.console import print_text
from hogstream.profiling.summary import interruption


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


def write_files(*files: tuple[Path | None, Callable[[Path], object]]) -> list[Path]:
    """Writes the files that were asked for: before anything is printed, which may fail.

    Args:
        files: A path, None if it was not asked for, and what writes to it.

    Returns:
        The paths written.
    """
    written = []
    for path, write in files:
        if path is not None:
            write(path)
            written.append(path)
    return written


def write_json(result: dict[str, Any], path: Path) -> None:
    """Writes the JSON output."""
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finish(result: dict[str, Any], written: list[Path]) -> None:
    """Says what was written and whether the result is whole.

    Raises:
        click.Abort: If it is not, which ends the command as interrupted.
    """
    interrupted = interruption(result)
    for sentence in interrupted:
        print_text(sentence)
    for path in written:
        click.echo(f"wrote {path}")
    if interrupted:
        raise click.Abort
