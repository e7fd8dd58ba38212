"""Finding and running NVIDIA's command-line profilers."""

from __future__ import annotations

import glob
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

from hogstream.profiling.capture import PROFILED
from hogstream.profiling.errors import MeasurementError

#: For how long an interrupted tool may write what it has.
GRACE_SECONDS = 60


@dataclass(frozen=True)
class Tool:
    """A profiler.

    Attributes:
        name: Of the program.
        title: What NVIDIA calls it.
        oldest: The oldest version that has the options we pass.
        places: Where it is installed if it is not on the PATH, as patterns; the best come first.
        export: The command that writes its reports in a format that we read.
    """

    name: str
    title: str
    oldest: tuple[int, int]
    places: tuple[str, ...]
    export: str

    @property
    def advice(self) -> str:
        """Where to get it."""
        year, release = self.oldest
        return (
            f"install {self.title} {year}.{release} or newer from https://developer.nvidia.com/"
            f"{self.title.lower().replace(' ', '-')} and put {self.name} on the PATH"
        )


# 2022.1 is the first that has --cuda-graph-trace and --capture-range-end.
NSYS = Tool(
    "nsys",
    "Nsight Systems",
    (2022, 1),
    (
        "/opt/nvidia/nsight-systems/*/bin/nsys",
        "/opt/nvidia/nsight-systems/*/target-linux-*/nsys",
        "/opt/nvidia/nsight-systems-cli/*/target-linux-*/nsys",
        "/usr/local/cuda*/bin/nsys",
    ),
    "nsys export --type sqlite",
)
# 2021.1 is the first that takes --kernel-name regex:...
NCU = Tool(
    "ncu",
    "Nsight Compute",
    (2021, 1),
    ("/opt/nvidia/nsight-compute/*/ncu", "/usr/local/cuda*/bin/ncu"),
    "ncu --page raw --csv --import",
)


@dataclass(frozen=True)
class Program:
    """What is profiled.

    Attributes:
        command: Its command line.
        environment: Variables to add to ours.
        marked: Whether it marks what is to be captured; see ``captured``.
    """

    command: tuple[str, ...]
    environment: dict[str, str]
    marked: bool

    @classmethod
    def module(cls, name: str, *arguments: str) -> Program:
        """A module of hogstream's, which marks what is to be captured."""
        # Else -m would put the current folder where modules are looked for.
        return cls(
            (sys.executable, "-m", name, *arguments), {"PYTHONSAFEPATH": "1", PROFILED: "1"}, True
        )

    @classmethod
    def named(cls, command: Sequence[str]) -> Program:
        """Hogstream's ``bench`` or ``train`` with their options, or any other command."""
        if command[0] in ("bench", "train"):
            return cls.module("hogstream.cli.main", *command)
        return cls(tuple(command), {}, False)


@dataclass(frozen=True)
class FoundTool:
    """A profiler that is here.

    Attributes:
        tool: Which.
        path: Of the program.
        version: Such as ``2025.3.1``.
    """

    tool: Tool
    path: str
    version: str

    def offers(self, option: str, *command: str) -> bool:
        """Whether the help of a command of it names an option."""
        shown = subprocess.run([self.path, *command, "--help"], capture_output=True, check=False)
        return option.encode() in shown.stdout + shown.stderr

    def convert(self, report: Path, *arguments: str) -> bytes:
        """Runs it to export a report; returns what it prints.

        Raises:
            MeasurementError: If it fails, with the last line of what it says.
        """
        # Numbers are to be printed as they are in C.
        environment = {**os.environ, "LC_ALL": "C"}
        done = subprocess.run(
            [self.path, *arguments], env=environment, capture_output=True, check=False
        )
        if done.returncode:
            said = (done.stdout + done.stderr).decode("utf-8", "replace").split("\n")
            last = next((line.strip() for line in reversed(said) if line.strip()), "nothing")
            raise MeasurementError(
                f"{report}: {self.tool.name} ended with status {done.returncode} and says: {last}"
            )
        return done.stdout


def find_tool(tool: Tool) -> FoundTool:
    """The profiler on the PATH, else the newest in the usual places, that is new enough.

    Raises:
        MeasurementError: If there is none; says what to do.
    """
    refused = []
    for path in _candidates(tool):
        version = _version(path)
        if version is None:
            refused.append(f"{path} does not tell its version")
        elif _numbers(version)[:2] < tool.oldest:
            refused.append(f"{path} is {version}, which is too old")
        else:
            return FoundTool(tool, path, version)
    if refused:
        raise MeasurementError(f"{refused[0]}: {tool.advice}")
    raise MeasurementError(f"{tool.name} was not found: {tool.advice}")


def run_tool(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a profiler, and the program under it, with our standard streams.

    They run in a session of their own. When we are interrupted or terminated, all processes of it
    are interrupted, as by Ctrl-C in a terminal, and the tool may write what it has; then none of
    them is left. A second Ctrl-C ends them at once.

    Args:
        command: The profiler and its arguments.
        environment: Variables to add to ours.

    Returns:
        The exit status; 128 and the signal's number if a signal ended it.

    Raises:
        KeyboardInterrupt: If interrupted, once all have ended.
        SystemExit: If terminated, once all have ended.
    """
    with _termination_raises():
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, start_new_session=True
        )
        try:
            status = process.wait()
        except BaseException:
            _end_session(process)
            raise
    return status if status >= 0 else 128 - status


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Makes SIGTERM raise ``SystemExit``, so that we clean up."""

    def leave(number: int, _: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Interrupts all processes of a session, and kills those that stay."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE_SECONDS)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _candidates(tool: Tool) -> Iterator[str]:
    on_path = shutil.which(tool.name)
    if on_path is not None:
        yield on_path
    for place in tool.places:
        yield from sorted(glob.glob(place), key=_numbers, reverse=True)


def _version(path: str) -> str | None:
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    match = re.search(r"\bversion (\d+\.\d+(?:\.\d+)*)", said.stdout, re.IGNORECASE)
    return match[1] if match else None


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text)))
