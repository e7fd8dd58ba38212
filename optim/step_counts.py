"""Counts of steps: float32, as torch has them, that go on where float32 skips numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from hogstream.optim.compiled_modules import compiled_module


def new_counts(params: int, device: torch.device) -> torch.Tensor:
    """Counts of zero in one piece of memory, so that they are shared, copied and saved together.

    Args:
        params: How many there are.
        device: Where they are.

    Returns:
        float32, shape (2, params): the counts, and how much more each one is than float32 can show.
    """
    return torch.zeros(2, params, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class Counter:
    """Counts that lie side by side in memory.

    Attributes:
        shown: Shape (n,): the counts, rounded to nearest even.
        rest: float32, shape (n,): what that left of them, at most half of a last place.
    """

    shown: torch.Tensor
    rest: torch.Tensor

    def add_one(self, found_inf: torch.Tensor | None = None) -> None:
        """Counts a step.

        Args:
            found_inf: On a GPU, where the host does not know it: not 0 if the step was left out.
        """
        if found_inf is None or found_inf.device.type == "cpu":
            self._add_one()
        else:
            _carry(self.shown, self.rest, (found_inf == 0).to(self.rest).reshape(()))

    @cached_property
    def _add_one(self) -> Callable[[], object]:
        if self.shown.device.type != "cpu":
            return partial(_carry, self.shown, self.rest)  # the host knows no counts there
        compiled = compiled_module("compiled_counts")
        if compiled is None or self.shown.dtype is not torch.float32:  # as those of users may be
            return self._add_one_by_numpy
        add_one_to: Callable[..., Callable[[], object]] = compiled.add_one_to
        return add_one_to(self.shown, self.rest)

    def _add_one_by_numpy(self) -> None:
        counts, more = self.shown.numpy(), self.rest.numpy()
        more[counts + more != counts] = 0  # of a count that somebody has set since
        _carry(counts, more)


def _carry(shown: Any, rest: Any, step: Any = 1) -> None:
    """Adds a step to arrays or tensors, of which ``shown`` takes as much as it can hold."""
    rest += step
    total = shown + rest
    rest -= total - shown  # both differences are exact
    shown[...] = total


def counts_in_use(
    counts: list[torch.Tensor], states: Iterable[dict[str, Any]]
) -> list[torch.Tensor]:
    """Those that the steps of any state still are in."""
    steps = [state.get("step") for state in states]
    used = {step.untyped_storage().data_ptr() for step in steps if isinstance(step, torch.Tensor)}
    return [each for each in counts if each.data_ptr() in used]


def gather_steps(
    counts: list[torch.Tensor], states: Iterable[dict[str, Any]]
) -> list[torch.Tensor]:
    """Puts steps on the CPU side by side again, each of which ``pickle`` gives its own memory.

    Args:
        counts: Copied together with ``states``, whose steps are still in them unless by ``pickle``:
            then all stays as it is, as they may be shared.
        states: Those steps are replaced. They go on from what they show.

    Returns:
        Where the steps are now.
    """
    alone = [
        state
        for state in states
        if not counts_in_use(counts, [state])
        and isinstance(step := state.get("step"), torch.Tensor)
        and (step.dtype, step.device.type, step.shape) == (torch.float32, "cpu", ())
    ]
    gathered = new_counts(len(alone), torch.device("cpu"))
    for state, step in zip(alone, gathered[0], strict=True):
        state["step"] = step.copy_(state["step"])
    return [*counts, gathered] if alone else counts


def exact_count(step: torch.Tensor, counts: list[torch.Tensor]) -> int:
    """What a step counts, beyond 2^24 too; of one on a GPU, the host waits for it.

    Args:
        step: Of shape ().
        counts: From ``new_counts``: where it is, maybe.
    """
    of_storage = {each.untyped_storage().data_ptr(): each for each in counts}
    counter = _counter(step, 1, of_storage)
    if counter.shown + counter.rest != counter.shown:  # somebody has set it since
        return int(counter.shown)
    return int(counter.shown) + int(counter.rest)


def counters_of(steps: Iterable[torch.Tensor], counts: list[torch.Tensor]) -> list[Counter]:
    """As few counters as can be: one for each run of steps that lie side by side in memory.

    Args:
        steps: Of shape () each.
        counts: From ``new_counts``: where most of them are. A step that is elsewhere, as somebody
            has put another in its place, has its rest for as long as the counter is kept.
    """
    runs: list[list[torch.Tensor]] = []
    for step in steps:
        if not (runs and _follows(step, runs[-1][-1])):
            runs.append([])
        runs[-1].append(step)
    of_storage = {each.untyped_storage().data_ptr(): each for each in counts}
    return [_counter(run[0], len(run), of_storage) for run in runs]


def _follows(step: torch.Tensor, other: torch.Tensor) -> bool:
    return (
        step.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
        and step.dtype == other.dtype
        and step.storage_offset() == other.storage_offset() + 1
    )


def _counter(first: torch.Tensor, steps: int, of_storage: dict[int, torch.Tensor]) -> Counter:
    # Of torch's own class, whatever that is which somebody has put there.
    shown = first.as_subclass(torch.Tensor).as_strided((steps,), (1,))
    counts = of_storage.get(first.untyped_storage().data_ptr())
    if counts is None:
        return Counter(shown, torch.zeros(steps, dtype=torch.float32, device=first.device))
    start = first.storage_offset() + counts.shape[1]
    return Counter(shown, counts.as_strided((steps,), (1,), start))
