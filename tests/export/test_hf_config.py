"""Files beside the weights: config.json keeps what it had, tokenizer files keep their bytes."""

from __future__ import annotations

import json

import pytest
import torch

from auto_round.errors import AutoRoundError, CheckpointError
from auto_round.export.hf_config import copy_side_files, output_config, read_config, side_files, write_configs

SOURCE = {
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "tie_word_embeddings": True,
    "custom": {"deep": [1, 2.5, None]},
    "text_config": {"hidden_size": 64},
    "vision_config": {"depth": 2},
    "other": {"tie_word_embeddings": True},
}
QUANT = {"quant_method": "auto-round", "bits": 4}


def test_config_keeps_every_key_and_its_order():
    out = output_config(SOURCE, QUANT)
    assert out == SOURCE | {"quantization_config": QUANT}
    assert list(out) == [*SOURCE, "quantization_config"]


def test_a_dense_output_has_no_quantization_config():
    assert output_config(SOURCE | {"quantization_config": {"quant_method": "fp8"}}, None) == SOURCE


def test_an_untied_head_is_said_wherever_it_was_tied():
    out = output_config(SOURCE, None, untied=True)
    assert out["tie_word_embeddings"] is False
    assert out["text_config"] == {"hidden_size": 64, "tie_word_embeddings": False}
    assert out["other"] == {"tie_word_embeddings": False}
    assert out["vision_config"] == {"depth": 2}
    assert SOURCE["tie_word_embeddings"] is True
    assert SOURCE["text_config"] == {"hidden_size": 64}


def test_a_source_that_ties_by_default_is_untied_too():
    assert output_config({"model_type": "gemma2"}, None, untied=True)["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"dtype": "bfloat16"}, {"dtype": "float16"}),
        ({"torch_dtype": "float32", "a": 1}, {"torch_dtype": "float16", "a": 1}),
        ({"model_type": "llama"}, {"model_type": "llama", "torch_dtype": "float16"}),
        (
            {
                "dtype": "bfloat16",
                "text_config": {"dtype": "bfloat16"},
                "vision_config": {"dtype": "bfloat16"},
            },
            {"dtype": "float16", "text_config": {"dtype": "float16"}, "vision_config": {"dtype": "bfloat16"}},
        ),
        ({"model_type": "gemma2", "dtype": "bfloat16"}, {"model_type": "gemma2", "dtype": "bfloat16"}),
        (
            {"model_type": "gemma3", "dtype": "bfloat16", "text_config": {"model_type": "gemma3_text"}},
            {"model_type": "gemma3", "dtype": "bfloat16", "text_config": {"model_type": "gemma3_text"}},
        ),
    ],
)
def test_readers_are_told_another_dtype_where_the_model_survives_it(source, expected):
    assert output_config(source, None, dtype=torch.float16) == expected
    assert output_config(source, None) == source


def test_both_files_hold_the_same_dictionary(tmp_path):
    write_configs(tmp_path, SOURCE, QUANT)
    assert read_config(tmp_path) == SOURCE | {"quantization_config": QUANT}
    assert json.loads((tmp_path / "quantization_config.json").read_text()) == QUANT
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    write_configs(tmp_path, SOURCE, QUANT)
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == before
    assert set(before) == {"config.json", "quantization_config.json"}


def test_a_dense_output_gets_config_json_only(tmp_path):
    write_configs(tmp_path, SOURCE, None)
    assert [f.name for f in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize("text", ["{", "[1]", "\udcff"])
def test_a_damaged_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


def test_a_missing_config_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_config(tmp_path)


COPIED = {
    "tokenizer.json": b'{"a":  "\xc3\xa9"}\r\n',
    "tokenizer.model": bytes(range(256)),
    "generation_config.json": b"{ }",
    "chat_template.jinja": b"{{ x }}",
    "additional_chat_templates/tool.jinja": b"{{ y }}",
    "modeling_own.py": b"# own\n",
    "LICENSE": b"text",
}
LEFT = [
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "README.md",
    "quantization_config.json",
    "x.gguf",
]


def source_folder(tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    for name, data in COPIED.items():
        (source / name).write_bytes(data)
    for name in LEFT:
        (source / name).write_bytes(b"left")
    return source


def test_side_files_are_copied_byte_for_byte_and_nothing_else(tmp_path):
    source, target = source_folder(tmp_path), tmp_path / "target"
    target.mkdir()
    copied = copy_side_files(source, target)
    found = {str(f.relative_to(target)): f.read_bytes() for f in target.rglob("*") if f.is_file()}
    assert found == COPIED
    assert [str(name) for name in copied] == sorted(COPIED)
    assert copied == side_files(source)


def test_links_are_followed(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (tmp_path / "blob").write_bytes(b"vocabulary")
    (source / "vocab.json").symlink_to(tmp_path / "blob")
    copy_side_files(source, target)
    assert not (target / "vocab.json").is_symlink()
    assert (target / "vocab.json").read_bytes() == b"vocabulary"


def test_a_target_that_cannot_be_written_is_named(tmp_path):
    target = tmp_path / "target"
    target.write_bytes(b"a file")
    with pytest.raises(AutoRoundError, match="target"):
        copy_side_files(source_folder(tmp_path), target)
