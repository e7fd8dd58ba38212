"""README's examples run, and its figures are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hogstream.scheduler import Checkpoint
from results_page import DOCUMENTS, RESULTS, updated

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(import .*?)```", README, flags=re.DOTALL)


def run_example(word: str) -> dict[str, object]:
    """Runs the one example with this word in it, and returns the names that it defines."""
    (example,) = (example for example in EXAMPLES if word in example)
    names: dict[str, object] = {}
    exec(example, names)
    return names


def test_example_of_the_optimizer_learns() -> None:
    loss = run_example("RMSpropAsync")["loss"]
    assert isinstance(loss, torch.Tensor)
    assert loss.item() < 1.0  # untrained, it is about 8


def test_example_of_the_scheduler_says_how_stale_updates_were(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_example("StreamScheduler")
    assert "'mean'" in capsys.readouterr().out


def test_example_of_a_checkpoint_loads_what_it_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = run_example("save_checkpoint")["checkpoint"]
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.iterations == (120, 118)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_figures_are_those_of_the_committed_results(name: str) -> None:
    text = (ROOT / name).read_text("utf-8")
    assert updated(name, text, RESULTS) == text


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_to_files(name: str) -> None:
    path = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", path.read_text("utf-8"))
    assert links
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_files_that_the_page_on_races_names_are_there() -> None:
    page = (ROOT / "docs" / "lock-free.md").read_text("utf-8")
    tests = (ROOT / "tests").rglob("test_*.py")
    named = set(re.findall(r"`(?:[a-z/]*/)?(test_\w+)\.py`", page))
    assert named
    assert named <= {path.stem for path in tests}
