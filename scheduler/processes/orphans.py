"""How a process ends when its parent has, and what it has started with it."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from multiprocessing import active_children, connection, parent_process

# How often a process looks whether it is an orphan.
_ORPHAN_SECONDS = 1.0


def end_with_parent() -> None:
    """Has this process end at once when the one that multiprocessing started it from has ended.

    Processes that it has started by multiprocessing, as a ``DataLoader`` does, end with it.
    """
    threading.Thread(target=_end_with_parent, name="hogstream-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    ends = [parent.sentinel]
    # A process that the parent has forked keeps the sentinel open when the parent has ended.
    if hasattr(os, "pidfd_open") and parent.pid is not None:
        with suppress(OSError):  # where that is not allowed, or it has ended
            ends.append(os.pidfd_open(parent.pid))
    by_parent = os.getppid() == parent.pid  # and not by a server of forks
    while not connection.wait(ends, _ORPHAN_SECONDS):
        if by_parent and os.getppid() != parent.pid:
            break
    try:
        for child in active_children():
            child.terminate()
    finally:
        os._exit(1)  # nobody is left to report to
