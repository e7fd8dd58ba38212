"""Random runs of schedulers on the driver of tests: ``simulate(seed)`` runs one and checks it.

Scenarios are drawn from a seed, and so are the delays of the driver. Threads go on as the system
lets them, so a seed that fails may need some tries; but the driver finds a wait that is missing by
what comes before what, and not by what came first.

Gradients lie in memory that is poisoned with NaN, and given to others, the moment nobody refers to
it; or the worker keeps it and writes it again as soon as ``submit`` allows.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import pytest
import torch

from fuzzing import Chance, run_in_loop, try_seed
from gpu_testing import BLOCK, TestGpu, faults, gpu_of_tests, scheduler_on
from gradient_making import Memory, Streams, within
from hogstream.kernels.backends import numpy_kernels
from hogstream.kernels.hyperparameters import Hyperparameters
from hogstream.kernels.launch_table import LaunchTable
from hogstream.kernels.operands import Operands
from hogstream.scheduler import (
    RunReport,
    SharedParameters,
    Timeline,
    WorkerContext,
    WorkerError,
)
from hogstream.scheduler.lanes import cuda, cuda_loop
from hogstream.scheduler.lanes.compiled import compile_loop
from hogstream.scheduler.lanes.process_lock import ProcessLock
from hogstream.scheduler.update_state import UpdateState, kinds_of
from scenarios import Plan, Run, Scenario, draw
from scheduler_fuzz import ENDS, LEAVES
from scheduler_testing import part_of

#: Of parameters, by how many elements they have: several of them are tables.
_SHAPES = {1: (1, 1), 3: (3,), 64: (16, 4), 65: (13, 5), 200: (25, 8)}


@dataclass(frozen=True)
class _Case:
    """A scenario, to be run."""

    scenario: Scenario

    def run(self) -> None:
        """Runs it, and checks what came of it.

        Raises:
            AssertionError: If the driver has found anything wrong, or anything else is.
            Exception: Whatever the code under test raised.
        """
        failure: Exception | None = None
        with gpu_of_tests(self.scenario.seed, abort=False) as gpu:
            destroyed = gpu.tests.streams_destroyed
            try:
                self._run_on(gpu)
            except Exception as error:
                failure = error
        if found := faults(gpu, leaks=self.scenario.leaks):
            raise AssertionError("\n".join(found[:8])) from failure
        if failure is not None:
            raise failure
        assert gpu.tests.streams_destroyed == destroyed, "a stream was destroyed"

    def _run_on(self, gpu: TestGpu) -> None:
        simulation = _Simulation(self.scenario, gpu)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cuda, "_GRAPHS", self.scenario.graphs)
            run_in_loop(self.scenario.loop, simulation.main())
        simulation.memory.close()
        simulation.streams.release()
        for stream in (0, *gpu.streams):
            gpu.tests.wait_idle(stream)
        simulation.check_parameters()


def simulate(seed: int) -> None:
    """Runs the scenario of a seed, for a minute at most.

    Raises:
        AssertionError: If anything is wrong; it says how to run the seed again.
    """
    simulate_scenario(draw(seed), f"make simulate SEEDS={seed}:{seed + 1}")


def simulate_scenario(scenario: Scenario, command: str) -> None:
    """Runs a scenario, for a minute at most.

    Args:
        scenario: What to run.
        command: Runs it again.

    Raises:
        AssertionError: If anything is wrong.
    """
    _compile()
    try_seed(lambda _: _Case(scenario), scenario.seed, command)


class Broken(Exception):
    """What workers fail with."""


class _BodyFailed(Exception):
    pass


class Submitted(NamedTuple):
    """What a worker submitted.

    Attributes:
        place: How many were submitted before.
        worker: Who did.
        value: Of all elements of the gradient.
        only: The parameters that it updates; None for all.
        numbers: It is made with.
    """

    place: int
    worker: int
    value: float
    only: tuple[str, ...] | None
    numbers: Hyperparameters


class _Simulation:
    """A scenario while it runs.

    Attributes:
        submitted: How many updates were, by all workers.
    """

    def __init__(self, scenario: Scenario, gpu: TestGpu) -> None:
        self.scenario, self.gpu = scenario, gpu
        self.submitted = 0
        self.lost = False
        self.streams = Streams(gpu)
        self.memory = Memory(gpu, sum(scenario.sizes), scenario.dtype)
        self.memory.before_poison = self._before_poison
        self._awaited: list[tuple[int, asyncio.Future[None]]] = []
        lock = ProcessLock() if scenario.lock else None
        shared = [self.make_parameters() for _ in range(1 if scenario.same else 2)] * 2
        self.programs = [
            _Program(self, index, plan, shared[index], lock)
            for index, plan in enumerate(scenario.plans)
        ]

    def make_parameters(self) -> SharedParameters:
        """Zeros."""
        scenario = self.scenario
        return SharedParameters(
            {
                f"p{index}": torch.zeros(_SHAPES[size], dtype=scenario.dtype)
                for index, size in enumerate(scenario.sizes)
            }
        )

    async def main(self) -> None:
        """All schedulers beside each other."""
        for program in self.programs:
            program.make_parameters()
        if self.scenario.failure is not None:
            self.gpu.tests.fail(*self.scenario.failure)
        mains = (program.main() for program in self.programs)
        for error in await asyncio.gather(*mains, return_exceptions=True):
            if error is not None:
                raise error

    def note_submission(self) -> int:
        """Counts an update that is submitted now, which may be what others wait for."""
        self.submitted += 1
        if self.submitted - 1 == self.scenario.lost_after:
            self.lose()
        for count, future in self._awaited:
            if count <= self.submitted and not future.done():
                future.set_result(None)
        return self.submitted

    def lose(self) -> None:
        """The device is lost; nobody cares for what gradients hold."""
        self.lost = True
        self.memory.close()
        self.gpu.tests.lose()

    async def until(self, count: int, task: asyncio.Task[Any]) -> None:
        """Waits until so many more were submitted, or a task is done."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if count:
            self._awaited.append((self.submitted + count, future))
            await asyncio.wait({task, future}, return_when=asyncio.FIRST_COMPLETED)

    def _before_poison(self, address: int) -> None:
        """Has a gradient made that no update has waited for, or none that was applied."""
        if self.streams.unsubmitted.pop(address, None) is not None or self.scenario.fails:
            self.streams.settle()

    def check_parameters(self) -> None:
        """Held to what was submitted and has landed."""
        if self.scenario.same:
            self.programs[0].check_parameters(self.programs)
        else:
            for program in self.programs:
                program.check_parameters([program])


