"""Somebody else's kernel on the machine: compiled ahead of time, run, and raced."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ptx_machine import GlobalMemory, Launch, Lineage, Program, execute, parse, race


@triton.jit
def increment(x_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, offsets < n)
    tl.store(x_ptr + offsets, x + 1.0, offsets < n)


source = ASTSource(increment, {"x_ptr": "*fp32", "n": "i32", "BLOCK": "constexpr"}, {"BLOCK": 256})
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
(kernel,) = parse(compiled.asm["ptx"]).kernels.values()
program, shared = Program(kernel), compiled.metadata.shared

x = torch.zeros(1000)
memory = GlobalMemory()
memory.add("x", x)  # what is not added no thread may touch
arguments = [x.data_ptr(), 1000, 0, 0]  # the last two are Triton's own, for scratch
execute(Launch(program, (4, 1, 1), arguments, shared), memory)
assert torch.equal(x, torch.ones(1000))

x.zero_()
lineage = Lineage(elements=1000, width=4)
memory.region("x").observers.append(lineage)
race([Launch(program, (4, 1, 1), arguments, shared, number) for number in range(8)], memory, seed=0)
assert torch.equal(x, 8 - torch.from_numpy(lineage.lost()).float())  # the rest was lost
print(f"{lineage.lost().sum()} of 8000 updates were lost")
