"""The built site fetches nothing from other hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from docs_site import on_page_content, on_post_build


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.html", '<script src="https://cdn.test/a.js"></script>'),
        ("page.html", '<script src="//cdn.test/a.js"></script>'),
        ("page.html", '<link rel="stylesheet" href="http://fonts.test/css">'),
        ("page.html", '<img src="https://pictures.test/a.png">'),
        ("page.html", "<style>@font-face { src: url(https://fonts.test/a.woff2) }</style>"),
        ("page.html", '<p style="background: url(//pictures.test/a.png)">text</p>'),
        ("sub/styles.css", '@import "https://fonts.test/a.css";'),
        ("sub/styles.css", "a { background: url('https://pictures.test/a.png') }"),
    ],
)
def test_what_comes_from_outside_is_refused(name: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"{path.name} must fetch nothing from outside.*test/"):
        on_post_build({"site_dir": str(tmp_path)})


def test_own_files_and_links_to_click_are_fine(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(
        '<link rel="stylesheet" href="assets/a.css"><script src="../a.js"></script>'
        '<a href="https://arxiv.org/abs/1602.01783">paper</a><p>see https://test/a.js</p>'
        '<svg xmlns="http://www.w3.org/2000/svg"></svg>'
    )
    (tmp_path / "a.css").write_text('a { background: url("a.png"); content: "https://test" }')
    on_post_build({"site_dir": str(tmp_path)})


def test_colons_of_docstrings_are_not_shown() -> None:
    html = "<p>It runs.</p>\n<p>::</p>\n<pre>run()</pre><p>as in::</p>\n<pre>a::b</pre>"
    assert on_page_content(html, page=None) == (
        "<p>It runs.</p>\n<pre>run()</pre><p>as in:</p>\n<pre>a::b</pre>"
    )
