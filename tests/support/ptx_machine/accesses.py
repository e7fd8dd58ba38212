"""Loads, stores and atomic operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from ptx_machine.errors import UnknownInstructionError
from ptx_machine.operands import Operands
from ptx_machine.scalars import SCALARS, Array, Scalar
from ptx_machine.strands import Order, Strand
from ptx_machine.syntax import SINK, Instruction, Literal, Operand, Register, Vector

_SPACES = ("param", "global", "shared", "shared::cta")
_ORDERS = ("weak", "relaxed", "acquire", "release", "acq_rel", "volatile")
_SCOPES = ("cta", "cluster", "gpu", "sys")
_COUNTS = {"v2": 2, "v4": 4, "v8": 8}
# These say how long caches keep what is accessed, and change no value.
_HINTS = (
    *("ca", "cg", "cs", "lu", "cv", "wb", "wt"),
    *(f"L1::{each}" for each in ("evict_normal", "evict_unchanged", "evict_first", "evict_last")),
    *("L1::no_allocate", "L2::64B", "L2::128B", "L2::256B"),
)

_FENCES = (
    *(f"fence.{order}.{scope}" for order in ("sc", "acq_rel") for scope in ("gpu", "sys")),
    *("membar.gl", "membar.sys"),
)

_ATOMIC: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "min": np.minimum,
    "max": np.maximum,
    "exch": lambda old, new: new,
}
_TYPES = {
    "add": ("u32", "s32", "u64", "f32", "f64"),
    "min": ("u32", "s32", "u64", "s64"),
    "max": ("u32", "s32", "u64", "s64"),
}
_BITS = ("b32", "b64")


class Access(NamedTuple):
    """What an instruction does with memory.

    Attributes:
        is_seen: Whether other threads see it.
        run: It.
    """

    is_seen: bool
    run: Callable[[Strand], None]


class _Qualifiers(NamedTuple):
    """What an opcode says; in any order, as PTX's own and Triton's differ.

    Attributes:
        space: Which memory.
        order: How it is ordered, in PTX's word.
        effect: What that is to the threads of all blocks: nothing, if its scope is less.
        elements: How many lie one after the other.
        scalar: Of which type each is.
        operation: What an atomic operation does.
    """

    space: str
    order: str
    effect: Order
    elements: int
    scalar: Scalar
    operation: str


def access(instruction: Instruction, operands: Operands) -> Access | None:
    """What an instruction does with memory; None if it has nothing to do with it.

    Raises:
        UnknownInstructionError: If it, or one of its qualifiers, is not known.
    """
    name, *parts = instruction.opcode.split(".")
    if instruction.opcode in _FENCES:
        return Access(True, lambda strand: strand.memory.fence(strand))
    if name not in ("ld", "st", "atom", "red"):
        return None
    qualifiers = _read(name, parts)
    needed = {"ld": 2, "st": 2, "red": 2, "atom": 3}[name] + (qualifiers.operation == "cas")
    if len(instruction.operands) != needed:
        raise UnknownInstructionError(f"takes {needed} operands, got {len(instruction.operands)}")
    if name == "ld":
        return _load(instruction, operands, qualifiers)
    if name == "st":
        return _store(instruction, operands, qualifiers)
    return _atomic(name, instruction, operands, qualifiers)


def _read(name: str, parts: list[str]) -> _Qualifiers:
    atomic = name in ("atom", "red")
    groups: dict[str, tuple[str, ...]] = {"space": _SPACES, "order": _ORDERS, "scope": _SCOPES}
    groups["type"] = tuple(SCALARS)
    if atomic:
        groups["operation"] = (*_ATOMIC, "cas")
    else:
        groups["count"] = tuple(_COUNTS)
        groups["hint"] = _HINTS
    found: dict[str, str] = {}
    for part in parts:
        group = next((each for each, known in groups.items() if part in known), None)
        if group is None or group in found:
            raise UnknownInstructionError(f"unknown qualifier {part!r}")
        found[group] = part
    needed = ("space", "type", "operation") if atomic else ("space", "type")
    for group in needed:
        if group not in found:
            raise UnknownInstructionError(f"it must say its {group}")
    order = found.get("order", "relaxed" if atomic else "weak")
    everywhere = found.get("scope", "gpu") in ("gpu", "sys")
    return _Qualifiers(
        found["space"],
        order,
        Order(
            acquires=everywhere and order in ("acquire", "acq_rel"),
            releases=everywhere and order in ("release", "acq_rel"),
        ),
        _COUNTS.get(found.get("count", ""), 1),
        SCALARS[found["type"]],
        found.get("operation", ""),
    )


def _elements(operand: Operand, count: int) -> tuple[Register | Literal, ...]:
    elements = operand.elements if isinstance(operand, Vector) else (operand,)
    if len(elements) != count:
        raise UnknownInstructionError(f"{count} elements are accessed, and {len(elements)} named")
    known = tuple(each for each in elements if isinstance(each, Register | Literal))
    if len(known) != count:
        raise UnknownInstructionError(f"no registers: {operand}")
    return known


def _load(instruction: Instruction, operands: Operands, qualifiers: _Qualifiers) -> Access:
    target, source = instruction.operands
    space, order, effect, count, scalar, _ = qualifiers
    if order in ("release", "acq_rel"):
        raise UnknownInstructionError(f"a load cannot {order}")
    elements = _elements(target, count)
    if space == "param":
        read, write = operands.parameter(source, scalar), operands.writer(elements[0], scalar)
        return Access(False, lambda strand: write(strand, np.asarray(read(strand))))
    addresses = operands.address(source)
    writers = [operands.loader(each, scalar) for each in elements]
    width = scalar.bits // 8

    def run(strand: Strand) -> None:
        active = strand.active
        where = addresses(strand)[active]
        if space == "global":
            values = strand.memory.load(strand, where.astype(np.uint64), width, count, effect)
        else:
            values = strand.shared.load(where, strand.place[active], width, count)
        for write, value in zip(writers, values, strict=True):
            write(strand, value)

    return Access(True, run)


def _store(instruction: Instruction, operands: Operands, qualifiers: _Qualifiers) -> Access:
    target, source = instruction.operands
    space, order, effect, count, scalar, _ = qualifiers
    if order in ("acquire", "acq_rel") or space == "param":
        raise UnknownInstructionError(f"a store cannot {order}, nor be of parameters")
    addresses = operands.address(target)
    raw = SCALARS[f"b{scalar.bits}"]
    readers = [operands.reader(each, raw, wide=True) for each in _elements(source, count)]

    def run(strand: Strand) -> None:
        active = strand.active
        where = addresses(strand)[active]
        everybody = len(strand.thread)
        values = [np.broadcast_to(read(strand), everybody)[active] for read in readers]
        if space == "global":
            strand.memory.store(strand, where.astype(np.uint64), values, effect)
        else:
            strand.shared.store(where, strand.place[active], values)

    return Access(True, run)


def _atomic(
    name: str, instruction: Instruction, operands: Operands, qualifiers: _Qualifiers
) -> Access:
    """The threads of a strand take their turns, in their order."""
    space, _, effect, _, scalar, operation = qualifiers
    if space != "global" or scalar.name not in _TYPES.get(operation, _BITS):
        raise UnknownInstructionError(f"no {operation} of {scalar.name} in {space} memory")
    target, where, *sources = (
        instruction.operands if name == "atom" else (SINK, *instruction.operands)
    )
    if not isinstance(target, Register):
        raise UnknownInstructionError(f"no register for a result: {target}")
    addresses, write = operands.address(where), operands.loader(target, scalar)
    readers = [operands.reader(each, scalar) for each in sources]
    width = scalar.bits // 8

    def run(strand: Strand) -> None:
        active = strand.active
        here = addresses(strand)[active].astype(np.uint64)
        everybody = len(strand.thread)
        values = [np.broadcast_to(read(strand), everybody)[active] for read in readers]
        before = np.empty(len(here), scalar.dtype)
        for turn in range(len(here)):
            given = [value[turn : turn + 1] for value in values]
            before[turn : turn + 1] = strand.memory.change(
                strand, here[turn : turn + 1], width,
                partial(_changed, operation, scalar, given), operation != "exch", effect,
            ).view(scalar.dtype)  # fmt: skip
        write(strand, before.view(scalar.raw))

    return Access(True, run)


def _changed(operation: str, scalar: Scalar, given: list[Array], old: Array) -> Array | None:
    """What to write, by what was there; None for nothing."""
    before = old.view(scalar.dtype)
    if operation == "cas":
        expected, new = given
        return new.view(scalar.raw) if before == expected else None
    if operation == "add" and given[0] == 0 and not scalar.is_float:  # which is a read
        return None
    return _ATOMIC[operation](before, given[0]).view(scalar.raw)
