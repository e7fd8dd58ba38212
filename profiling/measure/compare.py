"""Our optimizer against those a user would pick instead: steps after a backward, in turn."""

from __future__ import annotations

import ctypes
import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from hogstream.profiling.ceilings.machine import raise_known
from hogstream.profiling.ceilings.raising import of_peers
from hogstream.profiling.environment import describe_environment, free_memory, installed_version
from hogstream.profiling.measure.iterations import Passing, Seconds, Training
from hogstream.profiling.measure.peers import (
    CEILING,
    HOGSTREAM,
    MEMORY,
    PACKAGES,
    PEERS,
    Work,
    reason,
)
from hogstream.profiling.measure.shapes import Shape
from hogstream.profiling.results import schema
from hogstream.profiling.results.confidence import spread_warnings
from hogstream.profiling.results.records import PositiveSpread, Ratio
from hogstream.profiling.results.schema import Compare, PeerTime, Skipped

DEFAULT_SHAPES = "mlp,transformer,cnn,2^16,2^18,2^20,2^22,2^24,1000x1000,resnet50"
# On a CPU a round of all peers at gpt2 takes up to 13 s: minutes in all.
ON_GPU_TOO = "gpt2,2^28"
#: Rounds are made until a shape's time is used up, but no fewer and no more than these.
FEWEST_ROUNDS, MOST_ROUNDS = 7, 99
# Of glibc's ``malloc.h``.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class CompareSettings:
    """What to measure.

    Attributes:
        device: Where.
        backend: The backend that the device's default is.
        shapes: What a step updates.
        peers: Names of peers.
        seconds: To measure each shape, if it is enough for the fewest rounds.
        seed: Of parameters, data and the order in which peers take turns.
    """

    device: torch.device
    backend: str
    shapes: tuple[Shape, ...]
    peers: tuple[str, ...]
    seconds: float
    seed: int

    def steps(self) -> int:
        """How many times ``run_compare`` reports progress."""
        return 2 * len(self.shapes)


def run_compare(settings: CompareSettings, command: str, on_step: Callable[[str], None]) -> Compare:
    """Measures every peer at every shape, in turn, in a new random order each round.

    A peer that cannot run, or a shape that does not fit the memory, is listed with the reason; the
    others go on.

    Args:
        settings: What to measure.
        command: The command line that repeats it.
        on_step: Called before each of ``settings.steps()`` steps with what is to be done.

    Returns:
        The result. Interrupted, it is partial: the shape under way and those after it are left out.

    Raises:
        KeyboardInterrupt: If interrupted before there was any result.
    """
    results: list[PeerTime] = []
    skipped: list[Skipped] = []
    partial = False
    try:
        for shape in settings.shapes:
            on_step(f"{shape.name}: making parameters, compiling")
            contenders = _prepare_all(settings, shape, skipped)
            on_step(f"{shape.name}: measuring")
            samples = _measure_in_turn(settings, shape, contenders, skipped)
            results += [peer_time(shape, contenders[name], samples) for name in samples]
            del contenders
            _free_memory(settings.device)
    except KeyboardInterrupt:
        if not results:
            raise
        partial = True
    raise_known(settings.device, of_peers(results))
    return Compare(
        command=command,
        environment=describe_environment(settings.device, settings.backend),
        partial=partial,
        error=None,
        warnings=spread_warnings(
            {f"{each.peer} at {each.shape}": each.milliseconds.estimate for each in results}
        ),
        settings=schema.CompareSettings(
            shapes=[shape.name for shape in settings.shapes],
            peers=list(settings.peers),
            dtype="float32",
            fewest_rounds=FEWEST_ROUNDS,
            most_rounds=MOST_ROUNDS,
            seconds=settings.seconds,
            seed=settings.seed,
        ),
        peer_versions={name: installed_version(name) for name in PACKAGES.values()},
        results=results,
        skipped=skipped,
    )


def default_shapes(device: torch.device) -> str:
    """The shapes to measure on a device, as in ``--shapes``."""
    return f"{DEFAULT_SHAPES},{ON_GPU_TOO}" if device.type == "cuda" else DEFAULT_SHAPES


def check_memory(shape: Shape, peers: tuple[str, ...], device: torch.device) -> None:
    """Checks that all peers fit the device's free memory at once, as they take turns.

    Raises:
        ValueError: If they do not.
    """
    # What the gradients are made of and the parameters that are copied, the gradients of one peer
    # and those that a flat one keeps, the arrays of a copy and of the ceiling, and two temporaries
    # of whoever makes some.
    tensors = 2 + 2 + 2 + 3 + 2 + sum(1 + PEERS[name].state_tensors for name in peers)
    needed, free = 4 * tensors * shape.elements, free_memory(device)
    if needed > free:
        raise ValueError(
            f"must fit the memory of {device}, of which {free / 1e9:.1f} GB are free, "
            f"got {shape.name}, which needs {needed / 1e9:.1f} GB"
        )


