"""What the threads of a warp tell each other, without memory; all of them must take part.

A shuffle gives a thread what another has. A reduction gives all of them what theirs make together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from ptx_machine.errors import ThreadError, UnknownInstructionError
from ptx_machine.operands import Operands, Reader
from ptx_machine.scalars import SCALARS, Array, Scalar
from ptx_machine.strands import WARP, Strand
from ptx_machine.syntax import Instruction, Literal, Operand, Register

_OPCODE = re.compile(r"shfl\.sync\.(?:bfly|idx)\.b32|redux\.sync\.(?:add|min|max)\.[us]32")
_REDUCE: dict[str, np.ufunc] = {"add": np.add, "min": np.minimum, "max": np.maximum}
_LANES = np.arange(WARP)
_WORD = SCALARS["b32"]


def exchange(instruction: Instruction, operands: Operands) -> Callable[[Strand], None] | None:
    """What an instruction has the threads of a warp exchange; None if it does no such thing.

    Raises:
        UnknownInstructionError: If it, or one of its qualifiers, is not known.
    """
    name, *qualifiers = instruction.opcode.split(".")
    if name not in ("shfl", "redux"):
        return None
    if _OPCODE.fullmatch(instruction.opcode) is None:
        raise UnknownInstructionError(f"{instruction.opcode}: unknown qualifiers")
    _, kind, scalar = qualifiers
    return {"shfl": _shuffle, "redux": _reduction}[name](
        kind, SCALARS[scalar], instruction.operands, operands
    )


def by_warp(strand: Strand, values: Array) -> Array:
    """Values, one for each thread, of those that are active: (warps, ``WARP``).

    Raises:
        ThreadError: If some threads of a warp do not take part.
    """
    threads = strand.thread[strand.active]
    if len(threads) % WARP or (threads.reshape(-1, WARP) % WARP != _LANES).any():
        raise ThreadError("all threads of a warp must take part")
    everybody = np.broadcast_to(values, len(strand.thread))
    return everybody[strand.active].reshape(-1, WARP)


def _shuffle(
    kind: str, scalar: Scalar, given: Sequence[Operand], operands: Operands
) -> Callable[[Strand], None]:
    """Of the thread whose number is told, or differs from one's own in the bits that are told."""
    if len(given) != 5 or given[3] != Literal("31"):
        raise UnknownInstructionError("the only shuffles known are those within a whole warp")
    target, source, told, _, members = given
    read, read_told = operands.reader(source, scalar), operands.reader(told, _WORD)
    write = operands.loader(_register(target), scalar)
    check = _check_of(operands.reader(members, _WORD))

    def run(strand: Strand) -> None:
        check(strand)
        lanes = by_warp(strand, read_told(strand)).astype(np.int64) % WARP
        if kind == "bfly":
            lanes = lanes ^ _LANES
        values = by_warp(strand, read(strand))
        write(strand, np.take_along_axis(values, lanes, 1).reshape(-1))

    return run


def _reduction(
    kind: str, scalar: Scalar, given: Sequence[Operand], operands: Operands
) -> Callable[[Strand], None]:
    if len(given) != 3:
        raise UnknownInstructionError(f"takes 3 operands, got {len(given)}")
    target, source, members = given
    read, write = operands.reader(source, scalar), operands.loader(_register(target), scalar)
    check = _check_of(operands.reader(members, _WORD))

    def run(strand: Strand) -> None:
        check(strand)
        made = _REDUCE[kind].reduce(by_warp(strand, read(strand)), 1, scalar.dtype)
        write(strand, np.repeat(made, WARP).view(scalar.raw))

    return run


def _register(operand: Operand) -> Register:
    if not isinstance(operand, Register):
        raise UnknownInstructionError(f"no register for a result: {operand}")
    return operand


def _check_of(members: Reader) -> Callable[[Strand], None]:
    """Checks who is told to take part."""

    def check(strand: Strand) -> None:
        if (by_warp(strand, members(strand)) != 0xFFFF_FFFF).any():
            raise ThreadError("the only members known are all threads of a warp")

    return check
