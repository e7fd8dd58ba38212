"""Makes a kernel ready to run: each instruction becomes a step."""

from __future__ import annotations

from collections.abc import Callable

from ptx_machine.accesses import access
from ptx_machine.errors import UnknownInstructionError
from ptx_machine.exchanges import exchange
from ptx_machine.matrices import matrix_access
from ptx_machine.operands import Operands
from ptx_machine.operations import is_operation, operation
from ptx_machine.scalars import SCALARS
from ptx_machine.strands import Kind, Step, Strand
from ptx_machine.syntax import Instruction, Kernel, Name, Vector


class Program:
    """A kernel that is ready to run.

    Attributes:
        kernel: What it was made of.
        steps: One for each instruction, and the end.
        registers: How many there are.
    """

    def __init__(self, kernel: Kernel) -> None:
        """Makes a kernel ready.

        Raises:
            UnknownInstructionError: If one of its instructions is not known.
            InexactInstructionError: If one is an approximation.
        """
        self.kernel = kernel
        self._operands = Operands(kernel)
        self.registers = len(kernel.registers)
        self.steps = [self._step(each) for each in kernel.instructions]
        end = Instruction("ret", (), None, False, 0, "the end of the kernel")
        self.steps.append(Step(Kind.ENDS, _nothing, -1, False, -1, end))

    def shared_size(self, dynamic: int) -> int:
        """How many bytes of shared memory a block has.

        Args:
            dynamic: How many of them the launch says.
        """
        return self._operands.shared_end + dynamic

    def _step(self, instruction: Instruction) -> Step:
        try:
            predicate = -1
            if instruction.predicate is not None:
                predicate = self._operands.slot(instruction.predicate, SCALARS["pred"])
            kind, run, target = self._meaning(instruction)
        except UnknownInstructionError as error:
            raise type(error)(f"line {instruction.line}, {instruction.text!r}: {error}") from None
        return Step(kind, run, predicate, instruction.negated, target, instruction)

    def _meaning(self, instruction: Instruction) -> tuple[Kind, Callable[[Strand], None], int]:
        opcode, operands = instruction.opcode, instruction.operands
        if opcode in ("ret", "exit") and not operands:
            return Kind.ENDS, _nothing, -1
        if opcode in ("bra", "bra.uni"):
            return Kind.BRANCHES, _nothing, self._target(instruction)
        if opcode in ("bar.sync", "barrier.sync.aligned"):
            if len(operands) != 1 or getattr(operands[0], "text", "") != "0":
                raise UnknownInstructionError("the only barrier known is 0, of the whole block")
            return Kind.WAITS, _nothing, -1
        made = access(instruction, self._operands) or matrix_access(instruction, self._operands)
        if made is not None:
            return Kind.ACCESSES if made.is_seen else Kind.COMPUTES, made.run, -1
        exchanged = exchange(instruction, self._operands)
        if exchanged is not None:
            return Kind.COMPUTES, exchanged, -1
        if opcode.startswith("mov.") and any(isinstance(each, Vector) for each in operands):
            return Kind.COMPUTES, self._operands.split_or_join(instruction), -1
        if is_operation(opcode):
            return Kind.COMPUTES, self._computation(instruction), -1
        raise UnknownInstructionError(f"{opcode}: unknown instruction")

    def _target(self, instruction: Instruction) -> int:
        (label,) = instruction.operands
        if not isinstance(label, Name) or label.name not in self.kernel.labels:
            raise UnknownInstructionError(f"no such label: {label}")
        return self.kernel.labels[label.name]

    def _computation(self, instruction: Instruction) -> Callable[[Strand], None]:
        made = operation(instruction.opcode)
        result, *sources = instruction.operands
        if len(sources) != len(made.sources):
            raise UnknownInstructionError(
                f"takes {len(made.sources)} operands and a result, got {len(sources)}"
            )
        wide = instruction.opcode.startswith("cvt.")
        readers = [
            self._operands.reader(each, scalar, wide)
            for each, scalar in zip(sources, made.sources, strict=True)
        ]
        write = self._operands.writer(result, made.result, wide)
        compute = made.compute

        def run(strand: Strand) -> None:
            write(strand, compute(*[read(strand) for read in readers]))

        return run


def _nothing(strand: Strand) -> None:
    """What a step does that only says who goes where."""
