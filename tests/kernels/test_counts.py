"""What the kernels cost, in numbers that no clock blurs: instructions, and launches."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest
import torch

from counting import counted_calls, hold
from hogstream.kernels import multi_tensor_rmsprop_, rmsprop_
from process_testing import run_python
from update_testing import BACKENDS, Backend

SCRIPT = Path(__file__).parents[1] / "support" / "update_loops.py"

# Instructions of Haswell (256-bit vectors) for one cache line of ms. In float32 these are two
# vectors' eleven operations (a product each for sign, shrink, alpha, beta, grad, lr; two sums and
# a difference; root; division), which read their operands from memory as they go; 4 stores; 3
# requests for lines ahead; 4 counters, and 2 to go on. 16-bit formats convert, 4 in and 2 out, or
# by hand for bfloat16. float64 has half the elements in a line. Counted with LLVM 22; others,
# which may take more moves, are held less closely.
INSTRUCTIONS = {
    "optimizer, float32": 35,
    "lane, float32": 35,
    "lane, float32, coupled, eps outside": 41,
    "lane, float16": 39,
    "lane, bfloat16": 61,
    "lane, float64": 35,
}
LLVM, SLACK = 22, 6


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The inner loops, as compiled for one processor whichever this is."""
    pytest.importorskip("numba")
    if platform.machine() != "x86_64":
        pytest.skip(f"LLVM is asked for x86-64 code on that only, not on {platform.machine()}")
    cache = str(tmp_path_factory.mktemp("numba"))
    printed = run_python(
        str(SCRIPT),
        NUMBA_CPU_NAME="haswell", NUMBA_CPU_FEATURES="", NUMBA_CACHE_DIR=cache,
    )  # fmt: skip
    found: dict[str, list[str]] = json.loads(printed)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("loop", INSTRUCTIONS)
def test_a_cache_line_is_updated_in_few_instructions(
    loops: dict[str, list[str]], loop: str
) -> None:
    from llvmlite.binding import llvm_version_info

    most = INSTRUCTIONS[loop] + (0 if llvm_version_info[0] == LLVM else SLACK)
    listing = "\n".join(loops[loop])
    hold(f"{listing}\ninstructions for a cache line, {loop}", len(loops[loop]), most)


LAUNCH = {
    "numpy": "numpy_kernels.update_",
    "numba": "numba_kernels.update_",
    "triton": "triton_kernels._launch",
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tensors", [1, 30])
def test_a_list_is_one_launch(backend: Backend, tensors: int) -> None:
    params, grads, mss = (
        [torch.ones(5, device=backend.device) for _ in range(tensors)] for _ in range(3)
    )
    with counted_calls() as counts:
        multi_tensor_rmsprop_(params, grads, mss, backend=backend.name)
    assert counts[LAUNCH[backend.name]] == 1
    if backend.name == "triton" and backend.device == "cpu":
        # The interpreter calls the kernel for each program: one for each of these small tensors.
        kernels = ("triton_kernels.rmsprop_kernel", "triton_kernels.multi_tensor_rmsprop_kernel")
        assert sum(counts[each] for each in kernels) == tensors


# Python calls of ours for each tensor of a list: its operands checked (3) and made tensors (3), two
# compared (2), each found dense (6) and laid flat (3), and each held against all others (3).
CALLS_FOR_EACH_TENSOR = 20
# And for one by itself: the same, what it is made with, its backend, its table, and the update.
CALLS = 45


def test_checks_take_few_calls() -> None:
    pytest.importorskip("numba")
    param, grad, ms = (torch.ones(5) for _ in range(3))
    rmsprop_(param, grad, ms, backend="numba")  # compiles
    with counted_calls() as counts:
        rmsprop_(param, grad, ms, backend="numba")
    hold(f"{counts}\ncalls for one tensor", counts.total(), CALLS)
    totals = []
    for tensors in (10, 50):
        lists = [[torch.ones(5) for _ in range(tensors)] for _ in range(3)]
        with counted_calls() as counts:
            multi_tensor_rmsprop_(*lists, backend="numba")
        totals.append(counts.total())
    few, many = totals
    hold("calls for each tensor of a list", (many - few) / 40, CALLS_FOR_EACH_TENSOR)
