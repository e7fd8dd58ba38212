"""Waits that a cancellation puts off, where something must be seen through to its end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")

# Cancellations with shorter pauses between them are one: a scope of anyio whose deadline has passed
# cancels at every few turns of the event loop, however long a turn takes.
_PAUSE_SECONDS = 0.1
_PAUSE_TURNS = 10


async def uncancelled(wait: Callable[[], Awaitable[T]], *responses: Callable[[], object]) -> T:
    """Waits to the end, and raises then what cancellation came meanwhile.

    The wait goes on in a task of its own, which no cancellation of this one reaches, however often
    it comes. Should somebody cancel all tasks, as ``asyncio.run`` does at its end, it begins again.

    Args:
        wait: What to wait for; loses nothing if it begins again.
        responses: Called one at each cancellation, so that the end comes sooner. Cancellations that
            follow close upon another are the same one.
    """
    cancelled: asyncio.CancelledError | None = None
    answers = _Answers(responses)
    waiting = asyncio.ensure_future(wait())
    try:
        while not waiting.done():
            try:
                await asyncio.wait({waiting})
            except asyncio.CancelledError as error:
                cancelled = error
                answers.give_next()
            if waiting.cancelled():
                waiting = asyncio.ensure_future(wait())
    finally:
        answers.close()
    result = waiting.result()
    if cancelled is not None:
        raise cancelled
    return result


class _Answers:
    """What is called at each cancellation but those that follow close upon another."""

    def __init__(self, responses: tuple[Callable[[], object], ...]) -> None:
        self._left = iter(responses)
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.Handle | None = None

    def give_next(self) -> None:
        """Answers a cancellation."""
        if self._pause is None:
            next(self._left, lambda: None)()
        else:
            self._pause.cancel()
        self._pause = self._loop.call_later(_PAUSE_SECONDS, self._let_turns_pass, _PAUSE_TURNS)

    def close(self) -> None:
        """Forgets the last cancellation."""
        if self._pause is not None:
            self._pause.cancel()

    def _let_turns_pass(self, turns: int) -> None:
        self._pause = None
        if turns:
            self._pause = self._loop.call_soon(self._let_turns_pass, turns - 1)
