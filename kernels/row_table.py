"""Where the tensors of updates of rows lie in memory, as compiled code takes them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hogstream.kernels.launch_table import ELEMENTS, GRAD, PARAM
from hogstream.kernels.rows import RowUpdate

#: What an update of rows is, as int64 in memory: first addresses, as in a launch table; then the
#: address of ``last_update``, of rows in ascending order and of where their gradients are; how many
#: those are, elements of a row, and rows of the table; the number of the update; the address of the
#: factors; and the key of the step.
LAST_UPDATE = 6
ROWS, ORDER, POSITIONS, WIDTH, TABLE_ROWS, NUMBER, FACTORS, KEY = range(7, 15)
#: How many elements come before the table in what is counted and locked. A row belongs to the block
#: there in which it begins.
BEFORE = 15
#: The address of race counts, or 0; how many blocks they have, of how many elements each. On a GPU,
#: those of the table's rows alone, one by one.
COUNTS, BLOCKS, BLOCK = range(16, 19)
#: The address of mutexes, each in a cache line of its own, or 0; how many, which must be held for a
#: block of how many elements: block after block has the next one. On a GPU, locks of 4 bytes, one
#: row after the other.
LOCKS, STRIPES, LOCK_BLOCK = range(19, 22)
#: The address of the code that updates, for who has no more than the fields; on a GPU, of a
#: ``KERNEL`` of its lanes.
CODE = 22
#: The address of the version that changed each row last, int64, or 0; the version that the update
#: was made from; the address of versions, and how many there are, whose sum is the present one.
#: Then what the update counts: its rows, and how many of them another has changed since.
ROW_VERSIONS, READ_VERSION, VERSIONS, SLOTS, UPDATED, STALE = range(23, 29)
FIELDS = 29


class RowTable:
    """Updates of rows, each of another table, as lanes take what is one update to them.

    It is to them what a ``LaunchTable`` is to dense updates. Unlike that, it keeps the tensors.

    Attributes:
        parts: Each table's update: all of one dtype, on one device.
        grad_dtype: Of the gradients.
        updates: How many parts there are.
        elements: How many their gradients have together.
        fields: int64, shape (updates, FIELDS): of each part what the constants here say. What its
            tensors do not tell is 0 until whoever launches it knows.
        columns: int64, shape (7, updates): the rows of a launch table. In the place of the
            parameter's address is that of the part's fields; the elements are its gradients'.
    """

    def __init__(self, parts: Sequence[RowUpdate]) -> None:
        """Lays out updates: at least one."""
        self.parts = parts
        self.grad_dtype = parts[0].operands.grads.dtype
        self.updates = len(parts)
        self.elements = sum(part.elements for part in parts)
        self.fields = np.array([fields_of(part) for part in parts], np.int64)
        self.columns = np.zeros((ELEMENTS + 1, self.updates), np.int64)
        first, size = self.fields.ctypes.data, self.fields.itemsize * FIELDS
        self.columns[PARAM] = range(first, first + size * self.updates, size)
        self.columns[GRAD] = self.fields[:, GRAD]
        self.columns[ELEMENTS] = [part.elements for part in parts]


def fields_of(update: RowUpdate) -> list[int]:
    """The fields of an update: those that its tensors tell, up to its number, and 0 for others."""
    tensors = [*update.operands[:7], update.rows, update.order]
    fields = [0 if each is None else each.data_ptr() for each in tensors]
    positions = len(update.rows) if update.width else 0  # rows without elements are left alone
    fields += [positions, update.width, len(update.operands.param), update.number]
    return fields + [0] * (FIELDS - len(fields))
