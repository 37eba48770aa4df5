"""Every rule of every engine, each broken once; the folder that breaks none loads everywhere."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from auto_round.consumers.engines import ENGINES, GPTQMODEL, NAMES, SGLANG, VLLM
from auto_round.consumers.ours import TRANSFORMERS
from auto_round.consumers.verdict import judge_folder
from consumers.folders import (
    AUTO_ROUND,
    AUTO_ROUND_AWQ,
    AWQ,
    EXPERT_SHAPES,
    GPTQ,
    HIDDEN,
    SHAPES,
    Case,
    names,
    write,
)

KEEP = {"bits": 16, "data_type": "float"}
EIGHT = {"bits": 8}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def judge(tmp_path, case):
    return {v.engine: v for v in judge_folder(write(tmp_path / "m", case))}


GOOD = {
    "auto_round": Case(config=AUTO_ROUND),
    "auto_round awq": Case("awq", config=AUTO_ROUND_AWQ),
    "gptq": Case(config=GPTQ, index=True),
    "gptq v2": Case(config={**GPTQ, "checkpoint_format": "gptq_v2"}, index=True),
    "awq": Case("awq", config=AWQ),
    "awq legacy keys": Case(
        "awq", config={"quant_method": "awq", "w_bit": 4, "q_group_size": 128, "zero_point": True}
    ),
    "mixed": Case(
        config={**AUTO_ROUND, "extra_config": dict.fromkeys(names("mlp.down_proj"), EIGHT)},
        others={"mlp.down_proj": (8, 128)},
    ),
    "kept by name": Case(
        config={**AUTO_ROUND, "extra_config": dict.fromkeys(names("mlp.down_proj"), KEEP)},
        others={"mlp.down_proj": None},
    ),
    "kept by pattern": Case(
        config={**AUTO_ROUND, "extra_config": {r".*\.mlp\.down_proj.*": KEEP}},
        others={"mlp.down_proj": None},
    ),
    "fused of one scheme": Case(
        config={**AUTO_ROUND, "extra_config": dict.fromkeys(names(*QKV), EIGHT)},
        others=dict.fromkeys(QKV, (8, 128)),
    ),
    "head": Case(
        config={**AUTO_ROUND, "extra_config": {"lm_head": {"bits": 4, "group_size": 128, "sym": True}}},
        head=(4, 128),
    ),
    "gptq head": Case(config={**GPTQ, "lm_head": True}, head=(4, 128)),
    "gptq dynamic": Case(
        config={**GPTQ, "dynamic": {r"-:.*\.down_proj": {}, r"+:.*\.o_proj": EIGHT}},
        others={"mlp.down_proj": None, "self_attn.o_proj": (8, 128)},
    ),
    "awq kept": Case(
        "awq",
        config={**AWQ, "modules_to_not_convert": ["down_proj"], "dynamic": {r"-:.*down_proj": {}}},
        others={"mlp.down_proj": None},
    ),
    "experts": Case(config=AUTO_ROUND, shapes=EXPERT_SHAPES),
    "rows": Case(config={**AUTO_ROUND, "group_size": -1}, stored=(4, -1)),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_folders(tmp_path, name):
    case = GOOD[name]
    found = judge(tmp_path, case)
    readers = {row.name for row in ENGINES if row.method == case.config["quant_method"]} | {TRANSFORMERS}
    assert set(found) == {TRANSFORMERS, *NAMES}
    for engine, verdict in found.items():
        assert verdict.loads == (engine in readers), verdict.text
        assert verdict.loads or verdict.reasons == (
            f"it does not read {case.config['quant_method']} folders",
        )
    assert all("Marlin" in kernel for kernel in found[VLLM].kernels), found[VLLM].kernels
    count = sum(found[VLLM].kernels.values())
    assert count == {
        "experts": 2,
        "kept by name": 6,
        "kept by pattern": 6,
        "head": 9,
        "gptq head": 9,
        "gptq dynamic": 6,
        "awq kept": 6,
    }.get(name, 8)


BAD = {
    "9 bits": (
        Case(config={**AUTO_ROUND, "bits": 9}, stored=(4, 128)),
        (VLLM, SGLANG, TRANSFORMERS),
        "bits",
    ),
    "5 bits said, 4 stored": (
        Case(config={**AUTO_ROUND, "bits": 5}, stored=(4, 128)),
        (VLLM, SGLANG, TRANSFORMERS),
        "bits|disagree",
    ),
    "wrong group on disk": (
        Case(config=AUTO_ROUND, stored=(4, 64)),
        (VLLM, SGLANG, TRANSFORMERS),
        "groups of 512|disagree",
    ),
    "plain packing": (
        Case(config={**AUTO_ROUND, "packing_format": "auto_round"}),
        (VLLM, SGLANG),
        "packing_format",
    ),
    "packing that is not on disk": (
        Case(config=AUTO_ROUND_AWQ),
        (VLLM, SGLANG, TRANSFORMERS),
        "packed as gptq|disagree",
    ),
    "type of numbers": (
        Case(config={**AUTO_ROUND, "data_type": "mx_fp"}),
        (VLLM, SGLANG, TRANSFORMERS),
        "mx_fp",
    ),
    "no sym": (Case(config={k: v for k, v in AUTO_ROUND.items() if k != "sym"}), (SGLANG,), "lacks sym"),
    "no bits": (
        Case(config={k: v for k, v in AUTO_ROUND.items() if k != "bits"}),
        (VLLM, SGLANG),
        "lacks bits",
    ),
    "backend": (Case(config={**AUTO_ROUND, "backend": "exllama"}), (VLLM, SGLANG), "backend"),
    "q unlike k and v": (
        Case(
            config={**AUTO_ROUND, "extra_config": dict.fromkeys(names("self_attn.q_proj"), EIGHT)},
            others={"self_attn.q_proj": (8, 128)},
        ),
        (VLLM, SGLANG),
        "qkv_proj and needs one scheme.*q_proj W8",
    ),
    "gate kept, up not": (
        Case(
            config={**AUTO_ROUND, "extra_config": dict.fromkeys(names("mlp.gate_proj"), KEEP)},
            others={"mlp.gate_proj": None},
        ),
        (VLLM, SGLANG),
        "gate_up_proj and needs one scheme",
    ),
    "experts unlike": (  # vLLM asks for the module of all experts
        Case(
            config={**AUTO_ROUND, "extra_config": dict.fromkeys(names("mlp.experts.1.up_proj"), EIGHT)},
            shapes=EXPERT_SHAPES,
            others={"mlp.experts.1.up_proj": (8, 128)},
        ),
        (VLLM, SGLANG),
        "experts",
    ),
    "experts by their own names": (
        Case(
            config={
                **AUTO_ROUND,
                "extra_config": dict.fromkeys(names(*EXPERT_SHAPES), EIGHT),
            },
            shapes=EXPERT_SHAPES,
            stored=(8, 128),
        ),
        (VLLM,),
        "expects W4 g128 sym for .*experts, but finds 8 bits",
    ),
    "no bits in an exact entry": (  # vLLM takes it for 16 bits
        Case(
            config={**AUTO_ROUND, "extra_config": {n: {"group_size": 64} for n in names("mlp.down_proj")}},
            others={"mlp.down_proj": (4, 64)},
        ),
        (VLLM,),
        "takes .*down_proj for 16 bits, but it is packed",
    ),
    "kept but not said": (
        Case(config=AUTO_ROUND, others={"mlp.down_proj": None}),
        (VLLM, SGLANG, TRANSFORMERS),
        "16 bits|disagree",
    ),
    "said kept but packed": (
        Case(config={**AUTO_ROUND, "extra_config": dict.fromkeys(names("mlp.down_proj"), KEEP)}),
        (VLLM, SGLANG, TRANSFORMERS),
        "it is packed|disagree",
    ),
    "pattern for a part of the name": (  # found by search, not by full match
        Case(
            config={**AUTO_ROUND, "extra_config": {r"mlp\.down_proj": KEEP}}, others={"mlp.down_proj": None}
        ),
        (SGLANG,),
        "16 bits",
    ),
    "block prefix with a blank": (
        Case(config={**AUTO_ROUND, "block_name_to_quantize": "other, model.layers"}),
        (VLLM, SGLANG),
        "it is packed",
    ),
    "blocks of another name": (
        Case(config={**AUTO_ROUND, "block_name_to_quantize": "language_model.layers"}),
        (VLLM, SGLANG, TRANSFORMERS),
        "it is packed|disagree",
    ),
    "3 bits": (Case(config={**AUTO_ROUND, "bits": 3}, stored=(3, 128)), (SGLANG,), "4 and 8 bits"),
    "3 bits of whole rows": (
        Case(config={**AUTO_ROUND, "bits": 3, "group_size": -1}, stored=(3, -1)),
        (VLLM, SGLANG),
        "one group a row|4 and 8 bits",
    ),
    "2 bits in groups of 8": (
        Case(config={**AUTO_ROUND, "bits": 2, "group_size": 8}, stored=(2, 8)),
        (VLLM, SGLANG),
        "powers of two from 16|4 and 8 bits",
    ),
    "3 bits asymmetric": (  # vLLM would load it and be off by one
        Case(config={**AUTO_ROUND, "bits": 3, "sym": False}, stored=(3, 128)),
        (VLLM, SGLANG),
        "stored minus one|4 and 8 bits",
    ),
    "asymmetric": (Case(config={**AUTO_ROUND, "sym": False}), (VLLM, SGLANG), "asym"),
    "group of 16": (
        Case(config={**AUTO_ROUND, "group_size": 16}, stored=(4, 16)),
        (VLLM, SGLANG),
        "group sizes -1, 32, 64, 128",
    ),
    "symmetric rows in the other order": (
        Case("awq", config={**AUTO_ROUND_AWQ, "sym": True, "group_size": -1}, stored=(4, -1)),
        (VLLM, SGLANG),
        "one group a row",
    ),
    "tied head": (
        Case(
            config={**AUTO_ROUND, "extra_config": {"lm_head": {"bits": 4, "group_size": 128}}},
            head=(4, 128),
            model={"tie_word_embeddings": True},
        ),
        (VLLM, SGLANG),
        "ties",
    ),
    "queries of Llama 4": (  # vLLM loads it, and predicts something else
        Case(config=AUTO_ROUND, model={"model_type": "llama4_text"}),
        (VLLM,),
        "order that Llama 4",
    ),
    "head not said": (Case(config=AUTO_ROUND, head=(4, 128)), (VLLM, SGLANG, TRANSFORMERS), "lm_head"),
    "gptq 3 bits": (Case(config={**GPTQ, "bits": 3}, stored=(3, 128)), (VLLM, SGLANG), "bits 3"),
    "gptq asymmetric": (
        Case(config={**GPTQ, "sym": False}),
        (VLLM, SGLANG, GPTQMODEL),
        "sym False|minus one",
    ),
    "gptq 2 asymmetric": (
        Case(config={**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}),
        (VLLM, SGLANG),
        "sym False",
    ),
    "gptq reordered": (Case(config={**GPTQ, "desc_act": True}, index=True), (VLLM,), "reordered"),
    "gptq group of 256": (
        Case(config={**GPTQ, "group_size": 256}, stored=(4, 256)),
        (VLLM, SGLANG),
        "group sizes|group_size",
    ),
    "gptq without desc_act": (
        Case(config={k: v for k, v in GPTQ.items() if k != "desc_act"}),
        (VLLM, SGLANG),
        "lacks desc_act",
    ),
    "gptq marlin": (
        Case(config={**GPTQ, "checkpoint_format": "marlin"}),
        (VLLM, SGLANG, GPTQMODEL, TRANSFORMERS),
        "marlin",
    ),
    "gptq kept but not said": (  # vLLM looks on disk
        Case(config=GPTQ, others={"mlp.down_proj": None}),
        (SGLANG, GPTQMODEL, TRANSFORMERS),
        "16 bits|disagree",
    ),
    "gptq rule for a part of a fused layer": (
        Case(
            config={**GPTQ, "dynamic": {r"+:.*\.(q|k|v)_proj$": EIGHT}}, others=dict.fromkeys(QKV, (8, 128))
        ),
        (VLLM, SGLANG),
        "W4 g128 sym for .*qkv_proj, but finds 8 bits",
    ),
    "gptq rule inside a name": (  # expressions meet the beginning
        Case(config={**GPTQ, "dynamic": {r"-:down_proj": {}}}, others={"mlp.down_proj": None}),
        (SGLANG, GPTQMODEL, TRANSFORMERS),
        "16 bits|disagree",
    ),
    "gptq list": (
        Case(config={**GPTQ, "modules_in_block_to_quantize": [["mlp.up_proj", "mlp.gate_proj"]]}),
        (VLLM, TRANSFORMERS),
        "it is packed|disagree",
    ),
    "gptq head not said": (
        Case(config=GPTQ, head=(4, 128)),
        (VLLM, SGLANG, GPTQMODEL, TRANSFORMERS),
        "lm_head",
    ),
    "awq 8 bits": (
        Case("awq", config={**AWQ, "bits": 8}, stored=(8, 128)),
        (VLLM, SGLANG, GPTQMODEL, TRANSFORMERS),
        "bits|disagree",
    ),
    "awq gemv": (
        Case("awq", config={**AWQ, "version": "gemv"}),
        (VLLM, SGLANG, GPTQMODEL, TRANSFORMERS),
        "gemv",
    ),
    "awq without zero_point": (
        Case("awq", config={k: v for k, v in AWQ.items() if k != "zero_point"}),
        (VLLM, SGLANG),
        "zero_point",
    ),
    "awq kept but not said": (  # vLLM looks on disk
        Case("awq", config=AWQ, others={"mlp.down_proj": None}),
        (SGLANG, GPTQMODEL, TRANSFORMERS),
        "16 bits|disagree",
    ),
    "awq list of parts": (  # SGLang asks for qkv_proj
        Case(
            "awq",
            config={**AWQ, "modules_to_not_convert": list(QKV)},
            others=dict.fromkeys(QKV),
        ),
        (SGLANG, GPTQMODEL),
        "16 bits",
    ),
    "awq part of a fused layer": (
        Case("awq", config={**AWQ, "modules_to_not_convert": ["q_proj"]}, others={"self_attn.q_proj": None}),
        (VLLM, SGLANG, GPTQMODEL),
        "only some parts|16 bits",
    ),
    "awq substring": (  # any part of a name will do
        Case(
            "awq",
            config={**AWQ, "modules_to_not_convert": ["layers.1.mlp.d", "layers.1.self_attn.o"]},
        ),
        (VLLM, SGLANG, TRANSFORMERS),
        "it is packed|disagree",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_folders_with_one_fault(tmp_path, name):
    case, refusing, message = BAD[name]
    found = judge(tmp_path, case)
    readers = {row.name for row in ENGINES if row.method == case.config["quant_method"]} | {TRANSFORMERS}
    assert {e for e in readers if not found[e].loads} == set(refusing), {e: v.text for e, v in found.items()}
    for engine in refusing:
        (reason, *_) = found[engine].reasons
        assert re.search(message, reason), (engine, reason)
        assert not found[engine].kernels


def kernels(tmp_path, case, engine):
    verdict = judge(tmp_path, case)[engine]
    assert verdict.loads, verdict.text
    return dict(verdict.kernels)


def test_kernels(tmp_path):
    small = {**SHAPES, "mlp.down_proj": (HIDDEN_ODD, 512), "self_attn.o_proj": (HIDDEN, 192)}
    case = Case(config={**AUTO_ROUND, "group_size": 64}, stored=(4, 64), shapes=small)
    assert kernels(tmp_path, case, VLLM) == {"Marlin": 6, "Marlin with padding": 2}  # 128 and 64 fit, too
    small = {**SHAPES, "mlp.down_proj": (HIDDEN_ODD, 512)}
    assert kernels(tmp_path, Case(config=AUTO_ROUND, shapes=small), VLLM) == {
        "Marlin": 6,
        "Marlin with padding": 2,
    }
    for bits, size in ((2, 64), (3, 128), (5, 16), (6, 256), (7, 32)):
        narrow = Case(config={**AUTO_ROUND, "bits": bits, "group_size": size}, stored=(bits, size))
        assert kernels(tmp_path, narrow, VLLM) == {"Humming": 8}
    few = Case(config={**AUTO_ROUND, "bits": 2}, stored=(2, 128), shapes=EXPERT_SHAPES)
    assert kernels(tmp_path, few, VLLM) == {"Humming": 2}
    flat = Case("awq", config={**AUTO_ROUND_AWQ, "sym": True})
    assert kernels(tmp_path, flat, VLLM) == kernels(tmp_path, flat, SGLANG) == {"AWQ": 8}
    assert kernels(tmp_path, Case(config=AUTO_ROUND, shapes=EXPERT_SHAPES), SGLANG) == {
        "Marlin for experts": 2
    }
    odd = {k: tuple(160 if n == 512 else n for n in s) for k, s in EXPERT_SHAPES.items()}
    case = Case(config={**AUTO_ROUND, "group_size": 32}, stored=(4, 32), shapes=odd)
    assert kernels(tmp_path, case, VLLM) == {"WNA16 for experts": 2}
    assert kernels(tmp_path, Case(config=GPTQ), GPTQMODEL) == {"Marlin": 14}
    wide = Case(config={**GPTQ, "group_size": 256}, stored=(4, 256))
    assert kernels(tmp_path, wide, GPTQMODEL) == {"PyTorch": 14}


HIDDEN_ODD = 96


def test_sglang_has_no_padding(tmp_path):
    shapes = {**SHAPES, "mlp.down_proj": (HIDDEN_ODD, 512)}
    verdict = judge(tmp_path, Case(config=AUTO_ROUND, shapes=shapes))[SGLANG]
    assert "64 outputs and 128 inputs, not 96 and 512" in verdict.reasons[0]
    assert "{0-1}.mlp.down_proj" in verdict.reasons[0]


def test_float16_only(tmp_path):
    case = Case("awq", config={**AUTO_ROUND_AWQ, "sym": True}, model={"dtype": "bfloat16"})
    assert "--dtype float16" in judge(tmp_path, case)[SGLANG].text
    assert "--dtype" not in judge(tmp_path, replace(case, model={}))[SGLANG].text


def test_a_router_that_is_not_named_is_a_doubt(tmp_path):
    shapes = {**EXPERT_SHAPES, "mlp.gate": (2, 256)}
    verdict = judge(tmp_path, Case(config=AUTO_ROUND, shapes=shapes, others={"mlp.gate": None}))[VLLM]
    assert verdict.loads
    assert "mlp.gate is not named as kept" in verdict.notes[0]
    named = {**AUTO_ROUND, "extra_config": dict.fromkeys(names("mlp.gate"), KEEP)}
    assert not judge(tmp_path, Case(config=named, shapes=shapes, others={"mlp.gate": None}))[VLLM].notes


HUMMING_HINTS = {
    "v2 asymmetric": (Case(config={**GPTQ, "sym": False, "checkpoint_format": "gptq_v2"}), True),
    "v2 asymmetric, auto_round": (
        Case(config={**AUTO_ROUND, "sym": False, "packing_format": "auto_round"}),
        True,
    ),
    "v1 asymmetric": (Case(config={**GPTQ, "sym": False}), False),
    "gptq 3 bits": (Case(config={**GPTQ, "bits": 3}, stored=(3, 128)), True),
    "small groups": (Case(config={**AUTO_ROUND, "group_size": 16}, stored=(4, 16)), True),
    "rows": (Case(config={**AUTO_ROUND, "bits": 3, "group_size": -1}, stored=(3, -1)), False),
    "kept layers": (
        Case(
            config={**GPTQ, "bits": 2, "dynamic": {r"-:.*\.down_proj": {}}},
            stored=(2, 128),
            others={"mlp.down_proj": None},
        ),
        True,
    ),
    "other bits by dynamic": (
        Case(
            config={**GPTQ, "bits": 2, "dynamic": {r"+:.*\.down_proj": EIGHT}},
            stored=(2, 128),
            others={"mlp.down_proj": (8, 128)},
        ),
        True,
    ),
    "other bits by extra_config": (
        Case(
            config={
                **AUTO_ROUND,
                "group_size": 16,
                "extra_config": dict.fromkeys(names("mlp.down_proj"), EIGHT),
            },
            stored=(4, 16),
            others={"mlp.down_proj": (8, 16)},
        ),
        False,
    ),
    "head": (Case(config={**GPTQ, "bits": 3, "lm_head": True}, stored=(3, 128), head=(3, 128)), False),
    "a part of a fused layer": (
        Case(config={**GPTQ, "bits": 3}, stored=(3, 128), others={"self_attn.q_proj": None}),
        False,
    ),
    "reordered": (Case(config={**GPTQ, "bits": 3, "desc_act": True}, stored=(3, 128)), False),
}


@pytest.mark.parametrize("name", HUMMING_HINTS)
def test_where_the_flag_helps(tmp_path, name):
    case, helps = HUMMING_HINTS[name]
    verdict = judge(tmp_path, case)[VLLM]
    assert not verdict.loads
    assert ("runs with --quantization humming" in verdict.notes) == helps


def test_the_file_beside_must_agree(tmp_path):
    folder = write(tmp_path / "m", Case(config=AUTO_ROUND))
    (folder / "quantization_config.json").write_text(json.dumps({**AUTO_ROUND, "bits": 8}))
    found = {v.engine: v for v in judge_folder(folder)}
    assert "contradict" in found[VLLM].text
    (folder / "quantization_config.json").write_text(json.dumps(AUTO_ROUND))
    assert {v.engine: v for v in judge_folder(folder)}[VLLM].loads


def test_every_row_names_its_source():
    assert all(row.source.count("/") >= 3 and row.source.endswith(".py") for row in ENGINES)
    assert {(row.name, row.method, row.order) for row in ENGINES}
    assert len(ENGINES) == len({(row.name, row.method, row.order) for row in ENGINES})
