"""The data set `self`: what a model writes, that it is kept, and where it is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.calibration import self_text
from auto_round.calibration.grammar import parse_dataset
from auto_round.calibration.rows import CalibrationRows
from auto_round.calibration.self_script import Script, script_of
from auto_round.calibration.self_writing import Pen, draws_of
from auto_round.config import build_options
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.pipeline.deciding import own_text
from auto_round.pipeline.deciding.open_model import Opened
from auto_round.pipeline.deciding.prepare import prepare
from auto_round.pipeline.quantize import run
from auto_round.testing.tiny_models import tiny_tokenizer
from pipeline.conftest import ModelMaker
from pipeline.runs import SHORT, tree

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "self"


def rows_of(model: Path, tmp_path: Path, dataset: str = "self", **given: object) -> CalibrationRows:
    options = build_options(
        {**SHORT, "model": str(model), "output_dir": str(tmp_path / "out"), "dataset": dataset, **given}
    )
    rows = prepare(options).rows
    assert rows is not None
    return rows


def ids(rows: CalibrationRows) -> list[list[int]]:
    return [row.tokens.tolist() for row in rows.rows]


def test_each_token_is_the_one_that_the_whole_model_gives_the_draw(
    tiny: ModelMaker, tmp_path: Path, cache: Path
):
    folder = tiny("llama", torch.float32)
    found = rows_of(folder, tmp_path, amp=False, nsamples=4, seqlen=12)
    assert len(found.rows) == 6
    assert found.summary.startswith("self: 6 rows from 6 samples")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept = [json.loads(line)["input_ids"] for line in next(cache.glob("*.jsonl")).open()]
    assert sorted(kept) == sorted(ids(found))
    draws = draws_of(42, range(6), 11, torch.device("cpu"))
    for row, draw in zip(kept, draws, strict=True):
        assert row[0] == 1
        with torch.no_grad():
            scores = model(torch.tensor([row])).logits[0, :-1]
        scores[:, [0]] = float("-inf")  # padding is no word
        begins = torch.tensor(row[:-1]) < 3  # behind a start nothing ends
        scores[begins, 2] = float("-inf")
        for step, token in enumerate(row[1:]):
            if row[step] == 2:
                assert token == 1  # a text that ended is followed by the start of another
                continue
            scores[step, 1] = float("-inf")
            sums = scores[step].softmax(-1).cumsum(-1)
            assert sums[token] >= draw[step] - 1e-5
            assert token == 0 or sums[token - 1] <= draw[step] + 1e-5


def test_what_was_written_is_used_again_and_more_is_added(
    tiny: ModelMaker, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tiny("llama")
    first = rows_of(folder, tmp_path, nsamples=2, seqlen=8)
    path = next(cache.glob("*.jsonl"))
    path.write_bytes(path.read_bytes() + b'{"text": "cut off')
    more = rows_of(folder, tmp_path, nsamples=4, seqlen=8)
    assert len(more.rows) == 6
    assert ids(more)[:4] == ids(first)
    assert len(path.read_text().splitlines()) == 6
    assert {"text", "input_ids"} == json.loads(path.read_text().splitlines()[-1]).keys()

    def never(*_: object) -> None:
        raise AssertionError("written again")

    monkeypatch.setattr(self_text, "write_rows", never)
    assert rows_of(folder, tmp_path, nsamples=4, seqlen=8).fingerprint == more.fingerprint
    with pytest.raises(AssertionError, match="written again"):
        rows_of(folder, tmp_path, nsamples=2, seqlen=8, seed=1)


def test_the_seed_decides(tiny: ModelMaker, tmp_path: Path):
    found = [rows_of(tiny("llama"), tmp_path, nsamples=2, seqlen=8, seed=seed) for seed in (1, 2)]
    assert found[0].fingerprint != found[1].fingerprint


def test_mixtures_with_other_text(tiny: ModelMaker, tmp_path: Path):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(60, 120))) * 40)
    found = rows_of(tiny("llama"), tmp_path, f"self:num=3,{tmp_path / 'a.txt'}", nsamples=6, seqlen=8)
    assert [(source.name, source.rows) for source in found.sources] == [("self", 3), ("a.txt", 5)]


def test_a_model_with_a_chat_template_talks(tiny: ModelMaker, tmp_path: Path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    (item,) = parse_dataset("self")
    script = script_of(tokenizer, None, item)
    spelt = [tokenizer.decode(part) for part in (script.opening, *script.behind)]
    assert spelt == ["<u>", "</s><a>", "</s><u>"]
    assert (script.ends, script.unspoken) == ({2}, {0, 1})
    (plain,) = parse_dataset("self:apply_chat_template=false")
    assert script_of(tokenizer, None, plain) == Script((1,), ((2, 1),), frozenset({2}), frozenset({0, 1}))
    (told,) = parse_dataset('self:system_prompt="Be brief."')
    assert tokenizer.decode(script_of(tokenizer, None, told).opening) == "<s>Be brief.</s><u>"


def test_turns_follow_the_script():
    script = Script((1,), ((2, 7, 8), (2, 9)), frozenset({2, 3}), frozenset({0}))
    scores = torch.zeros(1, 12)
    scores[0, 10:] = float("inf")  # a model may have more numbers than words
    # Ends are 2 of 9 words; the first draw would be one if a turn could end before it began.
    draws = torch.tensor([[0.15, 0.2, 0.9, 0.9, 0.6, 0.15, 0.5, 0.1]])
    pen = Pen(script, draws, 10, lambda _: None)
    found = [int(pen(torch.zeros(1, 1), scores).argmax()) for _ in range(8)]
    assert found == [4, 2, 7, 8, 7, 2, 9, 1]


@pytest.mark.parametrize(
    ("template", "dataset", "said"),
    [
        (None, "self:apply_chat_template", "no chat template"),
        ("{{ messages[-1]['content'] }}", "self", "does not show what is said"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "self", "puts nothing between"),
    ],
)
def test_templates_that_give_no_script_are_refused(template: str | None, dataset: str, said: str):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    (item,) = parse_dataset(dataset)
    with pytest.raises(ConfigError, match=said):
        script_of(tokenizer, None, item)


def test_rows_with_no_room_for_own_words_are_refused(tiny: ModelMaker, tmp_path: Path):
    talker = shutil.copytree(tiny("llama"), tmp_path / "talker")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(talker)
    said = (
        r"begins with 3 tokens of the chat template, which is most of 5; use a larger seqlen, or plain text"
    )
    with pytest.raises(ConfigError, match=said):
        rows_of(talker, tmp_path, seqlen=5)


def test_a_model_that_does_not_fit_is_refused_with_the_way_out(
    tiny: ModelMaker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(own_text, "available_bytes", lambda: 100_000)
    with pytest.raises(UnsupportedError, match=r"for all weights in .* give the file"):
        rows_of(tiny("llama"), tmp_path)


def test_an_encoder_with_a_decoder_is_refused(tiny: ModelMaker, tmp_path: Path):
    options = build_options({**SHORT, "model": str(tiny("llama")), "output_dir": str(tmp_path / "out")})
    job = prepare(options, dataset=[[1] * 16] * 8)

    class TwoLists:
        block_lists = ((), ())

    writer = own_text.own_text(Opened(job.options, job.source, job.tokenizer), job.device, job.dtype)
    with pytest.raises(UnsupportedError, match="several lists of blocks"):
        next(replace(writer, source=TwoLists()).records(parse_dataset("self")[0], 1))


def test_two_runs_on_own_text_give_equal_bytes_and_say_what_they_read(tiny: ModelMaker, tmp_path: Path):
    for name in ("a", "b"):
        given = {**SHORT, "model": str(tiny("llama")), "output_dir": str(tmp_path / name), "dataset": "self"}
        report = run(build_options(given)).report
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert "self: 6 rows" in json.dumps(report)
