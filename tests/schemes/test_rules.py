"""Rules: exact names, partial names, expressions, ignored layers, blocks, and their errors."""

from __future__ import annotations

import re

import pytest

from auto_round.errors import ConfigError
from auto_round.schemes.rules import Kind, loose_number, match_blocks, match_ignored, match_layer_config
from auto_round.schemes.scheme import QuantizationScheme

BASE = QuantizationScheme()


@pytest.fixture(scope="module")
def names(layers):
    return [layer.name for layer in layers]


def matched(key, names, value="W8A16"):
    (match,) = match_layer_config({key: value}, BASE, names)
    return match


@pytest.mark.parametrize(
    ("key", "kind", "oracle"),
    [
        ("model.layers.1.self_attn.k_proj", Kind.EXACT, lambda n: n == "model.layers.1.self_attn.k_proj"),
        ("k_proj", Kind.PARTIAL, lambda n: n.endswith(".k_proj")),
        ("layers.1", Kind.PARTIAL, lambda n: n.startswith("model.layers.1.")),
        ("layers.1.", Kind.PARTIAL, lambda n: n.startswith("model.layers.1.")),
        ("mlp.gate", Kind.PARTIAL, lambda n: n.endswith("mlp.gate")),
        ("_attn", Kind.PARTIAL, lambda n: "_attn" in n),
        ("ers.1", Kind.PARTIAL, lambda n: n.startswith("model.layers.1.")),
        ("experts.3", Kind.PARTIAL, lambda n: ".experts.3." in n),
        ("model.layers.*k_proj", Kind.REGEX, lambda n: n.endswith(".k_proj")),
        (r"layers\.(1|11)\.", Kind.REGEX, lambda n: n.startswith(("model.layers.1.", "model.layers.11."))),
        ("^lm_head$", Kind.REGEX, lambda n: n == "lm_head"),
        ("(?i)K_PROJ", Kind.REGEX, lambda n: n.endswith(".k_proj")),
        ("[qk]_proj|o_proj", Kind.REGEX, lambda n: n[-6:] in ("q_proj", "k_proj", "o_proj")),
    ],
)
def test_kinds_and_matches(key, kind, oracle, names):
    match = matched(key, names)
    wanted = {name for name in names if oracle(name)}
    assert wanted
    assert match.rule.kind is kind
    assert match.names == wanted
    if kind is not Kind.EXACT:
        assert {name for name in names if re.search(match.rule.regex, name)} == wanted


def test_a_number_never_matches_a_part_of_a_longer_one():
    with pytest.raises(ConfigError, match="matches no layer"):
        matched("layers.1", ["model.layers.10.k_proj"])


def test_names_are_not_searched_one_by_one():
    class Names(list):
        def __contains__(self, name):
            raise AssertionError("20,000 names would be compared with each of 20,000")

    match = matched("b.c", Names(["a.c", "b.c"]))
    assert (match.rule.kind, match.names) == (Kind.EXACT, {"b.c"})


def test_stronger_kinds_come_first(names):
    config = {"layers.*k_proj": "W2A16", "k_proj": "W3A16", names[1]: "W8A16", "v_proj": "W2A16"}
    kinds = [match.rule.kind for match in match_layer_config(config, BASE, names)]
    assert kinds == [Kind.EXACT, Kind.PARTIAL, Kind.PARTIAL, Kind.REGEX]


