"""Folders that are complete, odd, damaged or untrusted."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from auto_round.errors import CheckpointError, ConfigError, UnsupportedError
from auto_round.facts.layer import Role
from auto_round.models.folder import FolderSource
from auto_round.testing.tiny_models import save_tiny_model, tiny_config, tiny_model, tiny_tokenizer

IDS = torch.arange(3, 15).reshape(2, 6)


def rewrite(folder, change) -> None:
    """Replace the tensors of a folder by `change(tensors)`."""
    file = folder / "model.safetensors"
    tensors = change(load_file(file))
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, file, metadata={"format": "pt"})


def edit_config(folder, **values) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_only_the_block_is_read(saved, monkeypatch):
    with FolderSource.open(saved("llama")) as source:
        read = []
        original = source.files.read
        monkeypatch.setattr(source.files, "read", lambda name: read.append(name) or original(name))
        with source.block(1):
            pass
        assert set(read) == {name for name in source.tensors if name.startswith("model.layers.1.")}
        read.clear()
        with source.stem():
            pass
        assert sorted(read) == ["lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"]


def test_a_stem_without_its_head(saved, monkeypatch):
    with FolderSource.open(saved("llama")) as source:
        read = []
        original = source.files.read
        monkeypatch.setattr(source.files, "read", lambda name: read.append(name) or original(name))
        with source.stem(head=False) as stem:
            hidden = stem.trace({"input_ids": IDS}).states[0]
        assert sorted(read) == ["model.embed_tokens.weight", "model.norm.weight"]
        with source.stem() as stem:
            assert torch.equal(stem.trace({"input_ids": IDS}).states[0], hidden)


def test_a_tied_head_is_read_once(saved, monkeypatch):
    with FolderSource.open(saved("qwen2")) as source:
        read = []
        original = source.files.read
        monkeypatch.setattr(source.files, "read", lambda name: read.append(name) or original(name))
        with source.stem():
            assert read.count("model.embed_tokens.weight") == 1
        (head,) = (layer for layer in source.layers if layer.role is Role.HEAD)
        assert (head.name, head.tensor, source.tied_head) == ("lm_head", "model.embed_tokens.weight", True)
        assert torch.equal(source.read(head), source.read_tensor("model.embed_tokens.weight"))


def test_memory_is_given_back(saved):
    with FolderSource.open(saved("mixtral")) as source:
        with source.block(0) as module:
            assert not module.training
            weights = list(module.parameters())
            assert all(not w.requires_grad and w.device.type == "cpu" for w in weights)
        assert sum(w.untyped_storage().nbytes() for w in weights) == 0


def test_blocks_can_be_opened_again_and_together(saved):
    with FolderSource.open(saved("qwen3_moe")) as source:
        with source.block(0) as first:
            kept = {name: w.clone() for name, w in first.named_parameters()}
            for weight in first.parameters():
                weight.zero_()
        with source.block(0) as again, source.block(1) as other:
            assert all(torch.equal(w, kept[name]) for name, w in again.named_parameters())
            assert not any(torch.equal(w, kept[n]) for n, w in other.named_parameters() if w.dim() > 1)


def test_tensors_without_a_module_are_listed(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "m")
    rewrite(
        folder, lambda t: {**t, "mtp.fc.weight": torch.ones(4, 4), "model.layers.2.x.weight": torch.ones(3)}
    )
    with FolderSource.open(folder) as source:
        assert source.tensors["mtp.fc.weight"].shape == (4, 4)
        assert torch.equal(source.read_tensor("mtp.fc.weight"), torch.ones(4, 4))
        assert all(layer.name != "mtp.fc" for layer in source.layers)
        assert len(source.blocks) == 2


def test_missing_weights_are_named(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "m")
    gone = "model.layers.1.mlp.up_proj.weight"
    rewrite(folder, lambda t: {name: v for name, v in t.items() if name != gone})
    with pytest.raises(
        CheckpointError, match=r"1 weights of the model are missing: model\.layers\.1\.mlp\.up"
    ):
        FolderSource.open(folder)


def test_a_model_saved_without_its_head_is_said_to_be_so(tmp_path):
    model = tiny_model(tiny_config("llama"))
    model.model.save_pretrained(tmp_path / "m")
    with pytest.raises(
        CheckpointError, match=r"lm_head\.weight; .* holds a LlamaModel .* no LlamaForCausalLM"
    ):
        FolderSource.open(tmp_path / "m")


@pytest.mark.parametrize("expert", [1, 3])
def test_a_missing_expert_is_named(tmp_path, expert):
    folder = save_tiny_model("qwen3_moe", tmp_path / "m")
    gone = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
    rewrite(folder, lambda t: {name: v for name, v in t.items() if name != gone})
    with pytest.raises(CheckpointError, match=gone):
        FolderSource.open(folder)


def test_a_wrong_shape_is_named(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "m")
    edit_config(folder, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"mlp\.\w+_proj.*on disk.*config"):
        FolderSource.open(folder)


def test_a_head_equal_to_the_embedding_stays_tied(tmp_path):
    folder = save_tiny_model("qwen2", tmp_path / "m")
    rewrite(folder, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"]})
    with FolderSource.open(folder) as source:
        assert source.tied_head
        assert source.layers[-1].tensor == "lm_head.weight"


def test_a_head_of_its_own_is_untied(tmp_path):
    """`tie_word_embeddings` says tied, the files say otherwise: the files win, as in Transformers."""
    folder = save_tiny_model("qwen2", tmp_path / "m")
    rewrite(folder, lambda t: {**t, "lm_head.weight": 2 * t["model.embed_tokens.weight"]})
    with FolderSource.open(folder) as source:
        assert not source.tied_head
        with source.stem() as stem:
            hidden = stem.trace({"input_ids": IDS}).states[0]
            inputs = stem.finish_inputs(hidden)
            assert torch.equal(stem.finish(hidden), inputs @ source.read_tensor("lm_head.weight").T)


def test_only_the_head_on_disk(tmp_path):
    """A tied model may be saved with the head's name alone."""
    folder = save_tiny_model("qwen2", tmp_path / "m")
    rewrite(
        folder,
        lambda t: {n.replace("model.embed_tokens", "lm_head"): v for n, v in t.items()},
    )
    with FolderSource.open(folder) as source, source.stem() as stem:
        assert source.tied_head
        weight = source.read_tensor("lm_head.weight")
        assert torch.equal(stem.trace({"input_ids": IDS}).states[0], weight[IDS])


