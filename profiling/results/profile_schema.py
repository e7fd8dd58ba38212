"""The files of what is looked into: ``inspect``, the profilers, and the tests on a GPU."""

from __future__ import annotations

from typing import Literal

from hogstream.profiling.results.records import (
    Count,
    Environment,
    Measurement,
    Number,
    Record,
    Result,
    Size,
    Spread,
)
from hogstream.profiling.results.schema import BenchSettings, TrainSettings


class CompiledKernel(Record):
    """What one thread of a compiled kernel takes and does.

    Attributes:
        target: Device that it was compiled for, such as ``sm_90``.
        kernel: Which, as in ``--kernel``.
        dtype: Of parameters and gradients.
        eps_inside_sqrt: Where epsilon goes; null, as what follows, if the kernel updates nothing.
        coupled: Whether weight decay goes through the gradient.
        centered: Whether there is a mean of gradients.
        momentum: Whether there is a momentum buffer.
        lr_in_momentum: Whether what goes into that has been multiplied by lr.
        lr_on_device: Whether lr is read from the device's memory.
        registers: On AMD, vector registers.
        spills: What does not fit them: bytes on NVIDIA, registers on AMD.
        loads: Of global memory in full blocks: how many of each width in bits.
        stores: Likewise.
        masked_loads: Of global memory in other blocks, likewise.
        masked_stores: Likewise.
        fused: Multiply-adds that are rounded once.
        approximate: Operations that are not correctly rounded, or flush denormals.
    """

    target: str
    kernel: str
    dtype: str
    eps_inside_sqrt: bool | None
    coupled: bool | None
    centered: bool | None
    momentum: bool | None
    lr_in_momentum: bool | None
    lr_on_device: bool | None
    registers: Count
    spills: Count
    loads: dict[Size, Count]
    stores: dict[Size, Count]
    masked_loads: dict[Size, Count]
    masked_stores: dict[Size, Count]
    fused: Count
    approximate: Count


class Inspection(Result, kw_only=True, tag="inspect"):
    """``hogstream inspect``."""

    environment: Environment
    results: list[CompiledKernel]


class Percentiles(Record):
    """Of many times that a profiler took down, in microseconds; some may be < 0."""

    mean: float
    p50: float
    p90: float
    p99: float


class NamedTime(Record):
    """How often something ran, and for how long in all, in milliseconds."""

    name: str
    count: Size
    total_ms: Number


class RangeTimes(Record):
    """Of one of hogstream's NVTX ranges: how often, how long in all, and how long each."""

    count: Size
    total_ms: Number
    us: Percentiles


class StreamTime(Record):
    """What a CUDA stream did.

    Attributes:
        device: Its number.
        stream: Its number.
        kernels: That ran on it.
        busy_ms: Milliseconds in which one did.
    """

    device: int
    stream: int
    kernels: Size
    busy_ms: Number


class PolicyTimeline(Record):
    """What Nsight Systems saw while a policy ran; null of what is not in its report.

    Attributes:
        policy: Name of the policy, or ``all`` where policies are not told apart.
        runs: Of the scheduler.
        kernels: That ran.
        span_ms: Milliseconds from the first kernel's start to the last one's end, summed over runs.
        kernels_per_second: In that time.
        busy_ms: Milliseconds in which a kernel ran.
        overlap: Share, from 0 to 1, of those in which two or more did.
        kernel_us: Of kernels.
        gap_us: From the end of a kernel to the start of the next on its stream.
        launch_latency_us: From the start of the call that launched a kernel to its own.
        api_us_per_kernel: In CUDA calls, of all threads, for each kernel.
        api_us_per_kernel_on_event_loop: The same of the event loop's thread.
        api_us_per_update: In CUDA calls, of all threads, for each update.
        api_calls: Those that took most.
        ranges: Hogstream's NVTX ranges, by text.
        streams: In the order of devices and numbers.
    """

    policy: str
    runs: Size | None
    kernels: Count
    span_ms: Number
    kernels_per_second: Number | None
    busy_ms: Number
    overlap: Number | None
    kernel_us: Percentiles | None
    gap_us: Percentiles | None
    launch_latency_us: Percentiles | None
    api_us_per_kernel: Number | None
    api_us_per_kernel_on_event_loop: Number | None
    api_us_per_update: Number | None
    api_calls: list[NamedTime]
    ranges: dict[str, RangeTimes]
    streams: list[StreamTime]


