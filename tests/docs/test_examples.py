"""Programs under examples/ run as they are, and say what they promise."""

from __future__ import annotations

import io
import re
import runpy
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache

import pytest
import torch

from documents import ROOT, blocks

PROGRAMS = sorted(path.name for path in (ROOT / "examples").glob("*.py"))
# What a line of their output must match.
PROMISED = {
    "a3c.py": r"300 updates, \d+ episodes, the longest \d+ steps$",
    "asynchronous_training.py": r"accuracy (0\.9\d|1\.00) after 600 updates$",
    "await_cuda_event.py": r"(4 products; the event loop|skipped: there is no CUDA device)",
    "decide.py": r"(Use|It makes no difference here: use) .* updates/s.*\.$",
    "hogwild.py": r"accuracy (0\.9\d|1\.00) after 1000 updates by 2 processes$",
    "optimizer_swap.py": r"RMSpropAsync  +0\.\d{4}$",
}
# Those whose processes import them are run as users run them, with these arguments.
STARTS_PROCESSES = {"a3c.py": ["300"], "hogwild.py": []}


@cache
def output_of(name: str) -> str:
    """Runs an example, once for all tests, and returns what it prints."""
    path = ROOT / "examples" / name
    if name in STARTS_PROCESSES:
        return subprocess.run(
            [sys.executable, path, *STARTS_PROCESSES[name]],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    threads, said = torch.get_num_threads(), io.StringIO()
    with torch.random.fork_rng(devices=[]), redirect_stdout(said):
        runpy.run_path(str(path), run_name="__main__")
    torch.set_num_threads(threads)
    return said.getvalue()


def test_every_example_is_tested_and_shown() -> None:
    assert list(PROMISED) == PROGRAMS
    included = [block.code for block in blocks("docs/examples.md", "python")]
    shown = [re.fullmatch(r'--8<-- "examples/(\w+\.py)"\n', code) for code in included]
    assert sorted(match[1] for match in shown if match) == PROGRAMS
    assert len(shown) == len(PROGRAMS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMISED)
def test_example_says_what_it_promises(name: str) -> None:
    assert re.search(f"^{PROMISED[name]}", output_of(name), flags=re.MULTILINE)


@pytest.mark.slow
def test_torch_and_its_replacement_learn_alike() -> None:
    lines = output_of("optimizer_swap.py").splitlines()
    torchs, ours, _ = (float(line.split()[-1]) for line in lines)
    assert ours == pytest.approx(torchs, rel=0.05, abs=1e-4)
