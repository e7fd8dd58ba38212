"""What people run today, measured in the same rounds: torch's RMSprop and locks of Python.

As in torch's ``mnist_hogwild`` each worker has an optimizer of its own over parameters that all
share, in a thread or a process, and gives its operations one thread. Gradients are ready: a worker
puts one in ``.grad`` and steps, under a lock or not.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, Literal, NoReturn

import torch
import torch.multiprocessing

from hogstream.kernels import rmsprop_
from hogstream.kernels.operands import COMPUTE_DTYPES
from hogstream.profiling.measure.plain_process import (
    PlainProcess,
    end_all,
    enter_process,
    sigint_held_back,
)
from hogstream.scheduler.checks import error_text
from hogstream.scheduler.processes.process import check_main_module
from hogstream.scheduler.thread_state import ThreadState

TORCH, OURS = "torch.optim.RMSprop", "rmsprop_"
Kind = Literal["threads", "processes"]
THREADS: Kind = "threads"
PROCESSES: Kind = "processes"
# From when workers are told until they begin, so that all are there.
_LEAD_SECONDS = 0.01
_POLL_SECONDS = 1e-3


@dataclass(frozen=True)
class Setup:
    """One way to run workers.

    Attributes:
        spread_over: ``THREADS`` or ``PROCESSES``.
        update: What updates: ``TORCH`` or ``OURS``.
        lock: Whether a lock is held for each update, of ``threading`` or ``multiprocessing``.
    """

    spread_over: Kind
    update: str
    lock: bool


SETUPS = (
    Setup(THREADS, TORCH, lock=False),
    Setup(THREADS, TORCH, lock=True),
    Setup(PROCESSES, TORCH, lock=False),
    Setup(PROCESSES, TORCH, lock=True),
    Setup(THREADS, OURS, lock=True),
)

Make = Callable[[int], None]
#: Runs workers for so many seconds, and says how many updates/s they made.
Measure = Callable[[float], Awaitable[float]]


@dataclass(frozen=True)
class Gradients:
    """Ready gradients, the same in every process.

    Attributes:
        seed: The first is made with it, and each other with the next.
        dtype: Of each.
        device: Where.
    """

    seed: int
    dtype: torch.dtype
    device: torch.device

    def make(self, elements: int, indices: Iterable[int]) -> list[torch.Tensor]:
        """Some of them, shape (elements,) each, normal.

        Args:
            elements: Of each.
            indices: Which.
        """
        generator = torch.Generator(self.device)
        return [
            torch.randn(
                elements, generator=generator.manual_seed(self.seed + index), device=self.device
            ).to(self.dtype)
            for index in indices
        ]


class Today:
    """Workers as people run them: processes, which last as long as the scope, and threads."""

    def __init__(self, sizes: Sequence[int], workers: int, gradients: Gradients) -> None:
        """Allocates parameters; starts nothing.

        Args:
            sizes: Of the parameters that workers share, in elements.
            workers: How many there are at most.
            gradients: Theirs.
        """
        self._gradients = gradients
        self._workers = workers
        self._flats = {elements: self._zeros(elements).share_memory_() for elements in sizes}
        self._processes: list[PlainProcess] = []

    async def __aenter__(self) -> Today:
        """Starts the processes.

        Raises:
            RuntimeError: If they cannot import ``__main__``.
        """
        check_main_module()
        context = torch.multiprocessing.get_context("spawn")
        self._lock = context.Lock()  # kept, as its name is taken away with it
        try:
            with sigint_held_back():
                for index in range(self._workers):
                    arguments = index, [self._flats], self._lock, self._gradients
                    said = f"process {index} of what people run today"
                    self._processes.append(
                        PlainProcess(context, f"hogstream-today-{index}", said, _serve, arguments)
                    )
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the processes; what they do is of no use any more."""
        end_all(self._processes)
        self._processes.clear()

    async def prepare(self, elements: int, workers: int, count: int) -> dict[Setup, Measure]:
        """Makes workers of a size ready in each setup.

        Args:
            elements: One of the sizes.
            workers: How many.
            count: Of gradients, over all workers; at least one for each.

        Raises:
            MeasurementError: If a process ends or fails.
        """
        working = self._processes[:workers]
        await _ask(working, "prepare", elements, workers, count)
        gradients = self._gradients.make(elements, range(count))
        each = [gradients[worker::workers] for worker in range(workers)]
        shared = self._zeros(elements)
        updates = {TORCH: [_with_torch(shared, own) for own in each]}
        flat = self._zeros(elements)
        ms = torch.zeros_like(flat, dtype=COMPUTE_DTYPES[flat.dtype])
        updates[OURS] = [_with_ours(flat, ms, own) for own in each]
        return {
            setup: partial(_in_processes, working, setup.lock)
            if setup.spread_over == PROCESSES
            else partial(_in_threads, updates[setup.update], setup.lock, shared.device)
            for setup in SETUPS
        }

    def _zeros(self, elements: int) -> torch.Tensor:
        gradients = self._gradients
        return torch.zeros(elements, dtype=gradients.dtype, device=gradients.device)


