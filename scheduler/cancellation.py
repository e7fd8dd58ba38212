"""Waits that a cancellation puts off, where something must be seen through to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


async def uncancelled(wait: Callable[[], Awaitable[T]], *responses: Callable[[], object]) -> T:
    """Waits to the end, begun again after each cancellation, and raises the cancellation then.

    Args:
        wait: What to wait for; loses nothing if it is cancelled.
        responses: Called one at each cancellation, so that the end comes sooner.
    """
    cancelled: asyncio.CancelledError | None = None
    left = iter(responses)
    while True:
        try:
            result = await wait()
            break
        except asyncio.CancelledError as error:
            cancelled = error
            next(left, lambda: None)()
    if cancelled is not None:
        raise cancelled
    return result
