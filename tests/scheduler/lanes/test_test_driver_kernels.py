"""What kernels of the driver for tests compute, and how long launches take in counted time."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
import torch

from cuda_program import Program
from cuda_testing import ILLEGAL_ADDRESS, NOT_READY, Driver, Operation, Timing, image_of
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from hogstream.kernels.race_counters import LANDED, OVERWRITTEN, SURVIVED, RaceCounters
from hogstream.kernels.rmsprop import rmsprop_
from update_testing import (
    ADDS_2_TO_A_COUNT,
    ALIASED,
    VARIANTS,
    State,
    aliased,
    assert_same_bits,
    extreme,
    normal,
    special,
)

STORAGE = {torch.float32: "fp32", torch.float64: "fp64"}
EXPONENTS = {torch.float32: ("int32", 0x7F80_0000), torch.float64: ("int64", 0x7FF0 << 48)}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in STORAGE]
BLOCK = 256


def bits(value: float) -> int:
    """Those of a float64, as kernels take factors."""
    return int(struct.unpack("<q", struct.pack("<d", value))[0])


@contextmanager
def program(seed: int = 0, **options: Any) -> Iterator[Program]:
    """A program on a driver of its own, without a violation."""
    with Driver(seed, **options) as driver, Program(driver) as host:
        yield host
    assert driver.violations() == []


class Update:
    """Updates by the driver's kernel, of one form."""

    def __init__(
        self, host: Program, dtype: torch.dtype, h: Hyperparameters, **constants: Any
    ) -> None:
        self.host, self.hyperparameters = host, h
        self.constants = {
            "STORAGE": STORAGE[dtype],
            **{name.upper(): switch for name, switch in h.switches._asdict().items()},
            "BLOCK": BLOCK,
            **constants,
        }
        self.function = host.device.function("rmsprop_kernel", self.constants)

    def arguments(
        self,
        operands: Operands,
        verdict: torch.Tensor | None = None,
        counters: RaceCounters | None = None,
    ) -> list[int]:
        """What the kernel takes."""
        for tensor in (operands.grad, *operands.written):
            self.host.kept(tensor)
        h = self.hyperparameters
        decay = h.weight_decay if h.decoupled_weight_decay else 0.0
        factors = list(map(bits, h.factors._replace(shrink=decay)))
        if self.constants.get("LR_ON_DEVICE"):
            factors[0] = self.host.kept(torch.tensor(h.lr, dtype=torch.float64))
        return [
            *LaunchTable([operands]).columns[:, 0].tolist(),
            *factors,
            *(0, 0),  # the key, and the factor of gradients, which are not used
            0 if verdict is None else self.host.kept(verdict),
            0 if counters is None else self.host.kept(counters.counts),
        ]

    def launch(self, stream: int, operands: Operands, **options: Any) -> None:
        """Launches one in place."""
        programs = -(-operands.param.numel() // BLOCK)
        self.host.launch(self.function, programs, self.arguments(operands, **options), stream)


FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "centered": {"centered": True},
    "momentum": {"momentum": 0.9},
    "centered, momentum": {"centered": True, "momentum": 0.9},
    "centered, lr in momentum": {"centered": True, "momentum": 0.9, "lr_in_momentum": True},
}


def operands_for(
    h: Hyperparameters, param: torch.Tensor, grad: torch.Tensor, ms: torch.Tensor | None = None
) -> Operands:
    """What an update of this form takes, with zeros for what is not given."""
    return Operands(
        param.clone(),
        grad,
        torch.zeros_like(param) if ms is None else ms.clone(),
        torch.zeros_like(param) if h.centered else None,
        torch.zeros_like(param) if h.momentum else None,
    )


def update_by_numpy(operands: Operands, options: dict[str, Any]) -> None:
    """The same update, by the backend that all are held to."""
    param, grad, ms, grad_avg, buffer, _ = operands
    state: dict[str, Any] = {"grad_avg": grad_avg, "momentum_buffer": buffer}
    rmsprop_(param, grad, ms, **state, **options, backend="numpy")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_updates_have_the_bits_of_the_numpy_backend(dtype, options, form):
    options = {**options, **FORMS[form]}
    h = Hyperparameters(**options)
    numbers = special(dtype)
    grids = torch.meshgrid(*[numbers] * 3, indexing="ij")
    param, ms, grad = (grid.flatten().contiguous() for grid in grids)
    cases = [
        (normal(5001, dtype, seed=0), extreme(5001, dtype, seed=1)),
        (param, grad, ms.abs()),
        (normal(1, dtype, seed=2), normal(1, dtype, seed=3)),
    ]
    with program() as host:
        stream = host.stream()
        for constants in ({}, {"LR_ON_DEVICE": True}):
            update = Update(host, dtype, h, **constants)
            for case in cases:
                actual, expected = (operands_for(h, *case) for _ in range(2))
                for _ in range(3):
                    update.launch(stream, actual)
                    update_by_numpy(expected, options)
                host.synchronize(stream)
                for got, want in zip(actual.written, expected.written, strict=True):
                    assert_same_bits(State(got, got), State(want, want))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.0, 3e38, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("place", [0, 700, 999])
