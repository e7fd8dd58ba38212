"""Compiles kernels ahead of time, for devices that need not be here.

``inspection`` runs this module in an interpreter of its own, in which Triton does not
interpret: ``python -m hogstream.profiling.assembly.compile TARGET STAGE,... WORDS``. It prints a
line for each kernel: a JSON object of its code by stage.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
from dataclasses import asdict
from functools import partial

import torch
import triton
from triton.backends.compiler import GPUTarget

from hogstream.kernels.backends.triton_cache import ensure_folder
from hogstream.kernels.backends.triton_compile import compile_for, cuda_target
from hogstream.kernels.backends.triton_kernels import (
    finite_kernel,
    multi_tensor_finite_kernel,
    multi_tensor_rmsprop_kernel,
    rmsprop_kernel,
)
from hogstream.kernels.backends.triton_launch import BLOCK, EXPONENTS, STORAGE
from hogstream.profiling.assembly.inspection import Variant, variants_named
from hogstream.profiling.environment import usable_cores

# Each kernel, and whether it counts races and heeds a verdict.
_KERNELS = {
    "rmsprop": (rmsprop_kernel, False),
    "multi_tensor": (multi_tensor_rmsprop_kernel, False),
    "watched_rmsprop": (rmsprop_kernel, True),
    "watched_multi_tensor": (multi_tensor_rmsprop_kernel, True),
    "finite": (finite_kernel, False),
    "multi_tensor_finite": (multi_tensor_finite_kernel, False),
}
_CUOBJDUMP_OPTIONS = {"sass": "-sass", "resources": "-res-usage"}
_MAX_PROCESSES = 8


def compile_variant(target: str, stages: list[str], variant: Variant) -> dict[str, str]:
    """The code of one kernel by stage, compiled as it is for a launch.

    Args:
        target: Such as ``sm_90`` or ``gfx942``.
        stages: ``llir``, ``ptx`` or ``amdgcn``, and of what ``cuobjdump`` says of NVIDIA's machine
            code, ``sass`` or ``resources``.
        variant: Which kernel.
    """
    dtype = getattr(torch, variant.dtype)
    kernel, watched = _KERNELS[variant.kernel]
    bits, exponent = EXPONENTS[dtype]
    constants = {
        **{name.upper(): value for name, value in asdict(variant).items()},
        "STORAGE": STORAGE[dtype],
        "GRAD_STORAGE": STORAGE[dtype],
        "STOCHASTIC": False,
        "COMPENSATED": False,
        "SCALED": False,
        "CHECKED": watched,
        "COUNTED": watched,
        "BITS": bits,
        "EXPONENT": exponent,
        "BLOCK": BLOCK[dtype],
    }
    code = compile_for(kernel, constants, _gpu_target(target)).asm
    return {
        stage: _cuobjdump(stage, code["cubin"]) if stage in _CUOBJDUMP_OPTIONS else code[stage]
        for stage in stages
    }


def _gpu_target(target: str) -> GPUTarget:
    if target.startswith("sm_"):
        return cuda_target(int(target.removeprefix("sm_")))
    return GPUTarget("hip", target, 64)


def _cuobjdump(stage: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, _CUOBJDUMP_OPTIONS[stage], file.name]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout


def main() -> None:
    """Compiles what the command line names, in as many processes as there are cores."""
    target, stages, words = sys.argv[1:]
    ensure_folder()
    compile_one = partial(compile_variant, target, stages.split(","))
    with multiprocessing.get_context("fork").Pool(min(usable_cores(), _MAX_PROCESSES)) as pool:
        for code in pool.imap(compile_one, variants_named(words)):
            print(json.dumps(code), flush=True)


if __name__ == "__main__":
    main()
