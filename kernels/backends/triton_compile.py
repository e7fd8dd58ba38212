"""Compiles Triton's kernels ahead of time: for a device that is here, or for one that is not.

This module needs Triton.
"""

from __future__ import annotations

import threading
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hogstream.kernels.backends.triton_cache import ensure_folder

#: How kernels are compiled: no operation is fused with another.
COMPILE_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

#: Held while anything compiles: Triton's compiler is not safe from several threads.
compiling = threading.Lock()


def compile_for(kernel: Any, constants: dict[str, Any], target: GPUTarget) -> Any:
    """A compiled kernel, as Triton has it, that is loaded on no device.

    Args:
        kernel: One of ``triton_kernels``.
        constants: The values of its constexprs by name, and maybe more.
        target: For what.
    """
    values = {name: constants[name] for name in kernel.arg_names if name in constants}
    signature = {name: "constexpr" if name in values else "i64" for name in kernel.arg_names}
    with compiling:
        ensure_folder()
        return triton.compile(ASTSource(kernel, signature, values), target, COMPILE_OPTIONS)


def cuda_target(capability: int) -> GPUTarget:
    """An NVIDIA GPU as a target.

    Args:
        capability: Its compute capability, such as 90 for 9.0.
    """
    return GPUTarget("cuda", capability, 32)