def test_an_update_is_left_out_if_its_gradient_is_not_finite(dtype, value, place):
    name, exponent = EXPONENTS[dtype]
    grad, param = torch.ones(1000, dtype=dtype), torch.ones(1000, dtype=dtype)
    grad[place] = value
    verdict, counters = torch.zeros(1, dtype=torch.int32), RaceCounters.zeros(1000, BLOCK)
    with program() as host:
        stream = host.stream()
        constants = {"BITS": name, "EXPONENT": exponent, "BLOCK": BLOCK}
        finite = host.device.function("finite_kernel", constants)
        update = Update(host, dtype, Hyperparameters(), CHECKED=True, COUNTED=True)
        host.launch(finite, 4, (host.kept(grad), 1000, host.kept(verdict)), stream)
        operands = Operands(param, grad, torch.zeros_like(param))
        update.launch(stream, operands, verdict=verdict, counters=counters)
        host.synchronize(stream)
    left_out = not grad.isfinite().all()
    assert verdict.item() == left_out
    assert counters.landed == (0 if left_out else 4)
    assert param.eq(1).all() == left_out


@pytest.mark.parametrize(("row", "expected"), ALIASED)
def test_updates_that_landed_meanwhile_are_counted(row, expected):
    counters = RaceCounters.zeros(1, BLOCK)
    param, grad, ms = aliased(counters, row)
    with program() as host:
        host.driver.allow_races(counters.counts.data_ptr(), counters.counts.nbytes)
        update = Update(host, torch.float64, ADDS_2_TO_A_COUNT, COUNTED=True)
        stream = host.stream()
        update.launch(stream, Operands(param, grad, ms), counters=counters)
        host.synchronize(stream)
    assert counters.counts.flatten().tolist() == expected


def raced(seed: int, *, together: bool) -> RaceCounters:
    """What is counted of 6 updates of 8 blocks on each of 3 streams."""
    param, ms = torch.zeros(8 * BLOCK), torch.zeros(8 * BLOCK)
    counters = RaceCounters.zeros(8 * BLOCK, BLOCK)
    with program(seed) as host:
        update = Update(host, torch.float32, Hyperparameters(), COUNTED=True)
        streams = [host.stream() for _ in range(3)]
        grads = [torch.ones(8 * BLOCK) for _ in streams]
        if together:
            for tensor in (param, ms):
                host.driver.allow_races(tensor.data_ptr(), tensor.nbytes)
        for stream, grad in zip(streams, grads, strict=True):
            for _ in range(6):
                update.launch(stream, Operands(param, grad, ms), counters=counters)
            if not together:
                host.synchronize(stream)
        for stream in streams:
            host.synchronize(stream)
    return counters


def test_updates_of_several_streams_are_lost_to_each_other():
    found = [raced(seed, together=True) for seed in range(8)]
    assert {counters.landed for counters in found} == {3 * 6 * 8}
    assert all(0 <= counters.lost <= counters.overwritten for counters in found)
    assert sum(counters.lost for counters in found) > 0


def test_updates_one_after_the_other_are_not_lost():
    counts = raced(0, together=False).counts
    assert counts[LANDED].tolist() == counts[SURVIVED].tolist() == [3 * 6] * 8
    assert counts[OVERWRITTEN].tolist() == [0] * 8


@pytest.mark.parametrize(
    ("kernel", "constants", "message"),
    [
        ("multi_tensor_rmsprop_kernel", {}, "kernel_name must be one of"),
        ("rmsprop_kernel", {"STORAGE": "fp16", "BLOCK": 8}, "elements must be float32 or float64"),
        ("finite_kernel", {"BITS": "int16", "BLOCK": 8}, "elements must be float32 or float64"),
        ("rmsprop_kernel", {"STORAGE": "fp32", "SCALED": True}, "SCALED must be False"),
    ],
)
def test_there_is_no_image_of_others(kernel, constants, message):
    with pytest.raises(ValueError, match=message):
        image_of(kernel, constants)


# ---- counted time ----

FREE = {"launch": 0, "graph": 0, "record": 0, "wait": 0, "write": 0}


def launches(log: Sequence[Operation]) -> list[Operation]:
    """The launches in a log, in the order in which they began."""
    return sorted((each for each in log if "kernel" in each.name), key=lambda each: each.begun)


@pytest.mark.parametrize("serial", [0, 10_000, 70_000])
def test_launches_take_their_time_and_what_is_serial_one_by_one(serial):
    timing = Timing(update=50_000, serial=serial, dispatch=2000, **FREE)
    with program(mode="timed", timing=timing, log=True) as host:
        streams = [host.stream() for _ in range(8)]
        for _ in range(25):
            for stream in streams:
                host.fill(stream, torch.zeros(1), 1.0)
        for stream in streams:
            host.synchronize(stream)
    log = launches(host.driver.log())
    assert len(log) == 8 * 25
    free = 0
    for each in log:
        free = max(free, each.begun) + serial
        assert each.ended == max(each.begun + 50_000, free)
    for number in {each.stream for each in log}:
        mine = [each for each in log if each.stream == number]
        assert mine[0].begun == mine[0].called + 2000
        assert all(
            after.begun == max(after.called + 2000, before.ended)
            for before, after in pairwise(mine)
        )


