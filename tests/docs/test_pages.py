"""Pages hold what was measured, lead to files that are there, and use one word for one thing."""

from __future__ import annotations

import re

import pytest

from documents import PAGES, ROOT, page_text
from results_page import DOCUMENTS, RESULTS, updated

# Words that mean what another word of the glossary means.
_OTHER_WORDS = r"figures?\b|hand(?:s|ed|ing)?[- ]over|carried out"


@pytest.mark.parametrize("name", DOCUMENTS)
def test_numbers_are_those_of_the_committed_results(name: str) -> None:
    text = page_text(name)
    assert updated(name, text, RESULTS) == text


def test_links_lead_to_files() -> None:
    links = [
        (page, link)
        for page in PAGES
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)(?:#[^)]*)?\)", page_text(page))
    ]
    assert {page for page, _ in links} >= {"README.md", "docs/index.md", "docs/lock-free.md"}
    assert [each for each in links if not ((ROOT / each[0]).parent / each[1]).exists()] == []


def test_pages_use_one_word_for_one_thing() -> None:
    said = [
        (page, match[0])
        for page in PAGES
        for match in re.finditer(_OTHER_WORDS, page_text(page), flags=re.IGNORECASE)
    ]
    assert said == []


def test_glossary_has_each_word_once() -> None:
    words = re.findall(r"^\| (\*\*.*?\*\*) \|", page_text("docs/glossary.md"), flags=re.MULTILINE)
    each = [word for line in words for word in re.findall(r"\*\*(.+?)\*\*", line)]
    assert {"worker", "lane", "policy", "version", "staleness", "lost update"} <= set(each)
    assert len(each) == len(set(each))


def test_files_that_the_page_on_races_names_are_there() -> None:
    tests = (ROOT / "tests").rglob("test_*.py")
    named = set(re.findall(r"`(?:[a-z/]*/)?(test_\w+)\.py`", page_text("docs/lock-free.md")))
    assert named
    assert named <= {path.stem for path in tests}
