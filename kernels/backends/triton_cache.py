"""A folder that Triton can keep compiled kernels in, without which it does not run."""

from __future__ import annotations

import atexit
import logging
import os
import shutil
import tempfile
from functools import cache

import triton

_log = logging.getLogger(__name__)


@cache
def ensure_folder() -> None:
    """Gives Triton a temporary folder if its own cannot be written: for all of this process.

    To be called before anything is compiled. If there is no temporary folder either, Triton says
    what it lacks.
    """
    try:
        os.makedirs(triton.knobs.cache.dir, exist_ok=True)
        tempfile.TemporaryFile(dir=triton.knobs.cache.dir).close()
    except OSError as error:
        try:
            temporary = tempfile.mkdtemp(prefix="hogstream-triton-")
        except OSError:
            return
        triton.knobs.cache.dir = temporary
        atexit.register(_remove, temporary, os.getpid())
        _log.warning(
            "each process compiles anew, as what Triton compiled cannot be kept: %s", error
        )


def _remove(folder: str, owner: int) -> None:
    if os.getpid() == owner:  # not a child that was forked from it
        shutil.rmtree(folder, ignore_errors=True)
