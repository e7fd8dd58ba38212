"""torch's own OpenMP threads, for compiled code to run on.

After a backward they stay awake for a while, spinning on the cores that the next step wants. Other
threads would have to share those cores with them; these are there at once. They are reached by the
function that compiled OpenMP code calls to start a parallel region (libgomp's ``GOMP_parallel``,
which libomp and libiomp have too), in the very library that torch has loaded.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

# ``PF_FORKNOEXEC`` of Linux: a process that was forked and has not run another program since.
_FORKED_FLAG = 0x40


class TorchThreads(NamedTuple):
    """What runs C functions on torch's threads.

    Attributes:
        parallel: ``parallel(function, argument, threads, flags)`` calls a C function of one pointer
            on as many threads as torch would take, if ``threads`` is 0, until all have returned;
            without the GIL.
        number: The address of a C function without arguments. It returns an int32: which of these
            threads calls it, 0 being the one that called ``parallel``.
    """

    parallel: Callable[[int, int, int, int], None]
    number: int


def torch_threads() -> TorchThreads | None:
    """What runs C functions on torch's threads; None if there are none.

    There are none where torch was built without OpenMP, or with one of another kind, and none in
    the child of a fork: its parent's threads are gone, and the library would wait for them.
    Whether the parent had any, nothing tells.
    """
    return None if _forked else _loaded()


@cache
def _loaded() -> TorchThreads | None:
    if not torch.backends.openmp.is_available():
        return None
    # Where torch's own calls lead: whatever the process shows to all, then torch's own library.
    for library in (None, str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so")):
        try:
            loaded = ctypes.CDLL(library)
            parallel, number = loaded.GOMP_parallel, loaded.omp_get_thread_num
        except (OSError, AttributeError):
            continue
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return TorchThreads(parallel, ctypes.cast(number, ctypes.c_void_p).value or 0)
    return None


def _is_forked() -> bool:
    """Whether this process was forked before this module was loaded, maybe with torch's threads."""
    try:
        status = Path("/proc/self/stat").read_bytes()
    except OSError:  # not Linux
        return False
    return bool(int(status.rpartition(b")")[2].split()[6]) & _FORKED_FLAG)


def _note_fork() -> None:
    global _forked
    _forked = True


_forked = _is_forked()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)
