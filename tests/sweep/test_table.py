"""The tables of docs/models.md say what happens."""

from __future__ import annotations

import pytest

from sweep.table import TABLES

ROWS = [(table, name) for table in TABLES for name in table.names()]
REMEDY = "make it: python tests/sweep/table.py"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.mark)
def test_every_family_has_a_row(table):
    lacking = sorted(set(table.names()) - table.read().keys())
    assert not lacking, f"{REMEDY} {' '.join(lacking)}"
    assert all(line.count("|") == len(table.head) + 1 for line in table.read().values())
    assert not any("CRASH" in line for line in table.read().values())


@pytest.mark.slow
@pytest.mark.parametrize(("table", "name"), ROWS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_row_made_again_is_the_row(table, name):
    assert table.row(name) == table.read()[name], f"{REMEDY} {name}"
