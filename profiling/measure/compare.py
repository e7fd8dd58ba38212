"""Our optimizer against those a user would pick instead, on the same tensors, in turn."""

from __future__ import annotations

import gc
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hogstream.profiling.ceilings.machine import raise_known
from hogstream.profiling.ceilings.raising import of_peers
from hogstream.profiling.environment import describe_environment, free_memory, installed_version
from hogstream.profiling.measure.peers import (
    CEILING,
    COPY,
    HOGSTREAM,
    MEMORY,
    PACKAGES,
    PEERS,
    Peer,
    Step,
    reason,
)
from hogstream.profiling.measure.shapes import Shape
from hogstream.profiling.results import schema
from hogstream.profiling.results.confidence import spread_warnings
from hogstream.profiling.results.records import PositiveSpread, Ratio
from hogstream.profiling.results.schema import Compare, PeerTime, Skipped

DEFAULT_SHAPES = "2^16,2^20,2^24,resnet50,gpt2,1000x1000"
#: Rounds are made until a shape's time is used up, but no fewer and no more than these.
FEWEST_ROUNDS, MOST_ROUNDS = 7, 99
# A sample repeats the step for this long: small parameters are warm, and clocks exact enough.
_SAMPLE_SECONDS = 0.02
# After its work an OpenMP pool spins for some milliseconds; whoever comes next must not suffer.
_PAUSE_SECONDS = 0.02
_HOST_REPEATS = 21


@dataclass(frozen=True)
class CompareSettings:
    """What to measure.

    Attributes:
        device: Where.
        backend: The backend that the device's default is.
        shapes: What a step updates.
        peers: Names of peers.
        seconds: To measure each shape, if it is enough for the fewest rounds.
        seed: Of the gradients and of the order in which peers take turns.
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
    raise_known(settings.device, of_peers(results, COPY))
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
    return f"{DEFAULT_SHAPES},2^28" if device.type == "cuda" else DEFAULT_SHAPES


def check_memory(shape: Shape, peers: tuple[str, ...], device: torch.device) -> None:
    """Checks that all peers fit the device's free memory at once, as they take turns.

    Raises:
        ValueError: If they do not.
    """
    # The gradients, the arrays of a copy and of the ceiling, and two temporaries of whoever makes
    # some.
    tensors = 1 + 2 + 3 + 2 + sum(1 + PEERS[name].state_tensors for name in peers)
    needed, free = 4 * tensors * shape.elements, free_memory(device)
    if needed > free:
        raise ValueError(
            f"must fit the memory of {device}, of which {free / 1e9:.1f} GB are free, "
            f"got {shape.name}, which needs {needed / 1e9:.1f} GB"
        )


@dataclass(frozen=True)
class Contender:
    """A peer that runs at a shape.

    Attributes:
        peer: Which.
        step: Does one step.
        calls: How many steps a sample takes.
        launches: Kernels of a step on a GPU; None if not counted.
        host_us: Microseconds until a step returns while a GPU works on; None on a CPU.
    """

    peer: Peer
    step: Step
    calls: int
    launches: int | None
    host_us: float | None


def _prepare_all(
    settings: CompareSettings, shape: Shape, skipped: list[Skipped]
) -> dict[str, Contender]:
    """The peers that run, warmed up, then what memory can do; others go to ``skipped``."""
    try:
        check_memory(shape, settings.peers, settings.device)
    except ValueError as error:
        skipped.append(Skipped(shape.name, "all", str(error)))
        return {}
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    grads = [
        torch.randn(size, generator=generator, device=settings.device) for size in shape.tensors
    ]
    contenders = {}
    for peer in (*(PEERS[name] for name in settings.peers), *MEMORY.values()):
        try:
            contenders[peer.name] = _prepare(peer, grads)
        except Exception as error:  # whatever it is, the others go on
            skipped.append(Skipped(shape.name, peer.name, reason(error)))
    return contenders


def _prepare(peer: Peer, grads: list[torch.Tensor]) -> Contender:
    params = []
    for grad in grads:
        param = torch.ones_like(grad).requires_grad_()
        param.grad = grad  # the same for all: none of them changes it
        params.append(param)
    step, device = peer.build(params), grads[0].device
    for _ in range(2):  # state is made in the first, and seen for the first time in the second
        _seconds_of(step, 1, device)
    calls = math.ceil(_SAMPLE_SECONDS / _seconds_of(step, 1, device))
    return Contender(peer, step, calls, _launches(step, device), _host_us(step, device))


def _measure_in_turn(
    settings: CompareSettings,
    shape: Shape,
    contenders: dict[str, Contender],
    skipped: list[Skipped],
) -> dict[str, list[float]]:
    """Seconds of a step, a sample each round; one that fails now goes to ``skipped`` after all."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = random.Random(settings.seed)
    start = time.perf_counter()
    for index in range(MOST_ROUNDS):
        if index >= FEWEST_ROUNDS and time.perf_counter() - start > settings.seconds:
            break
        for name in order.sample(list(samples), len(samples)):
            contender = contenders[name]
            time.sleep(_PAUSE_SECONDS)
            try:
                seconds = _seconds_of(contender.step, contender.calls, settings.device)
            except Exception as error:
                skipped.append(Skipped(shape.name, name, reason(error)))
                del samples[name]
            else:
                samples[name].append(seconds / contender.calls)
    return samples


