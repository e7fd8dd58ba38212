"""What the fuzzes share: a case is all that was drawn from one seed, and each is watched."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import os
import random
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from types import CodeType
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

LIMIT_SECONDS = 60
LOOPS = ["asyncio", "uvloop"]


class Case(Protocol):
    """What was drawn from a seed; its ``repr`` is the whole configuration."""

    def run(self) -> None:
        """Raises AssertionError, or whatever the code under test did, if something is wrong."""


class Chance(random.Random):
    """Draws, all of which follow from one seed."""

    def some(self, probability: float) -> bool:
        """True as often as that."""
        return self.random() < probability

    def subset(self, values: Mapping[str, T], probability: float) -> dict[str, T]:
        """Each of the values as often as that."""
        return {name: value for name, value in values.items() if self.some(probability)}


def try_seed(draw: Callable[[int], Case], seed: int, command: str) -> None:
    """Runs the case of a seed; if it hangs, ends Python with a picture of where.

    Args:
        draw: Makes the case.
        seed: Of all that is drawn.
        command: Runs it again.

    Raises:
        AssertionError: If anything is wrong; it says how to run the case again.
    """
    again = f"again: {command}"
    case = draw(seed)
    try:
        with _watched(f"{again}\n{case}"), warnings.catch_warnings():
            warnings.simplefilter("error")
            case.run()
    except Exception as error:
        raise AssertionError(f"seed {seed}: {error!r}\n{again}\n{case}") from error


def fuzz_again(fuzz: str, seed: int) -> str:
    """The command that runs a seed of a fuzz."""
    return f"make fuzz FUZZ={fuzz} SEED={seed} RUNS=1"


def run_in_loop(name: str, main: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine in a new event loop of a kind, where it must leave nothing behind.

    Args:
        name: One of ``LOOPS``; uvloop's, if it is not installed, is asyncio's own.
        main: What to run.

    Raises:
        AssertionError: If a task, a thread or an open file is left, or a callback or a task that
            nobody awaits has failed.
    """
    unheard: list[dict[str, Any]] = []
    loop = _new_loop(name)
    loop.set_exception_handler(lambda _, context: unheard.append(context))
    files = _open_files()
    try:
        loop.run_until_complete(main)
        assert not (left := asyncio.all_tasks(loop)), f"tasks left: {left}"
        assert not (threads := hogstream_threads()), f"threads left: {threads}"
        assert not (more := _open_files() - files), f"files left: {more}"
        gc.collect(0)  # of failures that nobody heard of, garbage tells
        assert not unheard, f"nobody heard of {unheard}"
    finally:
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def hogstream_threads() -> list[threading.Thread]:
    """Those of lanes and workers."""
    names = ("hogstream-lane", "hogstream-worker")
    return [thread for thread in threading.enumerate() if thread.name.startswith(names)]


def _open_files() -> Counter[str]:
    """How many files without a name there are, of each kind: events, sockets, pipes, processes."""
    kinds: Counter[str] = Counter()
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # of the one that lists them
            target = os.readlink(f"/proc/self/fd/{number}")
            if not target.startswith("/"):
                kinds[target.rstrip("0123456789[]")] += 1
    return kinds


def _new_loop(name: str) -> asyncio.AbstractEventLoop:
    if name == "uvloop" and find_spec("uvloop"):
        import uvloop

        loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
        return loop
    return asyncio.new_event_loop()


@contextmanager
def _watched(what: str) -> Iterator[None]:
    ended = threading.Event()
    watch = threading.Thread(target=_watch, args=(ended, what), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def _watch(ended: threading.Event, what: str) -> None:
    # A second at a time: a machine that was paused meanwhile is no hang.
    if any(ended.wait(1) for _ in range(LIMIT_SECONDS)):
        return
    try:
        print(f"hangs for {LIMIT_SECONDS} s: {what}", file=sys.stderr)
        for task in gc.get_objects():
            if issubclass(type(task), asyncio.Task) and not task.done():
                print(task.get_name(), *_awaits(task), sep="\n  ", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(all_threads=True)
    finally:
        os._exit(3)


def _awaits(task: asyncio.Task[Any]) -> Iterator[str]:
    """Where a task is, from its outermost coroutine to what it waits for."""
    awaited: Any = task.get_coro()
    while isinstance(code := getattr(awaited, "cr_code", None), CodeType):
        frame = awaited.cr_frame
        yield f"{code.co_filename}:{frame.f_lineno if frame else '-'} {awaited.__qualname__}"
        awaited = awaited.cr_await
    yield repr(awaited)
