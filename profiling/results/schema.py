"""The result files: every field of every command's ``--json`` stands here once, with its unit.

A file is one object, tagged by ``kind``. Writers build these types, and readers get them back: what
is not in a type is in no file. Null means that something was not measured; it is never 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Annotated, Literal, TypeVar

from msgspec import Meta, Struct

from hogstream.profiling.results.confidence import Interval, median_interval, ratio_interval

SCHEMA = 2

# Beyond these, arithmetic on a number overflows, and nothing was measured.
LEAST, MOST = 1e-18, 1e18

Number = Annotated[float, Meta(ge=0, le=MOST)]
Positive = Annotated[float, Meta(ge=LEAST, le=MOST)]
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Size = Annotated[int, Meta(ge=1, lt=1 << 53)]
Bounds = tuple[Number, Number]
SomeSpread = TypeVar("SomeSpread", bound="Spread")


class Record(Struct, forbid_unknown_fields=True):
    """What all types here are: with no field but their own."""


class Spread(Record):
    """A metric that was sampled.

    Attributes:
        median: Of the samples.
        interval: The 95 % interval of the median, by bootstrap; null if too few samples bound none.
        samples: Of each round, in their order.
    """

    median: Number
    interval: Bounds | None
    samples: Annotated[list[Number], Meta(min_length=1)]

    def __post_init__(self) -> None:
        """Checks what a type cannot say; ``ValueError`` is told with the place in the file."""
        low, high = self.interval or (0.0, math.inf)
        if not low <= self.median <= high:
            raise ValueError("interval must hold the median")
        if any(0 < sample < LEAST for sample in self.samples):
            raise ValueError(f"samples must each be 0 or from {LEAST:g} on")

    @classmethod
    def of(cls: type[SomeSpread], samples: Sequence[float]) -> SomeSpread:
        """The median of samples, and how sure it is."""
        estimate = median_interval(samples)
        return cls(median=estimate.median, interval=estimate.bounds, samples=list(samples))

    @property
    def estimate(self) -> Interval:
        """The median and its interval, without bounds if there is none."""
        return _estimate(self.median, self.interval)


class PositiveSpread(Spread):
    """The same of a metric that is never 0, such as the time of a step."""

    median: Positive
    samples: Annotated[list[Positive], Meta(min_length=1)]


class Ratio(Record):
    """A metric over another that was measured in the same rounds.

    Attributes:
        median: The ratio of the medians.
        interval: Its 95 % interval, by bootstrap over rounds; null if too few bound none.
    """

    median: Number
    interval: Bounds | None

    @classmethod
    def of(cls, mine: Sequence[float], theirs: Sequence[float]) -> Ratio | None:
        """One over the other, paired by round; None if one of ``theirs`` is 0."""
        estimate = ratio_interval(mine, theirs, paired=True)
        return None if estimate is None else cls(median=estimate.median, interval=estimate.bounds)

    @property
    def estimate(self) -> Interval:
        """The ratio and its interval, without bounds if there is none."""
        return _estimate(self.median, self.interval)


def _estimate(median: float, interval: Bounds | None) -> Interval:
    return Interval(median, *(interval or (-math.inf, math.inf)))


class Environment(Record):
    """What a measurement was made on.

    Attributes:
        device: As torch calls it, such as ``cuda:0``.
        device_name: As its maker calls it.
        backend: Whose kernels were measured.
        cores: CPU cores that the process may run on.
        event_loop: ``asyncio`` or ``uvloop``.
        threads: Torch's intra-op threads.
        cuda_device_max_connections: The environment variable, on a GPU.
        system: Operating system and processor architecture.
        versions: Of packages, by name; null of what is not installed.
        commit: Of the source tree, ``-dirty`` if changed since; null outside git.
    """

    device: str
    device_name: str
    backend: str
    cores: Size
    event_loop: str
    threads: Size
    cuda_device_max_connections: str | None
    system: str
    versions: dict[str, str | None]
    commit: str | None


class Level(Record):
    """A level of memory and what it can move, with all cores, in 1e9 bytes/s.

    Attributes:
        level: Such as ``L2``, or ``memory``.
        bytes: Of the working set that was measured, over all threads.
        threads: How many shared it; null on a GPU.
        cache_bytes: That one of its caches holds; null for memory.
        copy_gigabytes_per_second: 8 bytes an element: one array is read, another written. Null for
            small caches where there is no Numba.
        update_shaped_gigabytes_per_second: 20 bytes an element, as an update: three arrays are
            read, and two of them written.
    """

    level: str
    bytes: Size
    threads: Size | None
    cache_bytes: Size | None
    copy_gigabytes_per_second: PositiveSpread | None
    update_shaped_gigabytes_per_second: PositiveSpread | None


class Ceilings(Record):
    """What a machine can do at most, measured once and kept.

    Attributes:
        measured: When, in UTC, ISO 8601.
        levels: Of its memory, smallest first; the last is the memory beyond all caches.
        launches_per_second: Of updates of nothing down one lane.
        event_loop_turns_per_second: Of the event loop that would run here.
    """

    measured: str
    levels: Annotated[list[Level], Meta(min_length=1)]
    launches_per_second: PositiveSpread
    event_loop_turns_per_second: PositiveSpread

    def __post_init__(self) -> None:
        """Checks what a type cannot say."""
        datetime.fromisoformat(self.measured)

    @property
    def memory(self) -> Level:
        """The memory beyond all caches."""
        return self.levels[-1]


class Shares(Record):
    """What a result is, as shares (from 0 to 1) of its machine's ceilings; null if not known.

    Attributes:
        level: The smallest whose cache holds the parameters and ``ms``.
        bandwidth: Of that level's update-shaped one.
        launch_rate: One launch an update, or on a GPU a batch, in each process.
        event_loop_rate: One turn for as many updates as may be in flight, in each process.
    """

    level: str | None
    bandwidth: Number | None
    launch_rate: Number | None
    event_loop_rate: Number | None


class Histogram(Record):
    """Latencies of updates.

    Attributes:
        edges_us: Edges of the bins, rising, in microseconds.
        counts: Updates in each bin.
    """

    edges_us: list[Number]
    counts: list[Count]

    def __post_init__(self) -> None:
        """Checks what a type cannot say."""
        if len(self.edges_us) != len(self.counts) + 1 or sorted(self.edges_us) != self.edges_us:
            raise ValueError("edges_us must rise, one more than there are counts")


class Latency(Record):
    """Microseconds from the submission of an update to its landing; null if none landed."""

    p50: Number | None
    p90: Number | None
    p99: Number | None
    histogram: Histogram | None


class Staleness(Record):
    """Versions between a worker's read and the landing of its update; null if none landed.

    Attributes:
        histogram: Updates of each staleness.
    """

    mean: Number | None
    p50: Number | None
    p99: Number | None
    max: Number | None
    histogram: dict[Count, Count] | None


class Run(Record):
    """The scheduler's runs under one policy, at one size and worker count, over all rounds.

    Attributes:
        policy: What an update waits for.
        workers: How many, over all processes.
        processes: How many they are spread over.
        batch: Updates that are launched at once.
        elements: Of the shared parameters.
        dtype: Of the parameters.
        backend: Whose kernels.
        device: Where.
        updates: That landed.
        seconds: Of all rounds together.
        updates_per_second: A sample a round.
        gigabytes_per_second: 1e9 bytes/s of the least traffic that the updates need.
        latency_us: From submission to landing.
        staleness: In versions.
        lost_updates_fraction: Of updates, block by block; null without telemetry.
        overwrites_per_update: How often a block was overwritten; null without telemetry.
        updates_by_worker: That landed.
        dropped_by_worker: That were submitted and did not land.
        nonfinite_by_worker: That were left out, as their gradient held an infinity or NaN.
        restarts_by_worker: How often each was started again.
        failures: Why workers failed, by their number.
        dead: Process ids of workers that were killed.
        partial: Whether a run ended early.
        share_of_ceilings: Of the machine's.
    """

    policy: str
    workers: Size
    processes: Size
    batch: Size
    elements: Size
    dtype: str
    backend: str
    device: str
    updates: Count
    seconds: Number
    updates_per_second: Spread
    gigabytes_per_second: Number
    latency_us: Latency
    staleness: Staleness
    lost_updates_fraction: Number | None
    overwrites_per_update: Number | None
    updates_by_worker: list[Count]
    dropped_by_worker: list[Count]
    nonfinite_by_worker: list[Count]
    restarts_by_worker: list[Count]
    failures: dict[str, str]
    dead: list[Count]
    partial: bool
    share_of_ceilings: Shares


class BenchRun(Run):
    """A run of simulated workers.

    Attributes:
        gains: Its updates/s over those of each other policy that took turns with it, by policy; a
            policy is left out if none of its updates landed in one of the rounds.
    """

    gains: dict[str, Ratio]


class TrainRun(Run):
    """Trainings of a model, a sample a round.

    Attributes:
        test_accuracy: From 0 to 1.
        final_loss: Of the finished model over all training data; null if a training diverged.
        training_seconds: Of a training.
        epochs: How often each training example was seen.
        losses: Of the first round: seconds since its start, and the loss of the batch, as long as
            it was a number.
        gains: How many times as fast it trained as each other policy that finished as many rounds,
            by policy.
    """

    test_accuracy: Spread
    final_loss: Spread | None
    training_seconds: Spread
    epochs: Spread
    losses: list[tuple[Number, Number]]
    gains: dict[str, Ratio]


class KernelTime(Record):
    """One update of one large float32 array, with all cores, and nothing around it.

    Attributes:
        name: Such as ``hogstream, numba``.
        elements: Of the array.
        milliseconds: Of an update.
        gigabytes_per_second: 1e9 bytes/s, at 20 bytes an element.
        differing_bits: From the NumPy expression, after two updates; null where that is not what
            is computed.
    """

    name: str
    elements: Size
    milliseconds: PositiveSpread
    gigabytes_per_second: Positive
    differing_bits: Count | None


class TelemetryCost(Record):
    """What counting lost updates costs at one size: lock-free with it over without it.

    Attributes:
        elements: Of the shared parameters.
        workers: How many.
        with_telemetry: Updates/s, a sample a round.
        without_telemetry: The same, in the same rounds.
        ratio: The first over the second; null if nothing landed.
    """

    elements: Size
    workers: Size
    with_telemetry: Spread
    without_telemetry: Spread
    ratio: Ratio | None


class PeerTime(Record):
    """One optimizer's step at one shape.

    Attributes:
        shape: As in ``--shapes``.
        tensors: That a step updates.
        elements: In all of them.
        peer: Name of the optimizer, or of what memory can do.
        milliseconds: Of a step.
        bytes_per_element: Of the least traffic that it needs.
        operations_per_element: Of its arithmetic.
        gigabytes_per_second: 1e9 bytes/s of that traffic.
        share_of_ceiling: Of an update-shaped pass over the same tensors; null if not measured.
        time_against_hogstream: Its time over ours; null if ours was not measured.
        steps_per_sample: That were timed together.
        launches: Kernels of a step on a GPU; null if not counted.
        host_us: Until a step returns while a GPU works on; null on a CPU.
    """

    shape: str
    tensors: Size
    elements: Size
    peer: str
    milliseconds: PositiveSpread
    bytes_per_element: Size
    operations_per_element: Count
    gigabytes_per_second: Positive
    share_of_ceiling: Number | None
    time_against_hogstream: Ratio | None
    steps_per_sample: Size
    launches: Count | None
    host_us: Number | None


class Skipped(Record):
    """An optimizer that could not be measured at a shape (``all``: none), and why."""

    shape: str
    peer: str
    reason: str


class Scheduling(Record):
    """How the scheduler ran; the fields of ``SchedulerSettings``, which documents them."""

    depth: Size
    batch: Size
    batch_of: str
    state: str
    read: str
    staleness_aware: bool
    telemetry: bool
    on_error: str
    on_nonfinite: str
    deadline: Positive | None


class BenchSettings(Record):
    """What ``bench`` was asked for.

    Attributes:
        scheduling: How the scheduler ran.
        processes: How many the workers were spread over.
        rounds: In which policies took turns.
        seconds: Of each configuration, over all rounds.
        think_time: Median seconds that a worker thinks.
        think_spread: Sigma of the think times' log-normal distribution.
        seed: Of gradients and think times.
        sweep: Whether it is a sweep over many sizes.
    """

    scheduling: Scheduling
    processes: Size
    rounds: Size
    seconds: Number
    think_time: Number
    think_spread: Number
    seed: Count
    sweep: bool


class TrainSettings(Record):
    """What ``train`` was asked for."""

    scheduling: Scheduling
    processes: Size
    rounds: Size
    epochs: Size
    seed: Count


class CompareSettings(Record):
    """What ``compare`` was asked for.

    Attributes:
        shapes: Names of what a step updates.
        peers: Names of optimizers.
        dtype: Of the parameters.
        fewest_rounds: Made in any case.
        most_rounds: Made if the seconds allow.
        seconds: To measure each shape.
        seed: Of gradients and of the order in which optimizers take turns.
    """

    shapes: list[str]
    peers: list[str]
    dtype: str
    fewest_rounds: Size
    most_rounds: Size
    seconds: Number
    seed: Count


class Result(Record, kw_only=True, tag_field="kind"):
    """What every result file says.

    Attributes:
        schema: Of the result files: another number whenever a field changes.
        command: That repeats it.
    """

    schema: Literal[2] = 2
    command: str


class Measurement(Result, kw_only=True):
    """What a measurement that may be cut short says besides.

    Attributes:
        environment: What it was measured on.
        partial: Whether it was cut short: what was not measured in all its rounds is left out.
        error: Why workers failed and ended it; null if they did not.
        warnings: Why one should not conclude from it.
    """

    environment: Environment
    partial: bool
    error: str | None
    warnings: list[str]


class Bench(Measurement, kw_only=True, tag="bench"):
    """``hogstream bench``."""

    settings: BenchSettings
    ceilings: Ceilings
    kernels: list[KernelTime]
    results: Annotated[list[BenchRun], Meta(min_length=1)]
    telemetry_cost: list[TelemetryCost] | None

    def __post_init__(self) -> None:
        """Checks that policies took turns: at one place all have as many rounds, and one result."""
        _check_turns(
            "updates_per_second",
            (
                (run.policy, (run.elements, run.workers), run.updates_per_second)
                for run in self.results
            ),
        )


class Train(Measurement, kw_only=True, tag="train"):
    """``hogstream train``."""

    settings: TrainSettings
    ceilings: Ceilings
    results: Annotated[list[TrainRun], Meta(min_length=1)]


class Compare(Measurement, kw_only=True, tag="compare"):
    """``hogstream compare``.

    Attributes:
        peer_versions: Of the optimizers' packages, by name; null of what is not installed.
    """

    settings: CompareSettings
    peer_versions: dict[str, str | None]
    results: list[PeerTime]
    skipped: list[Skipped]

    def __post_init__(self) -> None:
        """Checks that optimizers took turns: at one shape all have as many rounds."""
        _check_turns(
            "milliseconds", ((time.peer, time.shape, time.milliseconds) for time in self.results)
        )


class MachineCeilings(Result, kw_only=True, tag="ceilings"):
    """``hogstream ceilings``."""

    environment: Environment
    ceilings: Ceilings


class CompiledKernel(Record):
    """What one thread of a compiled kernel takes and does.

    Attributes:
        target: Device that it was compiled for, such as ``sm_90``.
        kernel: Which, as in ``--kernel``.
        dtype: Of parameters and gradients.
        eps_inside_sqrt: Where epsilon goes; null, as what follows, if the kernel updates nothing.
        coupled: Whether weight decay goes through the gradient.
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
        policy: Under which; null for a step of an optimizer.
        label: Such as ``submit`` or ``update``.
        lane: On which; null for all together.
        count: How often.
        total_us: Microseconds in all.
        mean_us: Microseconds each.
        p99_us: Likewise.
    """

    policy: str | None
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


class OutcomesOnGpu(Result, kw_only=True, tag="tests"):
    """The tests that only a GPU can pass: ``make gpu``.

    Attributes:
        passed: How many.
        failed: Their names.
        skipped: Likewise.
        seconds: Of all.
    """

    environment: Environment
    passed: Count
    failed: list[str]
    skipped: list[str]
    seconds: Number


AnyResult = (
    Bench
    | Train
    | Compare
    | MachineCeilings
    | Inspection
    | NsysProfile
    | NcuProfile
    | TorchProfile
    | OutcomesOnGpu
)


def _check_turns(field: str, results: Iterable[tuple[str, object, Spread]]) -> None:
    """Checks that all who took turns at one place have as many rounds, and stand there once."""
    rounds: dict[object, int] = {}
    seen = set()
    for index, (name, place, spread) in enumerate(results):
        mine = len(spread.samples)
        if rounds.setdefault(place, mine) != mine:
            raise ValueError(
                f"results[{index}].{field}.samples must hold {rounds[place]} rounds, as those of "
                f"others that took turns with it do, got {mine}"
            )
        if (name, place) in seen:
            raise ValueError(f"results[{index}] is of the same configuration as another")
        seen.add((name, place))
