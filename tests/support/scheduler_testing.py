"""What tests of the scheduler share."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from hogstream.scheduler import SharedParameters, StreamScheduler, WorkerContext

POLICIES = ["lock-free", "locked", "ordered", "awaited", "bounded:2"]

#: With these, and gradients of 1, an update subtracts exactly 1 from each parameter:
#: ms = 0*ms + (1*1)*1 = 1, and p -= (1*1)/sqrt(1 + 0). Two that overlap lose one of theirs.
COUNTING: dict[str, Any] = {"lr": 1.0, "alpha": 0.0, "eps": 0.0}


#: Kinds of ``racing_gradients``.
RACING = ["alike", "far apart"]


def racing_gradients(kind: str, elements: int) -> list[torch.Tensor]:
    """One for each of eight lanes, whose centered updates are near the root of a negative number.

    Where all are alike, rounding makes it negative; where they are far apart, what one lane writes
    of its two means between the writes of another.
    """
    if kind == "alike":
        return [torch.full((elements,), 1000 / 3) for _ in range(8)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(elements, generator=generator) * 10.0 ** (lane - 4) for lane in range(8)]


def small() -> SharedParameters:
    """64 zeros."""
    return SharedParameters({"p": torch.zeros(64)})


def part_of(
    shared: SharedParameters, grad: torch.Tensor, names: Collection[str] | None
) -> torch.Tensor | dict[str, torch.Tensor]:
    """Of a flat gradient what is of some parameters, by name; all of it, of None."""
    if names is None:
        return grad
    views = shared.views_of(grad)
    return {name: views[name] for name in names}


def submit_ones(shared: SharedParameters) -> Callable[[WorkerContext], Any]:
    """A worker whose gradients are 1."""
    grad = torch.ones_like(shared.flat)

    async def worker(context: WorkerContext) -> None:
        await context.submit(grad)

    return worker


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
