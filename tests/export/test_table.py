"""Names of formats: what is known, what is later, what is a typing error."""

from __future__ import annotations

import pytest

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.export.formats.auto_round import AutoRoundFormat
from auto_round.export.formats.gptq import GPTQFormat
from auto_round.export.table import EXPORTERS, LATER, describe_formats, parse_formats
from auto_round.layouts.table import CHECKPOINT_LAYOUTS, LAYOUTS
from auto_round.schemes.gguf_types import FILE_TYPES


def test_every_row_is_under_its_own_name():
    assert all(exporter.name == name for name, exporter in EXPORTERS.items())
    assert not set(EXPORTERS) & set(LATER)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("auto_round", ["auto_round"]),
        (" Auto-Round , fake ", ["auto_round", "fake"]),
        ("fake,fake", ["fake"]),
        ("auto_round:gptq", ["auto_round:auto_gptq"]),
        ("auto_round:awq,auto_round:gptqmodel", ["auto_round:auto_awq", "auto_round:gptqmodel"]),
    ],
)
def test_lists_of_names(text, names):
    assert [exporter.name for exporter in parse_formats(text)] == names


@pytest.mark.parametrize("name", [*LATER, "auto-round:mlx"])
def test_later_formats_say_so(name):
    with pytest.raises(UnsupportedError, match="not there yet"):
        parse_formats(f"auto_round,{name}")


@pytest.mark.parametrize(
    ("name", "hint"), [("autoround", "auto_round"), ("fak", "fake"), ("auto_gtpq", "auto_gptq")]
)
def test_unknown_formats_get_the_nearest_names(name, hint):
    with pytest.raises(ConfigError, match=f'unknown format "{name}".*{hint}'):
        parse_formats(name)


@pytest.mark.parametrize("text", ["", " , "])
def test_no_format_is_an_error(text):
    with pytest.raises(ConfigError, match="no format"):
        parse_formats(text)


def test_the_list_of_formats_and_schemes():
    described = describe_formats()
    assert list(described) == [*EXPORTERS]
    files = {f"gguf:{name}": f"GGUF:{name.upper()}" for name in FILE_TYPES}
    files |= {"gguf:f16": "BF16", "gguf:bf16": "BF16"}
    assert {name: list(presets) for name, presets in described.items() if name in files} == {
        name: [preset] for name, preset in files.items()
    }
    integers = {"W4A16", "W3A16", "W2A16", "W2A16G32", "W2A16G64", "W8A16", "W4A16_MIXED", "BF16"}
    assert set(described["auto_round:gptqmodel"]) == integers
    assert set(described["auto_gptq"]) == set(described["gptqmodel"]) == integers
    assert set(described["auto_round:auto_awq"]) == set(described["auto_awq"]) == {"W4A16", "BF16"}
    floats = {"MXFP4", "MXFP4_RCEIL", "MXFP6", "MXFP8", "MXFP8_RCEIL", "FPW8A16", "FP8_BLOCK"}
    floats |= {"FP8_STATIC", "NVFP4"}
    held = floats | {"INT8", "INT8_W8A8"}
    assert set(described["auto_round"]) == integers | held
    assert set(described["auto_round:llm_compressor"]) == held | {"BF16"}
    assert set(described["auto_round:fp8_static"]) == {"FP8_STATIC", "BF16"}
    assert set(described["auto_round:fp8"]) == {"FPW8A16", "BF16"}
    others = {"W5A16", "W6A16", "INT8", "INT8_W8A8", "INT4"} | floats
    assert set(described["llm_compressor"]) == integers | others
    assert set(described["fake"]) >= set(described["llm_compressor"])


def test_every_packing_that_is_written_has_a_layout():
    packings = {e.packing for e in EXPORTERS.values() if isinstance(e, AutoRoundFormat) and e.packing}
    assert packings <= LAYOUTS.keys()
    versions = {e.checkpoint_format for e in EXPORTERS.values() if isinstance(e, GPTQFormat)}
    assert versions == {"gptq", "gptq_v2"}
    assert versions <= CHECKPOINT_LAYOUTS.keys()