def test_a_wait_for_another_stream_takes_its_time():
    timing = Timing(update=2_000_000, dispatch=2000, crossing=1_000_000, **FREE)
    with program(mode="timed", timing=timing, log=True) as host:
        first, second, event = host.stream(), host.stream(), host.event()
        host.driver.hold(second)
        host.fill(first, torch.zeros(1), 1.0)
        host("cuEventRecord", event, first)
        host("cuStreamWaitEvent", second, event, 0)
        host.write(second, 5)
        host.synchronize(first)
        assert host.value() == 0
        host.driver.release(second)
        host.synchronize(second)
        assert host.value() == 5
    fill, record, wait, write = host.driver.log()
    assert record.ended == max(fill.ended, record.called + 2000)
    assert wait.ended == max(record.ended + 1_000_000, wait.called + 2000)
    assert write.ended == max(wait.ended, write.called + 2000)


@pytest.mark.parametrize(("chained", "time"), [(False, 3 * 1400), (True, 3 * 4000)])
def test_nodes_of_a_graph_run_beside_each_other_where_they_may(chained, time):
    timing = Timing(update=4000, serial=1400, **FREE)
    with program(mode="timed", timing=timing, log=True) as host, host.graph() as graph:
        last: list[int] = []
        for _ in range(3):
            node = graph.fill(torch.zeros(1), 1.0, after=last)
            last = [node] if chained else []
        stream = host.stream()
        host("cuGraphLaunch", graph.executable(), stream)
        host.synchronize(stream)
    (launch,) = host.driver.log()
    assert launch.ended - launch.begun == time


def test_events_tell_the_time_between_them():
    timing = Timing(update=1_000_000, serial=0, **FREE)
    with program(mode="timed", timing=timing, log=True) as host:
        stream, start, end = host.stream(), host.event(0), host.event(0)
        host.driver.hold(stream)
        host("cuEventRecord", start, stream)
        for _ in range(3):
            host.fill(stream, torch.zeros(1), 1.0)
        host("cuEventRecord", end, stream)
        assert host.driver.call("cuEventElapsedTime", host.out, start, end) == NOT_READY
        host.driver.release(stream)
        host.synchronize(stream)
        milliseconds = host.elapsed(start, end)
    log = host.driver.log()
    assert milliseconds >= 3.0
    assert milliseconds == pytest.approx((log[-1].ended - log[0].ended) / 1e6, rel=1e-6)


def test_the_time_of_an_event_is_of_its_latest_record():
    with program(mode="timed") as host:
        held, other = host.stream(), host.stream()
        start, end = host.event(0), host.event(0)
        host("cuEventRecord", start, other)
        host.driver.hold(held)
        host("cuEventRecord", end, held)
        host.fill(held, torch.zeros(1), 1.0)
        host("cuEventRecord", end, held)
        host("cuEventRecord", end, other)
        host.synchronize(other)
        milliseconds = host.elapsed(start, end)
        host.driver.release(held)
        host.synchronize(held)
        assert host.elapsed(start, end) == milliseconds


def test_calls_keep_their_thread_busy():
    timing = Timing(launch=30_000, record=20_000, wait=10_000, write=40_000)
    with program(mode="timed", timing=timing, log=True) as host:
        stream, event = host.stream(), host.event()
        for _ in range(3):
            host.fill(stream, torch.zeros(1), 1.0)
            host("cuEventRecord", event, stream)
            host("cuStreamWaitEvent", stream, event, 0)
            host.write(stream, 1)
        host.synchronize(stream)
    log = host.driver.log()
    cost = {"fill_kernel": 30_000, "record": 20_000, "wait": 10_000, "write of a value": 40_000}
    assert len(log) == 12
    assert all(after.called - before.called >= cost[after.name] for before, after in pairwise(log))


def test_memory_is_set_and_copied_but_kernels_compute_nothing():
    with program(mode="timed") as host:
        stream, first, second = host.stream(), torch.zeros(4), torch.zeros(4)
        host.fill(stream, first, 3.0)
        host("cuMemsetD32Async", host.kept(first), 0x3F800000, 2, stream)
        host.copy(stream, second, first)
        host.synchronize(stream)
        assert second.tolist() == [1.0, 1.0, 0.0, 0.0]


def test_what_is_lost_in_counted_time_is_never_done():
    with program(mode="timed") as host:
        stream = host.stream()
        host.driver.hold(stream)
        host.write(stream, 1)
        host.driver.lose()
        host.driver.release(stream)
        assert host.query(stream) == ILLEGAL_ADDRESS
        assert host.value() == 0
