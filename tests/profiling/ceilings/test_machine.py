"""What a machine can do: passes over memory, levels, rates, and shares of them."""

from __future__ import annotations

import asyncio
import json
import operator
import re
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from gpu_testing import backend_on_gpu, faults, gpu_of_tests
from hogstream.profiling import environment
from hogstream.profiling.ceilings import host, passes
from hogstream.profiling.ceilings.machine import ceiling_warnings, shares
from hogstream.profiling.ceilings.memory import _copy_passes, _update_shaped_passes, memory_levels
from hogstream.profiling.ceilings.passes import copy_pass, update_shaped_passes
from hogstream.profiling.results.records import Ceiling, Ceilings, Level
from hogstream.profiling.results.schema import Shares
from hogstream.scheduler import RunReport
from hogstream.scheduler.latencies import Latencies
from process_testing import run_python
from triton_testing import DEVICE, on_tritons_device

CPU = torch.device("cpu")


def passes_of(module: str) -> tuple[Any, Any]:
    if module == "numpy":
        return _copy_passes, _update_shaped_passes
    numba_passes = pytest.importorskip("hogstream.profiling.ceilings.numba_passes")
    return numba_passes.copy_passes, numba_passes.update_shaped_passes


# Elements of each array: less than a cache line, whole lines, and lines and a rest.
@pytest.mark.parametrize("size", [1, 15, 16, 64, 1_000, 100_003])
@pytest.mark.parametrize("module", ["numba", "numpy"])
def test_passes_read_and_write_every_element(module, size):
    copy, update_shaped = passes_of(module)
    for ways in [{}] if module == "numpy" else [{"ahead": False}, {"ahead": True}]:
        buffer = np.arange(3 * size, dtype=np.float32)
        param, grad, ms = buffer.reshape(3, -1).astype(np.float64)
        update_shaped(buffer, 2, **ways)
        assert np.array_equal(buffer.reshape(3, -1), [param + 2 * grad, grad, ms + 2 * grad])
    buffer = np.arange(2 * size, dtype=np.float32)
    copy(buffer, 2)
    assert np.array_equal(buffer.reshape(2, -1), [range(size, 2 * size)] * 2)


@pytest.mark.parametrize("backend", ["numba", "numpy"])
def test_every_call_goes_over_each_element_once(backend, monkeypatch):
    if backend == "numba":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(passes, "available_backends", lambda: {"numba": "not now"})
    sgd, *additions = update_shaped_passes(CPU, (1 << 21) + 7)  # several threads, and a rest
    assert len(additions) == (2 if backend == "numba" else 1)
    param, grad, ms = sgd()[:3]
    assert torch.all(ms == 1.5)
    assert torch.all(param == 0.25)
    for times, call in enumerate(additions, start=1):
        assert all(map(operator.is_, call()[:3], (param, grad, ms)))
        assert torch.all(grad == 1)
        assert torch.all(param == 0.25 + times)
        assert torch.all(ms == 1.5 + times)


def test_a_copy_is_made():
    copied: Any = copy_pass(CPU, 5)()
    assert torch.equal(copied, torch.ones(5))


@on_tritons_device
@pytest.mark.parametrize("size", [1, 1_000, 4_096])
def test_kernels_pass_over_every_element(size):
    triton_passes = pytest.importorskip("hogstream.profiling.ceilings.triton_passes")
    param, grad, ms = torch.arange(3.0 * size, device=DEVICE).chunk(3)
    expected = param + grad, grad.clone(), ms + grad
    triton_passes.update_shaped(param, grad, ms)
    assert all(map(torch.equal, (param, grad, ms), expected))
    triton_passes.copy(param, ms, passes=3)
    assert torch.equal(param, ms)


@on_tritons_device
def test_every_pass_of_a_kernel_goes_over_all_blocks():
    triton_passes = pytest.importorskip("hogstream.profiling.ceilings.triton_passes")
    if DEVICE.type == "cuda":
        pytest.skip("programs of a GPU do not wait for each other, and may lose additions")
    param, grad, ms = torch.arange(9_000.0).chunk(3)
    expected = param + 3 * grad, grad.clone(), ms + 3 * grad
    triton_passes.update_shaped(param, grad, ms, passes=3)
    assert all(map(torch.equal, (param, grad, ms), expected))


async def test_launches_are_updates_down_a_lane_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    pytest.importorskip("triton")
    with gpu_of_tests() as gpu:
        monkeypatch.setattr(host, "select_backend", lambda *_: backend_on_gpu())
        assert await host._launch(torch.device("cpu"), 1) > 0
        assert gpu.tests.calls["cuLaunchKernel"] == host._QUEUE
        assert gpu.tests.calls["cuGraphLaunch"] == 0
    assert not faults(gpu)


