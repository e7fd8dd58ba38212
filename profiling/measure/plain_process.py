"""A plain process that is spawned, told what to do through a pipe, and ended with its scope."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from typing import Any

import torch

from hogstream.profiling.errors import MeasurementError
from hogstream.scheduler.processes.orphans import end_with_parent

#: For how long processes may end by themselves, and give back what they share of a GPU's memory.
GRACE_SECONDS = 2.0


class PlainProcess:
    """A process, as its parent sees it.

    It answers with pairs: what it has to say and None, or None and what it failed with, as text.
    """

    def __init__(
        self,
        context: Any,
        name: str,
        said: str,
        serve: Callable[..., None],
        arguments: tuple[Any, ...],
    ) -> None:
        """Starts it.

        Args:
            context: Of ``torch.multiprocessing``.
            name: Of the process.
            said: What errors call it.
            serve: What it does; called with its end of the pipe, and the arguments.
            arguments: Pickled, or shared.
        """
        self._said = said
        self._end, its = context.Pipe()
        try:
            self._process = context.Process(target=serve, args=(its, *arguments), name=name)
            self._process.start()
        except BaseException:
            self._end.close()
            raise
        finally:
            its.close()

    def send(self, message: object) -> None:
        """Sends it a message; one that has ended is found out when it is to answer."""
        with suppress(BrokenPipeError):
            self._end.send(message)

    def has_answered(self) -> bool:
        """Whether there is an answer, or will be none."""
        return bool(self._end.poll())

    async def answer(self) -> Any:
        """Waits for its next answer, as ``receive`` returns it; a cancelled wait loses none."""
        loop, number = asyncio.get_running_loop(), self._end.fileno()
        while not self.has_answered():
            readable = asyncio.Event()
            loop.add_reader(number, readable.set)
            try:
                await readable.wait()
            finally:
                loop.remove_reader(number)
        return self.receive()

    def receive(self) -> Any:
        """Its answer; waits for it.

        Raises:
            MeasurementError: If it has ended or failed instead.
        """
        try:
            answer, error = self._end.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            raise MeasurementError(f"{self._said} ended with exit code {code}") from None
        if error is not None:
            raise MeasurementError(f"{self._said} failed: {error}")
        return answer

    def hang_up(self) -> None:
        """Lets it know that nothing more will come."""
        self._end.close()

    def end(self, until: float) -> None:
        """Waits for its end until a time, by ``time.monotonic``, and then ends it at once."""
        self._process.join(max(0.0, until - time.monotonic()))
        self._process.kill()
        self._process.join()
        self._process.close()


def end_all(processes: Sequence[PlainProcess], grace_seconds: float = GRACE_SECONDS) -> None:
    """Ends processes; what they do is of no use any more.

    Args:
        processes: Which.
        grace_seconds: For how long they may end by themselves.
    """
    for process in processes:
        process.hang_up()
    until = time.monotonic() + grace_seconds
    for process in processes:
        process.end(until)


@contextmanager
def sigint_held_back() -> Iterator[None]:
    """Holds SIGINT back here, and in processes that are started meanwhile."""
    resource_tracker.ensure_running()  # first, or its start would let SIGINT through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def enter_process(torch_threads: int) -> None:
    """What a process does first.

    Args:
        torch_threads: How many threads torch may use for an operation.
    """
    # Ctrl-C goes to the whole process group, but it is for the parent to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    torch.set_num_threads(torch_threads)
    end_with_parent()
