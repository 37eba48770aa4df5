"""Calibration with images: processors, padding, batches, verification, and what is refused before work."""

from __future__ import annotations

import json

import huggingface_hub
import pytest
import torch

pytest.importorskip("PIL")

from auto_round import AutoRoundMLLM
from auto_round.errors import AutoRoundError, CheckpointError, ConfigError
from auto_round.pipeline.checking import compare_rows
from pipeline.pictures import SIDE, conversations, llava_with_processor, picture, write_lines
from pipeline.runs import quantize, token_rows
from sweep.multimodal import image_rows, model_config
from sweep.outcome import save_config

TEXT = [row for row in token_rows(20, 40) if 100 not in row][:4]
SIZES = {"seqlen": 80, "nsamples": 4, "iters": 1}
SHORT = SIZES | {"seqlen": 40, "nsamples": 8}


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return llava_with_processor(tmp_path_factory.mktemp("llava") / "model")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return save_config(model_config("qwen2_5_vl"), tmp_path_factory.mktemp("qwen") / "model")


def test_conversations_with_images(llava, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", conversations(tmp_path))
    result = quantize(llava, tmp_path / "out", dataset=data, **SIZES)
    assert result.report["verified"]["auto_round"]["kl"] < 1e-6
    assert result.report["calibration"]["tokens_per_row"] > 50
    for name in ("processor_config.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (llava / name).read_bytes()


@pytest.mark.parametrize("data", ["", "liuhaotian/llava_instruct_80k"])
def test_llava_data_with_a_folder_of_images_by_the_old_class(llava, tmp_path, monkeypatch, data):
    records = [
        {
            "id": str(number),
            "image": record["images"][0],
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?"},
                {"from": "gpt", "value": "Noise" + "." * number},
            ],
        }
        for number, record in enumerate(conversations(tmp_path / "coco"))
    ]
    (tmp_path / "llava.json").write_text(json.dumps(records))
    given = {"dataset": data or str(tmp_path / "llava.json"), "extra_data_dir": str(tmp_path / "coco")}
    from transformers import AutoProcessor

    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *asked, **named: str(tmp_path / "llava.json")
    )
    processor = AutoProcessor.from_pretrained(llava)
    tuner = AutoRoundMLLM(
        str(llava), processor.tokenizer, processor, group_size=32, **SIZES, **given, device_map="cpu"
    )
    _, (out,) = tuner.quantize_and_save(tmp_path / "out", load=False)
    assert json.loads((out / "report.json").read_text())["verified"]["auto_round"]["kl"] < 1e-6


def test_the_comparison_sees_which_tokens_are_images(qwen, tmp_path, monkeypatch):
    rows = [*image_rows("qwen2_5_vl"), *TEXT]
    result = quantize(qwen, tmp_path / "out", dataset=rows, **SHORT)
    assert result.report["verified"]["auto_round"]["kl"] < 1e-6
    whole = compare_rows.joined

    def untold(rows):
        return {name: x for name, x in whole(rows).items() if name != "mm_token_type_ids"}

    monkeypatch.setattr(compare_rows, "joined", untold)
    with pytest.raises(CheckpointError, match="does not predict what was tuned"):
        quantize(qwen, tmp_path / "other", dataset=rows, **SHORT)


def test_rows_that_do_not_say_which_tokens_are_images(qwen, tmp_path):
    rows = image_rows("qwen2_5_vl")
    del rows[2]["mm_token_type_ids"]
    with pytest.raises(ConfigError, match="row 2 holds images and no mm_token_type_ids"):
        quantize(qwen, tmp_path / "out", dataset=rows, **SIZES)
    assert not list(tmp_path.iterdir())


def without_file(folder, records):
    (folder / "3.png").unlink()


