"""The last result of each command on this machine, kept in the user's cache folder."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from hogstream.scheduler.files import replace_file


def keep(kind: str, result: dict[str, Any]) -> None:
    """Keeps a result as the last of its kind; that it cannot be written is no error.

    Args:
        kind: The command, such as ``bench``.
        result: Its JSON output.
    """
    path = _path(kind)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as file:
            file.write(json.dumps(result, allow_nan=False).encode())


def last(kind: str) -> Path | None:
    """Where the last result of a command is; None if there is none."""
    path = _path(kind)
    return path if path.is_file() else None


def _path(kind: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache else Path(os.path.expanduser("~")) / ".cache"
    return folder / "hogstream" / f"last-{kind}.json"