def _with_torch(shared: torch.Tensor, gradients: Sequence[torch.Tensor]) -> Make:
    """What makes a worker's update of that number, by an optimizer of its own."""
    parameter = torch.nn.Parameter(shared)  # over the same memory, with a ``.grad`` of its own
    optimizer = torch.optim.RMSprop([parameter], foreach=True)

    def update(index: int) -> None:
        parameter.grad = gradients[index % len(gradients)]
        optimizer.step()

    update(0)  # which makes its state
    return update


def _with_ours(flat: torch.Tensor, ms: torch.Tensor, gradients: Sequence[torch.Tensor]) -> Make:
    def update(index: int) -> None:
        rmsprop_(flat, gradients[index % len(gradients)], ms)

    update(0)
    return update


def _work(
    update: Make,
    lock: AbstractContextManager[object],
    device: torch.device,
    begin: float,
    until: float,
) -> tuple[int, float]:
    """Makes updates from one time to another, at least one; how many, and when it was done."""
    time.sleep(max(0.0, begin - time.perf_counter()))
    made = 0
    while made == 0 or time.perf_counter() < until:
        with lock:
            update(made)
        made += 1
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return made, time.perf_counter()


def _rate(begin: float, done: Iterable[tuple[int, float]]) -> float:
    """Updates/s of all workers together."""
    made, ends = zip(*done, strict=True)
    return float(sum(made) / (max(ends) - begin))


async def _in_threads(
    updates: Sequence[Make], lock: bool, device: torch.device, seconds: float
) -> float:
    """Has a thread for each worker work for so many seconds."""
    held = threading.Lock() if lock else nullcontext()
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(
        len(updates), "hogstream-today", initializer=ThreadState(torch_threads=1).enter
    ) as pool:
        begin = time.perf_counter() + _LEAD_SECONDS
        times = begin, begin + seconds
        working = [
            loop.run_in_executor(pool, _work, each, held, device, *times) for each in updates
        ]
        return _rate(begin, await asyncio.gather(*working))


async def _in_processes(working: Sequence[PlainProcess], lock: bool, seconds: float) -> float:
    """Has a process for each worker work for so many seconds; clocks are the same in all."""
    begin = time.perf_counter() + _LEAD_SECONDS
    message = "work", lock, begin, begin + seconds
    return _rate(begin, await _ask(working, *message, takes=_LEAD_SECONDS + seconds))


async def _ask(processes: Sequence[PlainProcess], *message: object, takes: float = 0) -> list[Any]:
    """Asks processes for something, and waits for what each answers.

    Args:
        processes: Whom.
        message: For what.
        takes: How many seconds they need, in which nobody looks for answers, and disturbs.

    Raises:
        MeasurementError: If one ends or fails.
    """
    for process in processes:
        process.send(message)
    await asyncio.sleep(takes)
    answers: dict[int, Any] = {}
    while len(answers) < len(processes):
        for index, process in enumerate(processes):
            if index not in answers and process.has_answered():
                answers[index] = process.receive()
        await asyncio.sleep(_POLL_SECONDS)  # nothing else is to be done on this loop
    return [answers[index] for index in range(len(processes))]


def _serve(
    end: Connection,
    index: int,
    given: list[Mapping[int, torch.Tensor]],
    lock: AbstractContextManager[object],
    gradients: Gradients,
) -> None:
    """A process from its start to its end, which is when its parent has gone or hung up.

    Parameters are taken out of a list, as multiprocessing keeps arguments until Python ends: too
    late for memory of a GPU to be given back to its owner.
    """
    enter_process(torch_threads=1)
    with suppress(EOFError, ConnectionError):
        _answer(end, index, given.pop(), lock, gradients)
    gc.collect()


def _answer(
    end: Connection,
    index: int,
    flats: Mapping[int, torch.Tensor],
    lock: AbstractContextManager[object],
    gradients: Gradients,
) -> NoReturn:
    """Does what it is asked for, again and again.

    Raises:
        EOFError: If nobody is there any more who asks.
        ConnectionError: The same, while something was sent.
    """
    update: Make | None = None
    answer: object
    while True:
        kind, *content = end.recv()
        try:
            if kind == "prepare":
                update, answer = None, None  # first, as memory may be short
                elements, workers, count = content
                own = gradients.make(elements, range(index, count, workers))
                update = _with_torch(flats[elements], own)
            else:
                assert update is not None
                held, begin, until = content
                guard = lock if held else nullcontext()
                answer = _work(update, guard, gradients.device, begin, until)
        except Exception as error:
            end.send((None, error_text(error)))
        else:
            end.send((answer, None))
