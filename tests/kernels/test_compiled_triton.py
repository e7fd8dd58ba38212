"""The compiled kernel: its arithmetic is what was written, on every target, and gives its bits."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch

from hogstream.kernels import rmsprop_
from process_testing import run_python
from update_testing import (
    DTYPES,
    VARIANTS,
    Backend,
    State,
    assert_same_bits,
    extreme,
    fresh_state,
    normal,
)

SCRIPT = Path(__file__).parents[1] / "support" / "kernel_assembly.py"
FLOATS = ["float16", "bfloat16", "float32", "float64"]
PLACES = ["inside", "outside"]
CUDA_KERNELS = [" ".join(k) for k in product(["sm80", "sm90", "sm100"], FLOATS, PLACES)]
HIP_KERNELS = [" ".join(k) for k in product(["gfx942"], FLOATS, PLACES)]


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    pytest.importorskip("triton")
    return json.loads(
        run_python(str(SCRIPT), TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")))
    )


@pytest.mark.parametrize("kernel", CUDA_KERNELS)
def test_ptx_rounds_every_operation_by_itself(assembly, kernel):
    ptx = assembly[kernel]["ptx"]
    kind = "f64" if "float64" in kernel else "f32"
    assert f"sqrt.rn.{kind}" in ptx
    assert f"div.rn.{kind}" in ptx
    # No fused multiply-add, no approximate root or division, no denormal flushed to zero.
    assert re.findall(r"\b(?:fma|mad)\.\S*f(?:32|64)\S*|\S*\.(?:approx|full|ftz)\b\S*", ptx) == []


@pytest.mark.parametrize("kernel", HIP_KERNELS)
def test_hip_rounds_every_operation_by_itself(assembly, kernel):
    # The instructions of a correctly rounded root and division are fused ones, so LLVM's language
    # is read: no operation may be relaxed, and these two are not the device's approximations.
    llir, amdgcn = assembly[kernel]["llir"], assembly[kernel]["amdgcn"]
    operations = re.findall(r"= (f(?:add|sub|mul|div)) (\S+)", llir)
    assert {name for name, _ in operations} == {"fadd", "fsub", "fmul", "fdiv"}
    assert {kind for _, kind in operations} <= {"float", "double", "<2"}
    assert "@llvm.sqrt." in llir or "@llvm.fma." in llir  # Triton 3.6 refines the root by itself
    assert re.findall(r"fpmath|llvm\.fmuladd|llvm\.amdgcn\.(?:sqrt|rcp|fdiv)", llir) == []
    assert ".amdhsa_float_denorm_mode_32 3" in amdgcn  # kept, in operands and in results

    # Fusing happens below that language: as many sums must be left as it has.
    sums = re.findall(r"\tv_(pk_)?(?:add|sub|subrev)_f(?:32|64)", amdgcn)
    wanted = [kind for name, kind in operations if name in ("fadd", "fsub")]
    assert sum(2 if packed else 1 for packed in sums) >= sum(
        2 if kind == "<2" else 1 for kind in wanted
    )


@pytest.mark.gpu
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_device_gives_the_bits_of_numpy(dtype, options):
    size = 10**6 + 7
    on_device = on_cpu = fresh_state(normal(size, dtype, seed=0))
    for step in range(3):
        grad = extreme(size, dtype, seed=1 + step)
        on_device = Backend("triton", "cuda").update(on_device, grad, **options)
        on_cpu = Backend("numpy", "cpu").update(on_cpu, grad, **options)
    assert_same_bits(on_device, on_cpu)


@pytest.mark.gpu
def test_launches_on_the_current_stream():
    stream = torch.cuda.Stream()
    param, grad, ms = (torch.zeros(1 << 20, device="cuda") for _ in range(3))
    rmsprop_(param, grad, ms)  # compiles, and changes nothing
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        # Had the update not waited for these, it would have read a gradient of zero.
        torch.cuda._sleep(10**8)
        grad.fill_(1.0)
        rmsprop_(param, grad, ms)
    stream.synchronize()
    assert torch.all(param < 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_cpu_backends_refuse_a_device(name):
    operands = State(*(torch.ones(3, device="cuda") for _ in range(2)))
    with pytest.raises(ValueError, match=f"backend '{name}' takes cpu tensors, got one on cuda"):
        rmsprop_(operands.param, torch.ones(3, device="cuda"), operands.ms, backend=name)
    assert torch.all(operands.param == 1)
