"""The lists of other versions that tests are run with are what they say."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_the_oldest_are_those_of_pyproject() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    allowed: set[tuple[str, str]] = set()
    for name in ("dependencies", "bench", "cpu", "test"):
        (packages,) = re.findall(rf"^{name} = \[(.*?)\]$", pyproject, re.MULTILINE | re.DOTALL)
        allowed.update(re.findall(r'"([\w-]+)>=([\w.]+)', packages))
    listed = (ROOT / "tests" / "versions" / "oldest.txt").read_text("utf-8")
    assert {*re.findall(r"^([\w-]+)==(\S+)$", listed, re.MULTILINE)} == allowed
    assert len(allowed) > 10
