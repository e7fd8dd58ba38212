"""How a thread rounds and what it does with denormals: a mode that each thread has for itself."""

from __future__ import annotations

import ctypes

# C's functions from ``fenv.h``, in whatever is loaded; they are too short to give up the GIL for.
_libm = ctypes.PyDLL(None)
for _function in (_libm.fegetenv, _libm.fesetenv):
    _function.argtypes = [ctypes.c_void_p]
#: Room for an ``fenv_t``, which has 32 bytes on x86-64 and 8 on AArch64.
ENVIRONMENT_BYTES = 64


class FloatingPointMode:
    """The mode of the thread that makes this, for threads that compute in its place.

    ``torch.set_flush_denormal`` sets part of it for its caller alone. A new thread has the mode of
    whoever starts it, on Linux, and not that of whoever it works for later.
    """

    def __init__(self) -> None:
        self._environment = ctypes.create_string_buffer(ENVIRONMENT_BYTES)
        self._address = ctypes.addressof(self._environment)
        self.take()

    def take(self) -> None:
        """Becomes the mode of the calling thread."""
        write_environment(self._address)

    def set(self) -> None:
        """Gives the calling thread this mode."""
        _libm.fesetenv(self._address)


class InMode:
    """A context in which a thread has a mode, and after which it has its own again.

    For one thread at a time, which may be another each time.
    """

    def __init__(self, mode: FloatingPointMode) -> None:
        """Remembers the mode."""
        self._mode = mode
        self._own = FloatingPointMode()

    def __enter__(self) -> None:
        self._own.take()
        self._mode.set()

    def __exit__(self, *error: object) -> None:
        self._own.set()


def write_environment(address: int) -> None:
    """Writes the calling thread's mode to memory, as an ``fenv_t`` of C."""
    _libm.fegetenv(address)
