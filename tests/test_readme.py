"""README's examples run, and its figures are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hogstream.profiling.readme import updated_readme

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"```python\n(import .*?)```", README, flags=re.DOTALL)


def test_there_is_an_example_of_the_optimizer_and_one_of_the_scheduler() -> None:
    assert [("optim" in example, "scheduler" in example) for example in EXAMPLES] == [
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize("example", EXAMPLES, ids=["optimizer", "scheduler"])
def test_example_runs(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(example, names)
    if isinstance(loss := names.get("loss"), torch.Tensor):
        assert loss.item() < 1.0  # it has learnt something: untrained, it is about 8
    else:
        assert "'mean'" in capsys.readouterr().out


def test_figures_are_those_of_the_committed_results() -> None:
    assert updated_readme(README, ROOT / "profiling" / "results") == README


def test_links_lead_to_files() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
