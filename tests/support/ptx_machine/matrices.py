"""Matrices of 8 by 8 numbers of 16 bits, which a warp loads from shared memory, or stores there.

The eight rows of matrix ``j`` begin where thread ``8 * j`` and the seven after it say. Thread ``t``
has two neighbours of row ``t // 4`` in a register, from column ``2 * (t % 4)`` on; or of column
``t // 4``, if the matrix is transposed on its way.
"""

from __future__ import annotations

import re

import numpy as np

from ptx_machine.accesses import Access
from ptx_machine.errors import ThreadError, UnknownInstructionError
from ptx_machine.exchanges import by_warp
from ptx_machine.operands import Operands
from ptx_machine.scalars import SCALARS, Array
from ptx_machine.strands import WARP, Strand
from ptx_machine.syntax import Instruction, Vector

_OPCODE = re.compile(
    r"(ld|st)matrix\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16"
)
_THREADS = np.arange(WARP)
_ROW, _COLUMN = _THREADS // 4, _THREADS % 4 * 2
_WORD = SCALARS["b32"]


def matrix_access(instruction: Instruction, operands: Operands) -> Access | None:
    """What an instruction does with matrices; None if it has nothing to do with them.

    Raises:
        UnknownInstructionError: If it, or one of its qualifiers, is not known.
    """
    if not instruction.opcode.startswith(("ldmatrix", "stmatrix")):
        return None
    found = _OPCODE.fullmatch(instruction.opcode)
    if found is None or len(instruction.operands) != 2:
        raise UnknownInstructionError(f"{instruction.opcode}: unknown qualifiers or operands")
    loads, count, transposed = found[1] == "ld", int(found[2]), found[3] is not None
    vector, where = instruction.operands if loads else reversed(instruction.operands)
    if not isinstance(vector, Vector) or len(vector.elements) != count:
        raise UnknownInstructionError(f"takes {count} registers, got {vector}")
    addresses = operands.address(where)
    if loads:
        writers = [operands.loader(each, _WORD) for each in vector.elements]

        def load(strand: Strand) -> None:
            rows, place = _rows(strand, addresses(strand)), strand.place[strand.active]
            for index, write in enumerate(writers):
                halves = [
                    strand.shared.load(each, place, 2, 1)[0].astype(np.uint32)
                    for each in _halves(rows, index, transposed)
                ]
                write(strand, halves[0] | halves[1] << np.uint32(16))

        return Access(True, load)
    readers = [operands.reader(each, _WORD) for each in vector.elements]

    def store(strand: Strand) -> None:
        rows, place = _rows(strand, addresses(strand)), strand.place[strand.active]
        for index, read in enumerate(readers):
            word = read(strand)[strand.active]
            for half, each in enumerate(_halves(rows, index, transposed)):
                value = (word >> np.uint32(16 * half)).astype(np.uint16)
                strand.shared.store(each, place, [value])

    return Access(True, store)


def _rows(strand: Strand, addresses: Array) -> Array:
    """Where rows begin, by warp and thread."""
    rows = by_warp(strand, addresses)
    unaligned = rows[rows % np.uint32(16) != 0]
    if len(unaligned):
        raise ThreadError(f"shared address {unaligned[0]:#x} is not a multiple of 16")
    return rows


def _halves(rows: Array, index: int, transposed: bool) -> tuple[Array, Array]:
    """Where the lower and the upper half of each thread's register lie, of one of the matrices."""
    if transposed:
        first, second = (rows[:, 8 * index + _COLUMN + half] + 2 * _ROW for half in (0, 1))
    else:
        first, second = (rows[:, 8 * index + _ROW] + 2 * (_COLUMN + half) for half in (0, 1))
    return first.reshape(-1), second.reshape(-1)
