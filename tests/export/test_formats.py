"""Every row of the table passes the exporter kit; wrong exporters fail; refusals come before any work."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from auto_round.errors import InternalError
from auto_round.export.formats.auto_round import AutoRoundFormat
from auto_round.export.formats.awq import AWQFormat
from auto_round.export.formats.fake import FakeFormat
from auto_round.export.formats.gptq import GPTQFormat
from auto_round.export.table import EXPORTERS
from auto_round.facts.layer import Role
from auto_round.numerics.presets import int_format
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.testing.exporter_kit import check_exporter, expert_case, small_case
from auto_round.testing.failure import ConformanceError

S = QuantizationScheme

SCHEMES = {
    s.label: s
    for s in (
        S(4, 32),
        S(4, 32, sym=False),
        S(3, -1),
        S(2, 16, sym=False),
        S(8, 32, scale_dtype="bfloat16"),
        S(8, -1, sym=False, scale_dtype="float32"),
    )
}


def cases(scheme):
    other = S(8, 16, scheme.sym)
    yield small_case(scheme)
    yield small_case(scheme, head=scheme, tied=True)
    yield small_case(scheme, head=S(4, 16, scheme.sym))
    yield small_case(
        scheme, changes={"model.layers.0.mlp.up_proj": None, "model.layers.1.mlp.up_proj": other}
    )


HALF = [label for label, scheme in SCHEMES.items() if scheme.scale_dtype == "float16"]
"""Schemes with float16 scales, the only ones of GPTQ and AWQ folders."""


@pytest.mark.parametrize("name", ["auto_round", "auto_round:gptqmodel", "fake"])
@pytest.mark.parametrize("label", SCHEMES)
def test_formats_that_hold_everything(name, label):
    for case in cases(SCHEMES[label]):
        check_exporter(EXPORTERS[name], case)


@pytest.mark.parametrize("label", SCHEMES)
def test_no_zero_points_of_widths_that_a_reader_would_misread(label):
    for case in cases(SCHEMES[label]):
        schemes = [entry.scheme for entry in case.plan.entries.values() if entry.scheme is not None]
        if all(scheme.sym or scheme.bits in (4, 8) for scheme in schemes):
            check_exporter(EXPORTERS["auto_round:auto_gptq"], case)
            said = EXPORTERS["auto_round:auto_gptq"].warnings(case.plan, case.layers)
            assert ["minus one" in note for note in said] == [True] * (not SCHEMES[label].sym)
        else:
            (refusal,) = EXPORTERS["auto_round:auto_gptq"].refusals(case.plan, case.layers)
            assert "minus one" in refusal.reason
            assert "auto_round:gptqmodel" in refusal.remedy


@pytest.mark.parametrize("label", SCHEMES)
def test_four_bits_only(label):
    scheme = SCHEMES[label]
    for case in cases(scheme):
        if all(e.scheme is None or e.scheme.bits == 4 for e in case.plan.entries.values()):
            check_exporter(EXPORTERS["auto_round:auto_awq"], case)
        else:
            assert "4 bits" in str(EXPORTERS["auto_round:auto_awq"].refusals(case.plan, case.layers)[0])


@pytest.mark.parametrize("name", ["auto_gptq", "gptqmodel"])
@pytest.mark.parametrize("label", HALF)
def test_gptq_folders_hold_every_width_with_and_without_zero_points(name, label):
    scheme = SCHEMES[label]
    for case in (*cases(scheme), expert_case(scheme, experts=S(4, 16)), expert_case(scheme, experts=None)):
        check_exporter(EXPORTERS[name], case)


@pytest.mark.parametrize("sym", [True, False])
def test_awq_folders_hold_four_bits(sym):
    scheme = S(4, 32, sym=sym)
    kept = {"model.layers.0.mlp.down_proj": None}
    for case in (
        small_case(scheme, router="router", tied=True),
        small_case(scheme, router="router", changes=kept),
        small_case(S(4, -1, sym=sym), router="router"),
        expert_case(scheme, experts=scheme),
        expert_case(scheme, experts=None),
        expert_case(
            scheme, experts=scheme, changes={f"model.layers.1.self_attn.{p}_proj": None for p in "qkv"}
        ),
    ):
        check_exporter(EXPORTERS["auto_awq"], case)


def test_awq_folders_hold_both_kinds_of_four_bits_in_one():
    case = small_case(S(4, 32), router="router", changes={"model.layers.0.mlp.up_proj": S(4, 32, sym=False)})
    check_exporter(EXPORTERS["auto_awq"], case)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (small_case(S(3, 32), router="router"), "4 bits"),
        (small_case(S(4, 32, scale_dtype="bfloat16"), router="router"), "scales are float16"),
        (small_case(S(4, 32), head=S(4, 32), router="router"), "head"),
        (
            small_case(S(4, 32), router="router", changes={"model.layers.0.mlp.up_proj": S(4, 16)}),
            "group size",
        ),
        (small_case(S(4, 32)), "model.layers.1.mlp.gate is kept"),
        (small_case(S(4, 24), router="router"), "does not divide"),
    ],
)
def test_what_awq_folders_cannot_hold(case, reason):
    refusals = EXPORTERS["auto_awq"].refusals(case.plan, case.layers)
    assert any(reason in r.reason for r in refusals)
    assert all(r.who == "auto_awq" and r.remedy for r in refusals)


@pytest.mark.parametrize(
    ("scheme", "reason"),
    [
        (S(5, 32), "5 bits"),
        (S(4, 0), "group_size 0"),
        (S(4, 24), "does not divide"),
        (S(4, 32, scale_dtype="float32"), "scales are float16"),
    ],
)
@pytest.mark.parametrize("name", ["auto_gptq", "gptqmodel"])
def test_what_gptq_folders_cannot_hold(name, scheme, reason):
    case = small_case(scheme)
    refusals = EXPORTERS[name].refusals(case.plan, case.layers)
    assert any(reason in r.reason and r.who == name and r.remedy for r in refusals)


@pytest.mark.parametrize("name", ["auto_gptq", "gptqmodel", "auto_awq"])
def test_layers_outside_of_the_blocks_are_not_looked_for(name):
    case = small_case(S(4, 32), router="router")
    outside = dataclasses.replace(case.layers[0], block=None, role=Role.OUTSIDE)
    (refusal,) = EXPORTERS[name].refusals(case.plan, (outside, *case.layers[1:]))
    assert "in the blocks only" in refusal.reason


@pytest.mark.parametrize(
    ("name", "scheme", "changes", "says"),
    [
        ("auto_gptq", S(4, 32), {}, []),
        ("gptqmodel", S(4, 32), {}, []),
        ("auto_awq", S(4, 32, sym=False), {}, []),
        ("auto_gptq", S(2, 32, sym=False), {}, ["version 1"]),
        ("gptqmodel", S(2, 32, sym=False), {}, ["vLLM does not"]),
        ("auto_gptq", S(4, 32), {"model.layers.0.mlp.up_proj": S(8, 32)}, ["AutoRoundConfig"]),
        ("auto_gptq", S(4, 32), {"model.layers.0.mlp.up_proj": None}, []),
        (
            "auto_gptq",
            S(4, 32),
            {"model.layers.0.mlp.up_proj": S(4, 32, sym=False)},
            ["model.layers.0.mlp.up_proj: asymmetric", "AutoRoundConfig"],
        ),
    ],
)
def test_what_readers_do_not_do_well_is_said_beforehand(name, scheme, changes, says):
    case = small_case(scheme, changes=changes, router="router")
    found = EXPORTERS[name].warnings(case.plan, case.layers)
    assert len(found) == len(says)
    assert all(piece in note and note.startswith(name) for piece, note in zip(says, found, strict=True))


@pytest.mark.parametrize("name", ["auto_gptq", "gptqmodel", "auto_awq"])
def test_biases_of_quantized_layers_are_float16(name):
    case = expert_case(S(4, 32), experts=S(4, 32), changes={"model.layers.1.self_attn.q_proj": None})
    manifest = EXPORTERS[name].manifest(case.plan, case.layers, case.tensors)
    assert manifest.specs["model.layers.0.self_attn.q_proj.bias"].dtype is torch.float16
    assert manifest.specs["model.layers.1.self_attn.q_proj.bias"].dtype is torch.bfloat16
    assert manifest.specs["model.norm.weight"] == case.tensors["model.norm.weight"]
    same = EXPORTERS["auto_round:gptqmodel"].manifest(case.plan, case.layers, case.tensors)
    assert same.specs["model.layers.0.self_attn.q_proj.bias"].dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("scheme", "changes", "packing"),
    [
        (S(4, 32), {}, "auto_round:auto_gptq"),
        (S(3, 32), {}, "auto_round:auto_gptq"),
        (S(4, 32, sym=False), {}, "auto_round:auto_awq"),
        (S(4, 32, sym=False), {"model.layers.0.mlp.up_proj": None}, "auto_round:auto_awq"),
        (S(4, 32, sym=False), {"model.layers.0.mlp.up_proj": S(8, 32, sym=False)}, "auto_round"),
        (S(4, 32, sym=False), {"model.layers.0.mlp.up_proj": S(4, 32)}, "auto_round"),
        (S(4, 32), {"model.layers.0.mlp.up_proj": S(4, 32, sym=False)}, "auto_round"),
        (S(3, 32, sym=False), {}, "auto_round"),
        (S(2, 32, sym=False), {}, "auto_round"),
    ],
)
def test_the_packing_that_fits_the_plan(scheme, changes, packing):
    case = small_case(scheme, changes=changes)
    exact = EXPORTERS["auto_round"].for_plan(case.plan, case.layers)
    assert exact.packing == packing
    config = exact.config(case.plan, case.layers, case.blocks)
    assert config["packing_format"] == packing


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_widths_that_no_loader_reads(bits):
    case = small_case(S(bits, 32))
    (refusal,) = EXPORTERS["auto_round"].refusals(case.plan, case.layers)
    assert f"{bits} bits" in refusal.reason
    assert "model.layers.{0-1}.mlp.gate_proj" in refusal.reason
    assert "fake" in refusal.remedy
    check_exporter(EXPORTERS["fake"], case)


@pytest.mark.parametrize(("group", "reason"), [(0, "group_size 0"), (24, "does not divide")])
def test_groups_that_loaders_refuse(group, reason):
    case = small_case(S(4, group))
    refusals = EXPORTERS["auto_round"].refusals(case.plan, case.layers)
    assert any(reason in r.reason for r in refusals)
    assert EXPORTERS["fake"].refusals(case.plan, case.layers) == []
    check_exporter(EXPORTERS["fake"], case)


def test_a_format_with_several_packings_wants_a_plan_first():
    case = small_case(S(4, 32))
    with pytest.raises(InternalError, match="for_plan"):
        EXPORTERS["auto_round"].spec(case.layers[0], int_format(4, 32, sym=True))


def test_nothing_quantized_looks_unquantized():
    case = small_case(S(16, 128, data_type="fp"), changes=dict.fromkeys(small_case(S(4, 32)).plan.entries))
    exact = EXPORTERS["auto_round"].for_plan(case.plan, case.layers)
    assert exact.config(case.plan, case.layers, case.blocks) is None


def test_fake_writes_a_tied_head_apart():
    case = small_case(S(4, 32), head=S(4, 32), tied=True)
    head = next(layer for layer in case.layers if layer.name == "lm_head")
    assert head.tensor == "model.embed_tokens.weight"
    assert list(FakeFormat().spec(head, int_format(4, 32, sym=True))) == ["lm_head.weight"]


# --- exporters that are wrong ---


@dataclasses.dataclass(frozen=True)
class Mutant:
    """An exporter with one thing changed."""

    inner: object
    config_change: object = dict
    tensor_change: object = dict
    name: str = "mutant"

    def for_plan(self, plan, layers):
        return dataclasses.replace(self, inner=self.inner.for_plan(plan, layers))

    def refusals(self, plan, layers):
        return self.inner.refusals(plan, layers)

    def spec(self, layer, fmt):
        return self.inner.spec(layer, fmt)

    def encode(self, layer, q):
        return self.tensor_change(self.inner.encode(layer, q))

    def config(self, plan, layers, blocks, facts=None):
        config = self.inner.config(plan, layers, blocks, facts)
        return None if config is None else self.config_change(config)


def swap(config, key, value):
    return config | {key: value}


WRONG_CONFIGS = {
    "other packing": lambda c: swap(c, "packing_format", "auto_round"),
    "other bits": lambda c: swap(c, "bits", 8),
    "other group": lambda c: swap(c, "group_size", 16),
    "no blocks": lambda c: swap(c, "block_name_to_quantize", "model.decoder"),
    "forgets the router": lambda c: swap(c, "extra_config", {}),
    "greedy pattern": lambda c: swap(
        c, "extra_config", {r".*mlp\.gate.*": {"bits": 16, "data_type": "float"}}
    ),
    "not JSON": lambda c: swap(c, "sym", torch.tensor(1)),
}


@pytest.mark.parametrize("change", WRONG_CONFIGS)
def test_wrong_configs_fail(change):
    with pytest.raises((ConformanceError, TypeError)):
        check_exporter(Mutant(AutoRoundFormat("x"), WRONG_CONFIGS[change]), small_case(S(4, 32)))


WRONG_TENSORS = {
    "scale doubled": lambda t: {k: v * 2 if k.endswith("scales") else v for k, v in t.items()},
    "transposed": lambda t: {k: v.t() if k.endswith("qweight") else v for k, v in t.items()},
    "renamed": lambda t: {f"model.{k}": v for k, v in t.items()},
    "zero off by one": lambda t: {k: v + 0x11111111 if k.endswith("qzeros") else v for k, v in t.items()},
    "same name for all": lambda t: {k.rpartition(".")[2]: v for k, v in t.items()},
}


@pytest.mark.parametrize("change", WRONG_TENSORS)
def test_wrong_tensors_fail(change):
    with pytest.raises(ConformanceError):
        check_exporter(
            Mutant(AutoRoundFormat("x"), tensor_change=WRONG_TENSORS[change]), small_case(S(4, 32))
        )


WRONG_GPTQ_CONFIGS = {
    "other version": lambda c: swap(c, "checkpoint_format", "gptq_v2"),
    "other bits": lambda c: swap(c, "bits", 4),
    "no rules": lambda c: swap(c, "dynamic", {}),
    "rules for single parts only": lambda c: swap(
        c, "dynamic", {k: v for k, v in c["dynamic"].items() if "qkv" not in k}
    ),
    "rules for single experts only": lambda c: swap(
        c, "dynamic", {k: v for k, v in c["dynamic"].items() if not k.endswith("experts$")}
    ),
    "list of ends that are not ends of all": lambda c: swap(c, "modules_in_block_to_quantize", [["q_proj"]]),
    "other method": lambda c: swap(c, "quant_method", "gptq_marlin"),
}


@pytest.mark.parametrize("change", WRONG_GPTQ_CONFIGS)
def test_wrong_gptq_configs_fail(change):
    eight = {f"model.layers.0.self_attn.{p}_proj": S(8, 32) for p in "qkv"}
    case = expert_case(S(3, 32), experts=S(2, 32), changes=eight)
    check_exporter(GPTQFormat("x", "gptq"), case)
    with pytest.raises(ConformanceError):
        check_exporter(Mutant(GPTQFormat("x", "gptq"), WRONG_GPTQ_CONFIGS[change]), case)


def test_gptq_rules_that_match_more_than_their_layers_fail():
    def loose(config):
        return swap(config, "dynamic", {key.rstrip("$"): value for key, value in config["dynamic"].items()})

    case = small_case(S(4, 32))
    check_exporter(GPTQFormat("x", "gptq"), case)
    with pytest.raises(ConformanceError, match=r"mlp\.gate_proj"):
        check_exporter(Mutant(GPTQFormat("x", "gptq"), loose), case)


WRONG_AWQ_CONFIGS = {
    "converts all": lambda c: swap(c, "modules_to_not_convert", []),
    "keeps too much": lambda c: swap(c, "modules_to_not_convert", ["mlp.gate", "lm_head"]),
    "names single experts only": lambda c: swap(
        c, "modules_to_not_convert", [e for e in c["modules_to_not_convert"] if not e.endswith("experts")]
    ),
    "forgets merged matrices": lambda c: swap(
        c, "modules_to_not_convert", [e for e in c["modules_to_not_convert"] if "qkv" not in e]
    ),
    "forgets GPTQModel": lambda c: swap(c, "dynamic", {}),
    "other group": lambda c: swap(c, "group_size", 64),
}


@pytest.mark.parametrize("change", WRONG_AWQ_CONFIGS)
def test_wrong_awq_configs_fail(change):
    kept = {f"model.layers.0.self_attn.{p}_proj": None for p in "qkv"}
    case = expert_case(S(4, 32), experts=None, changes=kept)
    check_exporter(AWQFormat("x"), case)
    with pytest.raises(ConformanceError):
        check_exporter(Mutant(AWQFormat("x"), WRONG_AWQ_CONFIGS[change]), case)


@pytest.mark.parametrize("change", [name for name in WRONG_TENSORS if name != "same name for all"])
def test_wrong_peer_tensors_fail(change):
    for inner in (GPTQFormat("x", "gptq"), GPTQFormat("x", "gptq_v2"), AWQFormat("x")):
        with pytest.raises(ConformanceError):
            check_exporter(
                Mutant(inner, tensor_change=WRONG_TENSORS[change]), small_case(S(4, 32), router="router")
            )
