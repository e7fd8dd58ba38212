"""Settings that every test runs under."""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from brief_hogstream import BRIEF

HAS_DEVICE = torch.cuda.is_available()

# Triton reads this when a kernel is defined, so it is set before any test imports one.
if not HAS_DEVICE:
    os.environ["TRITON_INTERPRET"] = "1"


# What commands keep for the user they keep here, and nothing of the user's is seen.
_CACHE = tempfile.TemporaryDirectory(prefix="hogstream-tests-")
os.environ["XDG_CACHE_HOME"] = _CACHE.name


def pytest_unconfigure() -> None:
    _CACHE.cleanup()
    gc.unfreeze()  # else what some libraries have would be leaked when Python ends, as they tell


# A machine with a GPU and no network may lack what follows: its tests of the GPU run all the same.
if find_spec("hypothesis"):
    import hypothesis

    # A first example may compile a kernel: no deadline fits both it and the others.
    hypothesis.settings.register_profile("hogstream", deadline=None, max_examples=50)
    hypothesis.settings.load_profile("hogstream")

collect_ignore = [
    str(path)
    for path in Path(__file__).parent.rglob("test_*.py")
    for package in ("hypothesis", "safetensors")
    if not find_spec(package) and f"from {package} import" in path.read_text("utf-8")
]


def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Runs a test that is a coroutine function, in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not HAS_DEVICE:
        for item in items:
            if item.get_closest_marker("gpu"):  # not a keyword, as names of folders are too
                item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))
    if "PYTEST_XDIST_WORKER" in os.environ:
        # Files are shared out in their order: those that take long first, so that all end together.
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="module", autouse=True)
def nothing_older_is_garbage() -> None:
    """Tests that look for what they left behind collect garbage often: only in what is new."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def brief_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process measure little of what is around what they are asked for."""
    for module, (name, value) in BRIEF.items():
        monkeypatch.setattr(f"{module}.{name}", value)


@pytest.fixture
def hogstream(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    brief_measurements: None,
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command; returns exit status, standard output and standard error."""
    from hogstream.cli.main import main  # not for tests that do without the packages of commands

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["hogstream", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit_:
            main()
        captured = capsys.readouterr()
        assert isinstance(exit_.value.code, int)
        return exit_.value.code, captured.out, captured.err

    return run
