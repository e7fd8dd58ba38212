"""A model to train, its loss and its batches, as their owner makes them, and checked."""

from __future__ import annotations

import copy
import pickle
import random
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import torch

from hogstream.profiling.measure.by_hand import HandRun, Loss
from hogstream.scheduler import ModelWorker, SettingError, SharedParameters
from hogstream.scheduler.checks import error_text
from hogstream.scheduler.workers.batches import Batches, moved

_NONE = object()  # that no batch is

#: Returns a model, its loss of a batch, and batches.
Make = Callable[[], tuple[torch.nn.Module, Loss, Iterable[Any]]]


@dataclass(frozen=True)
class Problem:
    """What is to be trained.

    Attributes:
        model: Copied by who trains it.
        loss: Maps a model and a batch to a scalar to minimise.
        batches: Without end.
    """

    model: torch.nn.Module
    loss: Loss
    batches: Iterator[Any]

    @property
    def elements(self) -> int:
        """How many parameters are trained, counted one by one."""
        return sum(each.numel() for each in self.model.parameters() if each.requires_grad)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def copied(self) -> Problem:
        """With a model of its own, and the same batches."""
        return replace(self, model=copy.deepcopy(self.model))

    def backward(self) -> float:
        """Makes the gradient of the next batch; its loss."""
        self.model.zero_grad()
        loss = self.loss(self.model, moved(next(self.batches), self.device))
        loss.backward()
        return loss.item()


class Start:
    """Parameters and buffers of a model as they are, to begin with again."""

    def __init__(self, model: torch.nn.Module) -> None:
        """Copies them."""
        self._now = [*model.parameters(), *model.buffers()]
        self._then = [each.detach().clone() for each in self._now]

    def restore(self) -> None:
        """Gives the model what it had."""
        with torch.no_grad():
            for now, then in zip(self._now, self._then, strict=True):
                now.copy_(then)


def checked_problem(make: Make) -> Problem:
    """What a function makes, after a first batch went forward and backward.

    Raises:
        SettingError: If it is no function, fails, or makes something that cannot be trained.
    """
    if not callable(make):
        raise SettingError("make", f"must be callable, got {make!r}")
    try:
        problem = _made(make)
        _check_gradient(problem)
    except SettingError:
        raise
    except Exception as error:
        raise SettingError("make", f"must make what can be trained, but {_told(error)}") from error
    return problem


def _made(make: Make) -> Problem:
    """Calls it; what it has done to random numbers is undone, so that no two processes share them.

    Raises:
        SettingError: If it returns something else than it should.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    made = make()
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_state(states[2])  # noqa: NPY002
    if not isinstance(made, tuple) or len(made) != 3:
        raise _wrong(f"(model, loss, batches), got {_kind(made)}")
    model, loss, batches = made
    if not isinstance(model, torch.nn.Module):
        raise _wrong(f"a torch.nn.Module first, got {_kind(model)}")
    if not any(each.requires_grad for each in model.parameters()):
        raise _wrong("a model with a parameter that requires a gradient, got none")
    if not callable(loss):
        raise _wrong(f"a loss that is called with model and batch, got {_kind(loss)}")
    if not isinstance(batches, Iterable):
        raise _wrong(f"batches that can be iterated over, got {_kind(batches)}")
    return Problem(model, loss, iter(Batches(batches).read, _NONE))


def _check_gradient(problem: Problem) -> None:
    """Checks that a batch has a gradient."""
    mine = problem.copied()
    loss = mine.loss(mine.model, moved(next(mine.batches), mine.device))
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
        told = tuple(loss.shape) if isinstance(loss, torch.Tensor) else _kind(loss)
        raise _wrong(f"a loss that returns a tensor of one element, got {told}")
    if not loss.requires_grad:
        raise _wrong("a loss that depends on a parameter which requires a gradient, got another")
    loss.backward()
    SharedParameters.from_module(mine.model)


@cache
def _made_here(pickled: bytes) -> Problem:
    """What a function makes in this process, once."""
    return _made(pickle.loads(pickled))


def make_worker(pickled: bytes, shared: SharedParameters, process: int) -> ModelWorker:
    """A worker of another process.

    Args:
        pickled: What makes the problem.
        shared: What it trains.
        process: Its number.
    """
    problem = _made_here(pickled)
    return ModelWorker(shared, problem.model, problem.loss, problem.batches)


def make_by_hand(pickled: bytes, run: HandRun) -> tuple[Loss, Iterator[Any]]:
    """Loss and batches of a process by hand, which has its model already."""
    problem = _made_here(pickled)
    return problem.loss, problem.batches


def _wrong(what: str) -> SettingError:
    return SettingError("make", f"must return {what}")


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}"
    return type(value).__name__


def _told(error: Exception) -> str:
    """What failed, and where."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"failed: {error_text(error)} ({last.filename}:{last.lineno})"
