"""Scenarios for schedulers on the driver of tests: all that is drawn from one seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from cuda_testing import ILLEGAL_ADDRESS
from fuzzing import LOOPS, Chance
from hogstream.scheduler.policies import POLICIES, make_gate, select_policy
from scheduler_fuzz import ENDS, LEAVES
from scheduler_testing import COUNTING

OUT_OF_MEMORY, LAUNCH_FAILED = 2, 719

#: What may fail, and about how often a short run calls it.
FAILURES = {
    "cuEventCreate": 30,
    "cuStreamCreateWithPriority": 4,
    "cuMemHostAlloc": 2,
    "cuMemAlloc_v2": 2,
    "cuModuleLoadData": 2,
    "cuEventRecord": 60,
    "cuStreamWaitEvent": 60,
    "cuStreamWriteValue64_v2": 40,
    "cuLaunchKernel": 60,
    "cuGraphLaunch": 10,
    "cuGraphInstantiateWithFlags": 4,
    "cuGraphAddKernelNode_v2": 8,
    "cuMemsetD32Async": 20,
    "cuMemcpyDtoHAsync_v2": 20,
    "cuMemcpyDtoDAsync_v2": 20,
    "cuEventElapsedTime": 20,
}

#: Of these, what a batch calls when it is launched.
FAILURES_OF_BATCHES = (
    "cuEventRecord",
    "cuStreamWriteValue64_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuGraphLaunch",
)

#: Whose failure leaves something behind: there is no other way to be rid of it.
LEAVES_SOMETHING = (
    "cuCtxPopCurrent_v2",
    "cuThreadExchangeStreamCaptureMode",
    "cuEventDestroy_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuGraphExecDestroy",
)


@dataclass(frozen=True)
class Habits:
    """What workers do in an iteration, with which probability.

    Attributes:
        makers: What makes a gradient; one of these.
        keeps: Whether a worker has ``depth`` gradients, and writes them again; else each is new.
        hold: Hold the stream that makes the gradient, for a while.
        hold_lane: Hold a lane's stream, for a while.
        think: Sleep on the event loop.
        assign: Assign hyperparameters to the scheduler.
        part: Update some parameters only.
        rows: Update all rows of parameters, in some order, in place of the parameters.
        reads: Read some rows before.
        spoil: Submit a gradient of NaN.
        fail: Fail before they submit, or after.
        give_up: Stop waiting for ``submit``.
        cancel: Are cancelled at some moment.
    """

    makers: Sequence[str]
    keeps: bool
    hold: float
    hold_lane: float
    think: float
    assign: float
    part: float
    rows: float
    reads: float
    spoil: float
    fail: float
    give_up: float
    cancel: float


@dataclass(frozen=True)
class Run:
    """One run of a scheduler, and how it ends.

    Attributes:
        updates: How many it is asked for.
        end: A name in ``ENDS``, or one of ``LEAVES``.
        after: How many updates were submitted by then.
    """

    updates: int
    end: str
    after: int


@dataclass(frozen=True)
class Plan:
    """What one scheduler does.

    Attributes:
        settings: Of the scheduler.
        numbers: Its hyperparameters.
        timeline: Whether one is taken down.
        runs: One after the other.
        habits: Of the workers.
    """

    settings: dict[str, Any]
    numbers: dict[str, Any]
    timeline: bool
    runs: Sequence[Run]
    habits: Habits

    @property
    def counts(self) -> bool:
        """Whether each update subtracts ``lr`` from each element, or a whole part of it."""
        return bool(self.numbers == COUNTING)

    @property
    def counts_whole(self) -> bool:
        """Whether it subtracts all of it."""
        return self.counts and not self.settings["staleness_aware"]

    @property
    def locks_rows(self) -> bool:
        """Whether each row of an update has a lock."""
        return bool(self.settings["policy"] == "row-locked")

    @property
    def orders(self) -> bool:
        """Whether updates come after each other as they were submitted, whatever was flushed."""
        settings = self.settings
        ordered = settings["policy"] == "ordered" and settings["batch"] == 1
        return bool(ordered or settings["workers"] == 1)


@dataclass(frozen=True)
class Scenario:
    """What is run.

    Attributes:
        seed: Of this, of what workers do, and of the driver.
        loop: Kind of the event loop.
        dtype: Of the parameters.
        sizes: How many elements each parameter has.
        plans: Of the schedulers, which run beside each other.
        same: Whether they update the same parameters.
        lock: Whether each update holds a process lock.
        failure: The function of the driver that fails, which of its calls, and with which error.
        lost_after: After how many updates were submitted the device is lost.
        graphs: How many graphs are kept.
    """

    seed: int
    loop: str
    dtype: torch.dtype
    sizes: Sequence[int]
    plans: Sequence[Plan]
    same: bool
    lock: bool
    failure: tuple[str, int, int] | None
    lost_after: int | None
    graphs: int

    @property
    def leaks(self) -> bool:
        """Whether a call fails without which something is left."""
        return self.failure is not None and self.failure[0] in LEAVES_SOMETHING

    @property
    def fails(self) -> bool:
        """Whether the driver fails at anything."""
        return self.failure is not None or self.lost_after is not None

    def loses_nothing(self, plan: Plan) -> bool:
        """Whether no update of a scheduler is lost in another, in whatever order they come."""
        return self.is_serial(plan) or (plan.locks_rows and not self.same)

    def is_serial(self, plan: Plan) -> bool:
        """Whether a scheduler's updates come after each other, all that is written to one place."""
        settings = plan.settings
        beside = settings["workers"] > 1
        policy = settings["policy"]
        in_turn = policy in ("ordered", "locked", "awaited", "bounded:0")
        branches = settings["batch"] > 1 and settings["batch_of"] == "lanes"
        locked = self.lock and (not branches or policy == "ordered" or not beside)
        return bool(locked if self.same else in_turn or locked or not beside)


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    chance = Chance(seed)
    two = chance.some(0.25)
    same = two and chance.some(0.5)
    counts = same or chance.some(0.6)
    mishap = chance.choice(["none"] * 6 + ["failure", "failure", "lost"])
    error = chance.choice([OUT_OF_MEMORY, ILLEGAL_ADDRESS, LAUNCH_FAILED])
    lost_after = chance.choice([0, 1, 3, 10, 25])
    lock = chance.some(0.15)
    sizes = [chance.choice([1, 3, 64, 65, 200]) for _ in range(chance.choice([1, 1, 2]))]
    plans = [_draw_plan(chance, counts, same, len(sizes) > 1) for _ in range(1 + two)]
    batches = any(plan.settings["batch"] > 1 for plan in plans)
    function = chance.choice([*FAILURES, *(4 * FAILURES_OF_BATCHES if batches else ())])
    failure = (function, chance.randrange(1, FAILURES[function]), error)
    return Scenario(
        seed=seed,
        loop=chance.choice(LOOPS),
        dtype=chance.choice([torch.float32, torch.float64]),
        sizes=sizes,
        plans=plans,
        same=same,
        lock=lock,
        failure=failure if mishap == "failure" else None,
        lost_after=lost_after if mishap == "lost" else None,
        graphs=chance.choice([2, 6, 256, 256]),
    )


