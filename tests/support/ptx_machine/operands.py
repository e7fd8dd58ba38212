"""How instructions reach their operands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_machine.errors import UnknownInstructionError, UnwrittenError
from ptx_machine.scalars import SCALARS, UNSIGNED, Array, Scalar, constant
from ptx_machine.strands import NEVER_WRITTEN, WARP, Strand
from ptx_machine.syntax import (
    SINK,
    Address,
    Instruction,
    Kernel,
    Literal,
    Name,
    Operand,
    Register,
    Vector,
)

Reader = Callable[[Strand], Any]
Writer = Callable[[Strand, Array], None]

_AXES = {"x": 0, "y": 1, "z": 2}


class Operands:
    """The operands of one kernel.

    Attributes:
        shared_end: How much shared memory the kernel declares; behind it is what a launch adds.
    """

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._slots = {name: index for index, name in enumerate(kernel.registers)}
        self._parameters = {name: index for index, name in enumerate(kernel.parameters)}
        self._shared: dict[str, int] = {}
        self.shared_end = 0
        for name, variable in sorted(kernel.shared.items(), key=lambda item: item[1].size is None):
            start = -(-self.shared_end // variable.alignment) * variable.alignment
            self._shared[name] = start
            self.shared_end = start + (variable.size or 0)

    def slot(self, name: str, scalar: Scalar, wide: bool = False) -> int:
        """The number of a register.

        Args:
            name: Its name.
            scalar: What an instruction takes it for.
            wide: Whether it may have more bits than that.
        """
        if name not in self._slots:
            raise UnknownInstructionError(f"no such register: {name}")
        bits = self.bits(name)
        if bits != scalar.bits and not (wide and bits > scalar.bits > 1):
            raise UnknownInstructionError(f"{name} has {bits} bits, not the {scalar.bits} needed")
        return self._slots[name]

    def bits(self, name: str) -> int:
        """How wide a register is."""
        return SCALARS[self._kernel.registers[name]].bits

    def reader(self, operand: Operand, scalar: Scalar, wide: bool = False) -> Reader:
        """How to get an operand's values as a type: of all threads, or a number for all."""
        if isinstance(operand, Register):
            special = _special(operand.name)
            if special is not None:
                return special
            slot = self.slot(operand.name, scalar, wide)
            return _register(operand.name, slot, scalar)
        value: Any
        if isinstance(operand, Literal):
            try:
                value = constant(operand.text, scalar)
            except ValueError as error:
                raise UnknownInstructionError(str(error)) from None
        elif isinstance(operand, Name) and operand.name in self._shared:
            value = scalar.dtype.type(self._shared[operand.name])
        else:
            raise UnknownInstructionError(f"no such operand here: {operand}")
        return lambda strand: value

    def writer(self, operand: Operand, scalar: Scalar, wide: bool = False) -> Writer:
        """How to set a result in the active threads, from values of all threads."""
        if not isinstance(operand, Register):
            raise UnknownInstructionError(f"no register for a result: {operand}")
        slot = self.slot(operand.name, scalar, wide)
        extend = self._extension(operand.name, scalar)
        return lambda strand, values: strand.write(slot, extend(values))

    def loader(self, operand: Register | Literal, scalar: Scalar) -> Writer:
        """How to set a result in the active threads, from values of these alone."""
        if operand == SINK:
            return lambda strand, values: None
        if not isinstance(operand, Register):
            raise UnknownInstructionError(f"no register for a result: {operand}")
        slot = self.slot(operand.name, scalar, wide=True)
        extend = self._extension(operand.name, scalar)
        return lambda strand, values: strand.write_active(slot, extend(values.view(scalar.dtype)))

    def address(self, operand: Operand) -> Reader:
        """How to get the addresses that an operand says."""
        if not isinstance(operand, Address):
            raise UnknownInstructionError(f"no address: {operand}")
        base, offset = operand
        if isinstance(base, Literal):
            raise UnknownInstructionError(f"no address of a variable or in a register: {base}")
        bits = self.bits(base.name) if isinstance(base, Register) else 64
        read = self.reader(base, SCALARS[f"u{bits}"])
        added = UNSIGNED[bits].type(offset % (1 << bits))
        return lambda strand: np.broadcast_to(read(strand) + added, len(strand.thread))

    def parameter(self, operand: Operand, scalar: Scalar) -> Reader:
        """How to get a parameter's value."""
        if not isinstance(operand, Address) or operand.offset != 0:
            raise UnknownInstructionError(f"no parameter: {operand}")
        name = getattr(operand.base, "name", "")
        if name not in self._parameters:
            raise UnknownInstructionError(f"no such parameter: {name}")
        if SCALARS[self._kernel.parameters[name]].bits != scalar.bits:
            raise UnknownInstructionError(f"{name} is not of {scalar.bits} bits")
        index, limit = self._parameters[name], 1 << scalar.bits
        return lambda strand: scalar.raw.type(strand.setting.arguments[index] % limit)

    def split_or_join(self, instruction: Instruction) -> Callable[[Strand], None]:
        """A ``mov`` of a register to several that are its parts, the lowest first, or from them."""
        scalar = SCALARS.get(instruction.opcode.removeprefix("mov."))
        if scalar is None or len(instruction.operands) != 2:
            raise UnknownInstructionError(f"{instruction.opcode}: unknown qualifier")
        result, source = instruction.operands
        parts, whole = (result, source) if isinstance(result, Vector) else (source, result)
        if not isinstance(parts, Vector) or isinstance(whole, Vector):
            raise UnknownInstructionError("takes one vector")
        count = len(parts.elements)
        part = SCALARS.get(f"b{scalar.bits // count}")
        if part is None or part.bits * count != scalar.bits:
            raise UnknownInstructionError(f"{scalar.bits} bits have no {count} parts")
        if parts is result:
            return self._split(parts, self.reader(whole, scalar), scalar, part)
        return self._join(self.writer(whole, scalar), parts, scalar, part)

    def _split(
        self, parts: Vector, read: Reader, scalar: Scalar, part: Scalar
    ) -> Callable[[Strand], None]:
        writers = [
            (index, self.writer(each, part))
            for index, each in enumerate(parts.elements)
            if each != SINK
        ]

        def run(strand: Strand) -> None:
            values = read(strand)
            for index, write in writers:
                write(strand, (values >> scalar.dtype.type(index * part.bits)).astype(part.dtype))

        return run

    def _join(
        self, write: Writer, parts: Vector, scalar: Scalar, part: Scalar
    ) -> Callable[[Strand], None]:
        readers = [
            _or_never_written(self.reader(each, part), part.dtype) for each in parts.elements
        ]

        def run(strand: Strand) -> None:
            values = scalar.dtype.type(0)
            for index, read in enumerate(readers):
                shift = scalar.dtype.type(index * part.bits)
                values = values | read(strand).astype(scalar.dtype) << shift
            write(strand, np.asarray(values))

        return run

    def _extension(self, name: str, scalar: Scalar) -> Callable[[Array], Array]:
        """From values of a type to what the register holds: with their sign, if they have one."""
        bits = self.bits(name)
        if bits == scalar.bits:
            return lambda values: values.view(scalar.raw)
        signed = np.dtype(f"i{bits // 8}") if scalar.dtype.kind == "i" else UNSIGNED[bits]
        if scalar.is_float:
            return lambda values: values.view(scalar.raw).astype(UNSIGNED[bits])
        return lambda values: values.astype(signed).view(UNSIGNED[bits])


