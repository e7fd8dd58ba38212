"""README's examples run, and what it names is there."""

from __future__ import annotations

import re

import pytest
import torch

from documents import README, ROOT, blocks, page_text


def run_example(word: str) -> dict[str, object]:
    """Runs the one example with this word in it, and returns the names that it defines."""
    (example,) = (block.code for block in blocks(README, "python") if word in block.code)
    names: dict[str, object] = {}
    exec(example, names)
    return names


def test_example_of_the_optimizer_learns() -> None:
    loss = run_example("hogstream.optim import RMSprop")["loss"]
    assert isinstance(loss, torch.Tensor)
    assert loss.item() < 1.0  # untrained, it is about 8


def test_example_of_the_scheduler_says_how_stale_updates_were(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_example("StreamScheduler")
    assert "'mean'" in capsys.readouterr().out


def test_there_are_no_other_examples() -> None:
    assert len(blocks(README, "python")) == 2


def test_where_things_are_names_every_package() -> None:
    _, _, table = page_text(README).partition("## Where things are")
    named = set(re.findall(r"^\| \[`(\w+)/`\]\(\1\) \|", table, flags=re.MULTILINE))
    settings = (ROOT / "pyproject.toml").read_text("utf-8")
    packages = set(re.findall(r'^"hogstream\.(\w+)" = "\1"$', settings, flags=re.MULTILINE))
    assert packages
    assert packages | {"docs", "examples", "scripts", "tests"} == named
