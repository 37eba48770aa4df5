"""Every family, streamed block by block, against the whole model as Transformers loads it."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from auto_round.facts.layer import Role
from auto_round.models.experts import ExpertParts
from auto_round.models.folder import FolderSource
from auto_round.models.live import LiveSource
from auto_round.testing.tiny_models import DENSE, EXPERTS, KEPT, VOCABULARY
from sweep.configurations import family_config, known_families
from sweep.outcome import save_family

FAMILIES = [*DENSE, *EXPERTS, *KEPT]


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of 16 tokens, longer than the sliding windows; the second is padded on the left."""
    ids = torch.randint(3, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, :5] = 0
    return ids, mask


def run_whole(model, ids, mask):
    """Logits, and for each block its keyword arguments and output."""
    seen = []

    def note(module, args, kwargs, output):
        seen.append((kwargs, output[0] if isinstance(output, tuple) else output))

    source = LiveSource(model)
    handles = [
        model.get_submodule(b.module).register_forward_hook(note, with_kwargs=True) for b in source.blocks
    ]
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return logits, seen


def run_streamed(source, ids, mask, dtype=None):
    """Logits and each block's output, with one block in memory at a time."""
    outputs = []
    with source.stem(dtype=dtype) as stem, torch.no_grad():
        trace = stem.trace({"input_ids": ids, "attention_mask": mask})
        states = list(trace.states)
        for block in source.blocks:
            call, edit = trace.calls[block.index], trace.edits[block.index]
            assert edit == (None,)
            args, kwargs = call.given(states)
            with source.block(block.index, dtype=dtype) as module:
                output = module(*args, **kwargs)
            outputs.append(output[0] if isinstance(output, tuple) else output)
            states = [*call.kept(outputs[-1:]), *call.carried_on(kwargs, output, states)]
        logits = stem.finish(states[0])
        if source.head is not None:
            assert stem.finish_inputs(states[0]).shape[:2] == ids.shape
    return logits, outputs, trace


def flat(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in flat(item)]
    return []


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_equals_whole(saved, family):
    model = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32).eval()
    ids, mask = batch()
    expected, seen = run_whole(model, ids, mask)
    with FolderSource.open(saved(family)) as source:
        logits, outputs, trace = run_streamed(source, ids, mask)
    for call, output, (kwargs, wanted) in zip(trace.calls, outputs, seen, strict=True):
        assert torch.equal(output, wanted)
        for name, value in call.kwargs.items():
            assert all(map(torch.equal, flat(value), flat(kwargs[name]))), name
    assert torch.equal(logits, expected)


@pytest.mark.parametrize(
    ("family", "states", "carried"),
    [
        ("deepseek_v4", 4, 0),  # four hidden states of a token
        ("gemma3n_text", 4, 4),  # and keys and values of two blocks, for two later ones
        ("gemma4_text", 1, 4),
        ("glm_moe_dsa", 1, 1),  # choices of tokens, for the next block
        ("hy_v4", 2, 1),
        ("zaya", 1, 1),  # what a router keeps
        ("rwkv", 1, 0),
    ],
)
def test_more_than_one_hidden_state_flows(tmp_path, family, states, carried):
    """Several hidden states of a token are kept as one, and what else is handed on behind them."""
    if family not in known_families():
        pytest.skip("this Transformers has no such family")
    folder = save_family(family, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids, mask = batch()
    expected, seen = run_whole(model, ids, mask)
    with FolderSource.open(folder) as source:
        logits, outputs, trace = run_streamed(source, ids, mask)
        assert source.facts.flowing == states * source.facts.width
        assert trace.states[0].shape == (*ids.shape, source.facts.flowing)
        assert [state.shape[:2] for state in trace.states[1:]] == [(len(ids), 1)] * carried
    for output, (_, wanted) in zip(outputs, seen, strict=True):
        assert torch.allclose(output, wanted, rtol=0, atol=1e-5)  # padded rows in another order
    assert torch.allclose(logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "qwen3_moe", "deepseek_v3"])
