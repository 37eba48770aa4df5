"""Captions from files and from Python; what holds none is refused."""

from __future__ import annotations

import json

import pytest

from auto_round.diffusion.captions import check_captions, of_file, read_captions
from auto_round.errors import ConfigError

TEXTS = ["a red cat", 'a "blue" dog', "two men"]


def written(folder, name, text):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("c.tsv", "id\tcaption\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(TEXTS))),
        ("c.tsv", "caption\textra\n" + "".join(f"{text}\tx\n" for text in TEXTS)),
        ("c.jsonl", "".join(json.dumps({"caption": text}) + "\n" for text in TEXTS)),
        ("c.jsonl", "".join(json.dumps({"id": 1, "prompt": text}) + "\n" for text in TEXTS)),
        ("c.json", json.dumps([{"text": text} for text in TEXTS])),
        ("c.json", json.dumps(TEXTS)),
        ("c.txt", "\n".join(TEXTS) + "\n\n"),
    ],
    ids=["tsv", "tsv other columns", "jsonl", "jsonl prompts", "json", "json texts", "txt"],
)
def test_files(tmp_path, name, text):
    path = written(tmp_path, name, text)
    assert of_file(path) == TEXTS
    check_captions(str(path))
    some = read_captions(str(path), 2, seed=1)
    assert len(some) == 2
    assert set(some) < set(TEXTS)
    assert some == read_captions(str(path), 2, seed=1)
    assert sorted(read_captions(str(path), 9, seed=1)) == sorted(TEXTS)


def test_records_from_python_keep_their_order():
    assert read_captions([*TEXTS, {"caption": " last "}], 9, seed=1) == [*TEXTS, "last"]
    assert read_captions(TEXTS, 1, seed=1) == TEXTS[:1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.tsv", "id\twords\n1\ta cat\n", "caption, prompt, text"),
        ("c.tsv", "id\tcaption\n", "holds none"),
        ("c.jsonl", '{"id": 1}\n', "record 0"),
        ("c.jsonl", '{"caption": 3}\n', "record 0"),
        ("c.jsonl", '{"caption": " "}\n', "record 0"),
        ("c.txt", "\n\n", "holds none"),
        ("c.csv", "caption\na cat\n", "no data set of captions"),
    ],
)
def test_files_without_captions(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=message):
        of_file(written(tmp_path, name, text))


@pytest.mark.parametrize("name", ["c.tsv", "c.txt"])
def test_files_of_another_encoding(tmp_path, name):
    (tmp_path / name).write_bytes(b"caption\nun caf\xe9\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        of_file(tmp_path / name)


@pytest.mark.parametrize("name", ["nowhere.tsv", "mbpp", "python-docs", "some/data"])
def test_names_that_hold_none(name):
    with pytest.raises(ConfigError):
        check_captions(name)


def test_the_default_of_text_means_the_captions_of_coco(monkeypatch):
    from auto_round.diffusion import captions

    check_captions("NeelNanda/pile-10k")
    check_captions("coco2014")
    monkeypatch.setattr(captions, "COCO_ADDRESS", "http://127.0.0.1:9/none.tsv")
    monkeypatch.delenv("AR_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent")
    with pytest.raises(ConfigError, match="--dataset"):
        read_captions("coco2014", 3, seed=1)
