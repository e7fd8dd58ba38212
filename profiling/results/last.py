"""The last result of each command on this machine, kept in the user's cache folder."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from hogstream.profiling.capture import is_profiled
from hogstream.profiling.results.user_cache import cache_folder
from hogstream.scheduler.files import replace_file


def keep(kind: str, result: dict[str, Any]) -> None:
    """Keeps a result as the last of its kind, but for one that a profiler has spoilt.

    That it cannot be written is no error.

    Args:
        kind: The command, such as ``bench``.
        result: Its JSON output.
    """
    path = _path(kind)
    if path is None or is_profiled():
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(json.dumps(result, allow_nan=False).encode())


def last(kind: str) -> Path | None:
    """Where the last result of a command is; None if there is none."""
    path = _path(kind)
    return path if path is not None and path.is_file() else None


def _path(kind: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / f"last-{kind}.json"
