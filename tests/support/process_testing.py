"""Running parts of a test in other processes, with a limit on how long they may take."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.process import BaseProcess

import pytest

LIMIT_SECONDS = 120

# From Python 3.12 on, forking a process that has threads warns. A3C does it all the same.
may_fork_with_threads = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


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


def run_to_end(process: BaseProcess) -> None:
    """Starts a process, and fails if it fails or hangs."""
    process.start()
    process.join(LIMIT_SECONDS)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    assert not hangs, f"still running after {LIMIT_SECONDS} s"
    assert process.exitcode == 0
