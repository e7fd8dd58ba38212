"""The pages of the documentation, and the blocks of code in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent.parent
README = "README.md"
#: README and every page of the site, by path from the root.
PAGES = (
    README,
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A block of code.

    Attributes:
        language: As its fence says; empty if that says nothing.
        line: Of the page, from 1, on which the code begins.
        code: What stands between the fences.
    """

    language: str
    line: int
    code: str


def page_text(page: str) -> str:
    """What is in a page of ``PAGES``."""
    return (ROOT / page).read_text("utf-8")


def blocks(page: str, language: str | None = None) -> list[Block]:
    """The blocks of a page in order: all, or those of one language."""
    text = page_text(page)
    found = [
        Block(match[1], text.count("\n", 0, match.start(2)) + 1, match[2])
        for match in _FENCE.finditer(text)
    ]
    return [block for block in found if language in (None, block.language)]
