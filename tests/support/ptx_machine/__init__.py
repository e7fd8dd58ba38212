"""A machine that executes PTX on NumPy."""

from ptx_machine.errors import (
    ExecutionError,
    InexactInstructionError,
    ParseError,
    PtxError,
    UnknownInstructionError,
)
from ptx_machine.machine import execute, race
from ptx_machine.memory import GlobalMemory
from ptx_machine.observers import Journal, Lineage, Observer, count_bits
from ptx_machine.parser import parse
from ptx_machine.program import Program
from ptx_machine.teams import Launch

__all__ = [
    "ExecutionError",
    "GlobalMemory",
    "InexactInstructionError",
    "Journal",
    "Launch",
    "Lineage",
    "Observer",
    "ParseError",
    "Program",
    "PtxError",
    "UnknownInstructionError",
    "count_bits",
    "execute",
    "parse",
    "race",
]
