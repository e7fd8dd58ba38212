"""What commands print: tables to standard output, progress to standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# Running text in tables is no wider than this.
_TEXT_WIDTH = 84


def print_table(table: Table) -> None:
    """Prints a table to standard output, whole, even if the terminal must wrap its lines."""
    console = Console(highlight=False, markup=False)
    wide = console.options.update(max_width=1 << 16)
    needed = console.measure(table, options=wide).minimum  # of its words, of which none is cut
    console.width = max(console.width, _TEXT_WIDTH, needed)
    console.print(table)


def print_text(text: str) -> None:
    """Prints a paragraph to standard output, wrapped to the terminal."""
    Console(highlight=False, markup=False).print(text)


def new_table(title: str, *columns: str, text_columns: int = 1) -> Table:
    """An empty table: the first columns hold text, the others numbers, set to the right.

    Columns without a name hold running text, which may wrap.
    """
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        show_header=any(columns),
        box=SIMPLE,
        padding=0,
        pad_edge=False,
    )
    # Headings of many lines stand on their columns; running text begins where its name stands.
    vertical: Literal["top", "bottom"] = "bottom" if any(columns) else "top"
    for index, column in enumerate(columns):
        heading = column.replace(" ", "\n")  # narrow columns, so that tables fit a terminal
        justify: Literal["left", "right"] = "left" if index < text_columns else "right"
        table.add_column(heading, justify=justify, vertical=vertical, no_wrap=bool(column))
    return table


class Steps:
    """Shows how far a command is: a bar in a terminal, a line a step elsewhere."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0
        self._task = progress.add_task("", total=total) if progress else None

    def begin(self, text: str) -> None:
        """Ends the step before and names the next."""
        self._show(text)
        self._done += 1

    def advance(self, text: str) -> None:
        """Ends a step of which there are too many for a line each."""
        self._done += 1
        if self._progress is not None:
            self._show(text)

    def _show(self, text: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=text, completed=self._done)
        else:
            Console(stderr=True, highlight=False).print(f"{self._done + 1}/{self._total} {text}")


@contextmanager
def steps(total: int) -> Iterator[Steps]:
    """Shows progress over ``total`` steps, on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Steps(None, total)
        return
    columns: tuple[Any, ...] = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Steps(progress, total)
