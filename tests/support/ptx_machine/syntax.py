"""A program as the parser reads it, with nothing of its meaning."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Register(NamedTuple):
    """A register, or one that the hardware sets, such as ``%tid.x``."""

    name: str


#: In a vector, a place that nothing comes of.
SINK = Register("_")


class Literal(NamedTuple):
    """A number, as it is written."""

    text: str


class Name(NamedTuple):
    """A label, a parameter, or a variable."""

    name: str


class Address(NamedTuple):
    """``[base + offset]``, in bytes."""

    base: Register | Name | Literal
    offset: int


class Vector(NamedTuple):
    """``{a, b, ...}``."""

    elements: tuple[Register | Literal, ...]


Operand = Register | Literal | Name | Address | Vector


class Instruction(NamedTuple):
    """One instruction.

    Attributes:
        opcode: With its qualifiers, such as ``ld.global.v4.b32``.
        operands: In their order.
        predicate: The register that says which threads it is for; None if it is for all.
        negated: Whether it is for the others.
        line: Where in the text it stands, from 1 on.
        text: As it is written.
    """

    opcode: str
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    line: int
    text: str


class Variable(NamedTuple):
    """What lies in shared memory.

    Attributes:
        size: In bytes; None for the one whose size a launch says.
        alignment: In bytes.
    """

    size: int | None
    alignment: int


@dataclass
class Kernel:
    """An entry point.

    Attributes:
        name: Its name.
        parameters: The type of each, by name, in their order.
        registers: The type of each by name, as declared.
        instructions: In their order.
        labels: Which instruction each stands before.
        threads: How many a block must have, if the text says so: (x, y, z).
        shared: What it and the module have declared in shared memory, by name.
    """

    name: str
    parameters: dict[str, str] = field(default_factory=dict)
    registers: dict[str, str] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    threads: tuple[int, int, int] | None = None
    shared: dict[str, Variable] = field(default_factory=dict)


class Module(NamedTuple):
    """What one text holds.

    Attributes:
        target: What it is for, such as ``sm_90a``.
        kernels: By name.
    """

    target: str
    kernels: dict[str, Kernel]
