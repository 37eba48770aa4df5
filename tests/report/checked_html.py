"""A page read strictly: tags closed in order, names unique, tables with their exact numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "img", "input", "hr"}
LOADS = {"src", "href", "srcset", "poster", "data", "action", "background", "xlink:href"}
"""Attributes by which a page loads or leads to something else."""


@dataclass
class Table:
    caption: str = ""
    columns: list[str] = field(default_factory=list)
    rows: list[list[str | tuple[float, str]]] = field(default_factory=list)


class Page(HTMLParser):
    """Reads as it is fed; raises AssertionError at the first fault."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, Table] = {}
        self.texts: list[str] = []
        self._table = Table()
        self._exact: float | None = None
        self._cell: list[str] | None = None
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.tags.append((tag, found))
        if "id" in found:
            self.ids.append(found["id"])
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self._table = Table()
        elif tag == "tr":
            self._table.rows.append([])
        elif tag in ("td", "th", "caption"):
            self._cell, self._exact = [], None
        elif tag == "data" and self._cell is not None:
            self._exact = float(found["value"])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"{tag} was never opened"
        assert self.open[-1] == tag, f"{tag} ends inside of {self.open[-1]}"
        self.open.pop()
        if tag in ("td", "th", "caption"):
            text = "".join(self._cell or []).strip()
            if tag == "caption":
                self._table.caption = text
            else:
                self._table.rows[-1].append(text if self._exact is None else (self._exact, text))
            self._cell = None
        elif tag == "table":
            self._table.columns = [str(cell) for cell in self._table.rows.pop(0)]
            self.tables[self._table.caption] = self._table

    def handle_data(self, data):
        self.texts.append(data)
        if self._cell is not None:
            self._cell.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def loading(self) -> list[str]:
        """What the page would load or lead to, beyond itself."""
        found = [v for _, attrs in self.tags for name, v in attrs.items() if name in LOADS]
        return [value for value in found if not value.startswith(("#", "data:"))]


def checked(text: str) -> Page:
    """A page that is closed in itself, names nothing twice, runs nothing and loads nothing."""
    page = Page(text)
    assert len(page.ids) == len(set(page.ids)), "an id twice"
    named = {a[1:] for _, found in page.tags for n, a in found.items() if n in LOADS and a.startswith("#")}
    named |= {i for _, found in page.tags for i in found.get("aria-labelledby", "").split()}
    assert named <= set(page.ids), named - set(page.ids)
    assert not page.loading()
    assert not {tag for tag, _ in page.tags} & {
        "script",
        "iframe",
        "object",
        "embed",
        "img",
        "audio",
        "video",
    }
    assert not [n for _, found in page.tags for n in found if n.startswith("on")]
    styles = text.split("<style>", 1)[1].split("</style>", 1)[0]
    assert "@import" not in styles
    assert "url(" not in styles
    outside = text.replace("url(#", "")
    assert "url(" not in outside
    for svg in (found for tag, found in page.tags if tag == "svg"):
        assert svg["role"] == "img"
        assert len(svg["aria-labelledby"].split()) == 2
    return page
