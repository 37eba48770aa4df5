"""Files, modules and members that the documents name are there.

The log is left out: it tells the past and may name what is gone.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "auto_round"
PAGES = sorted(page for page in DOCS.glob("*.md") if page.name != "LOG.md")
ARCHITECTURE = DOCS / "architecture.md"

_QUOTED = re.compile(r"`([^`\n]+)`")
_LINKED = re.compile(r"\]\((?!https?:)([^)#\s]+)\)")
_PLACE = re.compile(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)")
_HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
_FILE = re.compile(r"[\w.*/-]+\.(py|c|md|toml|json)")
_FOLDER = re.compile(r"[\w-]+/")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


def _names_in(folder: Path) -> set[str]:
    """Modules and folders of modules."""
    kept = (path for path in folder.iterdir() if path.is_dir() or path.suffix == ".py")
    return {path.stem for path in kept if path.name[0] not in "_."}


def _there(name: str) -> bool:
    return any(next(base.glob(name), None) is not None for base in (ROOT, PACKAGE, DOCS))


def _members(tree: ast.Module | ast.ClassDef) -> set[str]:
    found = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            found.add(ast.unparse(node.target))
        elif isinstance(node, ast.Assign):
            found |= {ast.unparse(target) for target in node.targets}
    return found


def _module_has(name: str) -> bool:
    """Whether `folder.module`, or `folder.module.member`, is there."""
    path, words = PACKAGE, name.split(".")
    for i, word in enumerate(words):
        if (path / word).is_dir():
            path /= word
        elif (path / f"{word}.py").is_file():
            rest = words[i + 1 :]
            source = (path / f"{word}.py").read_text(encoding="utf-8")
            return not rest or (len(rest) == 1 and rest[0] in _members(ast.parse(source)))
        else:
            return False
    return True


def _class_has(name: str, member: str) -> bool:
    """Whether some class of the package of that name has the member, itself or as an attribute it sets."""
    head = re.compile(rf"^class {name}\b", re.MULTILINE)
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if head.search(source):
            classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
            if any(node.name == name and member in _members(node) for node in classes):
                return True
    return False


def _wrong(text: str) -> list[str]:
    """What a page names that is not there."""
    tops, floors = _names_in(PACKAGE), _names_in(PACKAGE / "pipeline")
    wrong = [name for name in _LINKED.findall(text) if not (DOCS / name).exists()]
    for name in _QUOTED.findall(text):
        words = name.split(".")
        if _FILE.fullmatch(name):
            ok = "/" not in name or _there(name)  # without a folder it is a file of a model or a run
        elif _FOLDER.fullmatch(name) and name[:-1] in tops:
            ok = _there(name)
        elif not _DOTTED.fullmatch(name):
            continue
        elif words[0] in tops | floors:  # names begin at the top: a floor is not enough
            ok = _module_has(name)
        elif words[0][0].isupper() and len(words) == 2:
            ok = _class_has(*words)
        else:
            continue  # of another package, or an object in an example
        if not ok:
            wrong.append(name)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_named_is_there(page: Path) -> None:
    assert not _wrong(page.read_text(encoding="utf-8"))


def _places(page: Path) -> set[str]:
    """What links to headings of a page are called, as GitHub makes them of the headings."""
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in _HEADING.findall(page.read_text("utf-8")))
    return {heading.replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", [ROOT / "README.md", *DOCS.glob("*.md")], ids=lambda page: page.name)
def test_links_to_headings_find_them(page: Path) -> None:
    links = _PLACE.findall(page.read_text(encoding="utf-8"))
    assert not [link for link in links if link[1] not in _places(page.parent / link[0] if link[0] else page)]


def test_a_name_that_is_gone_is_found() -> None:
    gone = [
        "`numerics/gone.py`",
        "`pipeline.gone`",
        "`tuning.steps.gone`",
        "`Format.gone`",
        "`running.unit`",
        "[x](gone/x.md)",
    ]
    there = ["`numerics/format.py`", "`tuning.steps`", "`Format.quantize`", "`nn.Linear`", "[x](tuning.md)"]
    assert len(_wrong(" ".join(gone))) == len(gone)
    assert not _wrong(" ".join(there))


def test_tables_of_folders_name_each_folder_once() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    whole = text.split("## Folders, from top to bottom")[1].split("\n## ")[0]
    package, pipeline = whole.split("`pipeline` has floors")
    assert sorted(_first_column(package)) == sorted(_names_in(PACKAGE))
    assert sorted(_first_column(pipeline)) == sorted(_names_in(PACKAGE / "pipeline"))


def _first_column(table: str) -> list[str]:
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in _QUOTED.findall(row.split("|")[1])]