def _or_never_written(read: Reader, dtype: np.dtype[Any]) -> Reader:
    """Also reads what was never written: compilers join that to what they use a part of alone."""
    pattern = np.array(NEVER_WRITTEN, np.uint64).astype(dtype)

    def read_or_not(strand: Strand) -> Any:
        try:
            return read(strand)
        except UnwrittenError:
            return pattern

    return read_or_not


def _register(name: str, slot: int, scalar: Scalar) -> Reader:
    raw, dtype = scalar.raw, scalar.dtype

    def read(strand: Strand) -> Array:
        values = strand.registers[slot]
        if values is None:
            raise UnwrittenError(f"register {name} is read before it is written")
        if values.dtype.itemsize > raw.itemsize:
            values = values.astype(raw)
        return values.view(dtype)

    return read


def _special(name: str) -> Reader | None:
    """What the hardware knows of each thread, as uint32."""
    kind, _, axis = name.partition(".")
    if name == "%laneid":
        return lambda strand: (strand.thread % WARP).astype(np.uint32)
    if kind not in ("%tid", "%ntid", "%ctaid", "%nctaid") or axis not in _AXES:
        return None
    index = _AXES[axis]
    if kind == "%ntid":
        return lambda strand: np.uint32(strand.setting.block[index])
    if kind == "%nctaid":
        return lambda strand: np.uint32(strand.setting.grid[index])
    if kind == "%tid":
        return lambda strand: _coordinate(strand.thread, strand.setting.block, index)
    return lambda strand: _coordinate(strand.block, strand.setting.grid, index)


def _coordinate(linear: Array, shape: tuple[int, int, int], axis: int) -> Array:
    for size in shape[:axis]:
        linear = linear // size
    return (linear % shape[axis]).astype(np.uint32)