def with_broken_file(folder, records):
    whole = (folder / "3.png").read_bytes()
    (folder / "3.png").write_bytes(whole[: len(whole) // 2])


def with_text_for_a_file(folder, records):
    (folder / "3.png").write_text("no image")


def with_too_many_marks(folder, records):
    records[3]["messages"][0]["content"] = "<image><image>"


def with_two_images(folder, records):
    records[3]["images"].append(picture(folder / "more.png", 9))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_file, r"record 3: no image .*3\.png"),
        (with_broken_file, r"record 3: image .*3\.png cannot be read"),
        (with_text_for_a_file, r"record 3: image .*3\.png cannot be read"),
        (with_too_many_marks, r"record 3: 1 images, but 2 times"),
        (with_two_images, r"record 3: 2 images, but 1 times"),
    ],
)
def test_spoilt_rows_are_named_before_work(llava, tmp_path, spoil, said):
    records = conversations(tmp_path / "data")
    spoil(tmp_path / "data", records)
    data = write_lines(tmp_path / "data" / "data.jsonl", records)
    with pytest.raises(AutoRoundError, match=said):
        quantize(llava, tmp_path / "out", dataset=data, **SIZES | {"nsamples": 8})
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_no_processor(qwen, tmp_path):
    data = write_lines(tmp_path / "data.jsonl", conversations(tmp_path))
    with pytest.raises(ConfigError, match=r"no processor in .*name one with --processor"):
        quantize(qwen, tmp_path / "out", dataset=data, **SIZES)
    with pytest.raises(ConfigError, match=r"no processor in .*nowhere"):
        quantize(qwen, tmp_path / "out", dataset=data, processor=str(tmp_path / "nowhere"), **SIZES)


def test_templates_and_folders_are_checked_first(tmp_path):
    with pytest.raises(ConfigError, match='unknown template "qwen2vl": did you mean "qwen2_vl"'):
        quantize("no such model", tmp_path / "out", template="qwen2vl")
    with pytest.raises(ConfigError, match=r"template .*none\.jinja cannot be read"):
        quantize("no such model", tmp_path / "out", template=str(tmp_path / "none.jinja"))
    with pytest.raises(ConfigError, match='extra_data_dir "nowhere": no folder'):
        quantize("no such model", tmp_path / "out", extra_data_dir="nowhere")


def test_images_for_a_model_of_text(tmp_path):
    from auto_round.testing.tiny_models import save_tiny_model

    model = save_tiny_model("llama", tmp_path / "model")
    data = write_lines(tmp_path / "data.jsonl", conversations(tmp_path))
    with pytest.raises(ConfigError, match=r"record \d holds images, and this model reads text only"):
        quantize(model, tmp_path / "out", dataset=data, **SIZES)


def test_a_template_of_ones_own_and_another_image_processor(llava, tmp_path):
    from transformers import CLIPImageProcessor

    from auto_round.config import build_options
    from auto_round.pipeline.deciding.prepare import prepare

    (tmp_path / "mine.jinja").write_text("{{ 'mine ' }}<image>")
    sizes = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(do_normalize=False, **sizes).save_pretrained(tmp_path / "images")
    data = write_lines(tmp_path / "data.jsonl", conversations(tmp_path))
    given = {"model": str(llava), "output_dir": str(tmp_path / "out"), "dataset": str(data), **SIZES}
    first = prepare(build_options(given)).rows.rows[0]
    other = prepare(
        build_options(
            {
                **given,
                "template": str(tmp_path / "mine.jinja"),
                "image_processor": str(tmp_path / "images"),
                "processor": str(llava),
            }
        )
    ).rows.rows[0]
    assert len(other) < len(first)
    assert float(first.inputs["pixel_values"].min()) < 0 <= float(other.inputs["pixel_values"].min())
    assert torch.equal(other.tokens[:4], torch.tensor([112, 108, 113, 104]))  # "mine"


def test_towers_too(qwen, tmp_path):
    rows = [*image_rows("qwen2_5_vl"), *TEXT]
    result = quantize(qwen, tmp_path / "out", dataset=rows, quant_nontext_module=True, **SHORT)
    towers = [name for name in result.plan.quantized if name.startswith("visual.blocks.")]
    assert len(towers) == 10
    assert len(result.plan.quantized) == 24
    assert result.report["verified"]["auto_round"]["kl"] < 1e-6
    with pytest.raises(ConfigError, match=r"visual.blocks.* read images, and the calibration data hold none"):
        quantize(qwen, tmp_path / "other", dataset=TEXT, quant_nontext_module=True, **SHORT)


def test_a_model_in_memory_gets_its_processor_beside_it(llava, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    data = write_lines(tmp_path / "data.jsonl", conversations(tmp_path))
    processor = AutoProcessor.from_pretrained(llava)
    model = AutoModelForImageTextToText.from_pretrained(llava)
    given = {"dataset": str(data), "group_size": 32, "device_map": "cpu", **SIZES}
    tuner = AutoRoundMLLM(model, processor.tokenizer, processor, **given)
    _, (out,) = tuner.quantize_and_save(tmp_path / "out", load=False)
    assert json.loads((out / "report.json").read_text())["verified"]["auto_round"]["kl"] < 1e-6
    assert type(AutoProcessor.from_pretrained(out)) is type(processor)
