"""The result files: every field stands once, with its unit.

A file is one object, tagged by ``kind``. Writers build these types, and readers get them back: what
is not in a type is in no file. Null means that something was not measured; it is never 0.

Here are those of what is measured: ``bench``, ``train``, ``decide``, ``compare``, ``models`` and
``ceilings``.
``profile_schema`` has those of what is looked into, and ``records`` what all are made of.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

from msgspec import Meta

from hogstream.profiling.results.records import (
    Ceilings,
    Count,
    Environment,
    Measurement,
    Number,
    Positive,
    PositiveSpread,
    Ratio,
    Record,
    Result,
    Signed,
    SignedSpread,
    Size,
    Spread,
)


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


class Run(Record, kw_only=True, omit_defaults=True):
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
        stale_rows_fraction: Of rows, in updates of rows; left out without those or telemetry.
        updates_by_worker: That landed.
        dropped_by_worker: That were submitted and did not land.
        nonfinite_by_worker: That were left out, as their gradient held an infinity or NaN.
        restarts_by_worker: How often each was started again.
        failures: Why workers failed, by their number.
        dead: Process ids of workers that were killed.
        partial: Whether a run ended early.
        share_of_ceilings: Of the machine's.
        torch_threads: How many torch used for operations of a worker; null if it was not noted.
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
    stale_rows_fraction: Number | None = None
    updates_by_worker: list[Count]
    dropped_by_worker: list[Count]
    nonfinite_by_worker: list[Count]
    restarts_by_worker: list[Count]
    failures: dict[str, str]
    dead: list[Count]
    partial: bool
    share_of_ceilings: Shares
    torch_threads: Size | None


class BenchRun(Run, kw_only=True):
    """A run of simulated workers.

    Attributes:
        gains: Its updates/s over those of each other policy that took turns with it, by policy; a
            policy is left out if none of its updates landed in one of the rounds.
    """

    gains: dict[str, Ratio]


class TrainRun(Run, kw_only=True):
    """Trainings of a workload, a sample a round.

    ``policy`` says who trained: a policy, ``one alone`` (lock-free with one worker), or ``by hand``
    (plain processes with ``torch.optim.RMSprop`` under a lock, without a scheduler, of which
    latencies and staleness are not known).

    Attributes:
        reached: Whether the target was reached, in each round.
        seconds_to_target: Until the parameters were copied that reached it; of a round that did
            not, until its end: it would have taken longer.
        updates_to_target: The same in updates.
        metric: Of the target, at the end; null if it was no number in one of the rounds.
        evaluations: How many copies of the parameters were evaluated, in all rounds.
        evaluation_share: What that took of the seconds of all trainings, on a thread of its own.
        losses: Of the first round: seconds since its start, and the mean loss of the updates since
            the point before, as long as it was a number.
        metrics: Of the first round: seconds since its start, and the metric.
        gains: How many times as fast it reached the target as each other, by policy, if both did in
            more than half of the rounds.
    """

    reached: list[bool]
    seconds_to_target: PositiveSpread
    updates_to_target: PositiveSpread
    metric: SignedSpread | None
    evaluations: Size
    evaluation_share: Number
    losses: list[tuple[Number, Signed]]
    metrics: list[tuple[Number, Signed]]
    gains: dict[str, Ratio]

    def __post_init__(self) -> None:
        """Checks that there is a sample of each round."""
        for name in ("seconds_to_target", "updates_to_target"):
            count = len(getattr(self, name).samples)
            if count != len(self.reached):
                raise ValueError(f"{name} must hold {len(self.reached)} rounds, got {count}")

    @property
    def mostly_reached(self) -> bool:
        """Whether the target was reached in more than half of the rounds: medians are of it."""
        return 2 * sum(self.reached) > len(self.reached)


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


class TodayRun(Record):
    """Updates as people make them today, at one size and worker count, in the same rounds.

    Attributes:
        spread_over: ``threads`` or ``processes``: what workers are.
        update: What updates: ``torch.optim.RMSprop`` or ``rmsprop_``.
        lock: Whether a lock of Python is held for each update.
        workers: How many.
        elements: Of the shared parameters.
        updates_per_second: A sample a round.
        lock_free_ratio: Lock-free's updates/s over these; null if it did not take turns with them.
    """

    spread_over: Literal["threads", "processes"]
    update: str
    lock: bool
    workers: Size
    elements: Size
    updates_per_second: PositiveSpread
    lock_free_ratio: Ratio | None

    @property
    def name(self) -> str:
        """What it is, in words."""
        return f"{self.spread_over} with {self.update}{' under a lock' if self.lock else ''}"


class PeerTime(Record):
    """One optimizer's step at one shape, after a backward that makes new gradients.

    What memory can do is of passes in a loop, in which what fits the caches stays there.

    Attributes:
        shape: As in ``--shapes``.
        tensors: That a step updates.
        elements: In all of them.
        peer: Name of the optimizer, or of what memory can do.
        milliseconds: Of a step: a sample is the mean of a turn's.
        iteration_milliseconds: Of ``zero_grad``, forward, backward and step, in the same turns;
            null of what memory can do.
        bytes_per_element: Of the least traffic that it needs.
        operations_per_element: Of its arithmetic.
        gigabytes_per_second: 1e9 bytes/s of that traffic.
        share_of_ceiling: Of the fastest update-shaped pass over as many elements; null if that was
            not measured, and of what moves more or fewer bytes an element: it does not bound that.
        time_against_hogstream: Its step's time over ours; null if ours was not measured.
        iteration_against_hogstream: Its iteration's time over ours; null if not both were measured.
        steps_per_sample: Steps of a turn.
        launches: Kernels of a step on a GPU; null if not counted.
        host_us: Until a step returns while a GPU works on; null on a CPU.
    """

    shape: str
    tensors: Size
    elements: Size
    peer: str
    milliseconds: PositiveSpread
    iteration_milliseconds: PositiveSpread | None
    bytes_per_element: Size
    operations_per_element: Count
    gigabytes_per_second: Positive
    share_of_ceiling: Number | None
    time_against_hogstream: Ratio | None
    iteration_against_hogstream: Ratio | None
    steps_per_sample: Size
    launches: Count | None
    host_us: Number | None


class ModelRate(Record):
    """Trainings of a model in one way, beside the other ways in the same rounds.

    Attributes:
        model: Its name.
        spread_over: ``threads`` or ``processes``: what workers are.
        workers: How many.
        way: ``hogstream``, or what one would do by hand.
        updates_per_second: A sample a round.
        hogstream_ratio: Hogstream's updates/s over these; null of its own.
    """

    model: str
    spread_over: Literal["threads", "processes"]
    workers: Size
    way: str
    updates_per_second: PositiveSpread
    hogstream_ratio: Ratio | None


class Skipped(Record):
    """An optimizer that could not be measured at a shape (``all``: none), and why."""

    shape: str
    peer: str
    reason: str


RunBy = Literal["loop", "threads", "processes", "hand"]


class Way(Record):
    """A way to run a training, a sample a round. Each round begins with the same parameters.

    Attributes:
        run_by: ``loop``: one plain loop, without a scheduler. ``threads`` or ``processes``: the
            scheduler, whose workers are such. ``hand``: plain processes with
            ``torch.optim.RMSprop``, under a lock.
        policy: What an update waits for; null of a plain loop.
        workers: How many.
        torch_threads: How many torch had for each; a plain loop has all cores or one, whichever was
            faster.
        updates_per_second: Of all workers.
        latency_us: From an update's submission to its landing, on average; null where there is no
            scheduler.
        lock_wait_us: Of ``locked``: that latency less lock-free's with as many workers, which is
            what its updates wait for the lock; null of others.
        staleness: Versions between a worker's read and the landing of its update, on average; null
            where there is no scheduler.
        most_staleness: The largest.
        updates_compared: After how many updates losses are compared: as many as a plain loop and
            this made in every round.
        loss: After so many updates, the mean over the batches of the last fifth of them; null if
            one was not finite, then or at the end of a turn.
        loss_over_loop: That less a plain loop's after as many updates.
        loss_over_loop_in_time: The same after the same time, as many updates as there were by then.
    """

    run_by: RunBy
    policy: str | None
    workers: Size
    torch_threads: Size
    updates_per_second: PositiveSpread
    latency_us: Spread | None
    lock_wait_us: SignedSpread | None
    staleness: Spread | None
    most_staleness: Count | None
    updates_compared: Size
    loss: SignedSpread | None
    loss_over_loop: SignedSpread | None
    loss_over_loop_in_time: SignedSpread | None

    @property
    def name(self) -> str:
        """What it is, in words."""
        return way_name(self.run_by, self.policy, self.workers)


def way_name(run_by: RunBy, policy: str | None, workers: int) -> str:
    """A way to run a training, in words; the arguments are as in ``Way``."""
    if run_by == "loop":
        return "a plain loop"
    if workers == 1:
        return f"one worker in a {'thread' if run_by == 'threads' else 'process'}"
    spread_over = "processes by hand" if run_by == "hand" else run_by
    return f"{policy} over {spread_over} with {workers} workers"


class UnderLock(Record):
    """How much of an iteration would be under a lock, with some number of workers.

    Attributes:
        workers: How many.
        torch_threads: How many threads torch has for each.
        gradient_ms: Of a batch, forward and backward, with nothing beside it.
        update_ms: Of the kernel alone: for so long a lock would be held.
        most_gain: How many times as fast as ``locked`` lock-free can be at most, by Amdahl's law.
    """

    workers: Size
    torch_threads: Size
    gradient_ms: PositiveSpread
    update_ms: PositiveSpread
    most_gain: PositiveSpread


class Scheduling(Record):
    """How the scheduler ran; the fields of ``SchedulerSettings``, which documents them."""

    depth: Size
    batch: Size
    batch_of: str
    state: str
    read: str
    buffers: str
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
    """What ``train`` was asked for.

    Attributes:
        workload: Its name.
        metric: What is to reach the target.
        target: Its value.
        higher_is_better: Whether a metric above the target has reached it, or one below.
        updates: After how many a training was given up; null for any number.
        seconds: The same in seconds.
        hyperparameters: Numbers and switches of the update, by name.
        scheduling: How the scheduler ran.
        processes: How many the workers were spread over.
        rounds: In which all took turns.
        seed: Of all random input.
    """

    workload: str
    metric: str
    target: Signed
    higher_is_better: bool
    updates: Size | None
    seconds: Positive | None
    hyperparameters: dict[str, float | bool]
    scheduling: Scheduling
    processes: Size
    rounds: Size
    seed: Count


class DecideSettings(Record):
    """What ``decide`` was asked for.

    Attributes:
        make: What makes the model, loss and batches.
        workers: Worker counts.
        processes: Whether other processes were measured as well.
        rounds: In which the ways took turns.
        seconds: To measure for, besides the start of processes.
        lr: Learning rate of all.
    """

    make: str
    workers: list[Size]
    processes: bool
    rounds: Size
    seconds: Number
    lr: Number


class CompareSettings(Record):
    """What ``compare`` was asked for.

    Attributes:
        shapes: Names of what a step updates.
        peers: Names of optimizers.
        dtype: Of the parameters.
        fewest_rounds: Made in any case.
        most_rounds: Made if the seconds allow.
        seconds: To measure each shape.
        seed: Of parameters, data and the order in which optimizers take turns.
    """

    shapes: list[str]
    peers: list[str]
    dtype: str
    fewest_rounds: Size
    most_rounds: Size
    seconds: Number
    seed: Count


class Bench(Measurement, kw_only=True, tag="bench"):
    """``hogstream bench``.

    Attributes:
        today: What people run today, if ``--today`` asked for it.
    """

    settings: BenchSettings
    ceilings: Ceilings
    kernels: list[KernelTime]
    results: Annotated[list[BenchRun], Meta(min_length=1)]
    telemetry_cost: list[TelemetryCost] | None
    today: list[TodayRun] | None

    def __post_init__(self) -> None:
        """Checks that policies took turns: at one place all have as many rounds, and one result."""
        _check_turns(
            "updates_per_second",
            (
                (run.policy, (run.elements, run.workers), run.updates_per_second)
                for run in self.results
            ),
        )
        _check_turns(
            "updates_per_second",
            (
                (run.name, (run.elements, run.workers), run.updates_per_second)
                for run in self.today or ()
            ),
        )


class Train(Measurement, kw_only=True, tag="train"):
    """``hogstream train``: the policies first, then those beside them."""

    settings: TrainSettings
    ceilings: Ceilings
    results: Annotated[list[TrainRun], Meta(min_length=1)]


class Decision(Measurement, kw_only=True, tag="decide"):
    """``hogstream decide``.

    Attributes:
        elements: Of the parameters that are trained.
        answer: Which way to use, in a sentence; or that all diverged, so that there is none.
        use: Its number among the results; if all diverged, as if none had.
        next_best: The number of the fastest of the others; null if there is none.
        gain: Updates/s of the way to use over those of the next best; null if there is none.
        under_lock: For each worker count.
        results: The simplest way first.
    """

    settings: DecideSettings
    elements: Size
    answer: str
    use: Count
    next_best: Count | None
    gain: Ratio | None
    under_lock: list[UnderLock]
    results: Annotated[list[Way], Meta(min_length=1)]

    def __post_init__(self) -> None:
        """Checks that ways took turns, and that there are those which it names."""
        _check_turns(
            "updates_per_second",
            ((way.name, None, way.updates_per_second) for way in self.results),
        )
        for name, index in (("use", self.use), ("next_best", self.next_best)):
            if index is not None and index >= len(self.results):
                raise ValueError(f"{name} must be less than {len(self.results)}, got {index}")


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


class ModelRates(Measurement, kw_only=True, tag="models"):
    """``make models``.

    Attributes:
        rounds: In which ways took turns.
        seconds: Of each way, in each round.
    """

    rounds: Size
    seconds: Positive
    results: list[ModelRate]

    def __post_init__(self) -> None:
        """Checks that ways took turns: at one place all have as many rounds, and one result."""
        _check_turns(
            "updates_per_second",
            (
                (rate.way, (rate.model, rate.spread_over, rate.workers), rate.updates_per_second)
                for rate in self.results
            ),
        )


class MachineCeilings(Result, kw_only=True, tag="ceilings"):
    """``hogstream ceilings``."""

    environment: Environment
    ceilings: Ceilings


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
