"""Short checks of all that runs on a GPU, each alone: ``python -m gpu.smoke list cuda 25``.

Each takes a device of ``gpu_testing``: a GPU, or the driver of tests, whose tensors are on the CPU.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch.nn import Parameter

from gpu_testing import Gpu, graphs_made, open_gpu
from hogstream.kernels import multi_tensor_rmsprop_, rmsprop_, sparse_rmsprop_
from hogstream.optim import RMSpropAsync
from hogstream.scheduler import ProcessScheduler, RunReport, SharedParameters, WorkerContext
from process_workers import submit_ones as make_submit_ones
from scheduler_testing import COUNTING, submit_ones
from update_testing import (
    COMPUTE,
    State,
    assert_same_bits,
    extreme,
    fresh_state,
    normal,
    special,
    update_,
)

UPDATES = 200
_STATE = ("square_avg", "grad_avg", "momentum_buffer")
# Of its time; the rest is for imports.
_SHOWN_AT = 0.6
_SHAPES = ((3,), (), (17, 33), (4099,))
_VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"eps_inside_sqrt": False, "weight_decay": 0.1},
    {"weight_decay": 0.1, "decoupled_weight_decay": True, "maximize": True},
    {"momentum": 0.9, "centered": True},
    {"momentum": 0.5, "lr_in_momentum": True, "weight_decay": 0.1},
)
_ROW_OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"momentum": 0.9, "centered": True, "weight_decay": 0.1},
    {"rowwise": True, "lazy_decay": True},
)
# And what is for parameters of 16 bits.
_ROUNDINGS: tuple[dict[str, Any], ...] = (
    {"stochastic_rounding": True, "seed": 1 << 63},
    {"kahan_sum": True, "momentum": 0.9},
)


class CheckError(Exception):
    """Something is not as it should be; the message says what."""


def main() -> None:
    """Runs a check, on ``cuda`` or ``cpu``, that may take so many seconds, imports included.

    When those are nearly over it shows where each thread is, and ends with 1: to read the stacks of
    threads that go on meanwhile is nothing to survive.
    """
    name, device, seconds = sys.argv[1:]
    faulthandler.enable()
    faulthandler.dump_traceback_later(_SHOWN_AT * float(seconds), exit=True)
    with open_gpu("cuda" if device == "cuda" else "driver of tests") as gpu:
        CHECKS[name](gpu)


def update(dtype: torch.dtype, gpu: Gpu) -> None:
    """Three updates of special and extreme values have the bits of NumPy's."""
    values = special(dtype)
    pairs = torch.tensor(list(product(range(len(values)), repeat=2)))
    param = torch.cat([values[pairs[:, 0]], normal(10_007, dtype, seed=0)])
    for options in _VARIANTS:
        start = fresh_state(param, **options)
        expected, updated = (
            start.map(partial(torch.Tensor.to, device=where, copy=True))
            for where in (torch.device("cpu"), gpu.device)
        )
        for step in range(3):
            grad = torch.cat([values[pairs[:, 1]], extreme(10_007, dtype, seed=1 + step)])
            update_(expected, grad, backend="numpy", **options)
            update_(updated, grad.to(gpu.device), **options)
        assert_same_bits(updated.map(torch.Tensor.cpu), expected)


def update_list(gpu: Gpu) -> None:
    """A list of lengths and dtypes, some of them not aligned, has the bits of NumPy's."""
    sizes = [(dtype, size) for dtype in COMPUTE for size in (1, 5, 4099)]
    params, grads = (
        [normal(size, dtype, seed).to(gpu.device)[1:] for dtype, size in sizes if size > 1]
        + [normal(size, dtype, seed).to(gpu.device) for dtype, size in sizes]
        for seed in (0, 1)
    )
    mss = [torch.zeros_like(param, dtype=COMPUTE[param.dtype]) for param in params]
    expected = [
        State(param.cpu().clone(), ms.cpu().clone()) for param, ms in zip(params, mss, strict=True)
    ]
    multi_tensor_rmsprop_(params, grads, mss, weight_decay=0.1)
    for state, grad, param, ms in zip(expected, grads, params, mss, strict=True):
        rmsprop_(state.param, grad.cpu(), state.ms, weight_decay=0.1, backend="numpy")
        assert_same_bits(State(param.cpu(), ms.cpu()), state)