class NsightProfile(Result, kw_only=True):
    """What a profile by one of Nsight's tools says.

    Attributes:
        environment: What was profiled on; null if a file was only read.
        profiler_version: Of the tool; null likewise.
    """

    environment: Environment | None
    profiler_version: str | None


class NsysProfile(NsightProfile, kw_only=True, tag="profile nsys"):
    """``hogstream profile nsys``, or what it read of an export of Nsight Systems.

    Attributes:
        devices: Names of GPUs.
        results: In the order of the policies' first runs.
        kernels: Those that took most.
        kernels_outside_runs: That ran outside all runs of the scheduler, and are left out.
        kernels_untimed: That had no times, and are left out.
    """

    devices: list[str]
    results: list[PolicyTimeline]
    kernels: list[NamedTime]
    kernels_outside_runs: Count
    kernels_untimed: Count


class KernelCounters(Record):
    """Medians over the launches of a kernel, of one size; null of what was not measured.

    Attributes:
        kernel: Its name.
        grid: As ncu prints it.
        block: Likewise.
        launches: That were profiled.
        time_us: Of a launch, in microseconds, with a sample for each.
        dram_percent: Of the memory's peak throughput.
        bytes_read: From memory.
        bytes_written: To memory.
        gigabytes_per_second: 1e9 bytes/s of both.
        elements: That a launch updates; null if not known.
        bytes_read_per_element: Of those.
        bytes_written_per_element: Likewise.
        bytes_per_element: Of both.
        registers: Of a thread.
        occupancy_percent: Active warps, of the most that there can be.
    """

    kernel: str
    grid: str
    block: str
    launches: Size
    time_us: Spread | None
    dram_percent: Number | None
    bytes_read: Number | None
    bytes_written: Number | None
    gigabytes_per_second: Number | None
    elements: Size | None
    bytes_read_per_element: Number | None
    bytes_written_per_element: Number | None
    bytes_per_element: Number | None
    registers: Number | None
    occupancy_percent: Number | None


class NcuProfile(NsightProfile, kw_only=True, tag="profile ncu"):
    """``hogstream profile ncu``, or what it read of a report of Nsight Compute."""

    results: list[KernelCounters]


class OperatorTime(Record):
    """One of torch's operators.

    Attributes:
        name: Its name.
        where: ``cpu`` or ``gpu``.
        count: How often it ran.
        self_us: Microseconds in all, without the operators that it called.
        total_us: Microseconds in all.
    """

    name: str
    where: Literal["cpu", "gpu"]
    count: Size
    self_us: float
    total_us: Number


class LabelTime(Record):
    """What the scheduler did, by its labels.

    Attributes:
        policy: Under which.
        label: Such as ``submit`` or ``update``.
        lane: On which; null for all together.
        count: How often.
        total_us: Microseconds in all.
        mean_us: Microseconds each.
        p99_us: Likewise.
    """

    policy: str
    label: str
    lane: int | None
    count: Size
    total_us: Number
    mean_us: Number
    p99_us: Number


class TorchProfile(Measurement, kw_only=True, tag="profile torch"):
    """``hogstream profile torch``.

    Attributes:
        workload: What was profiled: a command and its arguments, as they follow ``--``.
        bench: What ``bench`` was asked for, if that was it.
        train: What ``train`` was asked for, if that was it.
        clock_error_us: Microseconds by which lanes may be displaced from operators, either way.
        operators: Most time of their own first.
        scheduler: Most time first, then lanes in order.
    """

    workload: list[str]
    bench: BenchSettings | None
    train: TrainSettings | None
    clock_error_us: Number
    operators: list[OperatorTime]
    scheduler: list[LabelTime]


class GpuOutcome(Record):
    """What became of a program that a run started, or of a test of one.

    Attributes:
        stage: Of which it is a part.
        name: Of it.
        end: What took too long was stopped; what lacks a tool was skipped.
        seconds: How long it took.
        said: Why it did not pass.
    """

    stage: str
    name: str
    end: Literal["passed", "failed", "stopped", "skipped"]
    seconds: Number
    said: str


class GpuRun(Result, kw_only=True, tag="gpu"):
    """What only a GPU can tell: ``make gpu``.

    Attributes:
        environment: What it ran on.
        outcomes: In the order in which they were known, stage by stage.
    """

    environment: Environment
    outcomes: list[GpuOutcome]
