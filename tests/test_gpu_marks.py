"""Tests that run on a GPU where there is one are those with the mark ``gpu``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gpu import stages
from process_testing import run_python

TESTS = Path(__file__).parent


@pytest.mark.slow
def test_what_runs_on_a_gpu_is_marked() -> None:
    pytest.importorskip("triton")
    folders = [str(TESTS / name) for name in ("kernels", "optim", "profiling/ceilings")]
    script = str(TESTS / "support" / "pretended_gpu.py")
    output = run_python(script, "-p", "no:cacheprovider", *folders)
    marked, unmarked = json.loads(output.splitlines()[-1])
    assert unmarked == []
    run_by_make_gpu = set(stages._files(but="nowhere"))
    assert {str(TESTS.parent / name.partition("::")[0]) for name in marked} <= run_by_make_gpu
    assert any("test_bits.py::test_variants_over_several_steps[triton-" in name for name in marked)
    assert any("test_capturable.py::test_gives_the_bits_" in name for name in marked)