def step(gpu: Gpu) -> None:
    """Steps of the optimizer, flat and not, have the bits of NumPy's."""
    for flat, options in product((False, True), (*_VARIANTS, *_ROUNDINGS)):
        dtype = torch.bfloat16 if options in _ROUNDINGS else torch.float32
        ours, numpys = _beside_numpy(gpu, dtype, flat=flat, **options)
        for seed in range(3):
            for optimizer in (ours, numpys):
                _give_gradients(optimizer.param_groups[0]["params"], seed)
                optimizer.step()
        _check_same(ours, numpys)


def scaled(gpu: Gpu) -> None:
    """Steps read a loss's scale, and what was found, on the device: the host waits for nothing."""
    ours, numpys = _beside_numpy(gpu, torch.float32, flat=False)
    for seed, found in enumerate((0.0, 1.0, 0.0)):
        for optimizer in (ours, numpys):
            params = optimizer.param_groups[0]["params"]
            _give_gradients(params, seed)
            optimizer.grad_scale = torch.tensor(1024.0, device=params[0].device)
            optimizer.found_inf = torch.tensor(found, device=params[0].device)
        numpys.step()
        with _no_waits(gpu):
            ours.step()
    _check_same(ours, numpys)
    counts = [
        float(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"])
        for optimizer in (ours, numpys)
    ]
    _require(counts == [2.0, 2.0], f"two steps must be counted, got {counts}")


def clipped(gpu: Gpu) -> None:
    """Gradients are clipped as torch clips them, by a factor on the device."""
    ours, others = _parameters(gpu.device), _parameters(gpu.device)
    optimizer = RMSpropAsync(ours, max_grad_norm=0.5)
    other = RMSpropAsync(others)
    for seed in range(2):
        _give_gradients(ours, seed)
        _give_gradients(others, seed)
        with _no_waits(gpu):
            optimizer.step()
        torch.nn.utils.clip_grad_norm_(others, 0.5)
        other.step()
    torch.testing.assert_close(ours, others, rtol=1e-5, atol=1e-5)


def rows(gpu: Gpu) -> None:
    """Sparse gradients update rows with the bits of NumPy's, and the host waits for nothing."""
    first = normal(50 * 33, torch.float32, 1).reshape(50, 33)
    for options in _ROW_OPTIONS:
        tables = [Parameter(first.to(device, copy=True)) for device in (gpu.device, "cpu")]
        ours = RMSpropAsync(tables[:1], **options)
        numpys = RMSpropAsync(tables[1:], backend="numpy", **options)
        for seed in range(3):
            index = torch.from_numpy(np.random.default_rng(seed).integers(0, 50, (1, 40)))
            values = normal(40 * 33, torch.float32, seed).reshape(40, 33)
            for table in tables:
                there = index.to(table.device), values.to(table.device)
                table.grad = torch.sparse_coo_tensor(*there, table.shape, check_invariants=False)
            numpys.step()
            with _no_waits(gpu):
                ours.step()
        _check_same(ours, numpys)
    param, ms = (torch.ones(4, 8, device=gpu.device) for _ in range(2))
    outside = torch.tensor([1, 4], device=gpu.device)
    try:
        sparse_rmsprop_(param, outside, torch.ones(2, 8, device=gpu.device), ms)
    except IndexError:
        _require(bool((param == 1).all()), "a row that is not there must change nothing")
    else:
        raise CheckError("a row that is not there must be refused")


@contextmanager
def _no_waits(gpu: Gpu) -> Iterator[None]:
    """Has torch raise where the host would wait for the device."""
    if gpu.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if gpu.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def _beside_numpy(
    gpu: Gpu, dtype: torch.dtype, *, flat: bool, **options: Any
) -> tuple[RMSpropAsync, RMSpropAsync]:
    ours, expected = _parameters(gpu.device, dtype), _parameters(torch.device("cpu"), dtype)
    return (
        RMSpropAsync(ours, flat=flat, **options),
        # As flat: a place in flat memory is what stochastic rounding goes by.
        RMSpropAsync(expected, flat=flat, backend="numpy", **options),
    )


def capturable(gpu: Gpu) -> None:
    """Steps whose lr is on the device have the bits of others, also those of a graph."""
    params, others = _parameters(gpu.device), _parameters(gpu.device)
    on_device = RMSpropAsync(params, lr=0.5, capturable=True, backend="triton")
    on_host = RMSpropAsync(others, lr=0.5, backend="triton")
    for optimizer, its in ((on_device, params), (on_host, others)):
        _give_gradients(its, 0)
        optimizer.step()
    again: Callable[[], object] = on_device.step
    if gpu.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            on_device.step()
        again = graph.replay
    for lr in (0.125, 0.0625):
        on_device.param_groups[0]["lr"].fill_(lr)
        on_host.param_groups[0]["lr"] = lr
        again()
        on_host.step()
    _check_same(on_device, on_host)


def policy(name: str, gpu: Gpu, **settings: Any) -> RunReport:
    """200 updates of four workers all land, and only races lose some."""
    shared = gpu.zeros(gpu.medium)
    report = _run(gpu, shared, submit_ones(shared), policy=name, **settings)
    _require(shared.version == UPDATES, f"{shared.version} versions instead of {UPDATES}")
    low, high = shared.flat.min().item(), shared.flat.max().item()
    if name in ("locked", "ordered", "awaited"):
        _require(low == high == -UPDATES, f"from {low} to {high} instead of {-UPDATES}")
    _require(-UPDATES <= low <= high <= -1, f"from {low} to {high}")
    if name.startswith("bounded"):
        most = max(report.staleness)
        _require(most <= int(name.partition(":")[2]), f"staleness {most}")
    return report


def row_lanes(gpu: Gpu) -> None:
    """Updates of rows by four workers all land, and lock-free alone loses any."""
    width = gpu.medium // 16
    for name in ("lock-free", "row-locked", "ordered"):
        zeros = torch.zeros(16, width, device=gpu.device)
        shared = SharedParameters({"spare": zeros[:1, :3], "table": zeros})
        every = torch.arange(16, device=gpu.device).repeat_interleave(2)
        halves = torch.full((32, width), 0.5, device=gpu.device)

        async def worker(
            context: WorkerContext, rows: Any = every, grads: Any = halves, policy: str = name
        ) -> None:
            read = await context.read_rows("table", rows)
            await context.submit_rows("table", rows, grads)
            if context.index == 0 and policy != "lock-free":
                _require(bool(read.eq(read[:, :1]).all()), "a row that was read is not whole")

        report = _run(gpu, shared, worker, policy=name, telemetry=True)
        table = shared.views["table"]
        low, high = table.min().item(), table.max().item()
        said = f"{name}: rows from {low} to {high}, {report.lost_block_updates} were lost"
        _require(shared.version == UPDATES and -UPDATES <= low <= high <= -1, said)
        _require(report.block_updates == 16 * UPDATES, f"{name}: {report.block_updates} landed")
        if name != "lock-free":
            _require(low == high == -UPDATES and not report.lost_block_updates, said)


def verdict(gpu: Gpu) -> None:
    """Gradients that are not finite are left out, and counted."""
    shared = gpu.zeros(gpu.medium)
    good, bad = torch.ones_like(shared.flat), torch.ones_like(shared.flat)
    bad[-1] = float("nan")

    async def worker(context: WorkerContext) -> None:
        await context.submit(bad if context.iteration % 4 == 3 else good)

    report = _run(gpu, shared, worker, policy="ordered", on_nonfinite="skip")
    left_out = sum(report.nonfinite)
    _require(left_out > 0, "none was left out")
    landed = shared.flat.eq(left_out - UPDATES).all().item()
    _require(bool(landed), f"{left_out} were left out, but parameters are {shared.flat}")


def telemetry(gpu: Gpu) -> None:
    """Lost updates are counted: none where there is an order."""
    for name in ("ordered", "lock-free"):
        report = policy(name, gpu, telemetry=True)
        landed, lost = report.block_updates, report.lost_block_updates
        said = f"{name}: of {landed} updates of a block {lost} were lost"
        _require(landed is not None and landed % UPDATES == 0 and landed > 0, said)
        _require(lost == 0 if name == "ordered" else lost is not None and lost >= 0, said)


def graph(gpu: Gpu) -> None:
    """Batches of all lanes are graphs, and lose no update."""
    with graphs_made() as graphs:
        policy("ordered", gpu, batch=4, batch_of="lanes", depth=8)
    _require(bool(graphs), "no graph was made")


def two_processes(gpu: Gpu) -> None:
    """Two processes update the memory of one, under a lock, and give it back."""
    before = torch.cuda.memory_allocated()
    shared = gpu.zeros(gpu.medium)

    async def run(shared: SharedParameters) -> None:
        async with ProcessScheduler(
            shared, processes=2, workers=2, policy="locked", depth=4, **COUNTING
        ) as scheduler:
            await scheduler.run(make_submit_ones, updates=UPDATES)

    asyncio.run(run(shared))
    low, high = shared.flat.min().item(), shared.flat.max().item()
    _require(low == high == -UPDATES, f"from {low} to {high} instead of {-UPDATES}")
    del shared
    gc.collect()
    kept = torch.cuda.memory_allocated() - before
    _require(kept <= 0, f"{kept} bytes of what was shared are kept")


def _run(gpu: Gpu, shared: Any, worker: Any, **settings: Any) -> RunReport:
    async def run() -> RunReport:
        chosen = {"workers": 4, "depth": 4, **COUNTING, **settings}
        async with gpu.scheduler(shared, **chosen) as scheduler:
            return await scheduler.run(worker, updates=UPDATES)

    return asyncio.run(run())


def _parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Parameter]:
    return [
        Parameter(normal(max(1, torch.Size(shape).numel()), dtype, seed).view(shape).to(device))
        for seed, shape in enumerate(_SHAPES)
    ]


