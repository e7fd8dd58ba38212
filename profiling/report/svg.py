"""From matplotlib's SVG, which stands alone, to SVG that is a part of a page."""

from __future__ import annotations

import re
from collections.abc import Mapping
from xml.etree import ElementTree

#: What the id of an element begins with whose other part is to show under the mouse.
TIP = "tip:"


def copy_drawing(text: str, svg: ElementTree.Element, colors: Mapping[str, str]) -> None:
    """Copies what is drawn, without what a page does not need.

    Args:
        text: What matplotlib wrote. All that it holds lies within its axes, so clips are left out.
        svg: Where to.
        colors: What is to stand for each colour, such as ``#0072b2``.
    """
    for child in ElementTree.fromstring(text):
        _copy(child, svg, colors)


def _copy(
    element: ElementTree.Element, parent: ElementTree.Element, colors: Mapping[str, str]
) -> None:
    tag, name = element.tag.rpartition("}")[2], element.get("id", "")
    if tag in ("metadata", "style", "clipPath"):
        return
    if tag == "defs" and not any(child.tag.endswith("}path") for child in element):
        return
    if tag == "g" and not name.startswith(TIP) and not element.get("transform"):
        for child in element:
            _copy(child, parent, colors)
        return
    kept = {
        key.rpartition("}")[2]: _rounded(value)
        for key, value in element.items()
        if key not in ("id", "clip-path", "style") and not value.startswith("rotate(-0 ")
    }
    if style := _styled(element.get("style", ""), colors):
        kept["style"] = style
    if parent.tag == "defs":
        kept["id"] = name
    copied = ElementTree.SubElement(parent, tag, kept)
    if tag == "text":
        copied.text = element.text
    if name.startswith(TIP):
        ElementTree.SubElement(copied, "title").text = name.removeprefix(TIP)
    for child in element:
        _copy(child, copied, colors)


def _styled(style: str, colors: Mapping[str, str]) -> str:
    """A style with the page's colours and without a font."""
    parts = [part.strip().replace(": ", ":") for part in style.split(";")]
    kept = ";".join(part for part in parts if not part.startswith("font-family"))
    return re.sub("#[0-9a-f]{6}", lambda found: colors.get(found[0], found[0]), kept)


def _rounded(value: str) -> str:
    """Coordinates, and paths of them, in tenths of a pixel."""
    tenths = re.sub(r"\d+\.\d+", lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), value)
    return " ".join(tenths.split())
