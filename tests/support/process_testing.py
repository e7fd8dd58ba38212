"""Running parts of a test in other processes, with a limit on how long they may take."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryFile

import psutil
import pytest

LIMIT_SECONDS = 120
HOGSTREAM = Path(__file__).with_name("brief_hogstream.py")

# From Python 3.12 on, forking a process that has threads warns. A3C does it all the same.
may_fork_with_threads = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


def ensure_server_of_forks() -> None:
    """Starts multiprocessing's, which has imported what processes of schedulers do.

    Each process costs little then. There is one server, until Python ends.
    """
    multiprocessing.set_forkserver_preload(["hogstream.scheduler", "hogstream.kernels"])
    forkserver.ensure_running()


def shared_memory() -> set[str]:
    """Segments of shared memory that this process, or one that it has started, has made and left.

    torch names each after its maker. Those of tests that run beside this one come and go.
    """
    process = psutil.Process()
    makers = {process.pid, *(child.pid for child in process.children(recursive=True))}
    made = {name: re.match(r"torch_(\d+)_", name) for name in os.listdir("/dev/shm")}
    return {name for name, maker in made.items() if maker and int(maker[1]) in makers}


def run_python(*arguments: str, **environment: str) -> str:
    """Runs a new interpreter, in which Triton is not interpreted, and returns what it prints."""
    inherited = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
    finished = subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def until(true: Callable[[], bool]) -> None:
    """Waits until something is true of other processes, which nothing tells."""
    end = time.monotonic() + LIMIT_SECONDS
    while not true():
        assert time.monotonic() < end, f"not so after {LIMIT_SECONDS} s"
        time.sleep(0.01)


def run_to_end(process: BaseProcess) -> int | None:
    """Starts a process, fails if it hangs, and returns its exit code."""
    process.start()
    process.join(LIMIT_SECONDS)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    assert not hangs, f"still running after {LIMIT_SECONDS} s"
    return process.exitcode


def interrupt_hogstream(
    line: str, *arguments: object, number: signal.Signals = signal.SIGINT
) -> tuple[int, str, str]:
    """Runs the ``hogstream`` command and sends it one signal when its progress shows a line.

    Args:
        line: What the line must hold.
        arguments: Of the command.
        number: The signal.

    Returns:
        Exit status, standard output and standard error.
    """
    command = [sys.executable, str(HOGSTREAM), *map(str, arguments)]
    shown = []
    with (
        TemporaryFile("w+") as out,
        subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True) as process,
    ):
        limit = threading.Timer(LIMIT_SECONDS, process.kill)
        limit.start()
        try:
            assert process.stderr is not None
            for each in process.stderr:
                shown.append(each)
                if line in each:
                    process.send_signal(number)
                    break
            else:
                raise AssertionError(f"no line with {line!r} in {''.join(shown)}")
            shown += process.stderr
            status = process.wait()
        finally:
            limit.cancel()
            process.kill()
        out.seek(0)
        return status, out.read(), "".join(shown)
