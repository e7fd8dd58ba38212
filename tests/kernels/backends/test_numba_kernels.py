"""What Numba compiles: its instructions, and what other compiled code calls, with race counters."""

from __future__ import annotations

import json
import platform
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from counting import hold
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.operands import Operands
from hogstream.kernels.race_counters import RaceCounters
from process_testing import run_python
from update_testing import (
    ADDS_2_TO_A_COUNT,
    ALIASED,
    DTYPES,
    aliased,
    assert_same_bits,
    extreme,
    formula,
    fresh_state,
    normal,
)

numba_kernels = pytest.importorskip("hogstream.kernels.backends.numba_kernels")

SCRIPT = Path(__file__).parents[2] / "support" / "update_loops.py"

# Instructions of Haswell (256-bit vectors) for one cache line of ms. In float32 these are two
# vectors' eleven operations (a product each for sign, shrink, alpha, beta, grad, lr; two sums and
# a difference; root; division), which read their operands from memory as they go; 4 stores; 3
# requests for lines ahead; 4 counters, and 2 to go on. 16-bit formats convert, 4 in and 2 out, or
# by hand for bfloat16. float64 has half the elements in a line. The optimizer's loop has more to
# keep and takes 2 moves. A mean of gradients is 6 operations a vector, 2 stores, a request and a
# counter more; a momentum buffer 2 operations, and as many others; both together take 2 moves.
# Counted with LLVM 22; others, which may take more moves, are held less closely.
INSTRUCTIONS = {
    "optimizer, float32": 37,
    "lane, float32": 35,
    "lane, float32, coupled, eps outside": 41,
    "lane, float16": 39,
    "lane, bfloat16": 61,
    "lane, float64": 35,
    "lane, float32, centered": 51,
    "lane, float32, momentum": 43,
    "lane, float32, lr in momentum": 43,
    "lane, float32, centered, momentum": 61,
}
LLVM, SLACK = 22, 6


@pytest.fixture(scope="module")
def loops(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """The inner loops, as compiled for one processor whichever this is."""
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


def update_of(dtype: str, hyperparameters: Hyperparameters) -> Any:
    return numba_kernels.update_function(dtype, hyperparameters.switches)


def addresses_of(operands: Operands) -> list[int]:
    return [0 if each is None else each.data_ptr() for each in operands[:5]]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="plain"),
        pytest.param({"eps_inside_sqrt": False, "weight_decay": 0.1}, id="coupled"),
        pytest.param({"centered": True, "lr_in_momentum": True, "momentum": 0.9}, id="full"),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [None, 1, 48, 1 << 13], ids=str)
def test_compiled_code_updates_and_counts(block, dtype, options):
    size = (1 << 14) + 37
    hyperparameters = Hyperparameters(**options)
    factors = np.array(hyperparameters.factors)
    update = update_of(str(dtype).removeprefix("torch."), hyperparameters)

    state = fresh_state(normal(size, dtype, seed=0), **options)
    expected = state.map(torch.clone)
    counters = RaceCounters.zeros(size, block or size)
    counts = counters.counts.data_ptr() if block else 0
    for step in range(2):
        grad = extreme(size, dtype, seed=1 + step)
        addresses = addresses_of(Operands(state.param, grad, *state[1:]))
        where = counts, counters.blocks, counters.block, addresses[0]
        update.ctypes(*addresses, size, factors.ctypes.data, *where)
        expected = formula(expected, grad, **options)
    assert_same_bits(state, expected)
    assert counters.counts.tolist() == [[2 if block else 0] * counters.blocks] * 2 + [
        [0] * counters.blocks
    ]


@pytest.mark.parametrize(("row", "counts"), ALIASED)
def test_reads_its_counts_before_the_block_and_writes_them_after(row, counts):
    counters = RaceCounters.zeros(1, 1)
    operands = Operands(*aliased(counters, row))
    addresses = addresses_of(operands)
    update = update_of("float64", ADDS_2_TO_A_COUNT)
    factors = np.array(ADDS_2_TO_A_COUNT.factors)
    where = counters.counts.data_ptr(), 1, 1, addresses[0]
    update.ctypes(*addresses, 1, factors.ctypes.data, *where)
    assert counters.counts.flatten().tolist() == counts


def test_threads_that_race_are_all_counted():
    # Each update that survives in an element adds exactly 1 to it.
    hyperparameters = Hyperparameters(lr=1.0, alpha=0.0, eps=0.0)
    update, factors = update_of("float64", hyperparameters), np.array(hyperparameters.factors)
    param, grad, ms = (torch.full((4000,), value).double() for value in (0.0, -1.0, 0.0))
    counters = RaceCounters.zeros(4000, 100)
    where = counters.counts.data_ptr(), counters.blocks, counters.block, param.data_ptr()

    def race() -> None:
        for _ in range(2000):
            addresses = addresses_of(Operands(param, grad, ms))
            update.ctypes(*addresses, 4000, factors.ctypes.data, *where)

    threads = [threading.Thread(target=race) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    landed, survived, overwritten = counters.counts
    assert torch.all(landed == 8000)
    assert torch.all((survived >= 1) & (survived <= landed))
    assert torch.all(landed - survived <= overwritten)
    untouched = (overwritten == 0).repeat_interleave(100)
    assert torch.all(param[untouched] == 8000)
