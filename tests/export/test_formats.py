"""Every row of the table passes the exporter kit; wrong exporters fail; refusals come before any work."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from auto_round.errors import InternalError
from auto_round.export.formats.auto_round import AutoRoundFormat
from auto_round.export.formats.fake import FakeFormat
from auto_round.export.table import EXPORTERS
from auto_round.numerics.presets import int_format
from auto_round.schemes.scheme import QuantizationScheme
from auto_round.testing.exporter_kit import check_exporter, small_case
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


@pytest.mark.parametrize("name", ["auto_round", "auto_round:gptqmodel", "fake"])
@pytest.mark.parametrize("label", SCHEMES)
def test_formats_that_hold_everything(name, label):
    for case in cases(SCHEMES[label]):
        check_exporter(EXPORTERS[name], case)


@pytest.mark.parametrize("label", SCHEMES)
def test_symmetric_only(label):
    for case in cases(SCHEMES[label]):
        if SCHEMES[label].sym:
            check_exporter(EXPORTERS["auto_round:auto_gptq"], case)
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
