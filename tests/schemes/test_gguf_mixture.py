"""GGUF mixtures choose what llama.cpp's own quantizer chooses."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest

from auto_round.errors import ConfigError
from auto_round.schemes import gguf_mixture
from auto_round.schemes.gguf_mixture import (
    RULES,
    Category,
    MixtureRule,
    Shape,
    When,
    choose_types,
    fitting,
    is_quantizable,
)
from auto_round.schemes.gguf_types import FILE_TYPES, TYPES, file_type, type_of_scheme
from schemes.gguf_models import FILES, MODELS, condensed, facts, shapes, stored_tables


@pytest.mark.parametrize(("model", "file"), list(product(MODELS, FILES)))
def test_types_are_those_of_llama_cpp(model: str, file: str) -> None:
    expected = stored_tables()[model]
    if file not in expected:
        pytest.skip("llama.cpp wants importances for this one")
    wanted = MODELS[model]
    chosen = choose_types(facts(wanted), FILE_TYPES[file], shapes(wanted))
    assert condensed(chosen, list(wanted["tensors"])) == expected[file]


def test_order_of_tensors_does_not_matter() -> None:
    model = MODELS["dense, 32 blocks"]
    chosen = choose_types(facts(model), FILE_TYPES["q4_k_m"], shapes(model))
    backwards = choose_types(facts(model), FILE_TYPES["q4_k_m"], shapes(model)[::-1])
    assert chosen == backwards


def test_mixed_gives_experts_two_bits() -> None:
    model = MODELS["8 experts"]
    chosen = choose_types(facts(model), FILE_TYPES["q2_k_mixed"], shapes(model))
    assert chosen["blk.3.ffn_down_exps.weight"] == "q2_k"
    assert chosen["blk.3.attn_v.weight"] == "q4_k"
    assert chosen["token_embd.weight"] == chosen["output.weight"] == "q8_0"
    assert chosen["blk.3.ffn_gate_inp.weight"] == "f32"


@pytest.mark.parametrize("name", sorted(TYPES))
def test_fallback_always_fits(name: str) -> None:
    for n_in in (8, 32, 96, 256, 352, 4096):
        assert TYPES[fitting(name, n_in)].fits(n_in)
    assert fitting(name, 256) == name


def test_vectors_and_norms_stay_in_32_bits() -> None:
    assert not is_quantizable(Shape("blk.0.ffn_gate_inp_shexp.weight", (1, 64)))
    assert not is_quantizable(Shape("blk.0.attn_q_norm.weight", (4, 64)))
    assert not is_quantizable(Shape("blk.0.attn_q.bias", (64,)))
    assert not is_quantizable(Shape("blk.0.shortconv.conv.weight", (64, 3)))
    assert not is_quantizable(Shape("blk.0.ssm_conv1d.weight", (64, 4)))
    assert not is_quantizable(Shape("per_layer_model_proj.weight", (64, 64)))
    assert is_quantizable(Shape("blk.0.ffn_down_exps.weight", (4, 1, 64)))
    assert is_quantizable(Shape("blk.0.shortconv.in_proj.weight", (192, 64)))
    assert is_quantizable(Shape("blk.0.time_mix_key.weight", (64, 64)))


@pytest.mark.parametrize("name", [n for n, t in TYPES.items() if t.preset is not None])
def test_schemes_stand_for_their_types(name: str) -> None:
    scheme = TYPES[name].scheme
    assert scheme is not None
    found = type_of_scheme(scheme)
    assert found is not None
    assert found.name == name


def test_block_bytes_agree_with_the_layouts() -> None:
    from auto_round.layouts.gguf import GGUF_BLOCKS

    for name, kind in TYPES.items():
        if kind.preset is not None:
            assert (GGUF_BLOCKS[name].weights, GGUF_BLOCKS[name].block_bytes) == (
                kind.block,
                kind.block_bytes,
            )


@pytest.mark.parametrize(("file", "dense"), [("mxfp4_moe", "q8_0"), ("mxfp4", "mxfp4"), ("nvfp4", "nvfp4")])
def test_mxfp4_holds_experts(file: str, dense: str) -> None:
    """As llama.cpp's quantizer: stacked tensors in MXFP4, all others in Q8_0; ours have all layers in it."""
    model = next(m for m in MODELS.values() if m["n_expert"])
    chosen = choose_types(facts(model), FILE_TYPES[file], shapes(model))
    experts = FILE_TYPES[file].base
    assert {t for n, t in chosen.items() if n.endswith("_exps.weight")} == {experts}
    assert {t for n, t in chosen.items() if "attn_q.weight" in n} == {dense}
    assert {chosen[n] for n in ("token_embd.weight", "output.weight") if n in chosen} == {"q8_0"}


def test_numbers_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf")
    for name, kind in TYPES.items():
        theirs = gguf.GGMLQuantizationType(kind.number)
        assert theirs.name.lower() == name
        assert gguf.GGML_QUANT_SIZES[theirs] == (kind.block, kind.block_bytes)
    for name, file in FILE_TYPES.items():
        if name not in ("q2_k_mixed", "mxfp4"):
            assert gguf.LlamaFileType(file.number).name.removeprefix("MOSTLY_").lower() == name


def test_unknown_types_name_the_nearest() -> None:
    with pytest.raises(ConfigError, match="gguf:q4_k_m"):
        file_type("gguf:q4_k_x")


def test_tables_hold_every_model() -> None:
    assert set(stored_tables()) == set(MODELS)
    assert Path(__file__).with_name("gguf_tables.json").stat().st_size < 300_000


UNSEEN = (MixtureRule(Category.QKV, (), "q8_0", When.EXPERTS8), MixtureRule(Category.QKV, ("q2_k",), "q3_k"))
"""Rules for fused projections with eight experts, and without grouped queries, which no model above has; in
llama.cpp they are the rules for V."""


@pytest.mark.parametrize("number", [i for i, rule in enumerate(RULES) if rule not in UNSEEN])
def test_every_rule_matters(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of them some table is missed (or the rule is never needed and should go)."""
    monkeypatch.setattr(gguf_mixture, "RULES", (*RULES[:number], *RULES[number + 1 :]))
    tables = stored_tables()
    files = RULES[number].files or ("q4_k_m",)
    assert any(
        condensed(choose_types(facts(m), FILE_TYPES[f], shapes(m)), list(m["tensors"])) != tables[name][f]
        for name, m in MODELS.items()
        for f in files
        if f in tables[name]
    )
