"""Ranges for Nsight Systems and other NVTX tools: what a worker does, and under which policy.

All are start/end ranges of the NVTX domain ``hogstream``. None is pushed and popped: that stack
belongs to a thread, and workers take turns on one.

=================  ============================================================  ========  =======
text               around                                                        category  payload
=================  ============================================================  ========  =======
``run POLICY``     a run of a scheduler, until all its updates have landed       policy    none
``iteration``      an iteration of a worker, with its read of the parameters     policy    lane
``submit``         the worker's ``submit``                                       policy    lane
``wait REASON``    a wait for ``lock``, ``bound``, ``landing`` or ``snapshot``   policy    lane
``update``         an update that is enqueued on its lane, on the host           policy    lane
``updates``        several of one ``submit`` that are enqueued together          policy    lane
``snapshot``       the same of a copy of the parameters                          policy    lane
=================  ============================================================  ========  =======

A lane has its worker's index; the payload is an int64. An update is launched as it is enqueued; of
a batch, the last one launches all. On a GPU that is a launch of the kernel; on a CPU, or under a
lock of processes, a thread does the rest later. How long that takes is not said here: on a GPU the
kernel's own row says it, on a CPU, whose lanes run without Python, a ``Timeline``.

In the SQLite export of Nsight Systems all are rows of ``NVTX_EVENTS``: the domain has
``eventType`` 75 and gives ``domainId``; a range has 60, with its payload in ``int64Value``, its
text in ``StringIds`` under ``textId``, and a ``category`` that the row of ``eventType`` 33 names.

Where ``nvtx`` is not installed torch makes the ranges, if it is built for CUDA: in the default
domain, without category and payload.

Without a tool there are no ranges, and nothing is called: ``open_ranges`` gives None. A profiler in
this process may be one too: see ``shown_to``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Protocol

import torch

DOMAIN = "hogstream"

#: What a tool sets before it starts a program that it is to be attached to.
TOOL_VARIABLE = "NVTX_INJECTION64_PATH"


class Tool(Protocol):
    """What takes ranges: the part of ``nvtx.Domain`` that is used."""

    def get_event_attributes(self, message: str, *, category: str, payload: int | None) -> Any:
        """What describes a range, again and again; made once for each that differs."""

    def start_range(self, attributes: Any) -> Any:
        """Begins a range, and gives what ends it."""

    def end_range(self, number: Any) -> None:
        """Ends a range."""


class TorchTool:
    """Ranges by torch, where ``nvtx`` is not installed: by text alone, in the default domain."""

    @staticmethod
    def works() -> bool:
        """Whether this torch was built with NVTX."""
        try:
            torch.cuda.nvtx.range_end(torch.cuda.nvtx.range_start("hogstream"))
        except (AttributeError, RuntimeError):  # as stubs of builds without it raise
            return False
        return True

    def get_event_attributes(self, message: str, *, category: str, payload: int | None) -> str:
        """The text."""
        return message

    def start_range(self, attributes: str) -> int:
        """Begins a range."""
        number: int = torch.cuda.nvtx.range_start(attributes)
        return number

    def end_range(self, number: int) -> None:
        """Ends it."""
        torch.cuda.nvtx.range_end(number)


_other_tool: ContextVar[Tool | None] = ContextVar("other_tool", default=None)


class Range:
    """A range while it goes on; or a context, around which it goes on."""

    __slots__ = ("_attributes", "_number", "_tool")

    def __init__(self, tool: Tool, attributes: Any) -> None:
        """Made by ``Ranges``."""
        self._tool = tool
        self._attributes = attributes

    def start(self) -> Range:
        """Begins it."""
        self._number = self._tool.start_range(self._attributes)
        return self

    def end(self, *_: object) -> None:
        """Ends it, on whatever thread."""
        self._tool.end_range(self._number)

    __enter__, __exit__ = start, end


class Ranges:
    """Ranges of one policy, for a tool that is attached. To be used from any thread."""

    def __init__(self, tool: Tool, policy: str) -> None:
        """Made by ``open_ranges``."""
        self._tool = tool
        self._policy = policy
        self._attributes: dict[tuple[str, int | None], Any] = {}

    def around(self, text: str, lane: int | None = None) -> Range:
        """A range that has not begun.

        Args:
            text: Its name.
            lane: Its payload, if it has one.
        """
        attributes = self._attributes.get((text, lane))
        if attributes is None:
            attributes = self._tool.get_event_attributes(text, category=self._policy, payload=lane)
            self._attributes[text, lane] = attributes
        return Range(self._tool, attributes)


def open_ranges(policy: str) -> Ranges | None:
    """Ranges of a policy, which is their category; None if no tool would see them.

    Whether one would is found out once, at the first call.
    """
    tool = _other_tool.get() or _find_domain()[0]
    return None if tool is None else Ranges(tool, policy)


@contextmanager
def shown_to(tool: Tool) -> Iterator[None]:
    """Shows a tool of this process what is opened in the block, in the place of an NVTX tool."""
    token = _other_tool.set(tool)
    try:
        yield
    finally:
        _other_tool.reset(token)


def why_no_ranges() -> str | None:
    """Why there are no ranges: no tool is attached, or what it lacks. None if there are."""
    return _find_domain()[1]


@cache
def _find_domain() -> tuple[Tool | None, str | None]:
    """The domain, or None and why there is none."""
    tool = os.environ.get(TOOL_VARIABLE)
    if not tool:
        return None, "no NVTX tool is attached"
    attached = f"an NVTX tool is attached ({TOOL_VARIABLE}={tool}), but "
    try:
        import nvtx
    except ImportError:
        if TorchTool.works():
            return TorchTool(), None
        return None, attached + "nvtx is not installed: pip install nvtx"
    if not hasattr(nvtx, "Domain"):
        return None, attached + "nvtx is too old: pip install --upgrade nvtx"
    if not nvtx.enabled():
        return None, attached + "NVTX_DISABLE is set"
    domain = nvtx.get_domain(DOMAIN)
    if not isinstance(domain, nvtx.Domain):
        return None, attached + "it takes no ranges"
    return domain, None