def _seconds_of(step: Step, calls: int, device: torch.device) -> float:
    """Seconds that some steps take, until the device has done them."""
    _synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        step()
    _synchronize(device)
    return time.perf_counter() - start


def peer_time(
    shape: Shape, contender: Contender, samples: Mapping[str, Sequence[float]]
) -> PeerTime:
    """What follows from the times of a step.

    Args:
        shape: What a step updates.
        contender: Whose step.
        samples: Seconds of a step, one of each round, by name: its own, ours, the ceiling's.
    """
    peer, seconds = contender.peer, samples[contender.peer.name]
    time = PositiveSpread.of([1e3 * sample for sample in seconds])
    ours, ceiling = samples.get(HOGSTREAM), samples.get(CEILING)
    speed = 1e-6 * peer.bytes_per_element * shape.elements / time.median
    return PeerTime(
        shape=shape.name,
        tensors=len(shape.tensors),
        elements=shape.elements,
        peer=peer.name,
        milliseconds=time,
        bytes_per_element=peer.bytes_per_element,
        operations_per_element=peer.operations_per_element,
        gigabytes_per_second=speed,
        share_of_ceiling=speed / _ceiling(shape, ceiling) if ceiling else None,
        time_against_hogstream=Ratio.of(seconds, ours) if ours else None,
        steps_per_sample=contender.calls,
        launches=contender.launches,
        host_us=contender.host_us,
    )


def _ceiling(shape: Shape, seconds: Sequence[float]) -> float:
    """1e9 bytes/s of the update-shaped pass."""
    return 1e-9 * MEMORY[CEILING].bytes_per_element * shape.elements / statistics.median(seconds)


def _host_us(step: Step, device: torch.device) -> float | None:
    """Microseconds until a step returns, while a GPU works on; None on a CPU, which does both."""
    if device.type == "cpu":
        return None
    seconds = []
    for _ in range(_HOST_REPEATS):
        _synchronize(device)
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    _synchronize(device)
    return 1e6 * statistics.median(seconds)


def _launches(step: Step, device: torch.device) -> int | None:
    """How many kernels one step starts on a GPU; None if they cannot be counted."""
    if device.type == "cpu":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    # Without ``acc_events``, torch 2.11 and later warn, once a process.
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        _synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    # A step without any kernel is none: the profiler may not read the GPU's counters.
    return sum(event.get("cat") == "kernel" for event in events) or None


def _free_memory(device: torch.device) -> None:
    """Gives back what the peers of one shape had, for those of the next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
