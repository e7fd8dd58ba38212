"""What people write by hand today: plain processes over one model in shared memory, and a lock.

Nothing here is of the scheduler. ``ByHand`` starts the processes and hears of them; what each does
is a plain loop, such as ``Hogwild``, that of torch's ``mnist_hogwild``.
"""

from __future__ import annotations

import asyncio
import gc
import math
import pickle
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import numpy as np
import torch
import torch.multiprocessing

from hogstream.profiling.environment import usable_cores
from hogstream.profiling.measure.plain_process import (
    GRACE_SECONDS,
    PlainProcess,
    end_all,
    enter_process,
    sigint_held_back,
)
from hogstream.scheduler.budget import Budget
from hogstream.scheduler.checks import check_integer, error_text
from hogstream.scheduler.processes.process import check_main_module
from hogstream.scheduler.workers.batches import Batches, moved

# How long a process may keep losses to itself, so that many are sent at once.
_KEPT_SECONDS = 0.05
# For how long processes that do nothing may take to end, with those of a DataLoader of theirs.
_END_SECONDS = 10.0

Heard = Callable[[int, Any], object]
Answer = Coroutine[Any, Any, Any]
Loss = Callable[[torch.nn.Module, Any], torch.Tensor]


@dataclass(frozen=True)
class HandReport:
    """What processes have done.

    Attributes:
        updates_by_process: How many each has made.
        seconds: From when all were ready until the last was done.
        partial: Whether the run ended before it had done what it was asked for.
        torch_threads: How many threads torch had in each for an operation.
    """

    updates_by_process: list[int]
    seconds: float
    partial: bool
    torch_threads: int

    @property
    def updates(self) -> int:
        """How many updates were made."""
        return sum(self.updates_by_process)

    @property
    def updates_per_second(self) -> float:
        """Updates, for each second of the run."""
        return self.updates / self.seconds


class HandRun:
    """A run, as one of its processes sees it.

    ::

        while run.going():
            ...  # one iteration
            run.landed(loss)

    Attributes:
        process: Number of the process, from 0.
        processes: How many there are.
        model: In shared memory; its gradients are the process's own.
        lock: One for all processes.
        extra: What ``ByHand`` was given for them besides.
    """

    def __init__(self, own: _Own, given: _Given, end: Connection, updates: int | None) -> None:
        """Made in each process, for each run."""
        self.process, self.processes = own.process, own.processes
        self.lock = own.lock
        self.model, self.extra = given.model, given.extra
        self._end = end
        self._stopped, self._made = own.stopped, own.made
        self._left = updates
        self._begun = False
        self._until = 0.0
        self._kept: list[tuple[bool, Any]] = []
        self._sent = time.perf_counter()

    def going(self) -> bool:
        """Whether there is another update to make.

        The first call waits until every process has come to it: the clock starts then, so what is
        done before is not timed.
        """
        if not self._begun:
            self._begun = True
            self._end.send((None, None))
            self._until = self._end.recv()
        return self._left != 0 and not self._stopped.value and time.perf_counter() < self._until

    def landed(self, loss: float | None = None) -> None:
        """Counts an update that was made.

        Args:
            loss: Of its batch; goes to ``on_loss``.
        """
        self._made[self.process] += 1
        if self._left is not None:
            self._left -= 1
        if loss is not None:
            self._kept.append((True, loss))
            if time.perf_counter() - self._sent > _KEPT_SECONDS:
                self._tell()

    def send(self, value: Any) -> None:
        """Sends a value to ``on_result``; it is pickled here.

        Raises:
            TypeError: If it cannot be pickled.
        """
        try:
            pickled = pickle.dumps(value)
        except Exception as error:
            raise TypeError(
                f"value must be something that can be pickled, got {value!r}"
            ) from error
        self._kept.append((False, pickled))
        self._tell()

    def close(self) -> float:
        """Tells what is left to be told; when the process was done, by ``time.perf_counter``.

        Raises:
            RuntimeError: If it never asked whether there is an update to make.
        """
        now = time.perf_counter()
        if not self._begun:
            raise RuntimeError("work must call going() before each update, but never did")
        self._tell()
        return now

    def _tell(self) -> None:
        if self._kept:
            self._end.send((self._kept, None))
            self._kept = []
        self._sent = time.perf_counter()


Work = Callable[[HandRun], None]


