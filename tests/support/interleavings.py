"""Every interleaving of the lanes' compiled loop with an event loop, step by step.

The functions of ``native_loop.py``, and of what it calls, are read as source and made into
generators, which stop at each access to memory that others write, and at each system call. What is
compiled has sequentially consistent access alone, so nothing else can happen there than some order
of these steps.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from types import GeneratorType, SimpleNamespace
from typing import Any, NamedTuple

from hogstream.scheduler.lanes import compiled, native_loop, rings
from hogstream.scheduler.lanes.compiled import RingLanes

WORD = rings.WORD
EVENT_OF_LOOP = 1  # of lanes, those that follow

_MODULES = rings, native_loop  # where the loop is

Step = Generator["Request", Any, Any]


class Request(NamedTuple):
    """What a thread does next, by name, and with what."""

    name: str
    arguments: tuple[Any, ...]


class StuckError(Exception):
    """Somebody waits, and nobody is left who could wake them."""


class Program(NamedTuple):
    """What an event loop does: it launches updates, and waits for landings.

    Attributes:
        steps: Each a lane and a number: 0 to launch an update on it, or how many of its updates
            must have been delivered before the next step.
        lanes: How many there are.
        low_water: As lanes have it.
        ordered: Whether each update waits for the one launched before it.
    """

    steps: list[tuple[int, int]]
    lanes: int = 1
    low_water: int = 0
    ordered: bool = False


class Machine:
    """Memory, events and threads: an event loop, which is the first, and one for each lane."""

    def __init__(self, program: Program, functions: Mapping[str, Callable[..., Step]]) -> None:
        launches = sum(not until for _, until in program.steps)
        self._program = program
        self._functions = functions
        self._rows = 1 << launches.bit_length()
        size = rings.THREAD + rings.ROWS + self._rows * rings.ROW
        self._threads_of_lanes = [rings.SETTINGS + size * lane for lane in range(program.lanes)]
        self._lanes = [thread + rings.THREAD for thread in self._threads_of_lanes]
        self._owners = rings.SETTINGS + size * program.lanes
        self._version = self._owners + self._rows
        self.memory = [0] * (self._version + 1)
        # As ``_deliver_landed`` knows them.
        self._event = SimpleNamespace(reader=EVENT_OF_LOOP)
        self.settings = SimpleNamespace(address=0)
        self.lanes = [_Lane(self._functions["landed"], WORD * each) for each in self._lanes]
        self.events: Counter[int] = Counter()
        self._set_up()
        lanes = [functions["run"](WORD * thread, 0) for thread in self._threads_of_lanes]
        self._threads = [_Thread(self, steps) for steps in (self._event_loop(), *lanes)]

    def _set_up(self) -> None:
        memory = self.memory
        settings = {
            rings.LOOP_EVENT: EVENT_OF_LOOP,
            rings.VERSIONS: WORD * self._version,
            rings.SLOTS: 1,
        }
        if self._program.ordered:
            settings |= {rings.OWNERS: WORD * self._owners, rings.OWNERS_MASK: self._rows - 1}
        for word, value in settings.items():
            memory[word] = value
        self.shared = {rings.NEXT, rings.WOKEN, rings.STOP}
        self.shared |= set(range(self._owners, self._version))
        for index, (thread, lane) in enumerate(
            zip(self._threads_of_lanes, self._lanes, strict=True)
        ):
            event = EVENT_OF_LOOP + 1 + index
            memory[thread + rings.THREAD_EVENT] = memory[thread + rings.THREAD_WAKER] = event
            memory[thread + rings.LANES] = WORD * (thread + rings.OWN_FACTORS)  # free here
            memory[thread + rings.OWN_FACTORS] = WORD * lane
            memory[thread + rings.LANE_COUNT] = 1
            memory[lane + rings.LANE_THREAD] = WORD * thread
            memory[lane + rings.MASK] = self._rows - 1
            memory[lane + rings.LOW_WATER] = self._program.low_water
            self.shared |= {thread + rings.ASLEEP, lane + rings.LAUNCHED, lane + rings.LANDED}

    def able(self) -> list[int]:
        """The threads that can go on."""
        return [index for index, thread in enumerate(self._threads) if thread.able()]

    def step(self, thread: int) -> None:
        """Has one of them make its next access, and go on to the one after it."""
        self._threads[thread].step()

    def ended(self) -> bool:
        """Whether all have."""
        return all(thread.next is None for thread in self._threads)

    def state(self) -> Any:
        """All that what follows depends on; what only one thread sees follows from where it is."""
        return (
            tuple(self.memory[word] for word in self.shared),
            tuple(lane.delivered for lane in self.lanes),
            tuple(sorted((+self.events).items())),
            tuple(thread.where() for thread in self._threads),
        )

    # What the event loop's thread does, as compiled.py has it

    def _event_loop(self) -> Step:
        launched = [0] * len(self.lanes)
        for place in range(len(self._program.steps)):
            lane, until = self._program.steps[place]
            if not until:
                yield from self._launch(lane, launched)
            yield from self._deliver(lane, until)
        for lane, until in enumerate(launched):
            yield from self._deliver(lane, until)
        yield Request("store", (WORD * rings.STOP, 1))
        for address in self._threads_of_lanes:
            yield from self._functions["wake"](WORD * address)

    def _deliver(self, lane: int, until: int) -> Step:
        while self.lanes[lane].delivered < until:
            yield from self._functions["_deliver_landed"](self)

    def _launch(self, lane: int, launched: list[int]) -> Step:
        address, ticket = self._lanes[lane], sum(launched)
        row = address + rings.ROWS + rings.ROW * launched[lane]
        thread = self._threads_of_lanes[lane]
        self.memory[row + rings.FORM] = 1
        self.memory[row + rings.TICKET] = ticket
        if self._program.ordered:
            yield Request("store", (WORD * (self._owners + ticket), WORD * thread))
        launched[lane] += 1
        yield from self._functions["launch"](WORD * address, launched[lane])


class _Lane:
    """A lane as the event loop sees it."""

    def __init__(self, landed: Callable[..., Step], address: int) -> None:
        self.delivered = 0
        self._landed = landed
        self._address = address

    def deliver(self) -> Step:
        """Takes what has landed."""
        self.delivered = yield from self._landed(self._address)


class _Thread:
    """One that runs, as far as its next access to what others write.

    Attributes:
        next: What it does next; None once it has ended.
    """

    def __init__(self, machine: Machine, steps: Step) -> None:
        self._machine = machine
        self._steps = steps
        self.next: Request | None = None
        self._go_on(None)

    def able(self) -> bool:
        if self.next is None:
            return False
        return self.next.name != "read" or self._machine.events[self.next.arguments[0]] > 0

    def step(self) -> None:
        assert self.next is not None
        self._go_on(self._do(self.next))

    def where(self) -> Any:
        return self.next, *_frames(self._steps)

    def _go_on(self, result: Any) -> None:
        try:
            while True:
                self.next = self._steps.send(result)
                if self._is_seen(self.next):
                    return
                result = self._do(self.next)
        except StopIteration:
            self.next = None

    def _is_seen(self, request: Request) -> bool:
        """Whether it matters to others when this is done."""
        if request.name in ("read", "write", "yield"):
            return True
        in_memory = request.name in ("load", "store", "add", "exchange")
        return in_memory and request.arguments[0] // WORD in self._machine.shared

    def _do(self, request: Request) -> Any:
        memory, events = self._machine.memory, self._machine.events
        name, arguments = request
        if name == "read":
            return events.pop(arguments[0])
        if name == "write":
            events[arguments[0]] += 1
        if name not in ("load", "store", "add", "exchange"):
            return 0  # a call, the time, a copy
        word = arguments[0] // WORD
        before = memory[word]
        if name != "load":
            memory[word] = arguments[1] + (before if name == "add" else 0)
        return before


def _frames(steps: Any) -> Iterator[Any]:
    while isinstance(steps, GeneratorType) and steps.gi_frame is not None:
        frame = steps.gi_frame
        values = frame.f_locals.items()
        numbers = (value for value in values if isinstance(value[1], int | tuple))
        yield frame.f_code.co_name, frame.f_lasti, *numbers
        steps = steps.gi_yieldfrom


_REQUESTS = {
    "read": "read",
    "atomic_load": "load",
    "atomic_store": "store",
    "atomic_add": "add",
    "atomic_exchange": "exchange",
    "call": "call",
    "_yield": "yield",
    "_read": "read",
    "_write": "write",
    "_copy": "copy",
    "_clock": "clock",
    "_timed_lock": "lock",
    "_consistent": "lock",
    "_unlock": "lock",
}


class _AsGenerators(ast.NodeTransformer):
    """Makes each access a ``yield``, and each call of a function among these a ``yield from``."""

    def __init__(self, functions: set[str]) -> None:
        self._functions = functions

    def visit_Call(self, node: ast.Call) -> ast.expr:
        self.generic_visit(node)
        name = ast.unparse(node.func).rpartition(".")[2]
        if name in _REQUESTS:
            arguments = ast.Tuple(node.args, ast.Load())
            request = ast.Call(ast.Name("Request", ast.Load()), [ast.Constant(_REQUESTS[name])], [])
            request.args.append(arguments)
            return ast.Yield(request)
        if name in self._functions:
            return ast.YieldFrom(ast.Call(ast.Name(name, ast.Load()), node.args, []))
        return ast.YieldFrom(node) if name == "deliver" else node


def functions_of(*changes: tuple[str, str]) -> dict[str, Callable[..., Step]]:
    """The functions of the compiled loop, and ``_deliver_landed``, as generators.

    Args:
        changes: Made to the source: a text that is in it once, and what takes its place.
    """
    deliver = textwrap.dedent(inspect.getsource(RingLanes._deliver_landed))
    source = "\n\n".join([*map(inspect.getsource, _MODULES), deliver])
    for old, new in changes:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    names = {node.name for node in functions}
    for node in functions:
        node.decorator_list.clear()
    tree = ast.Module(list(map(_AsGenerators(names).visit, functions)), [])
    # A lane that gives way to others does nothing that they see: here it sleeps at once.
    space: dict[str, Any] = {"Request": Request}
    for module in (compiled, *_MODULES):
        space |= vars(module)
    space["_YIELDS"] = 0
    exec(compile(ast.fix_missing_locations(tree), native_loop.__file__, "exec"), space)
    return {node.name: space[node.name] for node in functions}


def explore(program: Program, functions: Mapping[str, Callable[..., Step]]) -> int:
    """Follows every interleaving to its end, and returns how many states there are.

    Raises:
        StuckError: If one does not end.
    """
    seen = set()
    open_schedules: list[list[int]] = [[]]
    while open_schedules:
        schedule = open_schedules.pop()
        machine = Machine(program, functions)
        for thread in schedule:
            machine.step(thread)
        while (state := machine.state()) not in seen:
            seen.add(state)
            able = machine.able()
            if not able:
                if not machine.ended():
                    raise StuckError(f"after the steps of threads {schedule}")
                break
            first, *others = able
            open_schedules += [[*schedule, other] for other in others]
            schedule.append(first)
            machine.step(first)
    return len(seen)
