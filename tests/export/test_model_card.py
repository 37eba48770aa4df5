"""The model card: says what was done and measured, and nothing that changes from run to run."""

from __future__ import annotations

import dataclasses
import json

import pytest

from auto_round.export.model_card import CardFacts, Figure, model_card, write_model_card

FACTS = CardFacts(
    name="tiny",
    scheme="W4A16",
    exporter="auto_round",
    method="SignRound, 200 steps a block",
    bits_per_weight=4.15625,
    bytes_before=8 * 2**20,
    bytes_after=3 * 2**20,
    quantized=14,
    kept=("lm_head: head",),
    data="python-docs, 128 rows of 512 tokens",
    measured=(Figure("perplexity | held out", 12.3456, 12.0), Figure("KL, nats per token", 0.00123456)),
    options={"iters": 50},
)


def front_matter(text):
    start, front, _ = text.split("---\n", 2)
    assert start == ""
    return front.splitlines()


def test_the_card_says_what_was_done_and_measured():
    text = model_card(FACTS)
    for piece in (
        "# tiny, W4A16",
        "SignRound, 200 steps a block",
        "| 4.156 |",
        "8.0 MiB before, 3.0 MiB after",
    ):
        assert piece in text
    assert "| perplexity \\| held out | 12 | 12.35 |" in text
    assert "| KL, nats per token |  | 0.001235 |" in text
    assert "- lm_head: head" in text
    assert "| Option `iters` | `50` |" in text
    assert text.endswith("```\n")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_folders_of_other_tools_say_who_loads_them(method):
    text = model_card(dataclasses.replace(FACTS, exporter="auto_awq", quant_method=method))
    assert f"- {method}" in front_matter(text)
    assert "vLLM, SGLang" in text
    assert "quantization_config=AutoRoundConfig()" in text
    assert "AutoRoundConfig" not in model_card(FACTS)


def test_a_dense_folder_needs_no_package():
    assert "pip install" not in model_card(dataclasses.replace(FACTS, exporter="fake", quant_method=None))


def test_front_matter_names_the_original_only_when_it_is_on_the_hub():
    assert not any(line.startswith("base_model") for line in front_matter(model_card(FACTS)))
    lines = front_matter(model_card(dataclasses.replace(FACTS, hub_id="owner/tiny", license="apache-2.0")))
    assert 'base_model: "owner/tiny"' in lines
    assert 'license: "apache-2.0"' in lines
    assert {"tags:", "- auto-round"} <= set(lines)


def test_front_matter_cannot_be_broken_out_of():
    lines = front_matter(model_card(dataclasses.replace(FACTS, license='a"\n---\nb: c')))
    assert json.loads(lines[0].removeprefix("license: ")) == 'a"\n---\nb: c'


def test_the_card_is_the_same_each_time(tmp_path):
    write_model_card(tmp_path, FACTS)
    assert (tmp_path / "README.md").read_text() == model_card(FACTS)


def test_a_card_without_figures_has_no_table_of_them():
    assert "Measured" not in model_card(dataclasses.replace(FACTS, measured=()))
