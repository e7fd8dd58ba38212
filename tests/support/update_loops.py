"""Prints the inner loops of the compiled updates as JSON: NUMBA_CPU_NAME=... python update_loops.py

They are compiled for the processor named, an x86-64, and not run.
"""

from __future__ import annotations

import json
import re

import torch

from hogstream.kernels.backends.numba_kernels import _kernel, update_function
from hogstream.kernels.hyperparameters import Switches

DTYPES = ("float16", "bfloat16", "float32", "float64")
SWITCHES = {
    "coupled, eps outside": Switches(eps_inside_sqrt=False, coupled=True),
    "centered": Switches(centered=True),
    "momentum": Switches(momentum=True),
    "lr in momentum": Switches(momentum=True, lr_in_momentum=True),
    "centered, momentum": Switches(centered=True, momentum=True),
}


def loops() -> dict[str, list[str]]:
    """The instructions of one turn, in which a cache line of ``ms`` is updated."""
    plain = Switches()
    compiled = {
        "optimizer, float32": _kernel(torch.float32, torch.float32, plain).compiled,
        **{f"lane, {dtype}": update_function(dtype, plain) for dtype in DTYPES},
        **{
            f"lane, float32, {words}": update_function("float32", switches)
            for words, switches in SWITCHES.items()
        },
    }
    return {name: _inner_loop(each._library.get_asm_str()) for name, each in compiled.items()}


def _inner_loop(assembly: str) -> list[str]:
    """The longest block with a root in it that ends in a jump to its own start."""
    blocks: dict[str, list[str]] = {}
    block: list[str] = []
    for line in assembly.splitlines():
        code = " ".join(line.partition("#")[0].split())
        if code.endswith(":"):
            block = blocks[code[:-1]] = []
        elif code and not code.startswith("."):
            block.append(code)
    inner = [
        block
        for label, block in blocks.items()
        if re.search("sqrt", " ".join(block))
        and re.fullmatch(rf"j\w+ {re.escape(label)}", block[-1])
    ]
    return max(inner, key=len)


if __name__ == "__main__":
    print(json.dumps(loops()))
