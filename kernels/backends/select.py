"""Which backends there are, which of them run here, and which one takes an update."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch


@dataclass(frozen=True)
class Backend:
    """One implementation of the update.

    Attributes:
        name: As in ``backend=``.
        kernel: Updates the parameters and ``ms`` of a table in place, on the calling thread or on
            the current stream. All take the ``key`` of a step; Triton's ``lr_on_device``,
            ``counters``, ``verdict``, ``grad_factor`` and ``found_inf`` besides.
        update_: The same with all CPU threads that the update is worth.
        race_block: How many elements of a parameter ``RaceCounters`` count together, by its dtype
            and device; None if this backend has no atomic operations to count with.
    """

    name: str
    kernel: Callable[..., Any]
    update_: Callable[..., Any]
    race_block: Callable[[torch.dtype, torch.device], int] | None

    @property
    def counts_races(self) -> bool:
        """Whether it can keep ``RaceCounters``."""
        return self.race_block is not None


@dataclass(frozen=True)
class RowBackend:
    """One implementation of the update of rows.

    Attributes:
        name: As in ``backend=``.
        kernel: Updates rows of a table in place, on the calling thread or on the current stream.
            All take the ``key`` of a step; Triton's ``verdict``, ``lr_on_device``, ``grad_factor``,
            ``found_inf`` and ``counters`` besides.
        update_: The same with all CPU threads that the update is worth.
    """

    name: str
    kernel: Callable[..., Any]
    update_: Callable[..., Any]


def available_backends() -> dict[str, str | None]:
    """Maps each backend's name to None if it runs here, else to the reason that it does not.

    It imports their compilers, which takes a second or so when it is first called.
    """
    return {name: missing() for name, missing in _MISSING.items()}


def check_backend(name: str | None) -> None:
    """Checks a ``backend=`` argument.

    Raises:
        ValueError: If there is no backend of that name.
        RuntimeError: If it cannot run here; the message says what it lacks.
    """
    if name is None:
        return
    if not isinstance(name, str) or name not in _MISSING:
        raise ValueError(f"backend must be one of {', '.join(_MISSING)} or None, got {name!r}")
    missing = _MISSING[name]()
    if missing is not None:
        raise RuntimeError(f"backend {name!r} is not available: {missing}")


def select_backend(name: str | None, device_type: str) -> Backend:
    """The backend to use on a type of device: the one named, or the device's default.

    Args:
        name: A backend, or None for Triton on a GPU, and on a CPU Numba if it works, else NumPy.
        device_type: Where the operands are, as ``torch.device.type``.

    Raises:
        ValueError: If the name is unknown, or the backend cannot take tensors of that device.
        RuntimeError: If the backend is not available.
    """
    check_backend(name)
    return _select(name, device_type)


@cache
def _select(name: str | None, device_type: str) -> Backend:
    if name is None:
        name = "triton" if device_type == "cuda" else "numpy" if _numba_missing() else "numba"
        check_backend(name)
    takes = "cuda" if name == "triton" and not _interpreted() else "cpu"
    if device_type != takes:
        raise ValueError(f"backend {name!r} takes {takes} tensors, got one on {device_type}")
    module = importlib.import_module(_module(name))
    update_ = module.update_ if name == "triton" else module.update_in_pieces_
    race_block = None if name == "numpy" else module.race_block
    return Backend(name, module.update_, update_, race_block)


@cache
def select_row_backend(name: str | None, device_type: str) -> RowBackend:
    """As ``select_backend``, of updates of rows.

    Args:
        name: A backend, or None for the default.
        device_type: Where the operands are, as ``torch.device.type``.

    Raises:
        ValueError: As ``select_backend``.
        RuntimeError: Likewise.
    """
    chosen = select_backend(name, device_type).name
    module = importlib.import_module(f"{__package__}.{chosen}_rows")
    return RowBackend(chosen, module.update_, getattr(module, "update_in_pieces_", module.update_))


@cache
def _numba_missing() -> str | None:
    if importlib.util.find_spec("numba") is None:
        return "Numba is not installed; pip install 'hogstream[cpu]'"
    config = "numba.core.config"
    if broken := _import_error("Numba", config):
        return broken
    if importlib.import_module(config).DISABLE_JIT:
        return "Numba compiles nothing, as NUMBA_DISABLE_JIT is set"
    return _import_error("Numba", _module("numba"))


@cache
def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton (Linux only)"
    if not torch.cuda.is_available() and not _interpreted():
        return "no CUDA or ROCm device (with TRITON_INTERPRET=1 it runs on the CPU, slowly)"
    return _import_error("Triton", _module("triton"))


def _import_error(package: str, module: str) -> str | None:
    """Why a module cannot be imported, though its package is installed; None if it can.

    Only importing it tells: compilers refuse versions of Python, NumPy or torch, each in its way.
    """
    try:
        importlib.import_module(module)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        return f"{package} is installed, but cannot be imported: {said}"
    return None


def _module(backend: str) -> str:
    return f"hogstream.kernels.backends.{_MODULES[backend]}"


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


# Where each backend's ``update_`` is: imported on first use, as what it needs may not be here.
_MODULES = {"triton": "triton_launch", "numba": "numba_kernels", "numpy": "numpy_kernels"}

# What tells why each of them does not run here.
_MISSING: dict[str, Callable[[], str | None]] = {
    "triton": _triton_missing,
    "numba": _numba_missing,
    "numpy": lambda: None,
}

#: What there are, running here or not.
BACKENDS = tuple(_MISSING)
