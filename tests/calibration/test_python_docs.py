from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from auto_round.calibration.python_docs import PythonDocs, module_files, module_text, read_topics
from auto_round.errors import ConfigError

SOURCE = '''
"""First line.

Second.
    indented
"""
import sys
raise SystemExit("this module was run")

class A(dict, metaclass=type):
    """A's text."""

    def method(self, x: int = 3, *, y="é") -> int:
        """Method's text."""

if sys:
    async def later():
        """Found inside an if."""

def silent(): pass
'''

WANTED = """module pkg.m

First line.

Second.
    indented

class pkg.m.A(dict)

A's text.

pkg.m.A.method(self, x: int=3, *, y='é')

Method's text.

pkg.m.later()

Found inside an if."""


@pytest.fixture
def library(tmp_path: Path) -> Path:
    for name, text in {
        "pydoc_data/topics.py": "topics = {'b': 'chapter b\\n', 'a': 'chapter ' 'a'}\n",
        "pkg/m.py": SOURCE,
        "pkg/__init__.py": '"""The package."""',
        "pkg/test/skipped.py": '"""no"""',
        "site-packages/skipped.py": '"""no"""',
        "_sysconfigdata_x.py": '"""no"""',
        "broken.py": "def (",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_documents_of_a_small_library(library: Path) -> None:
    docs = PythonDocs(library)
    assert docs.names == ("topic:a", "topic:b", "module:broken", "module:pkg", "module:pkg.m")
    assert list(docs) == ["chapter a", "chapter b", "", "module pkg\n\nThe package.", WANTED]
    assert docs[-1] == docs[4]
    assert docs[:2] == ["chapter a", "chapter b"]
    with pytest.raises(IndexError):
        docs[5]


def test_a_library_without_sources_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--dataset path\.jsonl"):
        PythonDocs(tmp_path)


def test_this_python_has_plenty_of_text() -> None:
    docs = PythonDocs()
    assert sum(map(len, docs[::10])) > 50_000
    assert "module:argparse" in docs.names
    assert not any("idlelib" in name or ".test." in name for name in docs.names)


def test_reading_runs_and_imports_nothing() -> None:
    code = (
        "import sys\n"
        "from auto_round.calibration.python_docs import PythonDocs\n"
        "before = set(sys.modules)\n"
        "docs = PythonDocs()\n"
        "[docs[docs.names.index(n)] for n in ('module:antigravity', 'module:this', 'module:turtle')]\n"
        "assert not {'antigravity', 'this', 'turtle', 'pydoc_data.topics'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})


def test_parts(library: Path) -> None:
    assert [path.as_posix() for path in module_files(library)] == ["broken.py", "pkg/__init__.py", "pkg/m.py"]
    assert read_topics(library / "none.py") == {}
    assert module_text(library / "broken.py", "broken") == ""
