"""CUDA lanes on the driver of tests: hundreds of random runs, and what those reach rarely."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cuda_testing import ILLEGAL_ADDRESS
from hogstream.scheduler.policies import select_policy
from mutations import MUTATIONS, copy_with
from scenarios import LAUNCH_FAILED, OUT_OF_MEMORY, Habits, Plan, Run, Scenario
from scheduler_testing import COUNTING, POLICIES
from simulation import simulate, simulate_scenario

CHUNK = 20
#: Policies, with that which takes updates of rows alone.
EVERY = [*POLICIES, "row-locked"]


@pytest.mark.slow
@pytest.mark.parametrize("first", range(0, 300, CHUNK))
def test_seeds(first: int, capfd: pytest.CaptureFixture[str]) -> None:
    with capfd.disabled():  # a seed that hangs says where, and ends Python
        for seed in range(first, first + CHUNK):
            simulate(seed)


HABITS = Habits(
    makers=["own", "lane"],
    keeps=True,
    hold=0,
    hold_lane=0,
    think=0,
    assign=0,
    part=0,
    rows=0,
    reads=0,
    spoil=0,
    fail=0,
    give_up=0,
    cancel=0,
)
SETTINGS: dict[str, Any] = {
    "policy": "lock-free",
    "workers": 3,
    "depth": 2,
    "batch": 1,
    "batch_of": "lane",
    "state": "shared",
    "read": "live",
    "telemetry": False,
    "staleness_aware": False,
    "on_error": "stop",
    "on_nonfinite": "apply",
}


def plan(*, updates: int = 30, end: str = "itself", after: int = 0, **changes: Any) -> Plan:
    """Of a scheduler that counts; changes are of its settings, and of its workers' habits."""
    habits = {name: changes.pop(name) for name in vars(HABITS) if name in changes}
    return Plan(
        settings=SETTINGS | changes,
        numbers=COUNTING,
        timeline=False,
        runs=[Run(updates, end, after)],
        habits=replace(HABITS, **habits),
    )


def scenario(*plans: Plan, **changes: Any) -> Scenario:
    """Of schedulers beside each other."""
    usual = Scenario(
        seed=0,
        loop="asyncio",
        dtype=torch.float32,
        sizes=[200],
        plans=plans,
        same=False,
        lock=False,
        failure=None,
        lost_after=None,
        graphs=256,
    )
    return replace(usual, **changes)


def with_batches(policy: str) -> dict[str, Any]:
    """Settings for batches, where the policy takes them."""
    return {"batch": 2} if select_policy(policy).takes_batches else {}


