"""Triton's kernel with race counters and a verdict: interpreted, or on a device if there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hogstream.kernels.backends.select import select_backend
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands, check_operands
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED, RaceCounters
from triton_testing import DEVICE, MARKS
from update_testing import (
    ADDS_2_TO_A_COUNT,
    ALIASED,
    DTYPES,
    FULL,
    State,
    aliased,
    assert_same_bits,
    extreme,
    formula,
    worn_state,
)

pytestmark = MARKS


class Launch:
    """A parameter with its gradient, and what watches its updates."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        self.before = worn_state(size, dtype, seed=0, **FULL)
        self.updated = self.before.map(lambda tensor: tensor.to(DEVICE, copy=True))
        self.grad = extreme(size, dtype, seed=2).to(DEVICE)
        self.backend = select_backend("triton", DEVICE.type)
        assert self.backend.race_block is not None
        self.block = self.backend.race_block(dtype, DEVICE)
        self.counters = RaceCounters.zeros(size, self.block, DEVICE)
        self.verdict = torch.tensor([7], dtype=torch.int32, device=DEVICE)

    def update(self, counters: RaceCounters | None = None, verdict: Any = None) -> None:
        table = LaunchTable([self.operands])
        self.backend.update_(table, Hyperparameters(**FULL), None, counters, verdict)

    @property
    def operands(self) -> Operands:
        param, ms, grad_avg, momentum_buffer = self.updated
        return check_operands(param, self.grad, ms, grad_avg, momentum_buffer)

    @property
    def state(self) -> State:
        return self.updated.map(torch.Tensor.cpu)


@pytest.mark.parametrize("size", [0, 1, 1000, (1 << 16) + 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_counts_every_update(dtype, size):
    launch = Launch(size, dtype)
    expected = launch.before
    for _ in range(2):
        launch.update(launch.counters, launch.verdict)
        expected = formula(expected, launch.grad.cpu(), **FULL)
    assert_same_bits(launch.state, expected)
    assert launch.verdict.item() == 0
    counts = launch.counters.counts.cpu()
    assert counts.shape == (3, -(-size // launch.block))
    assert torch.all(counts[LANDED] == 2)
    assert torch.all(counts[SURVIVED] == 2)
    assert torch.all(counts[OVERWRITTEN] == 0)


def test_goes_on_from_what_earlier_updates_left():
    launch = Launch(70_000)
    for row, count in ((LANDED, 9), (SURVIVED, 5), (OVERWRITTEN, 4)):
        launch.counters.counts[row] = count
    launch.update(launch.counters)
    blocks = launch.counters.blocks
    assert launch.counters.counts.tolist() == [[10] * blocks, [6] * blocks, [4] * blocks]
    assert launch.counters.lost == 4 * blocks


@pytest.mark.parametrize(("row", "counts"), ALIASED)
def test_reads_its_counts_before_the_block_and_writes_them_after(row, counts):
    backend = select_backend("triton", DEVICE.type)
    assert backend.race_block is not None
    counters = RaceCounters.zeros(1, backend.race_block(torch.float64, DEVICE), DEVICE)
    param, grad, ms = aliased(counters, row)
    table = LaunchTable([check_operands(param, grad, ms)])
    backend.update_(table, ADDS_2_TO_A_COUNT, None, counters)
    assert counters.counts.flatten().tolist() == counts


@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_update_that_is_not_finite_is_left_out(dtype, value, counted):
    launch = Launch((1 << 16) + 1, dtype)
    kept = launch.grad[-1].clone()
    counters = launch.counters if counted else None
    launch.grad[-1] = value
    launch.update(counters, launch.verdict)
    assert launch.verdict.item() == 1
    assert_same_bits(launch.state, launch.before)
    assert launch.counters.landed == 0

    launch.grad[-1] = kept
    launch.update(counters, launch.verdict)
    assert launch.verdict.item() == 0
    assert_same_bits(launch.state, formula(launch.before, launch.grad.cpu(), **FULL))
    assert launch.counters.landed == (launch.counters.blocks if counted else 0)


def test_a_list_is_left_out_as_a_whole():
    sizes = [70_000, 3, 1001]
    lists = [[torch.ones(size, device=DEVICE) for size in sizes] for _ in range(5)]
    table = LaunchTable(list(map(check_operands, *lists)))
    params, grads = lists[:2]
    backend = select_backend("triton", DEVICE.type)
    verdict = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    grads[1][2] = torch.nan
    backend.update_(table, Hyperparameters(**FULL), None, None, verdict)
    assert verdict.item() == 1
    assert all(torch.all(each == 1) for place in (0, 2, 3, 4) for each in lists[place])
    grads[1][2] = 1.0
    backend.update_(table, Hyperparameters(alpha=0.5, **FULL), None, None, verdict)
    assert verdict.item() == 0
    assert all(torch.all(param < 1) for param in params)


def _counters(elements: int, block: int) -> Callable[[Launch], dict[str, Any]]:
    return lambda launch: {"counters": RaceCounters.zeros(elements, block or launch.block, DEVICE)}


def _verdict(*shape: int, dtype: torch.dtype = torch.int32) -> Callable[[Launch], dict[str, Any]]:
    return lambda launch: {"verdict": torch.full(shape, 7, dtype=dtype, device=DEVICE)}


@pytest.mark.parametrize(
    ("watch", "error", "message"),
    [
        (_counters(99, 0), ValueError, "counters must be for 100 elements .* got 99 in"),
        (_counters(100, 7), ValueError, "counters must be for .* got 100 in blocks of 7 on"),
        (_verdict(2), ValueError, r"verdict must be of shape \(1,\) .* got \(2,\)"),
        (_verdict(), ValueError, r"verdict must be of shape \(1,\) .* got \(\)"),
        (_verdict(1, dtype=torch.int64), TypeError, "verdict must be int32, got torch.int64"),
    ],
)
def test_refusals_change_nothing(watch, error, message):
    launch = Launch(100)
    with pytest.raises(error, match=message):
        launch.update(**watch(launch))
    assert_same_bits(launch.state, launch.before)


def test_counts_one_update_at_a_time():
    one, other = Launch(100), Launch(100)
    operands = [each.operands for each in (one, other)]
    with pytest.raises(ValueError, match="counters must be for a table of one update, got 2"):
        one.backend.update_(LaunchTable(operands), Hyperparameters(), None, one.counters)
    assert_same_bits(one.state, one.before)
