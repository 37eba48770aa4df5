from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from auto_round.calibration.records import Tokens
from auto_round.calibration.row import CalibrationRow
from auto_round.calibration.rows import CalibrationRows, load_rows
from auto_round.calibration.shape import Reason, cut_rows, join_rows
from auto_round.calibration.sources import OfModel
from auto_round.errors import ConfigError
from calibration.words import CountingTokenizer, make_tokenizer, words


def write_lines(path: Path, records: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def ids(found: CalibrationRows) -> list[list[int]]:
    return [row.tokens.tolist() for row in found.rows]


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> str:
    records = [{"text": words(i, 10 + i % 30)} for i in range(100)]
    return write_lines(tmp_path_factory.mktemp("data") / "books.jsonl", records)


def test_long_samples_are_cut_and_short_ones_dropped(tokenizer: PreTrainedTokenizerFast, books: str) -> None:
    found = load_rows(books, tokenizer, nsamples=100, seqlen=20, seed=42)
    wanted = [tokenizer(words(i, 20))["input_ids"] for i in range(100) if 10 + i % 30 >= 20]
    assert sorted(ids(found)) == sorted(wanted)
    assert found.dropped == {Reason.SHORT: 100 - len(wanted)}
    assert all(row.tokens.dtype == torch.int64 and row.mask is None for row in found.rows)
    assert "books.jsonl: 60 rows from 100 samples; dropped: 40 shorter than seqlen" in found.summary


def test_the_seed_decides(tokenizer: PreTrainedTokenizerFast, books: str) -> None:
    first, again = (load_rows(books, tokenizer, nsamples=16, seqlen=16, seed=1) for _ in range(2))
    other = load_rows(books, tokenizer, nsamples=16, seqlen=16, seed=2)
    assert ids(first) == ids(again)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(first.rows) == 16


def test_more_rows_begin_with_the_same_ones(tokenizer: PreTrainedTokenizerFast, books: str) -> None:
    few, many = (load_rows(books, tokenizer, nsamples=n, seqlen=16, seed=1) for n in (10, 30))
    assert ids(many)[:10] == ids(few)


def test_no_more_is_tokenized_than_needed(books: str) -> None:
    tokenizer = CountingTokenizer(make_tokenizer())
    load_rows(books, tokenizer, nsamples=8, seqlen=10, seed=1)
    assert tokenizer.texts == 16


def test_concat_joins_everything_and_cuts(tokenizer: PreTrainedTokenizerFast, books: str) -> None:
    found = load_rows(f"{books}:concat", tokenizer, nsamples=1000, seqlen=20, seed=42)
    total = sum(10 + i % 30 for i in range(100))
    assert len(found.rows) == total // 20
    assert not found.dropped


def test_text_files_are_joined_without_being_asked(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("\n".join(words(i, 7) for i in range(100)), encoding="utf-8")
    found = load_rows(tmp_path / "a.txt", tokenizer, nsamples=70, seqlen=10, seed=0)
    assert [t for row in ids(found) for t in row] == tokenizer((tmp_path / "a.txt").read_text())["input_ids"]


def test_mixture_shares(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    for name, count in (("a", 50), ("b", 50), ("c", 3)):
        write_lines(tmp_path / f"{name}.jsonl", [f"{name} {words(i, 9)}" for i in range(count)])
    spec = f"{tmp_path}/a.jsonl:num=8,{tmp_path}/b.jsonl,{tmp_path}/c.jsonl"
    found = load_rows(spec, tokenizer, nsamples=20, seqlen=10, seed=3)
    report = [part.split(" from")[0] for part in found.summary.split("; ")]
    assert report == ["a.jsonl: 8 rows", "b.jsonl: 9 rows", "c.jsonl: 3 rows"]
    assert len(found.rows) == 20
    assert len(set(map(tuple, ids(found)))) == 20


def test_num_alone_caps_and_nsamples_caps_all(tokenizer: PreTrainedTokenizerFast, books: str) -> None:
    assert len(load_rows(f"{books}:num=5", tokenizer, nsamples=20, seqlen=10, seed=3).rows) == 5
    assert (
        len(load_rows(f"{books}:num=50,{books}:num=50", tokenizer, nsamples=20, seqlen=10, seed=3).rows) == 20
    )


def test_too_few_because_of_num_says_so(tokenizer: PreTrainedTokenizerFast, books: str) -> None:
    found = load_rows(f"{books}:num=5,{books}:num=2", tokenizer, nsamples=20, seqlen=10, seed=3)
    assert "7 of 20 calibration rows" in found.missing
    assert "Ask for more with :num=" in found.missing
    assert "more data" not in found.missing
    found = load_rows(f"{books}:num=5,{books}:num=500", tokenizer, nsamples=800, seqlen=10, seed=3)
    assert "more data" in found.missing


def test_too_few_are_told_with_the_reason(tokenizer: PreTrainedTokenizerFast, books: str) -> None:
    found = load_rows(books, tokenizer, nsamples=100, seqlen=38, seed=42)
    assert len(found.rows) == 6
    assert "6 of 100 calibration rows of 38 tokens" in found.missing
    assert "94 shorter than seqlen (the longest of these has 37)" in found.missing
    assert ":concat" in found.missing


def test_enough_rows_miss_nothing(tokenizer: PreTrainedTokenizerFast, books: str) -> None:
    assert load_rows(books, tokenizer, nsamples=6, seqlen=38, seed=42).missing == ""


def test_none_at_all_is_a_config_error_with_counts_and_remedies(
    tokenizer: PreTrainedTokenizerFast, books: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_rows(books, tokenizer, nsamples=100, seqlen=64, seed=42)
    for part in ("64 tokens", "100 samples", "100 shorter", "has 39", "smaller seqlen", ":concat"):
        assert part in str(caught.value)


def test_a_repeating_tail_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [words(0, 5) + " w9" * 5, words(0, 4) + " w9" * 6, words(0, 10)]
    found = load_rows(samples, tokenizer, nsamples=3, seqlen=10, seed=0)
    assert len(found.rows) == 2
    assert found.dropped == {Reason.TAIL: 1}


@pytest.mark.parametrize("token", [0, 1, 7])
def test_token_ids_are_taken_as_they_are(tokenizer: PreTrainedTokenizerFast, token: int) -> None:
    """Also a row of one token, of padding even: smoke tests of tools that call this one give such rows."""
    rows = [torch.full((1, 10), token) for _ in range(3)]
    found = load_rows(rows, tokenizer, nsamples=2, seqlen=4, seed=0)
    assert ids(found) == [[token] * 4] * 2
    assert all(row.mask is None for row in found.rows)


def test_own_records_keep_their_order(tokenizer: PreTrainedTokenizerFast) -> None:
    samples = [words(i, 12) for i in range(40)]
    found = load_rows(samples, tokenizer, nsamples=20, seqlen=10, seed=0)
    assert ids(found) == [tokenizer(words(i, 10))["input_ids"] for i in range(20)]


def test_own_masks_are_kept_and_full_ones_are_none() -> None:
    records = [
        {"input_ids": torch.arange(1, 7)[None], "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])},
        {"input_ids": torch.arange(1, 7)[None], "attention_mask": torch.ones(1, 6)},
        {"input_ids": list(range(1, 7)), "attention_mask": [0] * 6},
    ]
    found = load_rows(records, None, nsamples=4, seqlen=6, seed=0)
    masks = [None if row.mask is None else row.mask.int().tolist() for row in found.rows]
    assert masks == [[0, 0, 1, 1, 1, 1], None]
    assert found.dropped == {Reason.PADDING: 1}


def test_padding_of_own_ids_is_found_without_a_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    pad = tokenizer.pad_token_id
    found = load_rows(
        [[pad, pad, 9, pad, 8, pad], [9, 8, 7, 9, 8, 7]], tokenizer, nsamples=4, seqlen=6, seed=0
    )
    assert found.rows[0].mask is not None
    assert found.rows[0].mask.int().tolist() == [0, 0, 1, 1, 1, 0]
    assert found.rows[1].mask is None


def test_the_mask_is_part_of_the_fingerprint() -> None:
    def rows(mask: list[int]) -> str:
        record = {"input_ids": [1, 2, 3], "attention_mask": mask}
        return load_rows([record], None, nsamples=1, seqlen=3, seed=0).fingerprint

    assert rows([1, 1, 1]) == load_rows([[1, 2, 3]], None, nsamples=1, seqlen=3, seed=0).fingerprint
    assert len({rows([1, 1, 1]), rows([0, 1, 1]), rows([1, 1, 0])}) == 3


def test_data_loader_and_generator(tokenizer: PreTrainedTokenizerFast) -> None:
    data = [torch.arange(i, i + 8) + 1 for i in range(10)]
    loader: DataLoader[Tensor] = DataLoader(data, batch_size=4)  # type: ignore[arg-type]
    wanted = [row[:6].tolist() for row in data[:7]]
    assert ids(load_rows(loader, tokenizer, nsamples=7, seqlen=6, seed=0)) == wanted

    def endless() -> Iterator[str]:
        index = 0
        while True:
            yield words(index, 10)
            index += 1

    assert len(load_rows(endless(), tokenizer, nsamples=7, seqlen=6, seed=0).rows) == 7


def test_one_encoding_is_its_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    encoding = tokenizer([words(0, 8), words(3, 8)])
    assert ids(load_rows(encoding, None, nsamples=9, seqlen=8, seed=0)) == encoding["input_ids"]


def test_a_tensor_is_its_rows() -> None:
    data = torch.arange(1, 41).reshape(5, 8)
    assert ids(load_rows(data, None, nsamples=9, seqlen=8, seed=0)) == data.tolist()


def test_chat_template_and_system_prompt(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["w1 w2", "w1 w2"])
    found = load_rows(f'{path}:system_prompt="w5 w6"', tokenizer, nsamples=1, seqlen=12, seed=0)
    assert tokenizer.decode(found.rows[0].tokens) == "system : w5 w6 eot user : w1 w2 eot assistant :"
    plain = load_rows(f"{path}:apply_chat_template:num=1", tokenizer, nsamples=1, seqlen=7, seed=0)
    assert tokenizer.decode(plain.rows[0].tokens) == "user : w1 w2 eot assistant :"


def test_conversations_use_the_template_where_there_is_one(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2 w3"}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": talk, "prompt": "w1"}])
    for template, wanted in ((True, "user : w1 eot assistant : w2 w3 eot"), (False, "w1 w2 w3")):
        tokenizer = make_tokenizer() if template else make_tokenizer(template=None)
        found = load_rows(path, tokenizer, nsamples=1, seqlen=len(wanted.split()), seed=0)
        assert tokenizer.decode(found.rows[0].tokens) == wanted


def test_chat_refusals(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", ["w1"])
    with pytest.raises(ConfigError, match="no chat template"):
        load_rows(f"{path}:apply_chat_template", make_tokenizer(template=None), nsamples=1, seqlen=1, seed=0)
    with pytest.raises(
        ConfigError, match=r"system_prompt: this tokenizer has no chat template; .*--tokenizer"
    ):
        load_rows(f"{path}:system_prompt=x", make_tokenizer(template=None), nsamples=1, seqlen=1, seed=0)
    strict = make_tokenizer(template="{{ raise_exception('no system role') }}")
    with pytest.raises(ConfigError, match="refuses a conversation system > user: no system role"):
        load_rows(f"{path}:system_prompt=x", strict, nsamples=1, seqlen=1, seed=0)


def test_a_tokenizer_that_merges_long_runs_still_fills_the_row(tmp_path: Path) -> None:
    text = "x" * 5000 + " " + words(0, 20)
    found = load_rows([text], make_tokenizer(), nsamples=1, seqlen=10, seed=0)
    assert found.rows[0].tokens.tolist()[1:] == make_tokenizer()(words(0, 9))["input_ids"]


@pytest.mark.parametrize(
    ("dataset", "words_"),
    [
        ("", "name is missing"),
        ("pile10k", 'did you mean "pile-10k"'),
        ("./none.jsonl", "no such file"),
        ("none/such.parquet", "no such file"),
        ("NeelNanda/pile-10k;mbpp", "commas divide data sets"),
        ("NeelNanda/pile-10k mbpp", "commas divide data sets"),
        ("my texts, second half.txt", "a file that has them in its name stands in quotes inside the text"),
        ("audiocaps", "captions or sound"),
        (["some text"], "needs a tokenizer"),
        ([{"a": "x", "b": "y"}], "the given data, record 0 has the fields"),
        ([], "0 rows from 0 samples"),
        (3, "dataset is of type int"),
    ],
)
def test_bad_data_sets_are_config_errors(dataset: object, words_: str) -> None:
    with pytest.raises(ConfigError, match=words_):
        load_rows(dataset, None, nsamples=4, seqlen=4, seed=0)  # type: ignore[arg-type]


@pytest.mark.parametrize(("nsamples", "seqlen"), [(0, 4), (4, 0), (-1, 4)])
def test_counts_are_at_least_one(nsamples: int, seqlen: int) -> None:
    with pytest.raises(ConfigError, match="expected at least 1"):
        load_rows([[1, 2]], None, nsamples=nsamples, seqlen=seqlen, seed=0)


def test_python_docs_need_nothing_and_fill_long_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    found = load_rows("python-docs", tokenizer, nsamples=4, seqlen=2048, seed=42)
    assert [len(row.tokens) for row in found.rows] == [2048] * 4


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 5), max_size=40), max_size=8), st.integers(1, 12))
def test_shapes_against_plain_lists(samples: list[list[int]], seqlen: int) -> None:
    def repeats(row: list[int]) -> bool:
        run = next((i for i, token in enumerate(reversed(row)) if token != row[-1]), len(row))
        return run > seqlen / 2

    dropped: list[str] = []
    tokens = [Tokens(torch.tensor(sample, dtype=torch.int64)) for sample in samples]
    cut = [row.tokens.tolist() for row in cut_rows(tokens, seqlen, lambda reason, _: dropped.append(reason))]
    assert cut == [s[:seqlen] for s in samples if len(s) >= seqlen and not repeats(s[:seqlen])]
    assert len(cut) + len(dropped) == len(samples)
    joined = [row.tokens.tolist() for row in join_rows(tokens, seqlen, lambda reason, _: None)]
    line = [token for sample in samples for token in sample]
    chunks = [line[i : i + seqlen] for i in range(0, len(line) - seqlen + 1, seqlen)]
    assert joined == [chunk for chunk in chunks if not repeats(chunk)]


