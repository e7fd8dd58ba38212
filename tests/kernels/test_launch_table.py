"""The table of a launch: which program takes which block, and gradients that move."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cuda_program import Program
from cuda_testing import Driver, library
from hogstream.kernels import launch_table
from hogstream.kernels.launch_table import (
    ELEMENTS,
    GRAD,
    GRAD_AVG,
    KAHAN_COMP,
    MOMENTUM_BUFFER,
    MS,
    PARAM,
    LaunchTable,
)
from hogstream.kernels.operands import Operands

ENTRIES = {
    PARAM: "param",
    GRAD: "grad",
    MS: "ms",
    GRAD_AVG: "grad_avg",
    MOMENTUM_BUFFER: "momentum_buffer",
    KAHAN_COMP: "kahan_comp",
}


def table_of(*lengths: int) -> tuple[LaunchTable, list[Operands]]:
    operands = [Operands(*(torch.zeros(length) for _ in range(3))) for length in lengths]
    return LaunchTable(operands), operands


def test_blocks_of_a_case_worked_by_hand():
    table, _ = table_of(10, 0, 4, 5)
    # Four elements a block: three of the first, none of the second, one, and two.
    assert table.split_into_blocks(4).tolist() == [[0, 0, 0, 2, 3, 3], [0, 1, 2, 0, 0, 1]]


@given(lengths=st.lists(st.integers(0, 50), min_size=1, max_size=10), block=st.integers(1, 20))
def test_blocks_cover_every_element_once(lengths, block):
    table, _ = table_of(*lengths)
    covered = [
        (update, element)
        for update, part in table.split_into_blocks(block).T.tolist()
        for element in range(part * block, min((part + 1) * block, lengths[update]))
    ]
    assert covered == [(u, e) for u, length in enumerate(lengths) for e in range(length)]


def test_blocks_of_more_elements_than_32_bits_count():
    table, _ = table_of(1)
    table.columns[ELEMENTS] = 2**32 + 1  # only counted here, never touched
    updates, blocks = table.split_into_blocks(1024)
    assert len(blocks) == 2**22 + 1
    assert blocks[-1] == 2**22
    assert not updates.any()


def test_a_table_holds_addresses_and_lengths():
    lengths = (3, 7)
    operands = [Operands(*(torch.zeros(length) for _ in Operands._fields)) for length in lengths]
    table = LaunchTable(operands)
    for row, name in ENTRIES.items():
        assert table.columns[row].tolist() == [getattr(o, name).data_ptr() for o in operands]
    assert table.columns[ELEMENTS].tolist() == [3, 7]
    assert len(table.columns) == len(ENTRIES) + 1
    assert (table.updates, table.elements) == (2, 10)


def test_an_address_of_what_is_not_there_is_0():
    table, _ = table_of(3, 7)
    assert not table.columns[[GRAD_AVG, MOMENTUM_BUFFER, KAHAN_COMP]].any()
    assert table.columns[[PARAM, GRAD, MS, ELEMENTS]].all()


def copy_of(table: LaunchTable, *grads: int) -> LaunchTable:
    """A copy in new memory, with gradients at such addresses."""
    copy = table.copy_to(np.empty_like(table.columns))
    copy.columns[GRAD] = grads
    return copy


def test_moved_gradients_of_a_copy_leave_the_table_as_it_was():
    table, _ = table_of(3, 7)
    before = table.columns.copy()
    moved = copy_of(table, 64, 128)
    assert moved.columns[GRAD].tolist() == [64, 128]
    assert np.array_equal(np.delete(moved.columns, GRAD, axis=0), np.delete(before, GRAD, axis=0))
    assert np.array_equal(table.columns, before)


GLOBAL, RELAXED = 0, 2


class Capture:
    """Stands for a stream of CUDA that is captured, and for pinned memory.

    Attributes:
        driver: Of tests.
        modes: In which mode of capture memory was pinned, each time.
    """

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.modes: list[int] = []

    def exchange(self, mode: int) -> int:
        """Sets the mode of this thread, and returns the one before."""
        word = ctypes.c_int(mode)
        self.driver.call("cuThreadExchangeStreamCaptureMode", ctypes.byref(word))
        return word.value

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self.modes.append(self.exchange(0))
        self.exchange(self.modes[-1])
        return tensor.clone()


def test_gradients_that_move_are_sent_to_the_device_anew(monkeypatch):
    """A table is sent once, then gradients alone and only if they moved: where a step kept them."""
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.numel())
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    table, _ = table_of(3, 7)
    moved, sent = copy_of(table, 64, 128), []
    for grads in ((64, 128), (64, 128), (192, 128), (64, 128)):
        moved.columns[GRAD] = grads
        with moved._on_device.of(moved, 4) as on:
            assert on.columns.tolist() == moved.columns.tolist()
        sent.append(len(pinned))
    assert pinned == [14, 6, 2, 2]  # seven columns, three blocks of 4 elements, and gradients twice
    assert sent == [2, 2, 3, 4]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Capture]:
    with Driver() as driver, Program(driver):
        stands_for = Capture(driver)
        stands_for.exchange(GLOBAL)  # whatever lanes have left on this thread
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: stands_for.pin(tensor))
        monkeypatch.setattr(ctypes, "CDLL", {"libcuda.so.1": library()}.__getitem__)
        yield stands_for


def test_memory_is_pinned_while_a_stream_is_captured_without_ending_that(capture):
    table, _operands = table_of(3, 7)
    with table._on_device.of(table, 4) as on:
        assert on.columns.tolist() == table.columns.tolist()
    assert capture.modes == [RELAXED, RELAXED]
    assert capture.exchange(GLOBAL) == GLOBAL


def test_what_was_captured_lives_as_long_as_what_it_updates(capture):
    gc.collect()
    before = len(launch_table._captured)
    table, operands = table_of(3, 7)
    seen = []
    for moved in (table, copy_of(table, 64, 128), table):
        with moved._on_device.of(moved, 4) as on:
            seen.append(on)
            assert on.columns.tolist() == moved.columns.tolist()
    # The same again is copied from and to where it was; what is else has memory of its own.
    assert seen[0] is seen[2] is not seen[1]
    assert len(capture.modes) == 4
    assert len(launch_table._captured) == before + 1
    with launch_table.LaunchTable(operands)._on_device.of(table, 4) as on:
        assert on is seen[0]
    del operands
    gc.collect()
    assert len(launch_table._captured) == before
