"""Components run list by list give what they give at once; what their folders cannot be is refused."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", exc_type=ImportError)

from auto_round.errors import CheckpointError, UnsupportedError
from auto_round.models.component import ComponentSource
from auto_round.models.replay_stem import first_tensor
from auto_round.pipeline.running.block_group import BlockGroup

CPU = torch.device("cpu")


def flux2():
    from diffusers import Flux2Transformer2DModel

    config = {"in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16}
    config |= {"num_attention_heads": 2, "joint_attention_dim": 32, "timestep_guidance_channels": 32}
    inputs = {
        "hidden_states": torch.randn(2, 16, 16),
        "encoder_hidden_states": torch.randn(2, 6, 32),
        "timestep": torch.tensor([0.3, 0.7]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.arange(64.0).reshape(16, 4) % 5,
        "txt_ids": torch.arange(24.0).reshape(6, 4) % 5,
    }
    return Flux2Transformer2DModel(axes_dims_rope=(4, 4, 4, 4), **config), inputs


def unet():
    """As in Stable Diffusion 1.5: attention without linear projections around it."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    inputs = {
        "sample": torch.randn(2, 4, 16, 16),
        "timestep": 5,
        "encoder_hidden_states": torch.randn(2, 7, 32),
    }
    return model, inputs


@pytest.fixture(params=[flux2, unet], ids=lambda make: make.__name__)
def component(request, tmp_path):
    """A source over a folder, the model itself, and what it is called with."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = request.param()
    model.eval().save_pretrained(tmp_path)
    return ComponentSource.open(tmp_path, type(model)), model, inputs


def test_list_by_list(component):
    source, model, inputs = component
    with torch.no_grad():
        wanted = first_tensor(model(**inputs))
    ended = []
    with source.replay(CPU, torch.float32) as replay:
        for members in source.block_lists:
            trace = replay.trace(inputs, ended)
            blocks = [model.get_submodule(block.module) for block in members]
            group = BlockGroup(blocks, [block.flow for block in members])
            with torch.no_grad():
                ended.append(group(*trace.states, list(zip(trace.calls, trace.edits, strict=True))))
        assert torch.equal(replay.finish(inputs, ended), wanted)
    with source.streamed(CPU, torch.float32) as streamed, torch.no_grad():
        assert torch.equal(first_tensor(streamed(**inputs)), wanted)


def test_layers(component):
    source, model, _ = component
    linear = {name for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert {layer.name for layer in source.layers} == linear
    assert all(layer.shape == tuple(model.get_parameter(layer.parameter).shape) for layer in source.layers)
    assert not source.unsupported
    assert source.dtype is torch.float32


def test_an_unknown_class(tmp_path):
    from diffusers import AutoencoderKL

    with pytest.raises(UnsupportedError, match="FluxTransformer2DModel"):
        ComponentSource.open(tmp_path, AutoencoderKL)


def test_weights_of_another_model(tmp_path):
    model, _ = flux2()
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(CheckpointError, match="missing"):
        ComponentSource.open(tmp_path, type(model))
    config.write_text(text.replace('"joint_attention_dim": 32', '"joint_attention_dim": 64'))
    with pytest.raises(CheckpointError, match="context_embedder"):
        ComponentSource.open(tmp_path, type(model))


def test_shards(tmp_path):
    model, _ = flux2()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert (tmp_path / "diffusion_pytorch_model.safetensors.index.json").is_file()
    source = ComponentSource.open(tmp_path, type(model))
    assert set(source.tensors) == set(model.state_dict())