COMPILE = """
import json, re, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from hogstream.profiling.ceilings import triton_passes

def asm(kernel, target):
    arrays = [name for name in kernel.arg_names if name.endswith("_ptr")]
    signature = {
        **dict.fromkeys(arrays, "*fp32"), "elements": "i32", "passes": "i32", "BLOCK": "constexpr"
    }
    aligned = {(index,): [["tt.divisibility", 16]] for index in range(len(arrays) + 1)}
    source = ASTSource(kernel, signature, {"BLOCK": triton_passes.BLOCK}, aligned)
    code = triton.compile(source, target, triton_passes.COMPILE_OPTIONS).asm
    return code.get("ptx") or code["amdgcn"]

targets = {"sm_90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
kernels = {
    "copy": triton_passes._copy_kernel, "update_shaped": triton_passes._update_shaped_kernel
}
print(json.dumps({
    f"{name} {target}": asm(kernel, targets[target])
    for name, kernel in kernels.items() for target in targets
}))
"""


@pytest.mark.slow
def test_compiled_kernels_go_to_memory_in_every_pass(tmp_path):
    pytest.importorskip("triton")
    code = json.loads(run_python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path)))
    for name, loads, stores in (("copy", 2, 2), ("update_shaped", 6, 4)):
        # All of it is in the loop, 8 elements a thread of each array, and goes past the L1.
        ptx = code[f"{name} sm_90"]
        loop = re.search(r"^(\$L__BB\w+):(.*?)\bbra\S*\s+\1;", ptx, re.DOTALL | re.MULTILINE)
        assert loop
        assert loop[2].count("ld.global.cg.v4") == ptx.count("ld.global") == loads
        assert loop[2].count("st.global.v4") == ptx.count("st.global") == stores
        # A load that LLVM has taken out of the loop would have lost its mark.
        lines = [line for line in code[f"{name} gfx942"].splitlines() if "global_load" in line]
        assert lines
        assert all(line.rstrip().endswith("nt") for line in lines)


def lay_out_caches(folder: Path, rows: list[tuple[str, str, str, str, str]]) -> None:
    for row, (core, level, kind, size, cores) in enumerate(rows):
        index = folder / f"cpu{core}" / "cache" / f"index{row}"
        index.mkdir(parents=True)
        (index / "level").write_text(level + "\n")
        (index / "type").write_text(kind + "\n")
        (index / "shared_cpu_list").write_text(cores + "\n")
        if size:
            (index / "size").write_text(size + "\n")


KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("rows", "levels"),
    [
        pytest.param([], [("memory", 192 * MIB, None)], id="nothing told"),
        pytest.param(
            [
                *((core, "1", "Instruction", "64K", "0-1") for core in "01"),
                *((core, "1", "Data", "32K", core) for core in "01"),
                *((core, "2", "Unified", "512K", core) for core in "01"),
                *((core, "3", "Unified", "65536K", "0-1") for core in "01"),
            ],
            [
                ("L1", 32 * KIB, 32 * KIB),
                ("L2", 512 * KIB, 512 * KIB),
                ("L3", 32 * MIB, 64 * MIB),
                ("memory", 256 * MIB, None),
            ],
            id="own caches and a shared one",
        ),
        pytest.param(
            [
                *((core, "1", "Data", "48K", "0-1") for core in "01"),
                *((core, "2", "Unified", "2048K", "0-1") for core in "01"),
                *((core, "3", "Unified", "3072K", "0-1") for core in "01"),
            ],
            [("L1", 24 * KIB, 48 * KIB), ("L2", MIB, 2 * MIB), ("memory", 192 * MIB, None)],
            id="threads of one core, and an L3 hardly larger than the L2",
        ),
        pytest.param(
            [
                *((core, "1", "Data", "32K", core) for core in "01"),
                *((core, "2", "Unified", "", core) for core in "01"),
            ],
            [("L1", 32 * KIB, 32 * KIB), ("memory", 192 * MIB, None)],
            id="a size left out",
        ),
    ],
)
def test_levels_are_those_that_can_be_told_apart(rows, levels, tmp_path, monkeypatch):
    lay_out_caches(tmp_path, rows)
    monkeypatch.setattr(environment, "_CPU_FOLDER", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1}, raising=False)
    unit = 2 * 6 * 64  # lines for two threads, of two and of three arrays
    assert [
        (level.name, level.bytes, level.threads, level.cache_bytes) for level in memory_levels(CPU)
    ] == [(name, size - size % unit, 2, cache) for name, size, cache in levels]


def rate(median: float, spread: float = 0.0) -> Ceiling:
    return Ceiling(median, (median * (1 - spread), median * (1 + spread)), [median])


