"""Counting what code does: a number that is the same each time, where a clock's is not."""

from __future__ import annotations

import gc
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import hogstream.kernels
import hogstream.optim
import hogstream.scheduler

# As they are imported, which may be by links: the names of files in code are not resolved either.
_FOLDERS = [
    Path(str(package.__file__)).parent
    for package in (hogstream.kernels, hogstream.optim, hogstream.scheduler)
]
_ROOT = _FOLDERS[0].parent
_OURS = tuple(os.path.join(folder, "") for folder in _FOLDERS)
# From Python 3.12 on these are part of the function around them.
_INLINED = ("<listcomp>", "<dictcomp>", "<setcomp>")


def hold(what: str, counted: float, at_most: float) -> None:
    """Fails if there is more of something than is held."""
    assert counted <= at_most, (
        f"{what}: {counted:g}, held at {at_most:g}. Take out what was added; or, if it is worth "
        "what it costs, raise the number in the table and say in the commit what it buys."
    )


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Counts, on this thread, calls of each Python function of ours: by its module and name.

    Each time that a coroutine or generator is resumed counts too.
    """
    counts: Counter[str] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call" and (name := _name(frame.f_code)):
            counts[name] += 1

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        yield counts
    finally:
        sys.setprofile(before)


def opcodes(function: Callable[[], object]) -> int:
    """How many instructions of Python a call executes in functions of ours."""
    count = 0

    def note(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "opcode"
        return note

    def enter(frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return note

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


@contextmanager
def counted_collections(threshold: int) -> Iterator[Counter[str]]:
    """Counts runs of the garbage collector, which starts after so many new objects that live."""
    counts: Counter[str] = Counter()

    def note(phase: str, _: dict[str, int]) -> None:
        counts[phase] += 1

    gc.collect()
    before = gc.get_threshold()
    gc.callbacks.append(note)
    gc.set_threshold(threshold)
    try:
        yield counts
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(note)


@cache
def _name(code: CodeType) -> str:
    """What a function of ours is called in the counts; of others, nothing."""
    if not code.co_filename.startswith(_OURS) or code.co_name in _INLINED:
        return ""
    module = Path(code.co_filename).relative_to(_ROOT).with_suffix("")
    return ".".join((*module.parts, code.co_name))
