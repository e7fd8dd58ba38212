"""The result files: every field of every command's ``--json`` stands here once, with its unit.

A file is one object, tagged by ``kind``. Writers build these types, and readers get them back: what
is not in a type is in no file. Null means that something was not measured; it is never 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

from msgspec import Meta, Struct

from hogstream.profiling.results.confidence import Interval, median_interval, ratio_interval

# Beyond these, arithmetic on a number overflows, and nothing was measured.
Number = Annotated[float, Meta(ge=0, le=1e18)]
Positive = Annotated[float, Meta(ge=1e-18, le=1e18)]
Count = Annotated[int, Meta(ge=0, lt=1 << 53)]
Size = Annotated[int, Meta(ge=1, lt=1 << 53)]
Bounds = tuple[Number, Number]


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

    @classmethod
    def of(cls, samples: Sequence[float]) -> Spread:
        """The median of samples, and how sure it is."""
        estimate = median_interval(samples)
        return cls(median=estimate.median, interval=estimate.bounds, samples=list(samples))

    @property
    def estimate(self) -> Interval:
        """The median and its interval, without bounds if there is none."""
        return _estimate(self.median, self.interval)


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
    copy_gigabytes_per_second: Spread | None
    update_shaped_gigabytes_per_second: Spread | None


class Ceilings(Record):
    """What a machine can do at most, measured once and kept.

    Attributes:
        measured: When, in UTC, ISO 8601.
        levels: Of its memory, smallest first.
        launches_per_second: Of updates of nothing down one lane.
        event_loop_turns_per_second: Of the event loop that would run here.
    """

    measured: str
    levels: Annotated[list[Level], Meta(min_length=1)]
    launches_per_second: Spread
    event_loop_turns_per_second: Spread


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
        gains: Its updates/s over those of each baseline that was measured, by policy.
    """

    gains: dict[str, Ratio]


class TrainRun(Run):
    """Trainings of a model, a sample a round.

    Attributes:
        test_accuracy: From 0 to 1.
        final_loss: Of the finished model over all training data.
        training_seconds: Of a training.
        epochs: How often each training example was seen.
        losses: Of the first round: seconds since its start, and the loss of the batch.
    """

    test_accuracy: Spread
    final_loss: Spread
    training_seconds: Spread
    epochs: Spread
    losses: list[tuple[Number, Number]]


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
    milliseconds: Spread
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
    with_telemetry: list[Number]
    without_telemetry: list[Number]
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
    milliseconds: Spread
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
    seed: int
    sweep: bool


class TrainSettings(Record):
    """What ``train`` was asked for."""

    scheduling: Scheduling
    processes: Size
    rounds: Size
    epochs: Size
    seed: int


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
    seed: int


class Result(Record, kw_only=True, tag_field="kind"):
    """What every result file says.

    Attributes:
        schema: Of the result files: another number whenever a field changes.
        command: That repeats it.
        environment: What it was measured on; null if a file was only read.
    """

    schema: Literal[2] = 2
    command: str
    environment: Environment


class Measurement(Result, kw_only=True):
    """What a measurement says besides.

    Attributes:
        partial: Whether it was cut short: what was not measured in all its rounds is left out.
        error: Why workers failed and ended it; null if they did not.
        warnings: Why one should not conclude from it.
    """

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
