"""The compiled kernels: what they do is what was written, on every target, and gives its bits."""

from __future__ import annotations

import inspect
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import astuple

import pytest
import torch

from hogstream.kernels import rmsprop_
from hogstream.profiling.assembly.inspection import (
    TARGETS,
    Code,
    Variant,
    inspect_kernel,
    variants_named,
)
from process_testing import run_python
from update_testing import DTYPES, Backend, State, assert_same_bits, extreme, fresh_state, normal
from update_testing import VARIANTS as OPTIONS

pytestmark = pytest.mark.slow

CodeOf = Callable[[str, Variant], Code]

NVIDIA = [target for target in TARGETS if target.startswith("sm_")]

# Words of the kernels that are looked at here: on each target others, with all dtypes,
# centered or not and with either momentum or none. ``hogstream inspect`` has all.
OTHERS = ("watched_rmsprop centered momentum", "finite", "multi_tensor_finite")
LOOKED_AT = {
    "sm_80": ("rmsprop outside uncoupled host-lr", *OTHERS),
    "sm_90": ("multi_tensor inside coupled device-lr", "watched_rmsprop", *OTHERS),
    "sm_100": ("rmsprop outside coupled device-lr", "watched_multi_tensor", *OTHERS),
    "gfx942": ("multi_tensor inside uncoupled host-lr", *OTHERS),
}
KERNELS = list(
    dict.fromkeys(
        (target, variant)
        for target, several in LOOKED_AT.items()
        for words in several
        for variant in variants_named(words)
    )
)


def for_each(*, updates: bool = False, nvidia: bool | None = None) -> pytest.MarkDecorator:
    """All kernels that are looked at, or some of them, each with its target."""
    chosen = [
        pytest.param(target, variant, id=f"{target} {variant.name}")
        for target, variant in KERNELS
        if (variant.updates or not updates) and nvidia in (None, target in NVIDIA)
    ]
    return pytest.mark.parametrize(("target", "variant"), chosen)


# As ``compile_kernels`` does for a target, but all in one process and its children.
COMPILE = """
import json, multiprocessing, sys
from hogstream.kernels.backends.triton_cache import ensure_folder
from hogstream.profiling.assembly.compile import compile_variant
from hogstream.profiling.assembly.inspection import Variant

def compile_one(kernel):
    target, variant = kernel
    stages = ["ptx", "resources"] if target.startswith("sm_") else ["llir", "amdgcn"]
    return compile_variant(target, stages, Variant(*variant))

ensure_folder()
with multiprocessing.get_context("fork").Pool(2) as pool:
    for code in pool.imap(compile_one, json.loads(sys.argv[1])):
        print(json.dumps(code))
"""


@pytest.fixture(scope="module")
def code_of(tmp_path_factory: pytest.TempPathFactory) -> CodeOf:
    """The code of a kernel that is looked at; all are compiled when the first is asked for."""
    pytest.importorskip("triton")
    kernels = json.dumps([(target, astuple(variant)) for target, variant in KERNELS])
    lines = run_python(
        *("-c", COMPILE, kernels), TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton"))
    ).splitlines()
    codes: dict[tuple[str, Variant], Code] = dict(zip(KERNELS, map(json.loads, lines), strict=True))
    return lambda target, variant: codes[target, variant]


@for_each(updates=True, nvidia=True)
def test_ptx_rounds_every_operation_by_itself(code_of, target, variant):
    code = code_of(target, variant)
    kind = "f64" if variant.dtype == "float64" else "f32"
    assert f"sqrt.rn.{kind}" in code["ptx"]
    assert f"div.rn.{kind}" in code["ptx"]
    findings = inspect_kernel(target, code)
    assert (findings.fused, findings.approximate) == (0, 0)


