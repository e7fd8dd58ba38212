"""What the machine refuses, and says of a program that goes wrong."""

from __future__ import annotations


class PtxError(Exception):
    """Any error of the machine."""


class ParseError(PtxError):
    """Text that is not PTX, or of a part of it that the machine does not know."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(f"line {line}: {problem}")


class UnknownInstructionError(PtxError):
    """An opcode, a qualifier or a form of operands that the machine does not know."""


class InexactInstructionError(PtxError):
    """An approximation: PTX bounds its error and does not say which bits come out."""


class ExecutionError(PtxError):
    """A program does what it must not: it is told where, and which thread."""


class ThreadError(Exception):
    """What one of several threads does that it must not; its strand says who that is.

    Attributes:
        problem: What is wrong.
        position: Which of the active threads it is.
    """

    def __init__(self, problem: str, position: int = 0) -> None:
        super().__init__(problem)
        self.problem = problem
        self.position = position


class UnwrittenError(ThreadError):
    """A register is read that no thread of the strand has written."""
