"""The last result of each command on this machine, kept in the user's cache folder."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from hogstream.profiling.capture import is_profiled
from hogstream.profiling.results.files import Reported, encoded, kind_of
from hogstream.scheduler.files import replace_file


def cache_folder() -> Path | None:
    """The folder ``hogstream`` in the user's cache folder, as the XDG base directories say.

    Returns:
        None if the user has no home folder, and none is named by ``XDG_CACHE_HOME``.
    """
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # then it does not count
        folder = os.path.expanduser("~/.cache")
    return Path(folder, "hogstream") if os.path.isabs(folder) else None


def keep(result: Reported) -> None:
    """Keeps a result as the last of its kind, but for one that a profiler has spoilt.

    That it cannot be written is no error.

    Args:
        result: What a command found out.
    """
    path = _path(kind_of(result))
    if path is None or is_profiled():
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(encoded(result))


def last(kind: str) -> Path | None:
    """Where the last result of a command is; None if there is none."""
    path = _path(kind)
    return path if path is not None and path.is_file() else None


def _path(kind: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / f"last-{kind}.json"