def test_head_inputs_give_the_logits(saved):
    with FolderSource.open(saved("llama")) as source, source.stem() as stem:
        hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
        weight = source.read_tensor("lm_head.weight")
        logits = torch.nn.functional.linear(stem.finish_inputs(hidden), weight)
        assert torch.equal(logits, stem.finish(hidden))


def test_opening_leaves_the_random_state_alone(saved):
    folder = saved("lfm2_moe")  # made here when no test before did, from random numbers
    before = torch.get_rng_state()
    with FolderSource.open(folder) as source, source.block(0), source.stem() as stem:
        stem.trace({"input_ids": IDS})
    assert torch.equal(torch.get_rng_state(), before)


def test_text_of_a_model_with_images(tmp_path):
    """Towers stay on disk, their layers are named, and disk names differ from module names."""
    text = {**tiny_config("gemma3_text").to_dict(), "model_type": "gemma3_text"}
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    }
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    model = tiny_model(config)
    model.save_pretrained(tmp_path)
    with FolderSource.open(tmp_path) as source:
        assert source.blocks[1].module == "model.language_model.layers.1"
        assert source.layers[0].name.startswith(f"{source.blocks[0].disk}.")
        outside = [layer.name for layer in source.layers if layer.role is Role.OUTSIDE]
        assert outside
        assert all("vision_tower" in name for name in outside)
        with source.stem() as stem, torch.no_grad():
            trace = stem.trace({"input_ids": IDS})
            hidden = trace.states[0]
            for block in source.blocks:
                with source.block(block.index) as module:
                    hidden = module(hidden, **trace.calls[block.index].kwargs)
            assert torch.equal(stem.finish(hidden), model(IDS, use_cache=False).logits)


def test_not_a_model_folder(tmp_path, saved):
    with pytest.raises(ConfigError, match="not a folder"):
        FolderSource.open(tmp_path / "nothing")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"config\.json"):
        FolderSource.open(tmp_path)
    (tmp_path / "config.json").write_text("{ this is not json")
    with pytest.raises(ConfigError, match=r"config\.json"):
        FolderSource.open(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no_such_family"}')
    with pytest.raises(ConfigError, match="no_such_family"):
        FolderSource.open(tmp_path)


def test_not_a_causal_model(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "m")
    edit_config(folder, model_type="vit")
    with pytest.raises(UnsupportedError, match="causal"):
        FolderSource.open(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "hqq", "quark", ""])
def test_quantized_in_a_way_that_is_not_known(tmp_path, method):
    folder = save_tiny_model("llama", tmp_path / "m")
    edit_config(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(UnsupportedError, match=f'"{method or "a method that it does not name"}"'):
        FolderSource.open(folder)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class ToyConfig(LlamaConfig):
    model_type = "toy_llama"
class ToyForCausalLM(LlamaForCausalLM):
    config_class = ToyConfig
"""


@pytest.mark.usefixtures("copied_code")
def test_code_in_the_folder_needs_trust(tmp_path):
    folder = save_tiny_model("llama", tmp_path / "m")
    (folder / "toy.py").write_text(CODE)
    auto_map = {"AutoConfig": "toy.ToyConfig", "AutoModelForCausalLM": "toy.ToyForCausalLM"}
    edit_config(folder, model_type="toy_llama", auto_map=auto_map)
    with pytest.raises(ConfigError, match="trust_remote_code"):
        FolderSource.open(folder)
    with FolderSource.open(folder, trust_remote_code=True) as source:
        assert type(source.config).__name__ == "ToyConfig"
        assert len(source.layers) == 15
        with source.stem() as stem, source.block(0) as module:
            trace = stem.trace({"input_ids": IDS})
            assert module(trace.states[0], **trace.calls[0].kwargs).shape == (2, 6, 32)


def test_tiny_tokenizer():
    tokenizer = tiny_tokenizer()
    text = "Hello, world 1+1=2"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert max(tokenizer(text).input_ids) < 128