SCENARIOS = {
    **{
        f"a worker dies, {then}": scenario(plan(on_error=then, fail=0.3, policy="ordered"))
        for then in ("stop", "continue", "restart")
    },
    **{
        f"workers are cancelled, {policy}": scenario(
            plan(policy=policy, cancel=0.5, hold=0.3, hold_lane=0.3, on_error="restart")
        )
        for policy in POLICIES
    },
    **{
        f"the run is {end} while streams are held, {policy}": scenario(
            plan(policy=policy, end=end, after=5, hold=0.5, hold_lane=0.5, depth=4)
        )
        for end in ("cancelled", "cancelled at every turn", "scope left", "body fails")
        for policy in POLICIES
    },
    **{
        f"gradients are new, {policy}": scenario(
            plan(policy=policy, keeps=False, depth=8, hold_lane=0.5, **with_batches(policy))
        )
        for policy in POLICIES
    },
    **{
        f"a batch whose lanes hang back, {policy}, {read}{', locked' if lock else ''}": scenario(
            plan(
                policy=policy,
                batch=3,
                batch_of="lanes",
                hold_lane=0.3,
                think=0.3,
                updates=60,
                read=read,
                state="per-worker",
                on_nonfinite="skip",
                spoil=0.1,
            ),
            lock=lock,
        )
        for policy in ("lock-free", "ordered")
        for lock in (False, True)
        for read in ("live", "snapshot")
    },
    **{
        f"graphs are dropped in flight, batches of {of}": scenario(
            plan(batch=2, batch_of=of, depth=4, updates=60, hold_lane=0.3), graphs=1
        )
        for of in ("lane", "lanes")
    },
    "batches of changing lanes": scenario(
        plan(
            workers=4,
            batch=2,
            batch_of="lanes",
            depth=4,
            updates=100,
            state="per-worker",
            makers=["default"],
            hold_lane=0.4,
        )
    ),
    "updates by themselves among batches": scenario(
        plan(
            batch=3,
            batch_of="lanes",
            depth=4,
            updates=100,
            state="per-worker",
            assign=0.03,
            makers=["default"],
            hold_lane=0.4,
        )
    ),
    **{
        f"updates and reads of rows, {policy}, {read}": scenario(
            plan(
                policy=policy,
                rows=1 if policy == "row-locked" else 0.6,
                reads=0.5,
                read=read,
                depth=4,
                hold_lane=0.3,
                on_nonfinite="skip",
                spoil=0.1,
                part=0.3,
                cancel=0.1,
                **with_batches(policy),
            ),
            sizes=[65, 200],
        )
        for policy in EVERY
        for read in ("live", "snapshot")
    },
    **{
        f"two schedulers at once, {first} and {second}{', of the same' if same else ''}"
        f"{', locked' if lock else ''}": scenario(
            plan(policy=first), plan(policy=second, workers=2, depth=4), same=same, lock=lock
        )
        for first, second in (("lock-free", "ordered"), ("ordered", "ordered"), ("locked",) * 2)
        for same in (False, True)
        for lock in (False, True)
    },
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_scenario(name: str) -> None:
    for seed in range(3):
        simulate_scenario(replace(SCENARIOS[name], seed=seed), f"pytest -k {name!r}")


def failing(policy: str) -> Plan:
    """Of a scheduler that calls whatever lanes call."""
    rows = 1 if policy == "row-locked" else 0.2
    settings = {"read": "snapshot", "on_nonfinite": "skip", **with_batches(policy)}
    return replace(plan(policy=policy, rows=rows, reads=0.2, **settings), timeline=True)


#: What lanes call of the driver, while they are opened, are open and are closed.
CALLED = (
    "cuCtxPushCurrent_v2",
    "cuCtxPopCurrent_v2",
    "cuThreadExchangeStreamCaptureMode",
    "cuCtxGetStreamPriorityRange",
    "cuStreamCreateWithPriority",
    "cuStreamWaitEvent",
    "cuStreamWriteValue64_v2",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventSynchronize",
    "cuEventElapsedTime",
    "cuEventDestroy_v2",
    "cuLaunchKernel",
    "cuMemsetD32Async",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemHostAlloc",
    "cuMemHostGetDevicePointer_v2",
    "cuMemFreeHost",
    "cuMemAlloc_v2",
    "cuMemFree_v2",
    "cuModuleLoadData",
    "cuModuleGetFunction",
    "cuGraphCreate",
    "cuGraphAddKernelNode_v2",
    "cuGraphAddMemsetNode",
    "cuGraphInstantiateWithFlags",
    "cuGraphDestroy",
    "cuGraphLaunch",
    "cuGraphExecDestroy",
)


@pytest.mark.parametrize("function", CALLED)
@pytest.mark.parametrize("policy", EVERY)
def test_a_call_that_fails(function: str, policy: str) -> None:
    """It is somebody's error, and nobody hangs: whichever call it is."""
    failures = ((1, OUT_OF_MEMORY), (2, LAUNCH_FAILED), (7, ILLEGAL_ADDRESS), (30, 1))
    # Of each function all four, and of each policy: two of them at a time.
    place = CALLED.index(function) + EVERY.index(policy)
    for nth, error in failures[place % 2 :: 2]:
        failure = function, nth, error
        simulate_scenario(scenario(failing(policy), failure=failure), f"pytest -k {function}")


@pytest.mark.parametrize("policy", EVERY)
def test_a_device_that_is_lost(policy: str) -> None:
    rows = 1 if policy == "row-locked" else 0
    for lost_after in (0, 1, 2, 5, 20):
        for usual in (failing(policy), plan(policy=policy, depth=8, rows=rows)):
            lost = scenario(usual, lost_after=lost_after, seed=lost_after)
            simulate_scenario(lost, f"pytest -k {policy}")


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_fault_made_on_purpose_can_be_made(name: str, tmp_path: Path) -> None:
    """Its texts are still in the sources; whether seeds find it, `make simulate` says."""
    copy_with(MUTATIONS[name], tmp_path / "hogstream")
