"""Scripts of calibration text."""

from __future__ import annotations

import torch

from auto_round.calibration.row import CalibrationRow
from auto_round.calibration.writing_systems import ROWS, letters_of


def rows(*texts: str) -> list[CalibrationRow]:
    return [CalibrationRow.of_tokens(torch.tensor([ord(c) for c in text])) for text in texts]


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def test_letters_are_counted_by_script_and_nothing_else_is():
    found = letters_of(rows("Good day, 12!", "добрый", "日本 です", "العربية", "\ue000é"), decode)
    assert found == {"Latin": 8, "Arabic": 7, "Cyrillic": 6, "Cjk": 2, "Hiragana": 2}
    assert list(found) == ["Latin", "Arabic", "Cyrillic", "Cjk", "Hiragana"]


def test_text_without_letters():
    assert letters_of(rows("12 + 3"), decode) == {}


def test_of_many_rows_some_are_looked_at_from_first_to_last():
    seen: list[str] = []
    letters_of(rows(*(chr(1000 + i) for i in range(3 * ROWS))), lambda t: seen.append(decode(t)) or "")
    assert len(seen) == ROWS
    assert seen[-1] == chr(1000 + 3 * ROWS - 3)