def level(name: str, cache_bytes: int | None, bandwidth: Ceiling | None) -> Level:
    return Level(name, 1 << 20, 2, cache_bytes, None, bandwidth)


CEILINGS = Ceilings(
    measured="2026-11-22T19:00:00+00:00",
    levels=[
        level("L1", 32 * KIB, None),
        level("L2", 512 * KIB, rate(200.0)),
        level("memory", None, rate(40.0)),
    ],
    launches_per_second=rate(500_000.0),
    event_loop_turns_per_second=rate(400_000.0),
)


def report_of(**attributes: Any) -> RunReport:
    """A report in which nothing landed, of what is given."""
    return RunReport(
        **{
            "policy": "lock-free",
            "workers": 1,
            "dtype": "float32",
            "backend": "numpy",
            "device": "cpu",
            "seconds": 1.0,
            "latencies": Latencies(),
            "staleness": Counter(),
            "updates_by_worker": [0],
            "dropped": [0],
            "nonfinite": [0],
            "restarts": [0],
            "failures": {},
            **attributes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "depth", "expected"),
    [
        # 8 bytes an element: 32 KiB, 32 KiB and a bit, 512 KiB and a bit.
        ({"elements": 4096}, 1, ("L1", None, 0.2, 0.25)),
        ({"elements": 4097}, 1, ("L2", 4097 * 20 / 200e4, 0.2, 0.25)),
        ({"elements": 65_537}, 1, ("memory", 65_537 * 20 / 40e4, 0.2, 0.25)),
        # 6 bytes an element, and 16.
        ({"elements": 5461, "dtype": "bfloat16"}, 1, ("L1", None, 0.2, 0.25)),
        ({"elements": 5462, "dtype": "bfloat16"}, 1, ("L2", 5462 * 14 / 200e4, 0.2, 0.25)),
        ({"elements": 4096, "dtype": "float64"}, 1, ("L2", 4096 * 40 / 200e4, 0.2, 0.25)),
        # A worker may submit so many in a turn, and each process has a loop of its own.
        ({"elements": 5000}, 8, ("L2", 0.05, 0.2, 0.25 / 8)),
        ({"elements": 5000, "processes": 2}, 1, ("L2", 0.05, 0.1, 0.125)),
        # A batch is one launch where it is a graph.
        ({"elements": 5000, "batch": 4}, 4, ("L2", 0.05, 0.2, 0.0625)),
        ({"elements": 5000, "batch": 4, "device": "cuda:0"}, 4, ("L2", 0.05, 0.05, 0.0625)),
    ],
)
def test_shares_are_of_the_smallest_level_that_holds_what_is_updated(changes, depth, expected):
    run = {"processes": 1, "batch": 1, **changes}
    spread = {name: run.pop(name) for name in ("processes", "batch")}
    found = shares(report_of(**run), 100_000.0, CEILINGS, depth=depth, **spread)
    assert found.level == expected[0]
    assert (found.launch_rate, found.event_loop_rate) == pytest.approx(expected[2:])
    assert found.bandwidth == (None if expected[1] is None else pytest.approx(expected[1]))


def test_ceilings_that_are_none_are_warned_of() -> None:
    wide = msgspec.structs.replace(
        CEILINGS,
        levels=[level("L2", None, rate(100.0, 0.2))],
        event_loop_turns_per_second=rate(100.0, 0.2),
    )
    (said,) = ceiling_warnings(wide)
    assert "to conclude from: turns of the event loop, L2 update-shaped. They" in said
    assert "exceeded" not in said
    few = msgspec.structs.replace(CEILINGS, launches_per_second=Ceiling.of([100.0]))
    (said,) = ceiling_warnings(few)
    assert "to conclude from: launches. They were measured at 2026-11-22T19:00:00+00:00" in said
    assert ceiling_warnings(CEILINGS, [Shares("L2", 1.05, None, None)]) == []
    (said,) = ceiling_warnings(CEILINGS, [Shares("L2", 1.34, None, 0.1)])
    assert "are exceeded by some results, to 134 %. They" in said


@pytest.mark.parametrize("after", [1, 64, 100, 1000])
async def test_turns_of_the_event_loop_can_be_cut_short(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, told, made = asyncio.get_running_loop(), [], count(1)
    loop.set_exception_handler(lambda _, context: told.append(context))
    create = loop.create_future

    def interrupt() -> asyncio.Future[Any]:  # as a signal does: in the midst of a coroutine
        if next(made) == after:
            turning.cancel()
        return create()

    turning = asyncio.create_task(host._turn(1 << 60))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "create_future", interrupt)
        with pytest.raises(asyncio.CancelledError):
            await turning
    await asyncio.sleep(0)
    assert told == []