@dataclass(frozen=True)
class Contender:
    """What takes turns at a shape.

    Attributes:
        work: Whose.
        turn: Does some steps.
        steps: How many.
        launches: Kernels of a step on a GPU; None if not counted.
    """

    work: Work
    turn: Callable[[], Seconds]
    steps: int
    launches: int | None


def _prepare_all(
    settings: CompareSettings, shape: Shape, skipped: list[Skipped]
) -> dict[str, Contender]:
    """The peers that run, warmed up, then what memory can do; others go to ``skipped``."""
    try:
        check_memory(shape, settings.peers, settings.device)
    except ValueError as error:
        skipped.append(Skipped(shape.name, "all", str(error)))
        return {}
    _keep_memory()
    network = shape.build(settings.device, settings.seed)
    contenders = {}
    for name in settings.peers:
        try:
            training = Training(PEERS[name], network)
            launches = training.launches()
        except Exception as error:  # whatever it is, the others go on
            skipped.append(Skipped(shape.name, name, reason(error)))
        else:
            contenders[name] = Contender(PEERS[name], training.turn, training.steps, launches)
    for name, work in MEMORY.items():
        passing = Passing(work.build(settings.device, shape.elements), settings.device)
        contenders[name] = Contender(work, passing.turn, passing.steps, None)
    return contenders


def _measure_in_turn(
    settings: CompareSettings,
    shape: Shape,
    contenders: dict[str, Contender],
    skipped: list[Skipped],
) -> dict[str, list[Seconds]]:
    """A sample each round; one that fails now goes to ``skipped`` after all."""
    samples: dict[str, list[Seconds]] = {name: [] for name in contenders}
    order = random.Random(settings.seed)
    start = time.perf_counter()
    for index in range(MOST_ROUNDS):
        if index >= FEWEST_ROUNDS and time.perf_counter() - start > settings.seconds:
            break
        for name in order.sample(list(samples), len(samples)):
            try:
                samples[name].append(contenders[name].turn())
            except Exception as error:
                skipped.append(Skipped(shape.name, name, reason(error)))
                del samples[name]
    return samples


def peer_time(
    shape: Shape, contender: Contender, samples: Mapping[str, Sequence[Seconds]]
) -> PeerTime:
    """What follows from the times of a step.

    Args:
        shape: What a step updates.
        contender: Whose step.
        samples: One of each round, by name: its own, ours, the ceiling's.
    """
    work, mine = contender.work, samples[contender.work.name]
    ours, ceiling = samples.get(HOGSTREAM, ()), samples.get(CEILING)
    steps, iterations = _steps(mine), _iterations(mine)
    hosts = [each.host for each in mine if each.host is not None]
    time = PositiveSpread.of([1e3 * step for step in steps])
    speed = 1e-6 * work.bytes_per_element * shape.elements / time.median
    return PeerTime(
        shape=shape.name,
        tensors=len(shape.tensors),
        elements=shape.elements,
        peer=work.name,
        milliseconds=time,
        iteration_milliseconds=PositiveSpread.of([1e3 * each for each in iterations])
        if iterations
        else None,
        bytes_per_element=work.bytes_per_element,
        operations_per_element=work.operations_per_element,
        gigabytes_per_second=speed,
        share_of_ceiling=speed / _ceiling(shape, ceiling)
        if ceiling and work.bytes_per_element == MEMORY[CEILING].bytes_per_element
        else None,
        time_against_hogstream=_ratio(steps, _steps(ours)),
        iteration_against_hogstream=_ratio(iterations, _iterations(ours)),
        steps_per_sample=contender.steps,
        launches=contender.launches,
        host_us=1e6 * statistics.median(hosts) if hosts else None,
    )


def _steps(samples: Sequence[Seconds]) -> list[float]:
    return [each.step for each in samples]


def _iterations(samples: Sequence[Seconds]) -> list[float]:
    """None of what memory can do."""
    return [each.iteration for each in samples if each.iteration is not None]


def _ratio(mine: Sequence[float], ours: Sequence[float]) -> Ratio | None:
    return Ratio.of(mine, ours) if mine and ours else None


def _ceiling(shape: Shape, samples: Sequence[Seconds]) -> float:
    """1e9 bytes/s of the update-shaped pass."""
    seconds = statistics.median(_steps(samples))
    return 1e-9 * MEMORY[CEILING].bytes_per_element * shape.elements / seconds


def _keep_memory() -> None:
    """Has glibc keep memory that is freed, where it can: blocks of up to 32 MiB.

    It gives some of it back to the system else, and some not, as addresses happen to be; whose
    gradients it gives back takes up to four times as long to step, as its cores' TLBs are emptied.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _free_memory(device: torch.device) -> None:
    """Gives back what the peers of one shape had, for those of the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
