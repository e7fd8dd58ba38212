"""What `make gpu` runs, in which order, and for how long: what tells most comes first."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_TWO_PROCESSES = "two-processes"
#: The checks of ``smoke``, by which each is run alone.
CHECKS = (
    *("float16", "bfloat16", "float32", "float64", "list", "step"),
    *("scaled", "clipped", "rows", "capturable"),
    *("lock-free", "locked", "ordered", "awaited", "bounded"),
    *("row-lanes", "verdict", "telemetry", "graph", _TWO_PROCESSES),
)
SANITIZER, NSYS, NCU = "compute-sanitizer", "nsys", "ncu"
#: What may be missing, and what needs it is left out.
TOOLS = (SANITIZER, NSYS, NCU)
#: How long it may take to find out what the machine is, before the stages.
MACHINE_SECONDS = 22
_UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
# What a file says that has tests of a GPU: their mark, or tables of variants with the mark in them.
_ON_GPU = re.compile(r"mark\.gpu|triton_testing|torch_suite|(?<!CPU_)BACKENDS")
# How much longer anything may take in a rehearsal.
_PATIENCE = 6
# It would tell nothing there: what its processes share is a segment of torch's, in which an access
# beyond a tensor is none beyond its memory; and its kernels are those of other checks.
_NOT_IN_MEMCHECK = (_TWO_PROCESSES,)
_PEERS = "hogstream,torch-foreach,torch-adam-fused"
_LIST_PEERS = "hogstream,hogstream-flat,torch-foreach,torch-adam-fused"
# Of a check, and of this one, whose processes begin when it has begun: torch is then imported, and
# kernels are compiled, a second time.
_CHECK_SECONDS, _TWO_PROCESSES_SECONDS = 25, 70


@dataclass(frozen=True)
class Job:
    """One program to run.

    Attributes:
        name: Of it in its stage; with the suffix, of the file that it writes.
        arguments: What follows the interpreter, which runs in the folder of results; ``{file}`` is
            its result, ``{device}`` what it measures, ``{seconds}`` how long it may take.
        seconds: How long it may take, unless its stage ends before.
        suffix: Of the file without which it has failed; empty if it writes none.
        tool: Without which it is left out: one of ``TOOLS``.
        under: Options of the tool, if that runs the interpreter.
        environment: Variables of its own.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    suffix: str = ""
    tool: str = ""
    under: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Jobs that belong together.

    Attributes:
        name: As in ``STAGES=``.
        seconds: How long all of it may take.
        jobs: In order.
        beside: How many may run at once; no more than there are cores.
    """

    name: str
    seconds: float
    jobs: tuple[Job, ...]
    beside: int = 1


def early(device: str) -> tuple[Stage, ...]:
    """What shows in five minutes whether it works, and how fast it is.

    Args:
        device: ``cuda``; or ``cpu``, to rehearse it with less to do.
    """
    largest, workers = ("2^28", "16") if device == "cuda" else ("2^20", "2")
    checked = [check for check in CHECKS if check not in _NOT_IN_MEMCHECK]
    return (
        Stage("smoke", 70, tuple(_smoke(check) for check in CHECKS), beside=len(CHECKS)),
        Stage("memcheck", 25, tuple(_memcheck(check) for check in checked), beside=len(checked)),
        Stage("largest", 25, (_compare("largest", 25, largest, "hogstream"),)),
        Stage("tensors", 60, (_compare("tensors", 60, "resnet50,1000x1000", _LIST_PEERS),)),
        Stage(
            "bench",
            30,
            (_bench("bench", 30, "--elements", "2^20", "--workers", workers, "--seconds", "1"),),
        ),
        Stage(
            "graphs",
            25,
            (
                _bench(
                    *("graphs-bench", 25, "--elements", "2^16", "--workers", workers),
                    *("--batch", "16", "--batch-of", "lanes", "--seconds", "1"),
                ),
            ),
        ),
        Stage("lanes", 35, (_tests("lanes", 35, *_files(under="tests/scheduler/lanes")),)),
    )


def late(device: str) -> tuple[Stage, ...]:
    """What takes longer, once the early stages have passed: nine minutes.

    Args:
        device: As of ``early``.
    """
    others = tuple(_files(but="tests/scheduler/lanes"))
    workers = "4" if device == "cuda" else "2"
    return (
        Stage(
            "compiled",
            75,
            (_compare("compiled", 75, "resnet50", "hogstream,torch-foreach,torch-compile"),),
        ),
        Stage("tests", 90, (_tests("tests", 90, *others, "-k", "not hundred_million"),)),
        Stage(
            "sizes",
            98,
            (
                _measure("ceilings", 25, "ceilings", "--fresh", "--device", "{device}"),
                _compare("sizes", 50, "2^16,2^20,2^24,gpt2", _PEERS),
                _bench(
                    *("sizes-bench", 23, "--elements", "2^16,2^20", "--workers", "1,4"),
                    *("--seconds", "0.5"),
                ),
            ),
        ),
        Stage(
            "traces",
            90,
            (
                _measure(
                    *("profile-torch", 40, "profile torch", "--trace", "{file}.trace", "--"),
                    *("bench", "--elements", "2^20", "--workers", "4", "--seconds", "1"),
                    *("--policies", "lock-free", "--device", "{device}"),
                ),
                _measure("profile-nsys", 25, "profile nsys", "--output", "{file}.nsys-rep"),
                _measure("profile-ncu", 25, "profile ncu", "--output", "{file}.ncu-rep"),
            ),
        ),
        Stage(
            "hundred-million",
            85,
            (_tests("hundred-million", 85, *others, "-k", "hundred_million"),),
        ),
        Stage(
            "today",
            80,
            (
                _bench(
                    *("today-bench", 80, "--elements", "2^20", "--workers", workers),
                    *("--policies", "lock-free,locked", "--seconds", "0.7", "--today"),
                ),
            ),
        ),
    )


def chosen(names: str, device: str) -> tuple[Stage, ...]:
    """The stages that names stand for, in the order in which they are run.

    Args:
        names: Of stages, with commas between; ``early``, ``late`` and ``all`` stand for several.
        device: As of ``early``.

    Raises:
        ValueError: If there is no such stage.
    """
    groups = {"early": early(device), "late": late(device)}
    every = (*groups["early"], *groups["late"])
    known = {stage.name: {stage.name} for stage in every}
    known |= {name: {stage.name for stage in group} for name, group in groups.items()}
    known["all"] = {stage.name for stage in every}
    wanted: set[str] = set()
    for name in names.split(","):
        if name not in known:
            raise ValueError(f"STAGES must name some of {', '.join(known)}, got {name!r}")
        wanted |= known[name]
    return tuple(_patient(stage, device) for stage in every if stage.name in wanted)


def _patient(stage: Stage, device: str) -> Stage:
    """A stage with as much time as it needs where it is only rehearsed."""
    if device == "cuda":
        return stage
    jobs = tuple(replace(job, seconds=_PATIENCE * job.seconds) for job in stage.jobs)
    return replace(stage, seconds=_PATIENCE * stage.seconds, jobs=jobs)


def _smoke(check: str) -> Job:
    """A check that shows where it hangs, and ends, before it would be stopped."""
    seconds = _TWO_PROCESSES_SECONDS if check == _TWO_PROCESSES else _CHECK_SECONDS
    return Job(check, ("-m", "gpu.smoke", check, "{device}", "{seconds}"), seconds)


def _memcheck(check: str) -> Job:
    """The same, with each access to memory checked, which takes longer.

    Where torch takes each tensor from the driver, an access beyond one is beyond its memory; not
    where memory is allocated in a capture.
    """
    uncached = {} if check == "capturable" else {_UNCACHED: "1"}
    under = ("--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "9")
    return replace(_smoke(check), tool=SANITIZER, under=under, environment=uncached)


def _compare(name: str, seconds: float, shapes: str, peers: str) -> Job:
    """Shapes one after the other in one process, which pays for its start only once.

    Interrupted, it writes those that were done: those that take least come first.
    """
    options = ("--shapes", shapes, "--peers", peers, "--seconds", "2", "--device", "{device}")
    return _measure(f"{name}-compare", seconds, "compare", *options)


def _bench(name: str, seconds: float, *options: str) -> Job:
    return _measure(name, seconds, "bench", *options, "--device", "{device}")


def _measure(name: str, seconds: float, command: str, *options: str) -> Job:
    """A command of hogstream's that writes its result; of a profiler, left out without that."""
    words = command.split()
    arguments = ("-m", "hogstream.cli.main", *words, "--json", "{file}", *options)
    tool = words[-1] if words[-1] in TOOLS else ""
    return Job(name, arguments, seconds, suffix=".json", tool=tool)


def _tests(name: str, seconds: float, *options: str) -> Job:
    return Job(name, ("-m", "gpu.run_tests", "{seconds}", "-m", "gpu", *options), seconds)


def _files(*, under: str = "tests", but: str = os.devnull) -> Iterator[str]:
    """The files that have tests of a GPU; others may not even import where packages are missing."""
    for path in sorted((ROOT / under).rglob("test_*.py")):
        if not path.is_relative_to(ROOT / but) and _ON_GPU.search(path.read_text("utf-8")):
            yield str(path)
