"""Running a program, and all that it starts, for no longer than it may."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

#: For how long what was interrupted may write what it has.
GRACE_SECONDS = 10.0
# For how long the system may take to end what was killed: a process in a driver's call may stay.
_LAST_SECONDS = 5.0


class Program:
    """A program that runs in a group of processes of its own, whose output goes to a file.

    Past its limit all of the group are interrupted, as by Ctrl-C, and after ``GRACE_SECONDS`` they
    are killed. When the program itself has ended, none of its group is left.

    Attributes:
        stopped: Whether it took too long.
        status: What it returned, minus the number of the signal that ended it; None before.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        seconds: float,
        folder: Path,
        environment: Mapping[str, str],
    ) -> None:
        """Starts it.

        Args:
            command: What to run.
            log: Where its output goes.
            seconds: How long it may take.
            folder: In which it runs.
            environment: All of its variables.

        Raises:
            OSError: If it cannot be started.
        """
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env=environment,
                start_new_session=True,
            )
        self._start = time.monotonic()
        self._until = self._start + seconds
        self._signals = [(signal.SIGINT, GRACE_SECONDS), (signal.SIGKILL, _LAST_SECONDS)]
        self.stopped = False
        self.status: int | None = None

    @property
    def seconds(self) -> float:
        """How long it has run."""
        return time.monotonic() - self._start

    def has_ended(self) -> bool:
        """Whether it has ended, or the system cannot end it; signals what is past its limit."""
        if self._is_dead():
            self.kill()  # what it started and left, while its number is still its own
            return True
        if time.monotonic() < self._until:
            return False
        self.stopped = True
        if not self._signals:
            return True
        number, seconds = self._signals.pop(0)
        self._send(number)
        self._until = time.monotonic() + seconds
        return False

    def kill(self) -> None:
        """Ends all of its group at once."""
        self._send(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.status = self._process.wait(_LAST_SECONDS)

    def _is_dead(self) -> bool:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._process.pid, options) is not None

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
