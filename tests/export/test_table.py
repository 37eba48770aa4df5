"""Names of formats: what is known, what is later, what is a typing error."""

from __future__ import annotations

import pytest

from auto_round.errors import ConfigError, UnsupportedError
from auto_round.export.table import EXPORTERS, LATER, describe_formats, parse_formats
from auto_round.layouts.table import LAYOUTS


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


@pytest.mark.parametrize("name", [*LATER, "gguf:q4_k_m", "GGUF:Q8_0", "llm-compressor"])
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
    assert list(described) == list(EXPORTERS)
    integers = {"W4A16", "W3A16", "W2A16", "W2A16G32", "W2A16G64", "W8A16", "W4A16_MIXED", "BF16"}
    assert set(described["auto_round"]) == set(described["auto_round:gptqmodel"]) == integers
    assert set(described["auto_round:auto_awq"]) == {"W4A16", "BF16"}
    assert set(described["fake"]) == integers | {"W5A16", "W6A16"}


def test_every_packing_that_is_written_has_a_layout():
    assert {e.packing for n, e in EXPORTERS.items() if n != "fake" and e.packing} <= LAYOUTS.keys()