@for_each(nvidia=True)
def test_kernels_take_integers_of_64_bits_then_what_triton_adds(code_of, target, variant):
    """Lanes and graphs launch them by the driver, with an array of such arguments."""
    from hogstream.kernels.backends import triton_kernels
    from hogstream.scheduler.lanes.cuda_graphs import SCRATCH

    words = variant.kernel.removeprefix("watched_").replace("multi_tensor", "multi_tensor_rmsprop")
    name = words.replace("rmsprop_finite", "finite") + "_kernel"
    takes = inspect.signature(getattr(triton_kernels, name).fn).parameters.values()
    ours = sum("constexpr" not in str(each.annotation) for each in takes)
    head = code_of(target, variant)["ptx"].split(".entry")[1].split(")")[0]
    parameters = re.findall(r"\.param \.(\w+)", head)
    assert parameters == ["u64"] * (ours + SCRATCH)


@for_each(nvidia=True)
def test_full_blocks_are_read_and_written_128_bits_at_a_time(code_of, target, variant):
    """Or 64, where a thread has 4 elements and not 8, as registers are for more state, of 16."""
    from hogstream.kernels.backends.triton_launch import BLOCK

    dtype, ptx = getattr(torch, variant.dtype), code_of(target, variant)["ptx"]
    (threads,) = map(int, re.findall(r"\.reqntid (\d+)", ptx))
    more_state = bool(variant.centered) + bool(variant.momentum)
    assert threads == (256 if more_state and variant.dtype != "float64" else 128)

    def accesses(size: int) -> Counter[int]:
        """Of a thread to elements of so many bytes, by width."""
        octets = BLOCK[dtype] // threads * size
        return Counter({8 * min(octets, 16): -(-octets // 16)})

    stored, state = accesses(dtype.itemsize), accesses(max(dtype.itemsize, 4))
    written = sum([state] * (1 + more_state), stored) if variant.updates else Counter()
    findings = inspect_kernel(target, code_of(target, variant))
    assert findings.loads == written + stored
    assert findings.stores == written
    assert findings.masked_loads
    assert findings.masked_stores


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", NVIDIA)
def test_a_block_is_read_and_written_between_reading_and_writing_its_witness(
    code_of, target, dtype
):
    name = str(dtype).removeprefix("torch.")
    ptx = code_of(target, Variant("watched_rmsprop", name, True, True, True, True, False, True))[
        "ptx"
    ]
    accesses = re.findall(r"\b(?:ld|st|atom|red)\.global\S*|\bbar\.sync\b", ptx)
    of_block = [at for at, access in enumerate(accesses) if ".v" in access]
    read = max(at for at, access in enumerate(accesses) if ".gpu.acquire." in access)
    write = next(at for at, access in enumerate(accesses) if ".release.exch." in access)
    landed = next(at for at, access in enumerate(accesses) if ".acq_rel.add." in access)
    assert read < of_block[0] < of_block[-1] < write < landed
    # The one thread that holds the witness waits for all others, and they for it.
    assert "bar.sync" in accesses[read : of_block[0]]
    assert "bar.sync" in accesses[of_block[-1] : write]


@for_each()
def test_kernels_fit_the_registers(code_of, target, variant):
    findings = inspect_kernel(target, code_of(target, variant))
    assert findings.spills == 0
    assert findings.registers <= 64  # 1024 threads at once on a multiprocessor


@for_each(updates=True, nvidia=False)
def test_hip_rounds_every_operation_by_itself(code_of, target, variant):
    # The instructions of a correctly rounded root and division are fused ones, so LLVM's language
    # is read: no operation may be relaxed, and these two are not the device's approximations.
    code = code_of(target, variant)
    operations = re.findall(r"= (f(?:add|sub|mul|div)) (\S+)", code["llir"])
    assert {name for name, _ in operations} == {"fadd", "fsub", "fmul", "fdiv"}
    assert all(re.fullmatch(r"float|double|<\d+", kind) for _, kind in operations)  # or vectors
    # Triton 3.6 refines the root by itself.
    assert "@llvm.sqrt." in code["llir"] or "@llvm.fma." in code["llir"]
    findings = inspect_kernel(target, code)
    assert (findings.fused, findings.approximate) == (0, 0)
    assert ".amdhsa_float_denorm_mode_32 3" in code["amdgcn"]  # kept, in operands and in results


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS)
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
