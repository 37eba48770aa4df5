"""Texts as rows of tokens."""

from __future__ import annotations

import json

import pytest
import torch

from auto_round.errors import ConfigError
from auto_round.evaluate.rows import check_text, token_rows


def letters(text, add_special_tokens):
    assert not add_special_tokens
    return {"input_ids": [ord(letter) for letter in text]}


def pairs(text, add_special_tokens):
    """A tokenizer of long tokens: eight characters a token do not suffice."""
    return {"input_ids": [1] * (len(text) // 20)}


def test_rows_are_the_text_without_its_end(tmp_path):
    path = tmp_path / "a.raw"
    path.write_text("abcdefghijk", encoding="utf-8")
    rows = token_rows(path, letters, 100, 4)
    assert rows.tolist() == [[97, 98, 99, 100], [101, 102, 103, 104]]
    assert token_rows(path, letters, 5, 4).tolist() == [[97, 98, 99, 100]]
    assert token_rows(path, letters, 100, 4, bos=7).tolist()[1] == [7, 100, 101, 102]


def test_line_ends_stay(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a\r\nb\r\n")
    assert token_rows(path, letters, 100, 3).flatten().tolist() == [97, 13, 10, 98, 13, 10]


def test_records_are_joined_by_an_empty_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "cd")))
    assert token_rows(path, letters, 100, 6).flatten().tolist() == [97, 98, 10, 10, 99, 100]


def test_more_is_read_where_tokens_are_long(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("x" * 10_000)
    assert token_rows(path, pairs, 300, 100).shape == (3, 100)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "the file is empty"),
        ("a.pdf", b"x", "cannot read .pdf"),
        ("a.txt", None, "no such file"),
    ],
)
def test_texts_that_cannot_be(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        check_text(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "abc", "gives 3 tokens, less than one row of 4"),
        ("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "x"}]}), "found a conversation"),
        ("a.jsonl", json.dumps({"input_ids": [1, 2]}), "found a tokens"),
    ],
)
def test_texts_that_do_not_do(tmp_path, name, content, words):
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=words):
        token_rows(tmp_path / name, letters, 100, 4)


def test_no_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        token_rows(tmp_path / "a.txt", letters, 100, 4)


def test_a_row_of_one_token_predicts_nothing(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    with pytest.raises(ConfigError, match="predict nothing"):
        token_rows(tmp_path / "a.txt", letters, 100, 2, bos=torch.tensor(1))
