"""The llm_compressor format: kit, configuration, names, refusals and remarks."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from auto_round.errors import InternalError
from auto_round.export.compressed_config import compressed_config, loader_notes
from auto_round.export.formats.llm_compressor import LLMCompressorFormat
from auto_round.export.table import EXPORTERS, all_refusals, plans_alone, scale_dtype
from auto_round.facts.layer import Layer, Role
from auto_round.facts.loading import Loading
from auto_round.numerics.presets import int_format
from auto_round.schemes.entry import PlanEntry
from auto_round.schemes.plan import Plan
from auto_round.schemes.scheme import PRESET_SCHEMES, QuantizationScheme
from auto_round.testing.compressed_reader import in_library, in_vllm
from auto_round.testing.exporter_kit import check_exporter, expert_case, small_case
from auto_round.testing.failure import ConformanceError


def scheme_of(bits, group_size, sym=True, **given):
    return QuantizationScheme(bits, group_size, sym=sym, scale_dtype="bfloat16", **given)


EXPORTER = EXPORTERS["llm_compressor"]
INT8 = dataclasses.replace(PRESET_SCHEMES["INT8"], scale_dtype="bfloat16")
W4A8 = scheme_of(4, 32, act_bits=8, act_group_size=-1)
ONE = {
    s.label: s
    for s in (
        scheme_of(4, 32),
        scheme_of(4, 32, False),
        scheme_of(3, -1),
        scheme_of(5, 16),
        scheme_of(8, -1, False),
        INT8,
        W4A8,
    )
}


@pytest.mark.parametrize("label", ONE)
def test_one_scheme(label):
    scheme = ONE[label]
    check_exporter(EXPORTER, small_case(scheme))
    check_exporter(EXPORTER, small_case(scheme, router="router"))
    check_exporter(EXPORTER, small_case(scheme, changes={"model.layers.0.mlp.down_proj": None}))
    if not scheme.act_quantized:
        check_exporter(EXPORTER, small_case(scheme, head=scheme, tied=True))
        check_exporter(EXPORTER, small_case(scheme, head=scheme))


@pytest.mark.parametrize("other", [scheme_of(8, 32), scheme_of(2, 16), INT8], ids=lambda s: s.label)
def test_several_schemes(other):
    down = [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    case = small_case(scheme_of(4, 32), changes=dict.fromkeys(down, other))
    check_exporter(EXPORTER, case)
    config = EXPORTER.config(case.plan, case.layers, case.blocks)
    assert config["format"] == ("mixed-precision" if other is INT8 else "pack-quantized")
    assert [g["targets"] for g in config["config_groups"].values()][1] == down


@pytest.mark.parametrize("experts", [scheme_of(4, 32), scheme_of(8, 32), None], ids=str)
def test_experts(experts):
    check_exporter(EXPORTER, expert_case(scheme_of(8, 32), experts=experts))


def test_the_numbers_of_experts_come_first():
    """Transformers unpacks experts by the first group."""
    case = expert_case(scheme_of(8, 32), experts=scheme_of(4, 32))
    groups = EXPORTER.config(case.plan, case.layers, case.blocks)["config_groups"]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8]


@pytest.mark.parametrize(
    ("loading", "changes", "reasons"),
    [
        (Loading(), {}, []),
        (Loading((("a.weight", "b.weight"),)), {}, []),
        (Loading((("a.weight", "b.weight"),)), {"b": None}, ["packed ones only: b (quantize them too"]),
        (Loading((("a.weight",), ("conv.weight",))), {}, ["packed ones only: conv (use the format"]),
        (Loading((("a.weight",), ("b.weight",))), {"b": scheme_of(8, 32)}, ["by one scheme (give them one"]),
        (Loading((("a.weight",),)), {"b": scheme_of(8, 32)}, []),
        (Loading((), {"compressed-tensors": ("x.y",), "gptq": ("z",)}), {}, ["x.y (quantize them too, or"]),
        (Loading((), {"bitsandbytes": ("x.y",)}), {}, []),
    ],
)
def test_what_transformers_cannot_load(loading, changes, reasons):
    layers = matrices("ab")
    schemes = {"a": scheme_of(4, 32), "b": scheme_of(4, 32), **changes}
    plan = Plan(scheme_of(4, 32), {name: PlanEntry(scheme, "") for name, scheme in schemes.items()})
    found = all_refusals(EXPORTER, plan, layers, loading)
    assert len(found) == len(reasons)
    assert all(reason in str(refusal) for reason, refusal in zip(reasons, found, strict=True))
    assert not all_refusals(EXPORTERS["auto_round"], plan, layers, loading)


def test_the_configuration_of_w8a8():
    case = small_case(INT8)
    assert EXPORTER.config(case.plan, case.layers, case.blocks) | {
        "version": "",
        "autoround_version": "",
    } == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "channel",
                    "group_size": None,
                    "dynamic": False,
                    "actorder": None,
                },
                "input_activations": {
                    "num_bits": 8,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "token",
                    "group_size": None,
                    "dynamic": True,
                },
                "output_activations": None,
                "format": "int-quantized",
            }
        },
        "ignore": ["model.layers.1.mlp.gate", "lm_head"],
        "kv_cache_scheme": None,
        "version": "",
        "provider": "auto-round",
        "autoround_version": "",
    }


@pytest.mark.parametrize(
    ("scheme", "form"),
    [
        (INT8, "int-quantized"),
        (dataclasses.replace(INT8, act_sym=False), "int-quantized"),
        (scheme_of(8, 32, act_bits=8, act_group_size=-1), "pack-quantized"),
        (W4A8, "pack-quantized"),
        (scheme_of(4, -1, act_bits=4), "pack-quantized"),
        (scheme_of(5, 32, act_bits=4, act_group_size=-1), "pack-quantized"),
    ],
)
def test_bytes_only_for_products_of_eight_by_eight_bits(scheme, form):
    """vLLM has kernels for these orders of bytes; packed, 4 bits take half the room."""
    case = small_case(scheme)
    check_exporter(EXPORTER, case)
    config = EXPORTER.config(case.plan, case.layers, case.blocks)
    assert [group["format"] for group in config["config_groups"].values()] == [form]


def test_no_zero_points_beside_rounded_activations():
    for scheme in (
        scheme_of(4, 32, False, act_bits=8, act_group_size=-1),
        dataclasses.replace(INT8, sym=False),
    ):
        case = small_case(scheme)
        (refusal,) = EXPORTER.refusals(case.plan, case.layers)
        assert "rounds no activations" in str(refusal)
        assert "symmetric weights" in str(refusal)


def test_compressed_tensors_accepts_the_configurations():
    quantization = pytest.importorskip("compressed_tensors.quantization")
    for scheme in (*ONE.values(), scheme_of(2, 16)):
        case = small_case(scheme, changes={"model.layers.0.mlp.down_proj": scheme_of(8, 32, scheme.sym)})
        config = compressed_config(case.plan, case.layers)
        parsed = quantization.QuantizationConfig.model_validate(config)
        assert parsed.quantization_status == "compressed"
        assert [g.format for g in parsed.config_groups.values()] == [
            g["format"] for g in config["config_groups"].values()
        ]


def matrices(names, router="gate"):
    return [
        Layer(
            n,
            f"{n}.weight",
            f"{n}.weight",
            (64, 64),
            torch.bfloat16,
            0,
            Role.ROUTER if router in n else Role.LINEAR,
        )
        for n in names
    ]


def planned(quantized, kept):
    layers = matrices([*quantized, *kept])
    entries = {n: PlanEntry(scheme_of(4, 32), "") for n in quantized} | {n: PlanEntry(None, "") for n in kept}
    return Plan(scheme_of(4, 32), entries), layers


def test_kept_layers_that_differ_in_numbers_are_one_expression():
    blocks = range(12)
    quantized = [f"model.layers.{i}.mlp.gate_proj" for i in blocks]
    plan, layers = planned(quantized, [f"model.layers.{i}.mlp.gate" for i in blocks])
    config = compressed_config(plan, layers)
    assert config["ignore"] == [r"re:.*\.layers\.\d+\.mlp\.gate$"]
    for layer in layers:
        assert (in_library(config, layer.name, ()) is None) == (layer.name not in quantized)
    # vLLM knows vision models under another prefix
    assert in_vllm(config, "language_model.model.layers.3.mlp.gate", ()) is None


def test_an_expression_never_finds_a_quantized_layer():
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(4)]
    plan, layers = planned(names[:2], names[2:])
    config = compressed_config(plan, layers)
    assert config["ignore"] == names[2:]
    assert [in_library(config, n, ()) is None for n in names] == [False, False, True, True]


def test_nothing_quantized_looks_unquantized():
    plan, layers = planned([], ["model.layers.0.mlp.up_proj"])
    assert compressed_config(plan, layers) is None


@pytest.mark.parametrize(
    ("scheme", "changes", "reason"),
    [
        (QuantizationScheme(4, 32), {}, "hold scales in the model's dtype, which would round float16 again"),
        (
            scheme_of(4, 32, False),
            {"model.layers.0.mlp.up_proj": scheme_of(8, 32, False)},
            "no zero points beside other schemes",
        ),
        (scheme_of(8, -1, False, act_bits=8, act_group_size=-1), {}, "symmetric weights"),
        (scheme_of(4, 0), {}, "whole tensor"),
    ],
)
def test_refusals(scheme, changes, reason):
    case = small_case(scheme, changes=changes)
    assert reason in " ".join(map(str, EXPORTER.refusals(case.plan, case.layers)))


def test_zero_points_of_experts_are_refused():
    case = expert_case(scheme_of(4, 32, False), experts=scheme_of(4, 32, False))
    (refusal,) = EXPORTER.refusals(case.plan, case.layers)
    assert "no zero points of routed experts" in refusal.reason


@pytest.mark.parametrize(
    "name", [n for n in EXPORTERS if n not in ("llm_compressor", "fake") and not plans_alone(n)]
)
def test_other_formats_refuse_activations(name):
    case = small_case(W4A8)
    assert "leave activations alone" in str(all_refusals(EXPORTERS[name], case.plan, case.layers)[0])
    assert not all_refusals(EXPORTER, case.plan, case.layers)
    assert not all_refusals(EXPORTERS["fake"], case.plan, case.layers)
    assert "leaves activations alone" in EXPORTERS["fake"].warnings(case.plan, case.layers)[0]


@pytest.mark.parametrize(
    ("scheme", "text"),
    [
        (scheme_of(4, 32), None),
        (INT8, None),
        (scheme_of(3, 32), "SGLang reads 4 and 8 bits"),
        (scheme_of(3, 32, False), "SGLang reads 4 bits"),
        (scheme_of(8, -1, False), "SGLang reads 4 bits"),
        (scheme_of(8, 32, act_bits=8, act_group_size=-1), "SGLang does not read it"),
        (scheme_of(4, -1, act_bits=4), "Marlin leaves activations in 16 bits"),
        (W4A8, "Marlin leaves activations in 16 bits"),
        (scheme_of(4, 32, act_bits=8, act_group_size=-1, act_sym=False), "wants symmetric activations"),
    ],
)
def test_remarks_on_loaders(scheme, text):
    case = small_case(scheme)
    found = loader_notes(case.plan, case.layers)
    assert found == EXPORTER.warnings(case.plan, case.layers)
    assert found == [] if text is None else text in found[0]


def test_scales_are_kept_in_the_dtype_of_the_model():
    both = [EXPORTERS["auto_round"], EXPORTER]
    assert scale_dtype(both, torch.bfloat16, "int") == "bfloat16"
    assert scale_dtype(both, torch.float16, "int") == "float16"
    assert scale_dtype(both, torch.float32, "int") is None  # the usual float16 is exact in it
    assert scale_dtype(both[:1], torch.bfloat16, "int") is None
    for dtype in ("bfloat16", "float16", "float32"):  # steps of FP8 are too small for float16
        assert scale_dtype(both[:1], getattr(torch, dtype), "fp") == dtype


def test_a_plan_has_to_decide():
    layer = small_case(scheme_of(4, 32)).layers[0]
    with pytest.raises(InternalError, match="for_plan"):
        LLMCompressorFormat().spec(layer, int_format(4, 32, sym=True))


WRONG_CONFIGS = {
    "forgets the router": lambda c: c | {"ignore": ["lm_head"]},
    "ignores everything": lambda c: c | {"ignore": ["re:.*"]},
    "other bits": lambda c: _weights(c, num_bits=8),
    "other groups": lambda c: _weights(c, group_size=16),
    "asymmetric": lambda c: _weights(c, symmetric=False),
}


def _weights(config, **changes):
    group = config["config_groups"]["group_0"]
    return config | {"config_groups": {"group_0": group | {"weights": group["weights"] | changes}}}


WRONG_TENSORS = {
    "scale doubled": lambda t: {k: v * 2 if k.endswith("scale") else v for k, v in t.items()},
    "rows shifted": lambda t: {k: v.roll(1, 0) if k.endswith("packed") else v for k, v in t.items()},
    "another shape": lambda t: {k: v.flip(0) if k.endswith("shape") else v for k, v in t.items()},
    "a bit of one code": lambda t: {k: _flipped(v) if k.endswith("packed") else v for k, v in t.items()},
}


def _flipped(words):
    words = words.clone()
    words[-1, -1] ^= 1
    return words


@dataclasses.dataclass(frozen=True)
class Mutant(LLMCompressorFormat):
    """The exporter with one thing changed."""

    change_config: object = dict
    change_tensors: object = dict

    def config(self, plan, layers, blocks, facts=None):
        return self.change_config(LLMCompressorFormat.config(self, plan, layers, blocks, facts))

    def encode(self, layer, q):
        return self.change_tensors(LLMCompressorFormat.encode(self, layer, q))


@pytest.mark.parametrize("change", WRONG_CONFIGS)
def test_wrong_configs_fail(change):
    with pytest.raises((ConformanceError, KeyError)):
        check_exporter(Mutant(change_config=WRONG_CONFIGS[change]), small_case(scheme_of(4, 32)))


@pytest.mark.parametrize("change", WRONG_TENSORS)
def test_wrong_tensors_fail(change):
    with pytest.raises(ConformanceError):
        check_exporter(Mutant(change_tensors=WRONG_TENSORS[change]), small_case(scheme_of(4, 32)))


def test_expressions_are_anchored():
    plan, layers = planned(["model.layers.0.mlp.gate_proj"], [f"model.layers.{i}.mlp.gate" for i in range(2)])
    (entry,) = compressed_config(plan, layers)["ignore"]
    assert not re.match(entry.removeprefix("re:"), "model.layers.0.mlp.gate_proj")
