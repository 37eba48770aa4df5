"""Which class of Transformers builds a model is a row of one table."""

from __future__ import annotations

import pytest

from auto_round.models import auto_classes
from auto_round.models.auto_classes import CAUSAL_LM, auto_class_name, load_model
from auto_round.models.folder import FolderSource
from auto_round.testing.tiny_models import save_tiny_model, tiny_config


def test_language_models_are_causal():
    assert auto_class_name(tiny_config("llama")) == CAUSAL_LM


def test_code_of_the_folder_says_it():
    config = tiny_config("llama")
    config.auto_map = {"AutoModelForMaskedLM": "toy.Toy"}
    assert auto_class_name(config) == CAUSAL_LM  # which knows the type


def test_one_row_serves_another_class(tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaForCausalLM

    class PictureConfig(LlamaConfig):
        model_type = "auto_round_picture_test"

    class PictureModel(LlamaForCausalLM):
        config_class = PictureConfig

    AutoConfig.register(PictureConfig.model_type, PictureConfig, exist_ok=True)
    AutoModelForSeq2SeqLM.register(PictureConfig, PictureModel, exist_ok=True)
    config = PictureConfig(**tiny_config("llama").to_diff_dict() | {"model_type": PictureConfig.model_type})
    PictureModel(config).save_pretrained(tmp_path / "model")
    with pytest.raises(Exception, match="causal language model"):
        FolderSource.open(tmp_path / "model")

    monkeypatch.setattr(auto_classes, "AUTO_CLASSES", (CAUSAL_LM, "AutoModelForSeq2SeqLM"))
    assert type(config) not in AutoModelForCausalLM._model_mapping
    with FolderSource.open(tmp_path / "model") as source:
        assert source.facts.auto_class == "AutoModelForSeq2SeqLM"
        assert len(source.blocks) == config.num_hidden_layers
    model = load_model(tmp_path / "model", trust_remote_code=False)
    assert type(model) is PictureModel


def test_numbers_are_those_of_the_text_model(tmp_path):
    folder = save_tiny_model("qwen3_moe", tmp_path)
    with FolderSource.open(folder) as source:
        facts = source.facts
    assert (facts.vocabulary, facts.width, facts.heads, facts.context) == (128, 32, 4, 64)
    assert (facts.experts, facts.chosen_experts) == (frozenset({4}), 2)
