"""Prints the inner loops of the compiled updates as JSON: NUMBA_CPU_NAME=... python update_loops.py

They are compiled for the processor named, an x86-64, and not run.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numba
import numpy as np

from hogstream.kernels.backends.numba_kernels import _kernel, update_function
from hogstream.kernels.hyperparameters import Hyperparameters


def loops() -> dict[str, list[str]]:
    """The instructions of one turn, in which a cache line of ``ms`` is updated."""
    of_lanes = {
        "lane, float32": update_function("float32", True, False),
        "lane, float32, coupled, eps outside": update_function("float32", False, True),
        "lane, float16": update_function("float16", True, False),
        "lane, bfloat16": update_function("bfloat16", True, False),
        "lane, float64": update_function("float64", True, False),
    }
    assemblies = {name: each._library.get_asm_str() for name, each in of_lanes.items()}
    assemblies["optimizer, float32"] = _assembly_of_optimizer()
    return {name: _inner_loop(assembly) for name, assembly in assemblies.items()}


def _assembly_of_optimizer() -> str:
    kernel: Any = _kernel("float32", True, False)
    columns, counters = np.zeros((4, 1), np.int64), np.zeros(16, np.int64)
    arguments = columns, counters, 1, 1, Hyperparameters().in_float32
    kernel.compile(tuple(map(numba.typeof, arguments)))
    return str(kernel.inspect_asm(kernel.signatures[0]))


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
