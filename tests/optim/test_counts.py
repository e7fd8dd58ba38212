"""What a step costs, in numbers that no clock blurs."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from counting import counted_calls, counted_collections, hold, opcodes
from hogstream.optim import RMSpropAsync
from optim_testing import parameters

# Calls of our Python functions in a step, however many tensors there are: step, what has its
# hooks, its settings, whether the plan holds and for which gradients (2), their holder, made and
# let go (2), a table with their addresses (2), the versions, the counter of steps, and the update:
# its form (3), the threads that it is worth (2), and its job for compiled code (2).
CALLS = 18
# Python's instructions for each tensor: compiled code looks at them all.
OPCODES = 0

FEW, MANY = 10, 200


class Operations(TorchDispatchMode):
    """Counts torch's operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        if func.namespace == "aten":  # and not a mark for torch's profiler
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def stepped(tensors: int, flat: bool = False) -> RMSpropAsync:
    """An optimizer that has made its plan."""
    params = parameters(*[(8,)] * tensors)
    optimizer = RMSpropAsync(params, flat=flat, backend="numba")
    for param in params:
        param.grad = torch.ones(8) if param.grad is None else param.grad.fill_(1)
    for _ in range(3):
        optimizer.step()
    return optimizer


def move_gradients(optimizer: RMSpropAsync) -> None:
    """Gives each parameter a gradient elsewhere, as ``zero_grad`` and ``backward`` do."""
    for param in optimizer.param_groups[0]["params"]:
        param.grad = param.grad.clone()


def stay(optimizer: RMSpropAsync) -> None:
    """Leaves gradients where they are."""


STEPS = [
    pytest.param(False, stay, id="list"),
    pytest.param(True, stay, id="flat"),
    pytest.param(False, move_gradients, id="moved"),
]
for_each_step = pytest.mark.parametrize(("flat", "move"), STEPS)
Move = Callable[[RMSpropAsync], None]


@for_each_step
def test_a_step_makes_no_call_for_each_tensor(flat: bool, move: Move) -> None:
    counted = {}
    for tensors in (FEW, MANY):
        optimizer = stepped(tensors, flat)
        move(optimizer)
        with counted_calls() as counts:
            optimizer.step()
        assert counts["kernels.backends.numba_kernels.update_in_pieces_"] == 1
        hold(f"calls in a step of {tensors} tensors, {counts}", counts.total(), CALLS)
        counted[tensors] = counts
    assert counted[FEW] == counted[MANY]


@for_each_step
def test_a_step_spends_no_instructions_of_python_on_each_tensor(flat: bool, move: Move) -> None:
    counts = []
    for tensors in (FEW, MANY):
        optimizer = stepped(tensors, flat)
        move(optimizer)
        counts.append(opcodes(optimizer.step))
    few, many = counts
    hold("Python's instructions for each tensor", (many - few) / (MANY - FEW), OPCODES)


@pytest.mark.parametrize("flat", [False, True], ids=["list", "flat"])
def test_a_step_makes_no_tensor_and_wakes_no_garbage_collector(flat: bool) -> None:
    optimizer = stepped(MANY, flat)
    with Operations() as operations:
        optimizer.step()
    assert not operations.counts
    with counted_collections(threshold=MANY // 4) as collections:
        optimizer.step()
    hold("runs of the garbage collector in a step", collections["start"], 0)


def test_steps_leave_nothing_behind() -> None:
    optimizer = stepped(FEW)
    grown, cycles = [], []
    for _ in range(4):  # of which the first fills lists of free objects; what leaks does so in each
        gc.collect()
        gc.disable()
        try:
            before = sys.getallocatedblocks()
            for _ in range(1000):
                optimizer.step()
            grown.append(sys.getallocatedblocks() - before)
            cycles.append(gc.collect())
        finally:
            gc.enable()
    hold("blocks of memory that 1000 steps leave", min(grown[1:]), 200)
    hold("objects in cycles that 1000 steps leave", min(cycles[1:]), 20)