def _draw_plan(chance: Chance, counts: bool, same: bool, parts: bool) -> Plan:
    settings = _draw_settings(chance)
    if same:  # and so is ``ms``, of how many workers ever
        settings["state"] = "shared"
    gated = make_gate(select_policy(settings["policy"]), int) is not None
    may_assign = settings["workers"] == 1 or not gated  # else it may come between
    may_spoil = settings["on_nonfinite"] != "apply"
    locks_rows = settings["policy"] == "row-locked"
    may_part = not settings["telemetry"]  # else counts are of all blocks, or rows
    numbers: dict[str, Any] = COUNTING
    if not counts:
        numbers = {
            "lr": chance.choice([0.01, 0.1]),
            "alpha": chance.choice([0.9, 0.99]),
            "weight_decay": chance.choice([0, 0.01]),
            "eps_inside_sqrt": chance.some(0.5),
            "decoupled_weight_decay": chance.some(0.3),
            "maximize": chance.some(0.2),
            "centered": chance.some(0.3),
            "momentum": chance.choice([0, 0, 0.5, 0.9]),
            "lr_in_momentum": chance.some(0.3),
        }
    makers = chance.choice([["default"], ["own"], ["lane"], ["default", "own", "lane", "loop"]])
    habits = Habits(
        makers=makers,
        keeps=chance.some(0.6),
        hold=chance.choice([0, 0, 0.2]),
        hold_lane=chance.choice([0, 0, 0.1]),
        think=chance.choice([0, 0, 0.3]),
        assign=chance.choice([0, 0.2]) if may_assign else 0,
        part=chance.choice([0, 0.3]) if parts and may_part else 0,
        rows=1 if locks_rows else chance.choice([0, 0, 0.5]) if may_part else 0,
        reads=chance.choice([0, 0, 0.3]),
        spoil=chance.choice([0, 0.15]) if may_spoil else 0,
        fail=chance.choice([0, 0, 0, 0.1]),
        give_up=chance.choice([0, 0, 0.1]),
        cancel=chance.choice([0, 0, 0.1]),
    )
    repeats = settings["batch"] > 1 and chance.some(0.7)
    if repeats:  # the same gradients come again, in the same order, and are graphs
        workers, depth = settings["workers"], settings["depth"]
        most = depth * (workers if settings["batch_of"] == "lanes" else 1)
        batch = chance.choice([most, max(most // 2, 2), settings["batch"]])
        if settings["batch_of"] == "lanes" and workers > 2:  # of other lanes each time
            batch = chance.choice([batch, workers - 1, 2])
            settings["depth"] = max(depth, 3)
        settings |= {"staleness_aware": False, "read": "live", "batch": batch}
        if not same:
            settings["state"] = chance.choice(["shared", "per-worker", "per-worker"])
        calm: dict[str, Any] = dict.fromkeys(("think", "fail", "give_up", "cancel"), 0)
        spoil = habits.spoil if settings["on_nonfinite"] == "skip" else 0
        hold = chance.choice([habits.hold_lane, 0.2, 0.4])
        rarely: dict[str, Any] = {"assign": 0.02 * may_assign, "part": 0.05 if habits.part else 0}
        habits = replace(habits, keeps=True, spoil=spoil, hold_lane=hold, **calm, **rarely)
        if chance.some(0.7):
            habits = replace(habits, makers=[chance.choice(["default", "own", "loop"])])
    return Plan(
        settings=settings,
        numbers=numbers,
        timeline=chance.some(0.2),
        runs=[
            Run(
                updates=100 if repeats else chance.choice([1, 5, 20, 40]),
                end=chance.choice(["itself"] * 8 + [*ENDS, *LEAVES]),
                after=chance.choice([0, 1, 3, 10, 30]),
            )
            for _ in range(chance.choice([1, 1, 2]))
        ],
        habits=habits,
    )


def _draw_settings(chance: Chance) -> dict[str, Any]:
    bound = chance.choice([0, 1, 2, 5])
    policy = chance.choice([*POLICIES, "lock-free", "ordered", f"bounded:{bound}"])
    workers, depth = chance.randrange(1, 7), chance.choice([1, 1, 2, 3, 4, 8])
    batch_of = chance.choice(["lane", "lanes"])
    most = depth * (workers if batch_of == "lanes" else 1)
    batches = select_policy(policy).takes_batches and chance.some(0.7)
    batch = chance.choice([most, max(depth // 2, 1), workers, chance.randrange(1, most + 1)])
    return {
        "policy": policy,
        "workers": workers,
        "depth": depth,
        "batch": min(batch, most) if batches else 1,
        "batch_of": batch_of,
        "state": chance.choice(["shared", "shared", "per-worker"]),
        "read": chance.choice(["live", "live", "snapshot"]),
        "telemetry": chance.some(0.3),
        "staleness_aware": chance.some(0.2),
        "on_error": chance.choice(["stop", "continue", "restart"]),
        "on_nonfinite": chance.choice(["apply", "skip", "raise"]),
    }
