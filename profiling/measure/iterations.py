"""What takes turns in ``hogstream compare``: trainings, iteration by iteration, and memory."""

from __future__ import annotations

import copy
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from torch import nn

from hogstream.profiling.measure.peers import Peer

# A turn is of so many iterations as fill this, and one before them that is not timed: by it the
# caches hold what they do in a training, and not what others left.
_TURN_SECONDS = 0.05
# Memory is passed over again and again for this long: small parameters are warm.
_PASS_SECONDS = 0.02


@dataclass(frozen=True)
class Seconds:
    """Of a step and what is around it: means over a turn.

    Attributes:
        step: From the end of the backward to that of the step, on a GPU by the GPU's clock.
        iteration: ``zero_grad``, forward, backward and step; None of what memory can do.
        host: Until the step returns, while a GPU works on; None on a CPU, which does both.
    """

    step: float
    iteration: float | None
    host: float | None


class Training:
    """An optimizer, and a network of its own that it trains.

    Attributes:
        steps: How many a turn takes.
    """

    def __init__(self, peer: Peer, network: nn.Module) -> None:
        """Makes the optimizer, and does its first steps, in which state is made and code compiled.

        Args:
            peer: Whose.
            network: Gives a loss each time that it is called. Its parameters are copied, and the
                data in its buffers is shared.

        Raises:
            Exception: Whatever says why the peer cannot run.
        """
        shared: dict[int, object] = {id(each): each for each in network.buffers()}
        self._network = copy.deepcopy(network, shared)
        params: list[torch.Tensor] = list(self._network.parameters())
        self._device = params[0].device
        self._optimizer = peer.build(params)
        for _ in range(2):  # state is made in the first, and seen for the first time in the second
            self.iterate()
        # Of two tries, as one may be disturbed.
        seconds = min(self.iterate().iteration or 0.0 for _ in range(2))
        self._warms_up = seconds < _TURN_SECONDS  # what takes longer is of more than caches hold
        self.steps = math.ceil(_TURN_SECONDS / seconds)
        self._forget()

    def turn(self) -> Seconds:
        """Does some iterations; the gradients are gone behind them, but for those that are kept."""
        if self._warms_up:
            self.iterate()
        each = [self.iterate() for _ in range(self.steps)]
        self._forget()
        host = [seconds.host for seconds in each if seconds.host is not None]
        return Seconds(
            fmean(seconds.step for seconds in each),
            fmean(seconds.iteration or 0.0 for seconds in each),
            fmean(host) if host else None,
        )

    def iterate(self) -> Seconds:
        """Does an iteration, as a training does, and waits for it."""
        if self._device.type == "cuda":
            return self._iterate_on_gpu()
        start = time.perf_counter()
        self._make_gradients()
        before = time.perf_counter()
        self._optimizer.step()
        end = time.perf_counter()
        return Seconds(end - before, end - start, None)

    def launches(self) -> int | None:
        """How many kernels a step starts on a GPU; None if they cannot be counted."""
        if self._device.type == "cpu":
            return None
        self._make_gradients()
        torch.cuda.synchronize(self._device)
        return _launches(self._optimizer.step, self._device)

    def _iterate_on_gpu(self) -> Seconds:
        # The host runs ahead of the GPU as far as it does in a training.
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        stream = torch.cuda.current_stream(self._device)
        start = time.perf_counter()
        self._make_gradients()
        marks[0].record(stream)
        before = time.perf_counter()
        self._optimizer.step()
        returned = time.perf_counter()
        marks[1].record(stream)
        torch.cuda.synchronize(self._device)
        iteration = time.perf_counter() - start
        return Seconds(1e-3 * marks[0].elapsed_time(marks[1]), iteration, returned - before)

    def _make_gradients(self) -> None:
        self._optimizer.zero_grad()
        self._network().backward()

    def _forget(self) -> None:
        """Gives the memory of gradients to whoever comes next."""
        self._optimizer.zero_grad()


class Passing:
    """Ways to go over memory, of which the fastest counts.

    Attributes:
        steps: How many passes a turn times together: those of the fastest.
    """

    def __init__(self, passes: Sequence[Callable[[], object]], device: torch.device) -> None:
        self._device = device
        self._passes = []
        for call in passes:
            self._seconds_of(call, 1)  # which may compile
            seconds = min(self._seconds_of(call, 1) for _ in range(2))
            times = math.ceil(_PASS_SECONDS / seconds)
            self._passes.append((call, times))
        self.steps = max(times for _, times in self._passes)

    def turn(self) -> Seconds:
        """Goes over memory in each way, again and again."""
        fastest = min(self._seconds_of(call, times) / times for call, times in self._passes)
        return Seconds(fastest, None, None)

    def _seconds_of(self, call: Callable[[], object], times: int) -> float:
        """Seconds that some passes take, until the device has done them."""
        _synchronize(self._device)
        start = time.perf_counter()
        for _ in range(times):
            call()
        _synchronize(self._device)
        return time.perf_counter() - start


def _launches(step: Callable[[], object], device: torch.device) -> int | None:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    # Without ``acc_events``, torch 2.11 and later warn, once a process.
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        step()
        torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text("utf-8"))["traceEvents"]
    # A step without any kernel is none: the profiler may not read the GPU's counters.
    return sum(event.get("cat") == "kernel" for event in events) or None


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
