"""A drawn picture made fit for the page: colours are variables, names unique, and it says what it shows."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from auto_round.report.theme import TONES

_SVG = "http://www.w3.org/2000/svg"
_LINK = "{http://www.w3.org/1999/xlink}href"
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_REFERENCE = re.compile(r"url\(#")
_NAMES = {pair[0]: f"var(--{name})" for name, pair in TONES.items()}


def inline(drawn: str, key: str, title: str, text: str) -> str:
    """Rework an SVG document of matplotlib into an element of the page.

    Args:
        drawn: the document.
        key: unique on the page; goes before every `id`.
        title: name of the picture.
        text: what it shows, for people who do not see it.
    """
    ElementTree.register_namespace("", _SVG)
    root = ElementTree.fromstring(drawn)
    for parent in root.iter():
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}metadata":
                parent.remove(child)
    for element in root.iter():
        _rework(element, key)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib |= {"role": "img", "aria-labelledby": f"{key}-title {key}-text"}
    for place, (tag, words) in enumerate((("title", title), ("desc", text))):
        element = ElementTree.Element(f"{{{_SVG}}}{tag}", {"id": f"{key}-{'text' if place else 'title'}"})
        element.text = words
        root.insert(place, element)
    return ElementTree.tostring(root, encoding="unicode")


def _rework(element: ElementTree.Element, key: str) -> None:
    """Prefix names and references, and replace colours."""
    found = element.attrib
    if "id" in found:
        found["id"] = f"{key}-{found['id']}"
    if _LINK in found:
        found["href"] = f"#{key}-{found.pop(_LINK).removeprefix('#')}"
    for name, value in found.items():
        if name == "style" or name in ("fill", "stroke", "clip-path"):
            value = _COLOUR.sub(lambda match: _NAMES.get(match[0], match[0]), value)
            found[name] = _REFERENCE.sub(f"url(#{key}-", value)
