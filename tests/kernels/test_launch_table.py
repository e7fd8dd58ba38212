"""The table of a launch: which program takes which block, and gradients that move."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hogstream.kernels.launch_table import ELEMENTS, GRAD, MS, PARAM, LaunchTable
from hogstream.kernels.operands import Operands


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
    table, operands = table_of(3, 7)
    for row, name in ((PARAM, "param"), (GRAD, "grad"), (MS, "ms")):
        assert table.columns[row].tolist() == [getattr(o, name).data_ptr() for o in operands]
    assert table.columns[ELEMENTS].tolist() == [3, 7]
    assert (table.updates, table.elements) == (2, 10)


def test_moved_gradients_leave_the_old_table_as_it_was():
    table, _ = table_of(3, 7)
    before = table.columns.copy()
    moved = table.with_grads([64, 128])
    assert moved.columns[GRAD].tolist() == [64, 128]
    assert np.array_equal(np.delete(moved.columns, GRAD, axis=0), np.delete(before, GRAD, axis=0))
    assert np.array_equal(table.columns, before)
