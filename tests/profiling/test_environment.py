"""What a result says of the code that it measured."""

from __future__ import annotations

import re

import pytest

from hogstream.profiling.environment import source_commit


def test_a_commit_that_is_given_is_told_whatever_git_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOGSTREAM_COMMIT", "")
    said = source_commit()
    assert said is None or re.fullmatch("[0-9a-f]{40}(-dirty)?", said)
    monkeypatch.setenv("HOGSTREAM_COMMIT", "4f1c2e7")
    assert source_commit() == "4f1c2e7"
