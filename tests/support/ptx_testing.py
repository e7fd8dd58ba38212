"""Kernels written by hand, for tests of the machine that executes PTX."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ptx_machine import GlobalMemory, Launch, Program, execute, parse
from ptx_machine.scalars import SCALARS, Array

_TEXT = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 dynamic[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
    .reg .pred %p<8>;
    .reg .b16 %h<16>;
    .reg .b32 %r<32>;
    .reg .b64 %d<32>;
{loads}
    mov.u32 %r31, %tid.x;
    mov.u32 %r30, %ctaid.x;
{body}
    ret;
}}
"""


def program(body: str, parameters: int = 1, threads: int = 32) -> Program:
    """A kernel that has its parameters in %d31, %d30 and so on, its thread in %r31, block in %r30.

    Args:
        body: Instructions.
        parameters: How many there are, of 64 bits each.
        threads: How many a block has.
    """
    text = _TEXT.format(
        parameters=", ".join(f".param .u64 p{index}" for index in range(parameters)),
        loads="\n".join(
            f"    ld.param.b64 %d{31 - index}, [p{index}];" for index in range(parameters)
        ),
        threads=threads,
        body=body,
    )
    (kernel,) = parse(text).kernels.values()
    return Program(kernel)


def launch(made: Program, arrays: Sequence[Array], blocks: int = 1, number: int = 0) -> Launch:
    """A launch with the addresses of arrays, and 256 bytes of shared memory."""
    addresses = [array.ctypes.data for array in arrays]
    return Launch(made, (blocks, 1, 1), addresses, shared=256, number=number)


def memory_of(arrays: Sequence[Array]) -> GlobalMemory:
    """Memory of arrays, which are called a, b and so on."""
    memory = GlobalMemory()
    for name, array in zip("abcdefgh", arrays, strict=False):
        memory.add(name, array)
    return memory


def run(body: str, *arrays: Array, threads: int = 32, blocks: int = 1) -> None:
    """Runs instructions once, with the addresses of arrays in %d31, %d30 and so on."""
    made = program(body, len(arrays), threads)
    execute(launch(made, arrays, blocks), memory_of(arrays))


_REGISTER = {1: "%p", 16: "%h", 32: "%r", 64: "%d"}


def compute(opcode: str, types: Sequence[str], operands: Sequence[Any]) -> Array:
    """What an instruction makes of operands, one for each thread.

    Args:
        opcode: It.
        types: The result's, then each operand's.
        operands: Arrays of these types, or lists, all of one length.
    """
    result, *sources = (SCALARS[each] for each in types)
    arrays = [
        np.ascontiguousarray(values, np.uint8 if scalar.bits == 1 else scalar.dtype).view()
        for values, scalar in zip(operands, sources, strict=True)
    ]
    count = len(operands[0])
    out = np.zeros(count, np.uint32 if result.bits == 1 else result.raw)
    lines, names = [], []
    for index, (array, scalar) in enumerate(zip([*arrays, out], [*sources, result], strict=True)):
        width = array.nbytes // count
        lines.append(f"mad.wide.u32 %d{20 + index}, %r31, {width}, %d{31 - index};")
        names.append(f"{_REGISTER[scalar.bits]}{index + 1}")
        if array is out:
            break
        if scalar.bits == 1:
            lines.append(f"ld.global.b8 %h15, [%d{20 + index}];")
            lines.append(f"setp.ne.b16 {names[-1]}, %h15, 0;")
        else:
            lines.append(f"ld.global.b{scalar.bits} {names[-1]}, [%d{20 + index}];")
    *given, made = names
    lines.append(f"{opcode} {', '.join([made, *given])};")
    if result.bits == 1:
        lines.append(f"selp.b32 %r20, 1, 0, {made};")
        made = "%r20"
    lines.append(f"st.global.b{out.itemsize * 8} [%d{20 + len(arrays)}], {made};")
    run("\n".join(lines), *arrays, out, threads=count)
    return out.astype(bool) if result.bits == 1 else out.view(result.dtype)
