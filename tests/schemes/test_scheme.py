"""Schemes: fields, spellings, presets, equality and what is not there yet."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from auto_round.config import SchemeOptions
from auto_round.errors import ConfigError, UnsupportedError
from auto_round.facts.layer import Role
from auto_round.numerics.presets import INT_BITS, SCALE_DTYPES, int_format
from auto_round.schemes import scheme as scheme_module
from auto_round.schemes import vocabulary
from auto_round.schemes.number_types import NUMBER_TYPES, spellings
from auto_round.schemes.scheme import (
    FIELD_TYPES,
    PRESET_SCHEMES,
    QuantizationScheme,
    integer_presets,
    parse_scheme,
)

PRESET_FACTS = {
    "W2A16": (2, 128),
    "W2A16G32": (2, 32),
    "W2A16G64": (2, 64),
    "W3A16": (3, 128),
    "W4A16": (4, 128),
    "W8A16": (8, 128),
    "W4A16_MIXED": (4, 128),
}


@pytest.mark.parametrize(("name", "facts"), PRESET_FACTS.items())
def test_integer_presets_are_symmetric_groups(name, facts):
    bits, group = facts
    assert PRESET_SCHEMES[name].weight_format() == int_format(bits, group, sym=True)
    assert name in integer_presets()


def test_bf16_keeps_the_weights():
    assert PRESET_SCHEMES["BF16"].weight_format() is None


def test_every_preset_is_there():
    assert {*integer_presets(), "BF16"} == set(PRESET_SCHEMES)


def test_later_presets_are_known_and_refuse_plainly(monkeypatch):
    monkeypatch.setitem(PRESET_SCHEMES, "SOON", QuantizationScheme(4, 32, super_bits=6))
    scheme = parse_scheme("soon")
    with pytest.raises(UnsupportedError, match="not there yet") as caught:
        scheme.weight_format()
    assert "SOON" in str(caught.value)
    assert "W4A16" in str(caught.value)
    assert len(caught.value.refusals) == 1


def test_later_names_of_the_guide_are_known():
    wanted = {"MXFP4", "MXFP4_RCEIL", "MXFP8", "MXFP8_RCEIL", "NVFP4", "FPW8A16", "FP8_STATIC", "INT8_W8A8"}
    ggufs = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K_S Q2_K_MIXED Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K"
    assert wanted | {f"GGUF:{name}" for name in ggufs.split()} <= set(PRESET_SCHEMES)


def test_a_new_integer_format_is_one_row(monkeypatch):
    monkeypatch.setitem(PRESET_SCHEMES, "W7A16G48", QuantizationScheme(7, 48, sym=False))
    scheme = parse_scheme("w7a16g48")
    assert scheme.weight_format() == int_format(7, 48, sym=False)
    assert "W7A16G48" in integer_presets()
    assert scheme.presets == ("W7A16G48",)


def test_tables_agree_with_numerics_and_roles():
    assert set(INT_BITS) <= set(vocabulary.BITS)
    assert {row["scale_dtype"] for row in vocabulary.SCALE_DTYPE_SPELLINGS.values()} == set(SCALE_DTYPES)
    assert list(FIELD_TYPES) == [f.name for f in dataclasses.fields(QuantizationScheme)]
    assert {s.recipe for s in PRESET_SCHEMES.values()} - {None} == set(vocabulary.MIXED_PRESETS)
    assert all(scheme_module.spelled("data_type", s.data_type, spellings()) for s in PRESET_SCHEMES.values())


def test_every_field_but_the_recipe_is_an_option():
    given = {"bits": 3, "sym": False, "data_type": "int", "scale_dtype": "bf16"}
    numbers = {name: 1 for name, (kind, _) in FIELD_TYPES.items() if kind is int} | given
    flags = {"act_sym": True, "act_dynamic": False, "act_data_type": "int"}
    options = SchemeOptions(**numbers, **flags)
    assert options.overrides() == numbers | flags | {"scale_dtype": "bfloat16"}
    assert set(options.overrides()) == set(FIELD_TYPES) - {"recipe"}


def test_types_of_fields_are_those_of_the_scheme():
    assert FIELD_TYPES["bits"] == (int, False)
    assert FIELD_TYPES["act_bits"] == (int, True)
    assert FIELD_TYPES["sym"] == (bool, False)
    assert FIELD_TYPES["act_data_type"] == (str, True)


def test_every_spelling_of_a_row_names_it():
    for name, row in NUMBER_TYPES.items():
        for spelling in row.spellings:
            assert parse_scheme({"data_type": spelling}).data_type == name


def test_reads_like_a_dictionary():
    scheme = QuantizationScheme(bits=3)
    assert scheme["bits"] == 3
    assert scheme.get("nothing") is None
    assert dict(scheme)["group_size"] == 128
    assert dataclasses.asdict(scheme) == dict(**scheme)
    with pytest.raises(KeyError):
        scheme["nothing"]


@pytest.mark.parametrize("name", PRESET_SCHEMES)
def test_dictionary_round_trip(name):
    scheme = PRESET_SCHEMES[name]
    assert QuantizationScheme.from_dict(scheme.to_dict()) == scheme
    assert None not in scheme.to_dict().values()


def test_equality_ignores_activations_that_are_not_quantized():
    plain, wide = QuantizationScheme(), QuantizationScheme(act_bits=16, act_group_size=32, act_sym=True)
    assert plain == wide
    assert hash(plain) == hash(wide)
    assert plain != QuantizationScheme(act_bits=8)
    assert QuantizationScheme(act_bits=8, act_sym=True) != QuantizationScheme(act_bits=8, act_sym=False)
    assert plain != QuantizationScheme(scale_dtype="float32")
    assert plain != "W4A16"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 9}, "bits must be one of"),
        ({"bits": "4"}, "bits must be a whole number"),
        ({"bits": True}, "bits must be a whole number"),
        ({"group_size": -2}, "group_size must be -1"),
        ({"sym": 1}, "sym must be True or False"),
        ({"data_type": "itn"}, 'did you mean "int"'),
        ({"scale_dtype": "f16"}, 'did you mean "fp16"'),
        ({"bit": 4}, 'did you mean "bits"'),
        ({"recipe": "W4A16-MIXED"}, 'did you mean "W4A16_MIXED"'),
        ({1: 2}, "unknown scheme field"),
    ],
)
def test_bad_fields_name_the_field(fields, message):
    with pytest.raises(ConfigError, match=message):
        parse_scheme(fields)


@pytest.mark.parametrize(
    ("value", "message"),
    [("W4A61", '"W4A16"'), (8, r'such as {"bits": 8}'), (None, "a preset name"), ([], "a preset name")],
)
def test_bad_schemes(value, message):
    with pytest.raises(ConfigError, match=message):
        parse_scheme(value)


def test_overrides_replace_single_fields_and_none_is_not_given():
    scheme = parse_scheme(" w4a16 ", {"bits": None, "group_size": 32, "sym": False, "scale_dtype": "bf16"})
    assert scheme == QuantizationScheme(4, 32, sym=False, scale_dtype="bfloat16")
    assert scheme.weight_format().rule.dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("word", "fields"),
    [
        ("mxfp", {"data_type": "mx_fp"}),
        ("mxfp_rceil", {"data_type": "mx_fp_rceil"}),
        ("MXFP8", {"data_type": "mx_fp", "bits": 8}),
        ("nvfp4", {"data_type": "nv_fp", "bits": 4}),
    ],
)
def test_number_types_as_documents_write_them(word, fields):
    """Without the underscores that folders have in these words."""
    said = {"data_type": word, "act_data_type": word}
    for found in (parse_scheme(said), parse_scheme(QuantizationScheme(**said))):
        for name, value in fields.items():
            assert (found[name], found[f"act_{name}"]) == (value, value)


def test_spellings_differ_by_more_than_case_and_underscores():
    for table in (spellings(), vocabulary.SCALE_DTYPE_SPELLINGS, vocabulary.MIXED_PRESETS):
        folded = [name.casefold().replace("_", "") for name in table]
        assert len(set(folded)) == len(folded)


def test_data_type_wins_over_bits_and_sym():
    assert parse_scheme({"data_type": "int_asym", "sym": True}).sym is False
    assert parse_scheme({"data_type": "int3", "bits": 8}).bits == 3
    assert parse_scheme({"data_type": "float", "bits": 4}).weight_format() is None


def test_bits_on_a_kept_scheme_mean_whole_numbers():
    assert parse_scheme("BF16", {"bits": 4}).weight_format() == int_format(4, 128, sym=True)


def test_missing_fields_come_from_the_base():
    base = QuantizationScheme(3, 32, sym=False, scale_dtype="float32")
    assert parse_scheme({"bits": 8}, base=base) == dataclasses.replace(base, bits=8)
    assert parse_scheme("W8A16", base=base) == QuantizationScheme(8, 128, scale_dtype="float32")


def test_gguf_presets_keep_their_fields():
    assert parse_scheme("GGUF:Q4_K_M", {"bits": 8}) == PRESET_SCHEMES["GGUF:Q4_K_M"]


def test_mixed_recipe_by_role():
    mixed = parse_scheme("W4A16_MIXED", {"group_size": 64})
    bits = {role: mixed.for_role(role).bits for role in Role}
    assert bits[Role.EXPERT] == 4
    assert bits[Role.LINEAR] == bits[Role.SHARED_EXPERT] == bits[Role.HEAD] == 8
    assert mixed.for_role(Role.LINEAR) == QuantizationScheme(8, 64)


@pytest.mark.parametrize(
    ("scheme", "label"),
    [
        (QuantizationScheme(), "W4 g128 sym"),
        (QuantizationScheme(2, -1, sym=False), "W2 per row asym"),
        (QuantizationScheme(8, 0), "W8 per tensor sym"),
        (QuantizationScheme(16), "16 bits"),
        (QuantizationScheme(4, 32, scale_dtype="float32"), "W4 g32 sym float32"),
        (PRESET_SCHEMES["NVFP4"], "W4 g16 nv_fp sym A4"),
    ],
)
def test_label(scheme, label):
    assert scheme.label == label


def test_schemes_need_no_torch():
    import subprocess
    import sys

    code = "import sys, auto_round.schemes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
