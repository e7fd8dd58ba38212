"""The checks of ``make gpu`` hold on the driver of tests, and find what is wrong."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from gpu.smoke import CHECKS, CheckError, policy
from gpu.stages import CHECKS as NAMES
from gpu_testing import open_gpu
from update_testing import INTERPRETER_WARNS

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
