"""The checks of ``make gpu`` hold on the driver of tests, and find what is wrong."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from gpu.outcomes import reason
from gpu.processes import Program
from gpu.smoke import CHECKS, CheckError, policy
from gpu.stages import CHECKS as NAMES
from gpu.stages import ROOT
from gpu_testing import open_gpu
from process_testing import until
from triton_testing import INTERPRETER_WARNS

pytestmark = [pytest.mark.slow, INTERPRETER_WARNS]


@pytest.mark.parametrize("name", CHECKS)
def test_check_holds_on_the_driver_of_tests(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # A spawned process imports that of its parent, and pytest's may run all tests again.
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    with open_gpu("driver of tests") as gpu:
        CHECKS[name](gpu)


def test_a_stage_has_all_checks() -> None:
    assert (*CHECKS,) == NAMES


def test_a_lost_update_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with open_gpu("driver of tests") as gpu:
        zeros = gpu.zeros

        def with_a_fault(elements: int) -> object:
            shared = zeros(elements)
            shared.flat[elements // 2] = torch.tensor(1.0)  # as if an update had been lost
            return shared

        monkeypatch.setattr(gpu, "zeros", with_a_fault)
        with pytest.raises(CheckError, match=r"from -200\.0 to -199\.0 instead of -200"):
            policy("ordered", gpu)


def test_a_check_that_hangs_shows_where(tmp_path: Path) -> None:
    hangs = """
import signal, sys
from gpu import smoke
def wait_for_ever(gpu):
    while True:
        signal.pause()
smoke.CHECKS["hangs"] = wait_for_ever
sys.argv = ["smoke", "hangs", "cpu", "5"]
smoke.main()
"""
    paths = os.pathsep.join(str(ROOT / name) for name in ("scripts", "tests/support"))
    program = Program(
        [sys.executable, "-c", hangs],
        tmp_path / "log",
        seconds=60,
        folder=tmp_path,
        environment={**os.environ, "PYTHONPATH": paths},
    )
    until(program.has_ended)
    assert (program.status, program.stopped) == (1, False)
    assert "Timeout (0:00:03)!" in (tmp_path / "log").read_text()
    assert reason(tmp_path / "log") == 'it was in File "<string>", line 6 in wait_for_ever'
