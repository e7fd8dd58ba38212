"""Where commands keep what they may need again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path | None:
    """The folder ``hogstream`` in the user's cache folder, as the XDG base directories say.

    Returns:
        None if the user has no home folder, and none is named by ``XDG_CACHE_HOME``.
    """
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # then it does not count
        folder = os.path.expanduser("~/.cache")
    return Path(folder, "hogstream") if os.path.isabs(folder) else None