def test_streamed_equals_whole_in_bfloat16(saved, family):
    model = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.bfloat16).eval()
    ids, mask = batch()
    expected, _ = run_whole(model, ids, mask)
    with FolderSource.open(saved(family), dtype=torch.bfloat16) as source:
        assert torch.equal(run_streamed(source, ids, mask)[0], expected)
    with FolderSource.open(saved(family)) as source:
        assert torch.equal(run_streamed(source, ids, mask, dtype=torch.bfloat16)[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_and_disk_look_alike(saved, family):
    """A model in memory has the layers, blocks and tensors that it has on disk."""
    model = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32).eval()
    live = LiveSource(model)
    with FolderSource.open(saved(family)) as source:
        assert live.layers == source.layers
        assert live.blocks == source.blocks
        assert (live.head, live.tied_head) == (source.head, source.tied_head)
        assert dict(live.tensors) == dict(source.tensors)
        for name in source.tensors:
            assert torch.equal(live.read_tensor(name), source.read_tensor(name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_tile_the_parameters(saved, family):
    """Each layer is exactly its rows of the module's parameter, and no row belongs to two layers."""
    with FolderSource.open(saved(family)) as source:
        for block in source.blocks:
            with source.block(block.index) as module:
                weights = dict(module.named_parameters())
                taken = {name: torch.zeros(w.shape[:-1], dtype=torch.int64) for name, w in weights.items()}
                for layer in (layer for layer in source.layers if layer.block == block.index):
                    assert layer.tensor.startswith(f"{block.disk}.")
                    name = layer.parameter.removeprefix(f"{block.module}.")
                    index = (() if layer.expert is None else (layer.expert,)) + (
                        () if layer.rows is None else (slice(*layer.rows),)
                    )
                    assert torch.equal(weights[name][index], source.read(layer))
                    assert source.read(layer).shape == layer.shape
                    taken[name][index] += 1
                for count in taken.values():
                    assert not count.any() or bool((count == 1).all())


@pytest.mark.parametrize("family", [*DENSE, *EXPERTS])
def test_every_matrix_is_found(saved, family):
    """Of the 2-D tensors on disk inside the blocks all are layers, except routers that are parameters."""
    with FolderSource.open(saved(family)) as source:
        known = {layer.tensor for layer in source.layers}
        rest = [
            name
            for name, spec in source.tensors.items()
            if len(spec.shape) == 2
            and name not in known
            and any(name.startswith(b.disk) for b in source.blocks)
        ]
        assert not source.unsupported
        assert all(name.endswith("gate.weight") for name in rest), rest


@pytest.mark.parametrize(
    ("family", "first"),
    [
        ("gpt_oss", "model.layers.0.mlp.experts.0.gate_proj"),
        ("granitemoe", "model.layers.0.block_sparse_moe.experts.0.gate_proj"),
    ],
)
def test_experts_in_one_tensor_are_read_one_by_one(saved, family, first):
    model = AutoModelForCausalLM.from_pretrained(saved(family), dtype=torch.float32)
    experts = next(m for m in model.modules() if ExpertParts.of(m) is not None)
    with FolderSource.open(saved(family)) as source:
        assert not source.unsupported
        fused = [layer for layer in source.layers if layer.fused]
        assert fused[0].name == first
        inside = [layer for layer in fused if layer.block == 0]
        up, down = experts.gate_up_proj, experts.down_proj
        if experts.is_transposed:
            up, down = up.mT, down.mT
        for layer in inside:
            stack = down if layer.name.endswith(("down_proj", "w2")) else up
            rows = slice(None) if layer.rows is None else slice(*layer.rows)
            assert torch.equal(source.read(layer), stack[layer.expert][rows])
        assert len(inside) == 3 * len(down)
        gates = [layer for layer in inside if layer.name.endswith(("gate_proj", "w1"))]
        gate = torch.stack([source.read(layer) for layer in gates])
        half = up.shape[1] // 2
        assert torch.equal(gate, up[:, 0::2] if family == "gpt_oss" else up[:, :half])


def test_experts_that_say_nothing_of_themselves_are_named():
    model = AutoModelForCausalLM.from_config(family_config("jetmoe"), dtype=torch.float32)
    refusals = LiveSource(model).unsupported
    assert refusals
    assert all("does not say how its experts compute" in refusal.reason for refusal in refusals)


def test_roles_of_experts(saved):
    with FolderSource.open(saved("qwen2_moe")) as source:
        roles = {layer.name: layer.role for layer in source.layers}
    assert roles["model.layers.0.mlp.experts.3.up_proj"] is Role.EXPERT
    assert roles["model.layers.0.mlp.shared_expert.up_proj"] is Role.SHARED_EXPERT
    assert roles["model.layers.0.mlp.shared_expert_gate"] is Role.ROUTER
    assert roles["model.layers.0.self_attn.q_proj"] is Role.LINEAR
    assert roles["lm_head"] is Role.HEAD
    assert "model.layers.0.mlp.gate" not in roles


def test_linears_outside_the_blocks(saved):
    with FolderSource.open(saved("opt")) as source:
        outside = {layer.name for layer in source.layers if layer.role is Role.OUTSIDE}
    assert outside == {"model.decoder.project_in", "model.decoder.project_out"}


def test_matrices_stored_the_other_way_round(saved):
    with FolderSource.open(saved("gpt2")) as source:
        assert not source.unsupported
        layer = next(layer for layer in source.layers if layer.name.endswith("h.0.mlp.c_fc"))
        assert (layer.transposed, layer.shape, layer.stored_shape) == (True, (128, 32), (32, 128))
        assert source.tensors[layer.tensor].shape == (32, 128)
        assert torch.equal(source.read(layer), source.read_tensor(layer.tensor).t())
        assert sum(layer.transposed for layer in source.layers) == 8
