"""What `make gpu` runs, in which order, and for how long: what tells most comes first."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

#: The checks of ``smoke``, by which each is run alone.
CHECKS = (
    *("float16", "bfloat16", "float32", "float64", "list", "step", "capturable"),
    *("lock-free", "locked", "ordered", "awaited", "bounded"),
    *("verdict", "telemetry", "graph", "two-processes"),
)
SANITIZER, NSYS, NCU = "compute-sanitizer", "nsys", "ncu"
#: What may be missing, and what needs it is left out.
TOOLS = (SANITIZER, NSYS, NCU)
#: How long it may take to find out what the machine is, before the stages.
MACHINE_SECONDS = 22
_UNCACHED = "PYTORCH_NO_CUDA_MEMORY_CACHING"
# What a file says that has tests of a GPU: their mark, or tables of variants with the mark in them.
_ON_GPU = re.compile(r"mark\.gpu|triton_testing|(?<!CPU_)BACKENDS")
# How much longer anything may take in a rehearsal.
_PATIENCE = 6


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
    """What shows in four minutes whether it works, and how fast it is.

    Args:
        device: ``cuda``; or ``cpu``, to rehearse it with less to do.
    """
    largest, workers = ("2^28", "16") if device == "cuda" else ("2^20", "2")
    return (
        Stage("smoke", 60, tuple(_smoke(check) for check in CHECKS), beside=len(CHECKS)),
        Stage("memcheck", 25, tuple(_memcheck(check) for check in CHECKS), beside=len(CHECKS)),
        Stage("largest", 18, (_compare(largest, "hogstream", 18),)),
        Stage(
            "tensors",
            28,
            tuple(
                _compare(shape, "hogstream,hogstream-flat,torch-foreach,torch-adam-fused", 14)
                for shape in ("1000x1000", "resnet50")
            ),
        ),
        Stage(
            "bench",
            58,
            (
                _bench("bench", 24, "--elements", "2^20", "--workers", workers, "--seconds", "1"),
                _bench(
                    *("today-bench", 34, "--elements", "2^20", "--workers", workers),
                    *("--policies", "lock-free,locked", "--seconds", "0.7", "--today"),
                ),
            ),
        ),
        Stage(
            "graphs",
            18,
            (
                _bench(
                    *("graphs-bench", 18, "--elements", "2^16", "--workers", workers),
                    *("--batch", "16", "--batch-of", "lanes", "--seconds", "1"),
                ),
            ),
        ),
        Stage("lanes", 25, (_tests("lanes", 25, *_files(under="tests/scheduler/lanes")),)),
    )


def late(device: str) -> tuple[Stage, ...]:
    """What takes longer, once the early stages have passed: eight minutes.

    Args:
        device: As of ``early``.
    """
    others = tuple(_files(but="tests/scheduler/lanes"))
    return (
        Stage(
            "compiled",
            75,
            (_compare("resnet50", "hogstream,torch-foreach,torch-compile", 75, "compiled"),),
        ),
        Stage(
            "tests",
            100,
            (_tests("tests", 100, *others, "-k", "not hundred_million"),),
        ),
        Stage(
            "sizes",
            120,
            (
                _measure("ceilings", 25, "ceilings", "--fresh", "--device", "{device}"),
                *(
                    _compare(shape, "hogstream,torch-foreach,torch-adam-fused", 18)
                    for shape in ("2^16", "2^20", "2^24", "gpt2")
                ),
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
                _measure("profile-nsys", 40, "profile nsys", "--output", "{file}.nsys-rep"),
                _measure("profile-ncu", 40, "profile ncu", "--output", "{file}.ncu-rep"),
            ),
        ),
        Stage(
            "hundred-million",
            85,
            (_tests("hundred-million", 85, *others, "-k", "hundred_million"),),
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
    return Job(check, ("-m", "gpu.smoke", check, "{device}", "{seconds}"), 25)


def _memcheck(check: str) -> Job:
    """The same, with each access to memory checked, which takes longer.

    Where torch takes each tensor from the driver, an access beyond one is beyond its memory; not
    where memory is shared between processes, or allocated in a capture.
    """
    uncached = {} if check in ("capturable", "two-processes") else {_UNCACHED: "1"}
    under = ("--tool", "memcheck", "--target-processes", "all", "--error-exitcode", "9")
    return Job(
        check, _smoke(check).arguments, 25, tool=SANITIZER, under=under, environment=uncached
    )


def _compare(shape: str, peers: str, seconds: float, name: str = "") -> Job:
    """A shape alone, so that its result is there before another begins."""
    options = ("--shapes", shape, "--peers", peers, "--seconds", "2", "--device", "{device}")
    name = name or shape.replace("^", "-")
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
    return Job(name, ("-m", "gpu.run_tests", "-m", "gpu", *options), seconds)


def _files(*, under: str = "tests", but: str = os.devnull) -> Iterator[str]:
    """The files that have tests of a GPU; others may not even import where packages are missing."""
    for path in sorted((ROOT / under).rglob("test_*.py")):
        if not path.is_relative_to(ROOT / but) and _ON_GPU.search(path.read_text("utf-8")):
            yield str(path)
