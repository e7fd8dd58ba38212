"""Ranges for Nsight Systems and other NVTX tools: whose step it is, and under which policy.

All are start/end ranges of the NVTX domain ``hogstream``. None is pushed and popped: that stack
belongs to a thread, and workers take turns on one.

=================  ============================================================  ========  =======
text               around                                                        category  payload
=================  ============================================================  ========  =======
``run POLICY``     a run of a scheduler, until all its updates have landed       policy    none
``iteration``      an iteration of a worker, with its read of the parameters     policy    lane
``submit``         the worker's ``submit``                                       policy    lane
``wait REASON``    a wait for ``lock``, ``bound``, ``landing`` or ``snapshot``   policy    lane
``update``         the hand-over of an update to its lane, on the host           policy    lane
``snapshot``       the same of a copy of the parameters                          policy    lane
``step``           ``RMSpropAsync.step``                                         none      none
=================  ============================================================  ========  =======

A lane has its worker's index; the payload is an int64. A hand-over launches the kernel, or puts the
update into a batch or a queue whose last one does, or a thread. How long an update then takes is
said by the kernel's own row on a GPU, and by a ``Timeline`` on a CPU, whose lanes run without
Python.

In the SQLite export of Nsight Systems all are rows of ``NVTX_EVENTS``: the domain has
``eventType`` 75 and gives ``domainId``; a range has 60, with its payload in ``int64Value``, its
text in ``StringIds`` under ``textId``, and a ``category`` that the row of ``eventType`` 33 names.

Without a tool there are no ranges, and nothing is called: ``open_ranges`` gives None.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

DOMAIN = "hogstream"

#: What a tool sets before it starts a program that it is to be attached to.
TOOL_VARIABLE = "NVTX_INJECTION64_PATH"


class Range:
    """A range while it goes on; or a context, around which it goes on."""

    __slots__ = ("_attributes", "_domain", "_number")

    def __init__(self, domain: Any, attributes: Any) -> None:
        """Made by ``Ranges``."""
        self._domain = domain
        self._attributes = attributes

    def start(self) -> Range:
        """Begins it."""
        self._number = self._domain.start_range(self._attributes)
        return self

    def end(self, *_: object) -> None:
        """Ends it, on whatever thread."""
        self._domain.end_range(self._number)

    __enter__, __exit__ = start, end


class Ranges:
    """Ranges of one category, for a tool that is attached. To be used from any thread."""

    def __init__(self, domain: Any, category: str | None) -> None:
        """Made by ``open_ranges``."""
        self._domain = domain
        self._category = category
        self._attributes: dict[tuple[str, int | None], Any] = {}

    def around(self, text: str, lane: int | None = None) -> Range:
        """A range that has not begun.

        Args:
            text: Its name.
            lane: Its payload, if it has one.
        """
        attributes = self._attributes.get((text, lane))
        if attributes is None:
            attributes = self._domain.get_event_attributes(
                message=text, category=self._category, payload=lane
            )
            self._attributes[text, lane] = attributes
        return Range(self._domain, attributes)


def open_ranges(category: str | None = None) -> Ranges | None:
    """Ranges of a category, such as a policy; None if no tool would see them.

    Whether one would is found out once, at the first call.
    """
    domain, _ = _find_domain()
    return None if domain is None else Ranges(domain, category)


def why_no_ranges() -> str | None:
    """Why there are no ranges: no tool is attached, or what it lacks. None if there are."""
    _, reason = _find_domain()
    return reason


@cache
def _find_domain() -> tuple[Any, str | None]:
    """The domain, or None and why there is none."""
    tool = os.environ.get(TOOL_VARIABLE)
    if not tool:
        return None, "no NVTX tool is attached"
    attached = f"an NVTX tool is attached ({TOOL_VARIABLE}={tool}), but "
    try:
        import nvtx
    except ImportError:
        return None, attached + "nvtx is not installed: pip install nvtx"
    if not hasattr(nvtx, "Domain"):
        return None, attached + "nvtx is too old: pip install --upgrade nvtx"
    if not nvtx.enabled():
        return None, attached + "NVTX_DISABLE is set"
    domain = nvtx.get_domain(DOMAIN)
    if not isinstance(domain, nvtx.Domain):
        return None, attached + "it takes no ranges"
    return domain, None