class ByHand:
    """Plain processes that are spawned once, and end with the scope.

    ::

        async with ByHand(work, model, processes=4) as by_hand:
            report = await by_hand.run(updates=10_000)

    Each computes with its share of the cores, at least one thread. They ignore Ctrl-C, which
    cancels a run here.

    Attributes:
        report: Of the run that ended last, also if it failed or was cancelled; None before.
    """

    def __init__(
        self, work: Work, model: torch.nn.Module, processes: int, *, extra: Any = None
    ) -> None:
        """Starts nothing.

        Args:
            work: What each process does in each run, in a plain loop: a function of a module, or
                something else that can be pickled.
            model: Trained by all; moved to shared memory.
            processes: How many, at least 1.
            extra: What ``work`` needs besides; tensors in it are shared.

        Raises:
            TypeError: If ``work`` cannot be pickled, or ``processes`` is no integer.
            ValueError: If ``processes`` is out of range.
        """
        try:
            pickle.dumps(work)
        except Exception as error:
            raise TypeError(
                f"work must be a function of a module, or something else that can be pickled, got "
                f"{work!r}"
            ) from error
        self._count = check_integer("processes", processes, at_least=1)
        self._work = work
        self._given = _Given(model, extra)
        self.report: HandReport | None = None
        self._processes: list[PlainProcess] = []
        self._running = False

    @property
    def made(self) -> int:
        """How many updates the run has made until now, or the last one made."""
        return sum(self._made)

    async def __aenter__(self) -> ByHand:
        """Starts the processes.

        Raises:
            RuntimeError: If they cannot import ``__main__``.
        """
        check_main_module()
        context = torch.multiprocessing.get_context("spawn")
        self._given.model.share_memory()
        self._threads = max(1, usable_cores() // self._count)
        self._lock = context.Lock()  # kept, as its name is taken away with it
        self._stopped = context.Value("b", False, lock=False)
        self._made = context.Array("q", self._count, lock=False)
        try:
            with sigint_held_back():
                for index in range(self._count):
                    own = _Own(index, self._count, self._lock, self._stopped, self._made)
                    self._processes.append(
                        PlainProcess(
                            context,
                            f"hogstream-by-hand-{index}",
                            f"process {index} by hand",
                            _serve,
                            (self._work, own, [self._given], self._threads),
                        )
                    )
        except BaseException:
            self._end()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Ends the processes; what they do is of no use any more."""
        self._end(_END_SECONDS)

    async def run(
        self,
        *,
        updates: int | None = None,
        seconds: float | None = None,
        on_loss: Callable[[int, float], object] | None = None,
        on_result: Callable[[int, Any], object] | None = None,
    ) -> HandReport:
        """Has the processes work until enough updates were made, or for a time.

        Args:
            updates: How many to make, over all processes: the same share each, give or take one.
            seconds: How long to begin updates, from when all processes are ready. With both, what
                ends first.
            on_loss: Called here with the number of the process and the loss of each update that
                had one, in order for each process.
            on_result: The same with what ``send`` was given.

        Returns:
            What was done and how fast. After an error or a cancellation, it is in ``report``.

        Raises:
            TypeError: If a number is of a wrong type.
            ValueError: If neither ``updates`` nor ``seconds`` is given, or one is out of range.
            RuntimeError: If it is not open, or runs already, or a run has failed before.
            MeasurementError: If a process failed or ended.
        """
        budget = Budget(updates, seconds)
        if not self._processes:
            raise RuntimeError("the processes have ended: use a new 'async with ByHand(...)'")
        if self._running:
            raise RuntimeError("the processes run already: await that run first")
        self._running, self._stopped.value = True, False
        self._made[:] = [0] * self._count
        hear = partial(self._hear, on_loss or _ignore, on_result or _ignore)
        began, ends = time.perf_counter(), list[float]()
        try:
            await self._prepare(budget)
            began = time.perf_counter()
            ends = await self._begin(budget, hear)
        except BaseException:
            self._end()  # where they are in their work is not known any more
            raise
        finally:
            self._running = False
            budget.spend(sum(self._made))
            self.report = HandReport(
                updates_by_process=list(self._made),
                seconds=max(ends, default=time.perf_counter()) - began,
                partial=not budget.is_spent(),
                torch_threads=self._threads,
            )
        return self.report

    def stop(self) -> None:
        """Has no process begin another update; ``run`` returns its report. Else without effect."""
        if self._running:
            self._stopped.value = True

    async def _prepare(self, budget: Budget) -> None:
        """Has the processes begin, and waits until all have come to their first update."""
        seed = int(torch.randint(1 << 62, ()))
        for index, (process, part) in enumerate(
            zip(self._processes, budget.divided(self._count), strict=True)
        ):
            process.send((seed + index, part.updates))
        await self._each(process.answer() for process in self._processes)

    async def _begin(self, budget: Budget, hear: Callable[[int], Answer]) -> list[float]:
        """Has them make updates, and hears them out; when each was done."""
        budget.start()
        until = math.inf if budget.seconds is None else time.perf_counter() + budget.seconds
        for process in self._processes:
            process.send(until)
        return await self._each(hear(index) for index in range(self._count))

    async def _each(self, answers: Iterable[Answer]) -> list[Any]:
        """Waits for an answer of each; if one fails, or this is cancelled, others may finish."""
        waits = [asyncio.ensure_future(answer) for answer in answers]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_EXCEPTION)
            return [wait.result() for wait in waits if wait.done()]
        except BaseException:
            self._stopped.value = True
            await asyncio.wait(waits, timeout=GRACE_SECONDS)
            raise
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)

    async def _hear(self, on_loss: Heard, on_result: Heard, index: int) -> float:
        """Hears a process out; when it was done."""
        while True:
            answer = await self._processes[index].answer()
            if isinstance(answer, float):
                return answer
            for is_loss, value in answer:
                if is_loss:
                    on_loss(index, value)
                else:
                    on_result(index, pickle.loads(value))

    def _end(self, grace_seconds: float = GRACE_SECONDS) -> None:
        end_all(self._processes, grace_seconds)
        self._processes.clear()


def _ignore(worker: int, value: Any) -> None:
    """Nobody asked for it."""


@dataclass(frozen=True)
class _Given:
    """What the processes share, and was given."""

    model: torch.nn.Module
    extra: Any


@dataclass(frozen=True)
class _Own:
    """A process, and what it needs to take part.

    Attributes:
        process: Its number.
        processes: How many there are.
        lock: One for all.
        stopped: Whether no update is to begin any more.
        made: How many updates each process has made in this run.
    """

    process: int
    processes: int
    lock: AbstractContextManager[Any]
    stopped: Any
    made: Any


def _serve(end: Connection, work: Work, own: _Own, given: list[_Given], threads: int) -> None:
    """A process from its start to its end, which is when its parent has gone or hung up.

    The model is taken out of a list, as multiprocessing keeps arguments until Python ends: too late
    for memory of a GPU to be given back to its owner.
    """
    enter_process(threads)
    with suppress(EOFError, ConnectionError):
        _answer(end, work, own, given.pop())
    gc.collect()


def _answer(end: Connection, work: Work, own: _Own, given: _Given) -> NoReturn:
    """Works, as often as it is asked to.

    Raises:
        EOFError: If nobody is there any more who asks.
        ConnectionError: The same, while something was sent.
    """
    while True:
        seed, updates = end.recv()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % (1 << 32))  # noqa: NPY002 (the one that others draw from)
        run = HandRun(own, given, end, updates)
        try:
            work(run)
            done = run.close()
        except (EOFError, ConnectionError):
            raise
        except Exception as error:
            end.send((None, error_text(error)))
        else:
            end.send((done, None))


@dataclass(frozen=True)
class Hogwild:
    """The plain loop: in each process an optimizer of its own over the model that all share.

    Attributes:
        prepare: Called in each process before its first update; returns the loss of a model and a
            batch, and batches, which are begun anew when they end.
        hyperparameters: Of ``torch.optim.RMSprop``, by name.
        locked: Whether the lock is held around each step of the optimizer.
    """

    prepare: Callable[[HandRun], tuple[Loss, Iterable[Any]]]
    hyperparameters: Mapping[str, Any]
    locked: bool = True

    def __call__(self, run: HandRun) -> None:
        """Trains until there is no more to do.

        Raises:
            RuntimeError: If the batches have run out.
        """
        loss_of, iterable = self.prepare(run)
        batches, device = Batches(iterable), next(run.model.parameters()).device
        optimizer = torch.optim.RMSprop(run.model.parameters(), **self.hyperparameters)
        guard = run.lock if self.locked else nullcontext()
        while run.going():
            optimizer.zero_grad()
            loss = loss_of(run.model, moved(batches.read(), device))
            loss.backward()
            with guard:
                optimizer.step()
            run.landed(loss.item())
