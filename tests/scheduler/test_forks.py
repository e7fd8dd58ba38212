"""A child of ``os.fork``, however it ends, takes nothing from its parent's scheduler."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from hogstream.scheduler import SharedParameters, StreamScheduler
from process_testing import may_fork_with_threads, run_python

PROGRAM = Path(__file__).parents[1] / "support" / "fork_program.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("numba", ["exit", "stays"]),
        ("numpy", ["exit", "handlers"]),
        ("cuda", ["exit", "handlers", "stays"]),
        ("processes", ["handlers", "exit", "stays"]),
    ],
)
def test_parent_goes_on_however_its_child_ends(kind: str, ends: list[str]) -> None:
    updates = 200 if kind == "cuda" else 6000
    printed = run_python(str(PROGRAM), kind, *ends, PYTHONWARNINGS="ignore")
    assert printed == f"{updates} {updates} True {{}}\n" * len(ends)


@may_fork_with_threads
async def test_child_may_use_what_its_parent_has_open() -> None:
    """Nobody in it has the parameters open, nor holds what counts their versions."""
    shared = SharedParameters({"p": torch.zeros(8)})
    async with StreamScheduler(shared, workers=2, backend="numpy"):
        with shared._landing:
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    shared.share_memory_(1)
                    shared.land(0)
                    code = 0 if shared.version == 1 else 2
                finally:
                    os._exit(code)
    _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 (nothing else has to go on)
    assert os.waitstatus_to_exitcode(status) == 0
    assert shared.version == 0


@may_fork_with_threads
async def test_child_may_not_move_what_its_parent_shares() -> None:
    """Updates that it made in other places would not be counted."""
    shared = SharedParameters({"p": torch.zeros(8)})
    shared.share_memory_(2)
    async with StreamScheduler(shared, workers=1, backend="numpy"):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                with pytest.raises(RuntimeError, match="must not move while a scheduler is open"):
                    shared.share_memory_(1)
                code = 0
            finally:
                os._exit(code)
    _, status = os.waitpid(pid, 0)  # noqa: ASYNC222 (nothing else has to go on)
    assert os.waitstatus_to_exitcode(status) == 0
