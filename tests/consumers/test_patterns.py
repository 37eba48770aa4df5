"""How patterns meet names: the readers against an independent one, on random configurations."""

from __future__ import annotations

import re
from pathlib import Path
from types import MappingProxyType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from auto_round.consumers.fields import CannotReadError
from auto_round.consumers.folder import Folder
from auto_round.consumers.modules import Module, fused_modules, split_modules
from auto_round.consumers.readers import AutoRoundReader, AWQReader
from auto_round.stored.formats import StoredFormats
from auto_round.stored.gptq_awq_config import dynamic_rule, is_listed
from auto_round.stored.matrices import PLAIN, Matrix
from auto_round.testing.config_reader import fields_of

PARTS = ("self_attn.o_proj", "mlp.down_proj", "mlp.gate", "linear_attn.out_proj")
LAYERS = st.builds(
    "{}.{}.{}".format,
    st.sampled_from(["model.layers", "other.h"]),
    st.integers(0, 11),
    st.sampled_from(PARTS),
)
KEYS = st.one_of(
    LAYERS,
    st.sampled_from(
        [
            r".*\.mlp\..*",
            r"mlp\.",
            r"^model\.layers\.1\.",
            r".*layers\.1.*",
            "down_proj",
            r"o_proj$",
            r"[",
            r".*gate",
        ]
    ),
)
FIELDS = st.sampled_from(
    [{"bits": 16, "data_type": "float"}, {"bits": 8}, {"group_size": 32}, {"bits": 2, "sym": False}]
)
BLOCKS = st.sampled_from(
    [None, "model.layers", ["model.layers.1", "other.h"], "model.layers,other.h", "model.layers.1."]
)


def matrix(name: str, order: str = PLAIN) -> Matrix:
    return Matrix(name, order, (64, 64), 16, 0, 0, (f"{name}.weight",))


def folder(config, matrices=()) -> Folder:
    return Folder(Path("m"), {}, config, None, tuple(matrices), 0)


def config_of(extra, blocks):
    top = {"bits": 4, "group_size": 128, "sym": True, "data_type": "int", "extra_config": extra}
    return top if blocks is None else {**top, "block_name_to_quantize": blocks}


def _numbers(got):
    return None if got is None else (got.bits, got.group_size, got.sym)


@given(LAYERS, st.dictionaries(KEYS, FIELDS, max_size=4), BLOCKS.filter(lambda b: b is not None))
def test_sglang_meets_whole_names(name, extra, blocks):
    extra = {k: v for k, v in extra.items() if k != "["}
    config = config_of(extra, blocks)
    got = AutoRoundReader(re.fullmatch, ends=False)(folder(config), Module(name, (matrix(name),)))
    want = fields_of(config, name, full_match=True)
    if want is None and got is not None:  # patterns reach layers outside of the blocks
        assert any(re.fullmatch(k, name) for k in extra if not k.isidentifier())
        return
    assert _numbers(got) == (None if want is None else (want["bits"], want["group_size"], want["sym"]))


def _vllm(extra, blocks, name):
    """What vLLM's `INCConfigParser` and `INCConfig.get_quant_method` say of a layer that is not fused."""
    if name in extra and extra[name].get("bits", 16) >= 16:
        return None
    entry = extra.get(name)
    if entry is None:
        entry = next((fields for key, fields in extra.items() if name.endswith("." + key)), None)
    if entry is not None:
        inside = True
    else:
        split = blocks.split(",") if isinstance(blocks, str) else blocks
        inside = any(name.startswith(block) for block in split)
        entry = next(
            (f for key, f in extra.items() if set(key) & set("*+?^$()[]{}|\\") and re.search(key, name)), {}
        )
    top = (
        {"bits": 4, "group_size": 128, "sym": True} if inside else {"bits": 16, "group_size": -1, "sym": True}
    )
    top |= {key: value for key, value in entry.items() if key in top}
    return None if top["bits"] >= 16 else (top["bits"], top["group_size"], top["sym"])


@given(LAYERS, st.dictionaries(KEYS, FIELDS, max_size=4), BLOCKS.filter(lambda b: b is not None))
def test_vllm_meets_ends_and_parts_of_names(name, extra, blocks):
    extra = {k: v for k, v in extra.items() if k != "["}
    got = AutoRoundReader(re.search, ends=True)(
        folder(config_of(extra, blocks)), Module(name, (matrix(name),))
    )
    assert _numbers(got) == _vllm(extra, blocks, name)


