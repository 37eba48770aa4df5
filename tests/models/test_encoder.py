"""Text encoders of pipelines, run block by block, give what they give at once."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from auto_round.errors import CheckpointError, UnsupportedError
from auto_round.models.encoder import EncoderSource
from auto_round.models.replay_stem import first_tensor
from auto_round.pipeline.running.block_group import BlockGroup
from auto_round.testing.small_flux import clip_encoder, t5_encoder
from diffusion.tiny import qwen2_5_vl, qwen3, umt5

CPU = torch.device("cpu")
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)


def plain(family):
    """A small decoder without a head."""
    import transformers

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
    config = getattr(transformers, f"{family}Config")(**shape, pad_token_id=1, bos_token_id=0, eos_token_id=2)
    return getattr(transformers, f"{family}Model")(config).eval()


ENCODERS = {
    "clip": clip_encoder,
    "clip with projection": lambda: clip_encoder(projection=True),
    "t5, one table of positions": t5_encoder,
    "umt5, a table for each block": umt5,
    "qwen3 without head": qwen3,
    "llama without head": lambda: plain("Llama"),
    "gemma2 without head": lambda: plain("Gemma2"),
    "qwen2.5-vl, which reads pictures too": qwen2_5_vl,
}


@pytest.fixture(params=ENCODERS)
def encoder(request, tmp_path):
    """A source over a folder, and the model itself."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ENCODERS[request.param]()
    model.save_pretrained(tmp_path)
    return EncoderSource.of_kind(tmp_path, type(model)), model


def test_block_by_block(encoder):
    source, model = encoder
    source.refuse_untraceable()
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, 5:] = 0
    inputs = {"input_ids": torch.arange(4, 22).reshape(2, 9), "attention_mask": mask}
    asked = {**inputs, "output_hidden_states": True}
    with torch.no_grad():
        wanted = model(**asked)
        with source.streamed(CPU, torch.float32) as streamed:
            found = streamed(**asked)
    close(found.hidden_states, wanted.hidden_states)  # pipelines read some of them
    close(first_tensor(found), first_tensor(wanted))
    with source.replay(CPU, torch.float32) as replay, torch.no_grad():
        trace = replay.trace(inputs)
        states = trace.states
        for block, call, edits in zip(source.blocks, trace.calls, trace.edits, strict=True):
            with source.block(block.index) as module:  # alone, as it is tuned
                states = BlockGroup([module], [block.flow])(*states, [(call, edits)])
        close(replay.finish(inputs, [states]), first_tensor(wanted))


def test_layers_and_tensors(encoder):
    source, model = encoder
    inside = [layer for layer in source.layers if layer.block is not None]
    assert len(source.blocks) == 2
    assert len(inside) == sum(
        type(module) is torch.nn.Linear
        for block in source.blocks
        for module in model.get_submodule(block.module).modules()
    )
    for layer in inside:
        assert torch.equal(source.read(layer), model.get_parameter(layer.parameter))
    with source.whole(CPU, torch.float32) as whole:
        assert all(torch.equal(whole.state_dict()[name], value) for name, value in model.state_dict().items())


def test_what_reads_no_captions(tmp_path):
    from transformers import CLIPTokenizer, CLIPVisionModelWithProjection

    for kind in (CLIPVisionModelWithProjection, CLIPTokenizer):
        with pytest.raises(UnsupportedError, match=f"{kind.__name__} is no text encoder"):
            EncoderSource.of_kind(tmp_path, kind)


def test_a_folder_of_another_model(tmp_path):
    model = t5_encoder()
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(CheckpointError, match="missing"):
        EncoderSource.of_kind(tmp_path, type(model))
