"""Compiles Triton's kernels ahead of time: for a device that is here, or for one that is not.

This module needs Triton.
"""

from __future__ import annotations

import threading
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hogstream.kernels.backends.triton_cache import ensure_folder

#: Held while anything compiles: Triton's compiler is not safe from several threads.
compiling = threading.Lock()


def compile_options(constants: dict[str, Any]) -> dict[str, Any]:
    """How a kernel is compiled: for how many warps, and no operation is fused with another.

    An update with state besides ``ms`` has twice as many threads, of half as many elements each:
    else it would take more than 64 registers a thread. Blocks of float64, and tiles of rows, are
    small enough. Of a tile, no thread has less than an element: else one reads what another writes.

    Args:
        constants: The values of its constexprs by name.
    """
    more_state = constants.get("CENTERED", False) or constants.get("MOMENTUM", False)
    warps = 8 if more_state and constants.get("STORAGE") != tl.float64 else 4
    if "ROWS" in constants:
        warps = min(constants["ROWS"] * constants["COLUMNS"] // 32, 4)
    return {"num_warps": warps, "enable_fp_fusion": False}


def compile_for(kernel: Any, constants: dict[str, Any], target: GPUTarget) -> Any:
    """A compiled kernel, as Triton has it, that is loaded on no device.

    Args:
        kernel: One of ours.
        constants: The values of its constexprs by name, and maybe more.
        target: For what.
    """
    values = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {name: "constexpr" if name in values else "i64" for name in kernel.arg_names}
    with compiling:
        ensure_folder()
        source = ASTSource(kernel, signature, values)
        return triton.compile(source, target, compile_options(values))


def cuda_target(capability: int) -> GPUTarget:
    """An NVIDIA GPU as a target.

    Args:
        capability: Its compute capability, such as 90 for 9.0.
    """
    return GPUTarget("cuda", capability, 32)
