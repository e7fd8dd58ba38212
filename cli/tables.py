"""Results as tables on the console."""

from __future__ import annotations

from rich.table import Table as RichTable

from hogstream.cli.console import new_table
from hogstream.profiling.report.rows import Table


def console_table(table: Table) -> RichTable:
    """A table for the console, with a line between groups of rows that belong together.

    One of words alone has no headings, and its lines may wrap.
    """
    words = table.text_columns == len(table.columns)
    columns = [""] * len(table.columns) if words else table.columns
    shown = new_table(table.title, *columns, text_columns=table.text_columns)
    before = None
    for row in table.rows:
        group = row[: table.grouped_by]
        if before not in (None, group):
            shown.add_section()
        before = group
        shown.add_row(*row)
    return shown
