"""What a thread sleeps on in a system call, and others wake it by."""

from __future__ import annotations

import os

from hogstream.scheduler.forks import cut_off, forget_in_forks, let_go_in_forks


class Signal:
    """An event of the system: an ``eventfd``, or a pipe where there is none, as outside of Linux.

    It is sent by writing 8 bytes, and taken by reading.

    Attributes:
        reader: A file descriptor that can be read when it was sent.
        writer: One to send it by; the same, of an ``eventfd``.
    """

    def __init__(self, *, blocking: bool) -> None:
        """Opens it.

        Args:
            blocking: Whether reading waits until it is sent.

        Raises:
            OSError: If there is no file descriptor left.
        """
        if hasattr(os, "eventfd"):
            self.reader = self.writer = os.eventfd(0, 0 if blocking else os.EFD_NONBLOCK)
        else:
            self.reader, self.writer = os.pipe()
            os.set_blocking(self.reader, blocking)
        self._open = {self.reader, self.writer}
        let_go_in_forks(self)

    def let_go(self) -> None:
        """Leaves it, in a child of ``os.fork``, to the parent."""
        for descriptor in self._open:
            cut_off(descriptor)

    def close(self) -> None:
        """Closes it."""
        forget_in_forks(self)
        while self._open:
            os.close(self._open.pop())
