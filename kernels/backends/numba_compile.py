"""Numba's compilers as all our compiled code uses them: what they make is kept where it can be.

Numba's own ``cache=True`` raises where it finds no folder that it may write, when the disk is full,
and at a file that is damaged; or it runs the damaged machine code. A cache is no reason to fail:
here the function is compiled again. So it is when a file has changed that it is made from: Numba
looks at the function's own alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import pickle
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core import caching, sigutils
from numba.core.ccallback import CFunc
from numba.core.registry import CPUDispatcher
from numba.core.serialize import dumps

Function = TypeVar("Function", bound=Callable[..., Any])

_caching: Any = caching  # much of it has no annotations
_log = logging.getLogger(__name__)
_warned = False


def njit(function: Function) -> Function:
    """``numba.njit`` that releases the GIL, checks no divisor, and keeps what it compiled."""
    compiled: Any = numba.njit(nogil=True, error_model="numpy")(function)
    compiled._cache = _cache_of(function)
    typed: Function = compiled
    return typed


class _Part(CPUDispatcher):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self.py_func.__name__} is called by compiled code alone")


def part(function: Function) -> Function:
    """As ``njit``, of what compiled code alone calls: half the time to compile.

    The other half Numba takes for what would call the function from Python.
    """
    options = {"nopython": True, "nogil": True, "error_model": "numpy", "boundscheck": None}
    compiled: Any = _Part(
        function, targetoptions={**options, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    )
    compiled._cache = _cache_of(function)
    typed: Function = compiled
    return typed


def cfunc(signature: Any) -> Callable[[Callable[..., Any]], Any]:
    """``numba.cfunc`` that keeps what it compiled."""

    def compile_(function: Callable[..., Any]) -> Any:
        compiled: Any = CFunc(
            function, sigutils.normalize_signature(signature), locals={}, options={}
        )
        compiled._cache = _cache_of(function)
        compiled.compile()
        return compiled

    return compile_


def with_the_gil(signature: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiles a function as ``cfunc`` does, to be called from Python, which keeps the GIL.

    Args:
        signature: Of int64, and of pointers, which are given as addresses; it returns int64.
    """

    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled = cfunc(signature)(function)
        arguments = [ctypes.c_int64] * function.__code__.co_argcount
        called: Any = ctypes.PYFUNCTYPE(ctypes.c_int64, *arguments)(compiled.address)
        called.compiled = compiled  # which has the code's memory
        typed: Callable[..., Any] = called
        return typed

    return compile_


def _cache_of(function: Callable[..., Any]) -> Any:
    try:
        return _Cache(function)
    except Exception as error:  # there is no folder for it
        _not_kept(error)
        return _caching.NullCache()


class _Cache(_caching.FunctionCache):  # type: ignore[misc]
    """Numba's cache of one function, which may fail to keep it, and may hold what is damaged."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        stamp = locator.get_source_stamp(), _sources_of(Path(function.__code__.co_filename).parent)
        self._cache_file = _CheckedFile(locator.get_cache_path(), self._impl.filename_base, stamp)

    def load_overload(self, signature: Any, context: Any) -> Any:
        """What was compiled for a signature; None if it was not, or cannot be read."""
        try:
            return super().load_overload(signature, context)
        except Exception as error:  # unpickling raises whatever the bytes make it do
            _log.info("compiling %s anew: %r", self._name, error)
            self._cache_file.remove()
            return None

    def save_overload(self, signature: Any, compiled: Any) -> None:
        """Keeps what was compiled, if it can be."""
        try:
            super().save_overload(signature, compiled)
        except Exception as error:  # such as a full disk
            _not_kept(error)


@cache
def _sources_of(folder: Path) -> str:
    """A digest of all files that code in a folder is compiled from; Numba looks at one alone."""
    kernels = Path(__file__).parents[1]
    paths = {*kernels.rglob("*.py"), *folder.glob("*.py")}
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()


class _CheckedFile(_caching.IndexDataCacheFile):  # type: ignore[misc]
    """The files of a cache, each with a digest: damaged machine code would be run."""

    def save(self, key: Any, data: Any) -> None:
        """Keeps the data of a key."""
        pickled = dumps((key, data))
        super().save(key, (hashlib.sha256(pickled).digest(), pickled))

    def load(self, key: Any) -> Any:
        """The data of a key; None if there is none."""
        found = super().load(key)
        if found is None:
            return None
        digest, pickled = found
        if hashlib.sha256(pickled).digest() != digest:
            raise ValueError(f"{self._index_path} or a file beside it is damaged")
        kept_key, data = pickle.loads(pickled)
        return data if kept_key == key else None

    def remove(self) -> None:
        """Forgets what is kept."""
        with suppress(OSError):
            Path(self._index_path).unlink()


def _not_kept(error: Exception) -> None:
    """Logs that what was compiled cannot be kept: as a warning once, as all will have one cause."""
    global _warned
    level, _warned = logging.INFO if _warned else logging.WARNING, True
    _log.log(level, "each process compiles anew, as what Numba compiled cannot be kept: %s", error)