def test_rows_with_images_are_padded_where_something_stands_for_each_token() -> None:
    row = CalibrationRow(
        {
            "input_ids": torch.tensor([[5, 6, 7]]),
            "token_type_ids": torch.tensor([[0, 1, 1]]),
            "cross_attention_mask": torch.ones(1, 3, 1, 2, dtype=torch.int64),
            "image_position_ids": torch.ones(1, 3, 2, dtype=torch.int64),  # three patches, as many as tokens
            "pixel_values": torch.ones(1, 3, 4, 4),
        }
    )
    longer = row.padded(5, 9)
    assert longer.tokens.tolist() == [5, 6, 7, 9, 9]
    assert longer.mask is not None
    assert longer.mask.tolist() == longer.inputs["attention_mask"][0].tolist() == [True] * 3 + [False] * 2
    assert longer.inputs["token_type_ids"].tolist() == [[0, 1, 1, 0, 0]]
    assert longer.inputs["cross_attention_mask"].sum() == 6
    assert {n: tuple(longer.inputs[n].shape) for n in ("image_position_ids", "pixel_values")} == {
        "image_position_ids": (1, 3, 2),
        "pixel_values": (1, 3, 4, 4),
    }
    assert longer.beginning(2) is longer  # tokens must fit the images


def test_the_remedy_names_the_option_that_was_too_long() -> None:
    with pytest.raises(ConfigError, match="smaller score_seqlen"):
        load_rows(["w1"], make_tokenizer(), nsamples=1, seqlen=9, seed=0, of_model=OfModel(prefix="score_"))
