"""How SIGINT and SIGTERM end a command; this module loads next to nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

#: What the signals that end a command have done to it.
ENDED = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


@contextmanager
def ending_at_once() -> Iterator[None]:
    """Has the signals end the process without further ado: for the time that modules are imported.

    Nothing is lost then; and an exception that strikes in an import may come out of it as another.
    """

    def end(number: int, _: FrameType | None) -> NoReturn:
        os.write(2, f"hogstream: {ENDED[signal.Signals(number)]}\n".encode("ascii"))
        os._exit(128 + number)

    before = {number: signal.getsignal(number) for number in ENDED}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Termination:
    """Has SIGTERM do what SIGINT does, in a ``with`` block: what is measured by then is told.

    Attributes:
        signal: Which of the two came last: SIGTERM if it did.
    """

    def __init__(self) -> None:
        self.signal = signal.SIGINT

    def __enter__(self) -> Termination:
        self._before = signal.getsignal(signal.SIGTERM)
        if self._before is not signal.SIG_IGN:
            signal.signal(signal.SIGTERM, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _interrupt(self, *_: object) -> None:
        self.signal = signal.SIGTERM
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells have it in the background
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)
