"""The ways in which processes are started; in scripts, as a server of forks stays."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hogstream.scheduler import ProcessScheduler, SharedParameters
from process_testing import LIMIT_SECONDS, run_python

pytestmark = pytest.mark.slow
METHODS = ["spawn", "forkserver", "fork"]
SUPPORT = Path(__file__).parents[2] / "support"


@pytest.mark.parametrize("method", METHODS)
def test_processes_compute_with_their_share_of_threads(method: str, tmp_path: Path) -> None:
    """Though their parent has used OpenMP; they share its memory, and one that dies is replaced."""
    out = run_python("-W", "ignore", str(SUPPORT / "start_method_script.py"), method, str(tmp_path))
    result = json.loads(out)
    share = result.pop("share")
    assert result == {
        "counted": [[0, [0, share - 1, 2]], [1, [0, share - 1, 2]]],
        "torch_threads": share,
        "fates": ["was killed by SIGKILL"],
        "updates": 40,
        "lost": 0.0,
        "threads": 2,
    }


UNGUARDED = """
import asyncio
import torch
from hogstream.scheduler import ProcessScheduler, SharedParameters

async def main():
    shared = SharedParameters({"p": torch.zeros(8)})
    async with ProcessScheduler(shared, processes=1, start_method="METHOD"):
        print("opened")

asyncio.run(main())
"""


@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_a_script_without_a_guard(method: str, tmp_path: Path) -> None:
    """Is told so, unless nothing imports it again, nor could; ``spawn``: beside other scripts."""
    path = tmp_path / "script.py"
    path.write_text(UNGUARDED.replace("METHOD", method), "utf-8")
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-" if method == "fork" else str(path)],
        input=path.read_text("utf-8"),
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
        check=False,
    )
    if method == "fork":
        assert (ended.returncode, ended.stdout) == (0, "opened\n"), ended.stderr
    else:
        last_line = ended.stderr.splitlines()[-1]
        assert 'a script starts them under `if __name__ == "__main__":`' in last_line, ended.stderr


@pytest.mark.parametrize(
    ("method", "device", "text"),
    [
        ("thread", "cpu", "start_method must be one of spawn, forkserver, fork, got 'thread'"),
        pytest.param(
            *("fork", "cuda", "start_method must be spawn or forkserver for parameters on cuda:0"),
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
        ),
    ],
)
def test_methods_that_cannot_be(method: str, device: str, text: str) -> None:
    shared = SharedParameters({"p": torch.zeros(8, device=device)})
    with pytest.raises(ValueError, match=text):
        ProcessScheduler(shared, processes=1, start_method=method)