def _give_gradients(params: list[Parameter], seed: int) -> None:
    for index, param in enumerate(params):
        grad = normal(param.numel(), param.dtype, 100 * seed + index).view(param.shape)
        if param.grad is None:
            param.grad = grad.to(param.device)
        else:
            param.grad.copy_(grad)


def _check_same(optimizer: RMSpropAsync, expected: RMSpropAsync) -> None:
    groups = (optimizer.param_groups[0]["params"], expected.param_groups[0]["params"])
    for mine, theirs in zip(*groups, strict=True):
        states = (
            State(
                param.detach(),
                *(owner.state[param].get(name) for name in _STATE),
            ).map(torch.Tensor.cpu)
            for owner, param in ((optimizer, mine), (expected, theirs))
        )
        assert_same_bits(*states)


def _require(held: bool, otherwise: str) -> None:
    if not held:
        raise CheckError(otherwise)


CHECKS: dict[str, Callable[[Gpu], object]] = {
    **{str(dtype).removeprefix("torch."): partial(update, dtype) for dtype in COMPUTE},
    "list": update_list,
    "step": step,
    "scaled": scaled,
    "clipped": clipped,
    "rows": rows,
    "capturable": capturable,
    **{name: partial(policy, name) for name in ("lock-free", "locked", "ordered", "awaited")},
    "bounded": partial(policy, "bounded:4"),
    "row-lanes": row_lanes,
    "verdict": verdict,
    "telemetry": telemetry,
    "graph": graph,
    "two-processes": two_processes,
}


if __name__ == "__main__":
    main()
