"""Prints the inner loops of the compiled updates as JSON: NUMBA_CPU_NAME=... python update_loops.py

They are compiled for the processor named, an x86-64, and not run.
"""

from __future__ import annotations

import json
import re

from hogstream.kernels.backends.numba_kernels import _kernel, update_function


def loops() -> dict[str, list[str]]:
    """The instructions of one turn, in which a cache line of ``ms`` is updated."""
    compiled = {
        "lane, float32": update_function("float32", True, False),
        "lane, float32, coupled, eps outside": update_function("float32", False, True),
        "lane, float16": update_function("float16", True, False),
        "lane, bfloat16": update_function("bfloat16", True, False),
        "lane, float64": update_function("float64", True, False),
        "optimizer, float32": _kernel("float32", True, False).compiled,
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
