"""Compiles the Triton kernel ahead of time, for devices that need not be here.

Run in an interpreter without TRITON_INTERPRET. Prints a JSON object of JSON objects: assembly by
stage, by kernel (target, storage type and place of epsilon).
"""

from __future__ import annotations

import json

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hogstream.kernels.triton_backend import BLOCK, rmsprop_kernel

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# Storage and compute type, as Triton spells them; bfloat16 is stored as its bits.
TYPES = {
    "float16": ("fp16", "fp32"),
    "bfloat16": ("i16", "fp32"),
    "float32": ("fp32", "fp32"),
    "float64": ("fp64", "fp64"),
}
STAGES = ("ptx", "llir", "amdgcn")


def compile_kernel(target: GPUTarget, types: tuple[str, str], eps_inside: bool) -> dict[str, str]:
    """Assembly of one kernel by stage, with the options that the backend launches it with."""
    storage, compute = types
    constants = {"EPS_INSIDE_SQRT": eps_inside, "COUPLED": True, "BLOCK": BLOCK}
    pointers = {"param_ptr": f"*{storage}", "grad_ptr": f"*{storage}", "ms_ptr": f"*{compute}"}
    signature = dict.fromkeys(rmsprop_kernel.arg_names, "i64")  # the bits of a factor
    signature |= pointers | {"elements": "i32"} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(rmsprop_kernel, signature, constants)
    compiled = triton.compile(source, target, {"enable_fp_fusion": False})
    return {stage: compiled.asm[stage] for stage in STAGES if stage in compiled.asm}


if __name__ == "__main__":
    kernels = {
        f"{target} {dtype} {'inside' if eps_inside else 'outside'}": compile_kernel(
            TARGETS[target], TYPES[dtype], eps_inside
        )
        for target in TARGETS
        for dtype in TYPES
        for eps_inside in (True, False)
    }
    print(json.dumps(kernels))
