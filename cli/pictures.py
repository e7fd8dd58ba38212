"""What draws, loaded when a picture or a page is asked for: nobody else waits for matplotlib."""

from __future__ import annotations

from types import ModuleType

import click


def plots() -> ModuleType:
    """The module that writes pictures."""
    from hogstream.profiling.report import plots

    return plots


def page() -> ModuleType:
    """The module that writes pages, which have pictures."""
    from hogstream.profiling.report import page

    return page


def check() -> None:
    """Loads them, before anything is measured for them.

    Raises:
        click.BadParameter: If what they need is installed and cannot be imported.
    """
    try:
        page()
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        raise click.BadParameter(f"what draws cannot be imported: {said}") from error
