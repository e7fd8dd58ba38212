"""The backends: one formula each, and how one is chosen."""

from hogstream.kernels.backends.select import (
    Backend,
    available_backends,
    check_backend,
    select_backend,
)

__all__ = ["Backend", "available_backends", "check_backend", "select_backend"]