def test_vllm_asks_for_parts_only_where_one_has_an_entry():
    qkv = Module(
        "model.layers.0.self_attn.qkv_proj",
        tuple(matrix(f"model.layers.0.self_attn.{p}_proj") for p in "qkv"),
    )
    vllm, sglang = AutoRoundReader(re.search, ends=True), AutoRoundReader(re.fullmatch, ends=False)
    for extra, here, there in (
        ({r".*qkv_proj.*": {"bits": 8}}, 8, 4),
        ({"qkv_proj": {"bits": 8}}, 8, 4),
        ({"self_attn.q_proj": {"bits": 8}}, 4, 4),
        ({r".*[qkv]_proj": {"bits": 8}}, 8, 8),
    ):
        found = folder(config_of(extra, "model.layers"))
        assert (vllm(found, qkv).bits, sglang(found, qkv).bits) == (here, there), extra


def test_parts_in_16_bits_agree_in_all_numbers():
    """Both engines compare bits, group_size and sym, whatever the bits."""
    names = [f"model.layers.0.self_attn.{p}_proj" for p in "qkv"]
    qkv = Module("model.layers.0.self_attn.qkv_proj", tuple(matrix(name) for name in names))
    extra = dict.fromkeys(names, MappingProxyType({"bits": 16}))
    for reader in (AutoRoundReader(re.search, ends=True), AutoRoundReader(re.fullmatch, ends=False)):
        assert reader(folder(config_of(extra, "model.layers")), qkv) is None
        other = {**extra, names[1]: {"bits": 16, "group_size": 32}}
        with pytest.raises(CannotReadError, match="even in 16 bits"):
            reader(folder(config_of(other, "model.layers")), qkv)


@given(LAYERS, st.dictionaries(KEYS.filter(lambda k: k != "["), FIELDS, max_size=4))
def test_stored_formats(name, extra):
    config = config_of(extra, "model.layers")
    how = StoredFormats.read(config, ()).layer((name,))
    want = fields_of(config, name, full_match=False)
    assert (how is None) == (want is None)
    if how is not None:
        fmt = how.format
        assert (fmt.grid.bits, fmt.group.size) == (want["bits"], want["group_size"])


@given(LAYERS, st.lists(st.tuples(st.sampled_from(["-:", "+:", ""]), KEYS, FIELDS), max_size=4))
def test_dynamic(name, rules):
    dynamic = {sign + key: fields for sign, key, fields in rules if key != "["}
    want = {}
    for key, fields in dynamic.items():
        sign = key[:2] if key[:2] in ("-:", "+:") else ""
        if re.compile(key[len(sign) :]).match(name):
            want = None if sign == "-:" else fields
            break
    assert dynamic_rule(dynamic, name) == want


@given(LAYERS, st.lists(st.sampled_from(["mlp", "down", "layers.1", "o_proj", "gate"]), max_size=3))
def test_awq_goes_by_substrings(name, kept):
    config = {"bits": 4, "group_size": 128, "zero_point": True, "modules_to_not_convert": kept}
    got = AWQReader(parts=False)(folder(config), Module(name, (matrix(name),)))
    assert (got is None) == any(part in name for part in kept)


def test_lists_go_by_whole_components():
    assert is_listed("model.layers.0.mlp.up_proj", ("mlp.up_proj",))
    assert is_listed("model.layers.0.mlp.up_proj", ("model.layers.0.mlp.up_proj",))
    assert not is_listed("model.layers.0.mlp.gate_up_proj", ("up_proj",))
    assert not is_listed("model.layers.10.mlp.up_proj", ("model.layers.1",))


def test_modules():
    ends = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    ends += [
        "mlp.experts.0.up_proj",
        "mlp.experts.1.up_proj",
        "mlp.shared_experts.gate_proj",
        "mlp.shared_experts.up_proj",
    ]
    found = [matrix(f"model.layers.3.{end}") for end in ends]
    found += [matrix("lm_head"), matrix("model.embed_tokens")]
    fused = {m.name: (len(m.parts), m.experts) for m in fused_modules(found)}
    assert fused == {
        "model.layers.3.self_attn.qkv_proj": (3, False),
        "model.layers.3.self_attn.o_proj": (1, False),
        "model.layers.3.mlp.experts": (2, True),
        "model.layers.3.mlp.shared_experts.gate_up_proj": (2, False),
        "lm_head": (1, False),
    }
    assert len(split_modules(found)) == len(ends) + 1
