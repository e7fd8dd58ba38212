"""What tests of the scheduler share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from hogstream.scheduler import SharedParameters, StreamScheduler


def python_lanes(
    shared: SharedParameters, kernel: Callable[..., Any], **settings: Any
) -> StreamScheduler:
    """A scheduler whose lanes call ``kernel(update, *operands)`` in place of NumPy's update.

    The warm-up, which updates one spare element, goes to NumPy itself.
    """
    scheduler = StreamScheduler(shared, backend="numpy", **settings)
    update = scheduler.backend.kernel

    def call(*operands: Any) -> None:
        chosen = update if operands[0].elements == 1 else partial(kernel, update)
        chosen(*operands)

    scheduler.backend = replace(scheduler.backend, kernel=call)
    return scheduler
