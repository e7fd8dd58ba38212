"""What the C library does in a process with memory that was freed."""

from __future__ import annotations

import ctypes
import os

# Parameters of ``mallopt``, by glibc's malloc.h, and the environment variables that set the same.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_VARIABLES = {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"}


def keep_freed_memory() -> None:
    """Has the C library keep for later, in this process, what is freed: up to 64 MiB a thread.

    Else it may return what an iteration has freed to the system, and the next has a page fault for
    each 4 KiB. For glibc; another library is left as it is, and so is this one where the
    environment says what it is to do. See mallopt(3).
    """
    library = ctypes.CDLL(None)
    told = _VARIABLES & os.environ.keys() or "_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if hasattr(library, "mallopt") and not told:
        library.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        library.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