class _Program:
    """A scheduler while it runs.

    Attributes:
        landed: What is in the parameters; some of it may have been dropped.
        updates: How many of them were reported as landed.
    """

    def __init__(
        self,
        simulation: _Simulation,
        index: int,
        plan: Plan,
        shared: SharedParameters,
        lock: ProcessLock | None,
    ) -> None:
        self._simulation, self._plan, self._shared = simulation, plan, shared
        self._gpu = simulation.gpu
        self._scenario = simulation.scenario
        beside = self._scenario.plans if self._scenario.same else [plan]
        self.serial = all(map(self._scenario.is_serial, beside))
        self._loses_nothing = all(map(self._scenario.loses_nothing, beside))
        self._counts_whole = all(each.counts_whole for each in beside)
        workers = plan.settings["workers"]
        seed = self._scenario.seed
        self._chances = [Chance(f"{seed}/{index}/{worker}") for worker in range(workers)]
        self._scheduler = scheduler_on(
            shared,
            timeline=Timeline() if plan.timeline else None,
            process_lock=lock,
            **plan.settings,
            **plan.numbers,
        )
        self._own = [self._gpu.torch.make_stream() for _ in range(workers)]
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        self._contexts: dict[int, WorkerContext] = {}
        self._log: dict[tuple[int, int], Submitted] = {}
        self._unsure: set[int] = set()
        self.landed: list[Submitted] = []
        self.updates = 0

    def make_parameters(self) -> None:
        """Has the default stream make them, zeros, when nobody waits for it but lanes."""
        for tensor in (self._shared.flat, *self._make_state().named().values()):
            tensor.fill_(math.nan)
            self._gpu.torch.launch_fill(0, tensor, 0.0)

    def _make_state(self) -> UpdateState:
        return self._shared.make_state(kinds_of(self._scheduler.hyperparameters.switches))

    async def main(self) -> None:
        """All runs."""
        left: _Begun | None = None
        errors = (RuntimeError, MemoryError) if self._scenario.fails else ()
        with suppress(_BodyFailed, *errors):
            async with self._scheduler:
                self._allow_races()
                for run in self._plan.runs:
                    begun = self._begin(run)
                    await self._simulation.until(
                        0 if run.end == "itself" else run.after, begun.task
                    )
                    if run.end in LEAVES:
                        left = begun
                        break
                    await ENDS[run.end](begun.task)
                    await self._check_end(begun)
                if left is not None and left.run.end == "body fails":
                    raise _BodyFailed
        if left is not None:
            await self._check_end(left)
        self._kept.clear()

    def _allow_races(self) -> None:
        if self.serial:
            return
        allow = self._gpu.tests.allow_races
        allow(self._shared.flat.data_ptr(), self._shared.flat.nbytes)
        if self._plan.settings["state"] == "shared":
            for tensor in self._make_state().named().values():
                allow(tensor.data_ptr(), tensor.nbytes)

    def _begin(self, run: Run) -> _Begun:
        self._contexts.clear()
        self._log.clear()
        self._scheduler.report = None
        running = self._scheduler.run(self._work, updates=run.updates)
        return _Begun(run, asyncio.ensure_future(running), self._shared.version)

    # What workers do

    async def _work(self, context: WorkerContext) -> None:
        """A worker's iteration."""
        chance, habits = self._chances[context.index], self._plan.habits
        self._contexts[context.index] = context
        self._check_read(context)
        if context.index in self._unsure:
            await context.lane.done(context.lane.record_event())
            await context.run_blocking(int)  # behind what its thread may still be making
            self._simulation.streams.settle()
            self._unsure.discard(context.index)
        if chance.some(habits.think):
            await asyncio.sleep(chance.choice([0, 0, 0.0005]))
        if chance.some(habits.fail):
            raise Broken("before")
        if chance.some(habits.reads):
            await self._read_rows(context, chance)
        with self._cancelled(chance):
            try:
                await self._submit(context, chance)
            except BaseException:
                self._unsure.add(context.index)
                self._simulation.streams.settle()
                raise
        if chance.some(habits.fail):
            raise Broken("after")

    @contextmanager
    def _cancelled(self, chance: Chance) -> Iterator[None]:
        """Its worker may be cancelled at some moment meanwhile."""
        if not chance.some(self._plan.habits.cancel):
            yield
            return
        task = asyncio.current_task()
        assert task is not None
        delay = chance.choice([0, 0.0001, 0.001])
        cancel = asyncio.get_running_loop().call_later(delay, task.cancel)
        try:
            yield
        finally:
            cancel.cancel()

    async def _submit(self, context: WorkerContext, chance: Chance) -> None:
        habits = self._plan.habits
        grad = self._take(context)
        value = self._draw_value(chance)
        only = self._draw_part(chance)
        stream = await self._make(context, chance, grad, value)
        if chance.some(habits.assign):
            self._assign(chance)
        streams = self._simulation.streams
        if chance.some(habits.hold_lane):
            lane: Any = context.lane
            streams.hold(lane.stream, chance.choice([0, 0.0005, 0.002]))
        as_rows = chance.some(habits.rows)
        submit = partial(self._submit_now, context, grad, value, only, as_rows)
        submission = within(self._gpu, stream, submit)
        if chance.some(habits.give_up):
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(submission, chance.choice([0, 1e-6, 1e-4]))
            self._unsure.add(context.index)
            streams.settle()
            return
        await submission
        if habits.keeps:  # the oldest in flight has landed
            oldest = (context.iteration + 1) % context.depth
            if (kept := self._kept.get((context.index, oldest))) is not None:
                self._simulation.memory.poison(kept.data_ptr())

    async def _submit_now(
        self,
        context: WorkerContext,
        grad: torch.Tensor,
        value: float,
        only: tuple[str, ...] | None,
        as_rows: bool,
    ) -> None:
        place = self._simulation.note_submission()
        numbers = self._scheduler.hyperparameters
        entry = Submitted(place, context.index, value, only, numbers)
        self._log[context.index, context.iteration] = entry
        self._simulation.streams.unsubmitted.pop(grad.data_ptr(), None)
        if as_rows:
            await context.submit_rows(self._as_rows(grad, only))
        else:
            await context.submit(part_of(self._shared, grad, only))

    def _as_rows(
        self, grad: torch.Tensor, only: tuple[str, ...] | None
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """An update of all rows of parameters, last first: of a gradient that is alike all over."""
        parts = part_of(self._shared, grad, only or tuple(self._shared.views))
        assert isinstance(parts, dict)
        return {
            name: (torch.arange(len(part)).flip(0), part.reshape(len(part), -1))
            for name, part in parts.items()
        }

    async def _read_rows(self, context: WorkerContext, chance: Chance) -> None:
        """Reads some rows of a parameter, twice each."""
        name = chance.choice(list(self._shared.views))
        rows = torch.arange(len(self._shared.views[name])).repeat(2)
        read = await context.read_rows(name, rows)
        if self._simulation.lost or self._scenario.fails:
            return
        assert read.isfinite().all(), f"rows of {name} are not finite: {read}"
        if self._plan.locks_rows and not self._scenario.same:
            assert read.eq(read[:, :1]).all(), f"a row of {name} is not whole: {read}"
        if self.serial:
            assert read.eq(read[0, 0]).all(), f"rows of {name} are not of one version: {read}"

    def _take(self, context: WorkerContext) -> torch.Tensor:
        memory = self._simulation.memory
        if not self._plan.habits.keeps:
            return memory.take()
        key = context.index, context.iteration % context.depth
        if key not in self._kept:
            self._kept[key] = memory.take()
        memory.poison(self._kept[key].data_ptr())
        return self._kept[key]

    async def _make(
        self, context: WorkerContext, chance: Chance, grad: torch.Tensor, value: float
    ) -> int:
        """Has a stream make a gradient, and says which is to be the current one at submission."""
        habits, streams = self._plan.habits, self._simulation.streams
        maker = chance.choice(habits.makers)
        own = self._own[context.index]
        if chance.some(habits.hold):
            lane: Any = context.lane
            held = lane.stream if maker in ("lane", "loop") else own
            streams.hold(held, chance.choice([0, 0.0005, 0.002]))
        if maker == "own":
            with self._gpu.computing(own):
                streams.fill(grad, value)
            return own
        if maker == "default":
            streams.fill(grad, value)
            return 0
        begins = chance.choice([0, own])  # and the lane goes on with it
        with self._gpu.computing(begins):
            streams.fill(grad, math.nan)
        if maker == "lane":
            fill = partial(context.run_blocking, streams.fill, grad, value)
            await within(self._gpu, begins, fill)
        else:
            with self._gpu.computing(begins):
                computing = context.lane.computing()
            with computing:
                streams.fill(grad, value)
        return 0

    def _draw_value(self, chance: Chance) -> float:
        if chance.some(self._plan.habits.spoil):
            return math.nan
        return 1.0 if self._plan.counts else chance.choice([1.0, -0.5, 0.25, 2.0])

    def _draw_part(self, chance: Chance) -> tuple[str, ...] | None:
        names = list(self._shared.views)
        if not chance.some(self._plan.habits.part):
            return None
        return tuple(chance.sample(names, chance.randrange(1, len(names) + 1)))

    def _assign(self, chance: Chance) -> None:
        now = self._scheduler.hyperparameters
        if self._plan.counts:
            self._scheduler.hyperparameters = replace(now, lr=chance.choice([1.0, 2.0, 4.0]))
        else:
            lr, inside = chance.choice([0.01, 0.001]), chance.some(0.5)
            self._scheduler.hyperparameters = replace(now, lr=lr, eps_inside_sqrt=inside)

    # What must hold

    def _check_read(self, context: WorkerContext) -> None:
        if self._plan.settings["read"] != "snapshot" or not self.serial or self._simulation.lost:
            return
        for name, part in context.parameters.items():
            assert part.eq(part.view(-1)[0]).all(), f"a snapshot of {name} is not whole: {part}"
        if self._counts_whole:
            seen = -sum(float(part.view(-1)[0]) for part in context.parameters.values())
            assert seen >= context.read_version, "a snapshot is older than it says"

    async def _check_end(self, begun: _Begun) -> None:
        run, task, before = begun
        await asyncio.wait({task})
        report, interrupted = self._scheduler.report, run.end != "itself"
        if task.cancelled():
            assert run.end.startswith("cancelled"), "it was cancelled by itself"
        elif isinstance(error := task.exception(), RuntimeError):
            assert run.end in LEAVES or self._scenario.fails, error
        else:
            assert isinstance(error, WorkerError | None), error
        if report is None:
            assert interrupted or self._scenario.fails  # before it began
            return
        self._check_counts(report, run, self._shared.version - before)
        self._check_failures(report, interrupted)
        self._check_staleness(report)
        self._check_races(report)
        for worker, context in self._contexts.items():
            entries = [self._log[worker, iteration] for iteration in range(context.iteration)]
            self.landed += [entry for entry in entries if not math.isnan(entry.value)]
        self.updates += report.updates

    def _check_counts(self, report: RunReport, run: Run, landed: int) -> None:
        if not self._scenario.same:
            assert report.updates == landed, f"{report.updates} in the report, {landed} landed"
        outcomes = zip(report.updates_by_worker, report.nonfinite, report.dropped, strict=True)
        for worker, each in enumerate(outcomes):
            context = self._contexts.get(worker)
            made = 0 if context is None else context.iteration
            assert sum(each) == made, f"{worker} made {made} updates, of which were reported {each}"
            if not self._scenario.fails:
                entries = [self._log[worker, iteration] for iteration in range(made)]
                spoiled = sum(math.isnan(entry.value) for entry in entries)
                assert each[1] == spoiled, f"{spoiled} gradients were NaN, {each[1]} were left out"
        assert self._scenario.fails or sum(report.dropped) == 0, f"dropped: {report.dropped}"
        done = report.updates + sum(report.nonfinite) + sum(report.dropped)
        assert done <= run.updates, f"asked for {run.updates}, did {done}"
        if not report.partial:
            assert done == run.updates, f"asked for {run.updates}, did {done}: {report.failures}"

    def _check_failures(self, report: RunReport, interrupted: bool) -> None:
        if report.partial:
            assert report.failures or interrupted, "it is partial, and nothing says why"
        may_fail = (Broken, RuntimeError, FloatingPointError)
        for failure in report.failures.values():
            assert isinstance(failure, may_fail) or self._scenario.fails, failure

    def _check_staleness(self, report: RunReport) -> None:
        assert sum(report.staleness.values()) == report.updates, report.staleness
        assert min(report.staleness, default=0) >= 0, report.staleness
        policy = self._plan.settings["policy"]
        if policy.startswith("bounded:") and not self._scenario.same:
            assert max(report.staleness, default=0) <= int(policy.removeprefix("bounded:"))

    def _check_races(self, report: RunReport) -> None:
        if not self._plan.settings["telemetry"] or self._scenario.same:
            return
        lost, updates = report.lost_block_updates, report.block_updates
        assert lost is not None
        assert updates is not None
        if not self._scenario.fails:
            blocks = -(-self._shared.elements // BLOCK)
            if self._plan.locks_rows:
                blocks = sum(len(view) for view in self._shared.views.values())
            assert updates == report.updates * blocks
        assert 0 <= lost <= updates
        overlapping = lost or report.overwritten_block_updates
        assert not (self._loses_nothing and overlapping), f"{overlapping} of a block overlapped"

    def check_parameters(self, programs: Sequence[_Program]) -> None:
        """What all that update the parameters have landed is there, and nothing else.

        Args:
            programs: Those that do.
        """
        landed = [entry for program in programs for entry in program.landed]
        plans = [program._plan for program in programs]
        exact = self._loses_nothing and not self._scenario.fails
        if any(plan.settings["staleness_aware"] for plan in plans):
            exact = False
        if self._simulation.lost:
            return
        assert self._shared.flat.isfinite().all(), f"not finite: {self._shared.flat}"
        if exact and self._plan.orders and not self._scenario.same:
            expected, states = self._replay(landed)
            assert torch.equal(self._shared.flat, expected), f"{self._shared.flat}, not {expected}"
            if self._plan.settings["state"] == "shared" and 0 in states:
                for kind, tensor in states[0].named().items():
                    assert torch.equal(self._shared.state.named()[kind], tensor), kind
        elif exact and all(plan.counts for plan in plans):
            for name, part in self._shared.views.items():
                gone = sum(e.numbers.lr for e in landed if e.only is None or name in e.only)
                assert part.eq(-gone).all(), f"{name} must be {-gone}, is {part}"
        elif all(plan.counts for plan in plans):
            most = sum(entry.numbers.lr for entry in landed)
            assert self._shared.flat.ge(-most).all(), f"more than {most} gone: {self._shared.flat}"
            least = 0
            if self._loses_nothing and self._counts_whole and all(e.only is None for e in landed):
                least = sum(program.updates for program in programs)
            assert self._shared.flat.le(-least).all(), (
                f"less than {least} gone: {self._shared.flat}"
            )

    def _replay(self, landed: Sequence[Submitted]) -> tuple[torch.Tensor, dict[int, UpdateState]]:
        """The parameters after updates in the order of their submission, and whose state."""
        by_worker = self._plan.settings["state"] == "per-worker"
        model = self._simulation.make_parameters()
        state = model.make_state(kinds_of(self._scheduler.hyperparameters.switches))
        states: dict[int, UpdateState] = {}
        for entry in sorted(landed):
            worker = entry.worker if by_worker else 0
            states.setdefault(worker, state.map(torch.zeros_like))
            for name, view in model.views_of(model.flat).items():
                if entry.only is None or name in entry.only:
                    part = states[worker].map(partial(_part_of, model, name))
                    grad = torch.full_like(view, entry.value)
                    table = LaunchTable([Operands(view, grad, *part)])
                    numpy_kernels.update_(table, entry.numbers)
        return model.flat, states


def _part_of(shared: SharedParameters, name: str, flat: torch.Tensor) -> torch.Tensor:
    return shared.views_of(flat)[name]


@cache
def _compile() -> None:
    """Compiles what lanes call, which takes longer than any run."""
    compile_loop()
    cuda_loop.compile_for_lanes()


class _Begun(NamedTuple):
    """A run that goes on, and the version of the parameters before it."""

    run: Run
    task: asyncio.Task[RunReport]
    before: int
