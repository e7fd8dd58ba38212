"""A machine that executes PTX on NumPy, without a GPU.

``parse`` reads a module, ``Program`` makes one of its kernels ready, ``Launch`` gives it a grid and
arguments. ``execute`` runs a launch by itself; ``race`` runs several at once, whose accesses to
memory are interleaved and take effect by a seed, as far as PTX allows. ``GlobalMemory`` holds the
arrays that threads may reach, and observers, such as ``Lineage``, are told of each access.

Whatever the machine does not know is an error that names it. All errors are ``PtxError``.
"""

from ptx_machine.errors import (
    ExecutionError,
    InexactInstructionError,
    ParseError,
    PtxError,
    UnknownInstructionError,
)
from ptx_machine.machine import execute, race
from ptx_machine.memory import GlobalMemory, Pretended
from ptx_machine.observers import Event, Journal, Lineage, Observer, count_bits
from ptx_machine.parser import parse
from ptx_machine.program import Program
from ptx_machine.teams import Launch

__all__ = [
    "Event",
    "ExecutionError",
    "GlobalMemory",
    "InexactInstructionError",
    "Journal",
    "Launch",
    "Lineage",
    "Observer",
    "ParseError",
    "Pretended",
    "Program",
    "PtxError",
    "UnknownInstructionError",
    "count_bits",
    "execute",
    "parse",
    "race",
]