def test_values(names):
    assert matched("k_proj", names, {"bits": 3}).rule.scheme == QuantizationScheme(3)
    assert matched("k_proj", names, QuantizationScheme(2)).rule.scheme == QuantizationScheme(2)
    assert matched("k_proj", names, "bf16").rule.scheme is None
    assert matched("k_proj", names, {"bits": 16, "data_type": "float"}).rule.scheme is None


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kproj": "W8A16"}, '"kproj" matches no layer; did you mean "k_proj"'),
        ({"self_atn.k_proj": "W8A16"}, 'did you mean "self_attn.k_proj"'),
        ({"layers.*kk_proj": "W8A16"}, "matches no layer"),
        ({"*k_proj": "W8A16"}, "nothing to repeat at position 0"),
        ({"a(b": "W8A16"}, "position 1"),
        ({"a{99999999999}": "W8A16"}, "not a valid regular expression"),
        ({"k_proj": "W9A16"}, 'layer_config "k_proj": unknown scheme "W9A16"; did you mean'),
        ({"k_proj": {"bit": 3}}, 'layer_config "k_proj": unknown scheme field'),
        ({"k_proj": 8}, r'such as {"bits": 8}'),
        ({"": "W8A16"}, "a key of layer_config"),
        ({".": "W8A16"}, "a key of layer_config"),
        ({3: "W8A16"}, "a key of layer_config"),
        (["k_proj"], "must be a dictionary"),
    ],
)
def test_bad_layer_config(config, message, names):
    with pytest.raises(ConfigError, match=message):
        match_layer_config(config, BASE, names)


@pytest.mark.parametrize(
    ("ignored", "oracle"),
    [
        ("down_proj", lambda n: "down_proj" in n),
        ("layers.1", lambda n: "layers.1." in n),
        ("experts.3, lm_head ,", lambda n: ".experts.3." in n or n == "lm_head"),
        (["q_proj", "k_proj,v_proj"], lambda n: n[-6:] in ("q_proj", "k_proj", "v_proj")),
        ("layers.1.mlp.gate", lambda n: "layers.1.mlp.gate" in n),
        ("", lambda _: False),
        (None, lambda _: False),
    ],
)
def test_ignored(ignored, oracle, names):
    assert set(match_ignored(ignored, names)) == {name for name in names if oracle(name)}


def test_ignored_must_exist_somewhere(names):
    assert match_ignored("embed_tokens", names, ["model.embed_tokens"]) == {}
    with pytest.raises(ConfigError, match='"lm_heat" matches no layer; did you mean "lm_head"'):
        match_ignored("q_proj,lm_heat", names)


@pytest.mark.parametrize("bad", [5, {"a": 1}, [None], [5], b"x"])
def test_bad_lists(bad, names, blocks):
    with pytest.raises(ConfigError):
        match_ignored(bad, names)
    with pytest.raises(ConfigError):
        match_blocks(bad, blocks)


@pytest.mark.parametrize(
    ("wanted", "indices"),
    [
        (None, range(12)),
        ("", range(12)),
        ("model.layers", range(12)),
        ("language.layers.1", [1]),
        ("model.layers.1,model.layers.11", [1, 11]),
        ([["model.layers.2", "model.layers.3"], ["model.layers.4"]], [2, 3, 4]),
    ],
)
def test_blocks(wanted, indices, blocks):
    prefixes, chosen = match_blocks(wanted, blocks)
    assert chosen == set(indices)
    assert bool(prefixes) is bool(wanted)


def test_unknown_blocks_name_the_nearest(blocks):
    with pytest.raises(ConfigError, match=r'"model\.layer" names no block; did you mean "model\.layers"'):
        match_blocks("model.layer", blocks)


def test_loose_number(names):
    hint = loose_number(matched("layers.1.*k_proj", names), names)
    assert "layers.10.self_attn.k_proj" in hint
    assert r'write "layers.1\..*k_proj"' in hint
    assert loose_number(matched(r"layers\.1\..*k_proj", names), names) is None
    assert loose_number(matched("layers.9.*k_proj", names), names) is None


@pytest.mark.parametrize("key", ["model.embed_tokens", "embed_tokens", ".*embed.*"])
def test_what_is_never_quantized_may_be_kept_and_its_bits_are_refused_with_the_way(key):
    names, others = ["model.layers.0.up_proj"], ["model.embed_tokens", "model.norm"]
    for kept in ({"bits": 16}, "BF16"):
        assert match_layer_config({key: kept}, BASE, names, others) == ()
    with pytest.raises(ConfigError, match=r"names model\.embed_tokens, which keeps 16 bits.*gguf:q4_k_m"):
        match_layer_config({key: {"bits": 4}}, BASE, names, others)
