"""Elements of an SVG, so that tests ask what is drawn and not how it is spelled."""

from __future__ import annotations

import re
from xml.etree import ElementTree


def parsed(svg: str) -> list[ElementTree.Element]:
    """All elements; fails unless the markup is well formed and every number in it is finite."""
    root = ElementTree.fromstring(svg)
    assert not re.search(r"\b(nan|inf|None)\b", svg)
    assert [child.tag for child in root][:2] == ["title", "desc"]
    assert all(child.text for child in list(root)[:2])
    return list(root.iter())


def of_class(elements: list[ElementTree.Element], name: str) -> list[ElementTree.Element]:
    return [element for element in elements if name in (element.get("class") or "").split()]


def texts(elements: list[ElementTree.Element]) -> list[str]:
    return ["".join(element.itertext()).replace("\u00a0", " ") for element in elements if element.tag == "text"]
