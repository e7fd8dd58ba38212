"""A machine that executes PTX on NumPy."""

from ptx_machine.errors import (
    ExecutionError,
    InexactInstructionError,
    ParseError,
    PtxError,
    UnknownInstructionError,
)
from ptx_machine.lineage import Lineage
from ptx_machine.machine import execute, race
from ptx_machine.memory import GlobalMemory
from ptx_machine.parser import parse
from ptx_machine.program import Program
from ptx_machine.teams import Launch

__all__ = [
    "ExecutionError",
    "GlobalMemory",
    "InexactInstructionError",
    "Launch",
    "Lineage",
    "ParseError",
    "Program",
    "PtxError",
    "UnknownInstructionError",
    "execute",
    "parse",
    "race",
]
