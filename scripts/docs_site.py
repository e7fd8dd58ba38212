"""What mkdocs runs on each page, and on the whole site: nothing in it may come from outside."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

_FETCHED = {"src", "srcset", "poster", "data"}
_OUTSIDE = re.compile(r"\s*(?:https?:)?//", re.IGNORECASE)
_IN_CSS = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')\s]+)", re.IGNORECASE)


def on_page_content(html: str, **_: Any) -> str:
    """Takes out the colons that mark a block of code in docstrings, as reStructuredText has it."""
    return html.replace("<p>::</p>\n", "").replace("::</p>", ":</p>")


def on_post_build(config: Mapping[str, Any]) -> None:
    """Looks through all pages and style sheets.

    Raises:
        ValueError: If one names a script, style, font or picture of another host.
    """
    site = Path(config["site_dir"])
    for path in sorted(site.rglob("*.html")) + sorted(site.rglob("*.css")):
        text = path.read_text("utf-8")
        found = outside_in_html(text) if path.suffix == ".html" else outside_in_css(text)
        if found:
            raise ValueError(f"{path} must fetch nothing from outside, got {', '.join(found)}")


def outside_in_html(text: str) -> list[str]:
    """Addresses that a browser fetches from other hosts to show a page; links to click are none."""
    page = _Page()
    page.feed(text)
    return page.outside


def outside_in_css(text: str) -> list[str]:
    """Addresses that a style sheet fetches from other hosts."""
    return _IN_CSS.findall(text)


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._in_style = tag == "style"
        for name, value in attrs:
            fetched = name in _FETCHED or (tag == "link" and name == "href")
            if fetched and value and _OUTSIDE.match(value):
                self.outside.append(value)
            elif name == "style" and value:
                self.outside += outside_in_css(value)

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.outside += outside_in_css(data)
