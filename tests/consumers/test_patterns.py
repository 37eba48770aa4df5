"""How patterns meet names: the readers against an independent one, on random configurations."""

from __future__ import annotations

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from auto_round.consumers.folder import Folder
from auto_round.consumers.matrices import PLAIN, Matrix
from auto_round.consumers.modules import Module, fused_modules, split_modules
from auto_round.consumers.readers import AutoRoundReader, AWQReader
from auto_round.inference.foreign import dynamic_rule, is_listed
from auto_round.inference.stored_formats import StoredFormats
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


@given(LAYERS, st.dictionaries(KEYS, FIELDS, max_size=4), BLOCKS.filter(lambda b: b is not None))
def test_auto_round_readers(name, extra, blocks):
    extra = {k: v for k, v in extra.items() if k != "["}
    config = config_of(extra, blocks)
    for match, full in ((re.search, False), (re.fullmatch, True)):
        got = AutoRoundReader(match)(folder(config), Module(name, (matrix(name),)))
        want = fields_of(config, name, full_match=full)
        outside = want is None
        if outside and got is not None:  # engines let patterns reach layers outside of the blocks
            assert any(match(k, name) for k in extra if not k.isidentifier())
            continue
        assert (None if got is None else (got.bits, got.group_size, got.sym)) == (
            None if want is None else (want["bits"], want["group_size"], want["sym"])
        )


@given(LAYERS, st.dictionaries(KEYS.filter(lambda k: k != "["), FIELDS, max_size=4))
def test_stored_formats(name, extra):
    config = config_of(extra, "model.layers")
    fmt = StoredFormats.read(config, ()).format_of((name,))
    want = fields_of(config, name, full_match=False)
    assert (fmt is None) == (want is None)
    if fmt is not None:
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
