"""Compiled code is kept where it can be; a cache that fails costs time, and nothing else."""

from __future__ import annotations

import importlib.util
import itertools
import logging
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

numba = pytest.importorskip("numba")

from numba.core import caching  # noqa: E402

from hogstream.kernels.backends import numba_compile  # noqa: E402
from hogstream.kernels.backends.numba_kernels import begin_block  # noqa: E402

SOURCE = """
from numba import types
from hogstream.kernels.backends.numba_compile import cfunc, njit

@njit
def double(number):
    return 2 * number

@cfunc(types.int64(types.int64))
def triple(number):
    return 3 * number
"""
_numbers = itertools.count()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder that Numba may keep something in; not made yet."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(folder))
    locators = [caching.UserProvidedCacheLocator]
    monkeypatch.setattr(caching.CacheImpl, "_locator_classes", locators)
    monkeypatch.setattr(numba_compile, "_warned", False)
    return folder


@pytest.fixture
def compile_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], ModuleType]:
    """Compiles the functions, as another process would, and checks that they are right."""
    path = tmp_path / "functions.py"
    path.write_text(SOURCE)

    def compile_() -> ModuleType:
        name = f"functions_{next(_numbers)}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        assert module.double(21) == 42
        assert module.triple.ctypes(14) == 42
        return module

    return compile_


def hits(module: ModuleType) -> tuple[int, int]:
    return sum(module.double.stats.cache_hits.values()), module.triple.cache_hits


def test_is_kept(cache, compile_anew):
    assert hits(compile_anew()) == (0, 0)
    assert hits(compile_anew()) == (1, 1)


def test_is_compiled_anew_when_a_file_beside_it_changes(cache, compile_anew, tmp_path):
    """Its constants, or what it calls, may come from there."""
    for content, expected in (("ONE = 1", (0, 0)), ("ONE = 1", (1, 1)), ("ONE = 2", (0, 0))):
        (tmp_path / "constants.py").write_text(content)
        numba_compile._sources_of.cache_clear()
        assert hits(compile_anew()) == expected


DAMAGE = {
    "emptied": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "a byte short": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "zeros at the end": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "another byte in the middle": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "text": lambda data: b"not a pickle\n",
    "a call of something that is not there": lambda data: b"cno_such_module\nfunction\n.",
}


@pytest.mark.parametrize("pattern", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_files_are_made_anew(cache, compile_anew, pattern, damage):
    compile_anew()
    files = list(cache.rglob(pattern))
    assert len(files) == 2
    for file in files:
        file.write_bytes(damage(file.read_bytes()))
    assert hits(compile_anew()) == (0, 0)
    assert hits(compile_anew()) == (1, 1)


@pytest.mark.slow
def test_no_changed_byte_is_run(cache, compile_anew):
    compile_anew()
    (file,) = cache.rglob("*double*.nbc")
    data = file.read_bytes()
    for place in range(7, len(data), len(data) // 24):
        file.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        assert hits(compile_anew())[0] == 0, place
        file.write_bytes(data)


def test_data_of_another_function_is_not_taken(cache, compile_anew):
    compile_anew()
    first, second = sorted(cache.rglob("*.nbc"))
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)
    compile_anew()


def folder_is_a_file(cache: Path) -> None:
    cache.write_text("")


def index_is_a_folder(cache: Path) -> None:
    for index in cache.rglob("*.nbi"):
        index.unlink()
        index.mkdir()


@pytest.mark.parametrize("spoil", [folder_is_a_file, index_is_a_folder])
def test_a_folder_that_cannot_be_used_is_told_once(cache, compile_anew, caplog, spoil):
    if spoil is index_is_a_folder:
        compile_anew()
    spoil(cache)
    with caplog.at_level(logging.WARNING):
        compile_anew()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "compiles anew" in caplog.text


def test_a_full_disk_is_told_once(cache, compile_anew, caplog):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
    try:
        compile_anew()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_a_part_is_called_by_compiled_code_alone():
    with pytest.raises(TypeError, match="begin_block is called by compiled code alone"):
        begin_block(0, 0, 0)
