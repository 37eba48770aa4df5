"""2,000 made-up layer patterns and scheme dictionaries: each is understood, or refused with our own error."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from auto_round.errors import AutoRoundError, ConfigError, UnsupportedError
from auto_round.schemes.make import make_plan
from auto_round.schemes.number_types import spellings
from auto_round.schemes.plan import Plan, PlanRequest
from auto_round.schemes.scheme import FIELD_TYPES, PRESET_SCHEMES, QuantizationScheme, parse_scheme

WORDS = "model layers self_attn q_proj k_proj mlp gate experts lm_head 0 1 11 - _ é"
SIGNS = r". .* \. * + ? ( ) (?: [ ] [0-3] | ^ $ {1,2} {9999999999} \d \ (?i) (?P<a> \1"
PIECES = tuple(f"{WORDS} {SIGNS}".split())
VALUES = (
    None,
    True,
    0,
    1,
    3,
    4,
    8,
    16,
    -1,
    -5,
    128,
    10**30,
    2.5,
    float("nan"),
    "",
    "int",
    "fp16",
    "mx_fp4",
    "4",
    b"",
    [],
    {},
)
COUNT = 2000


def _fields(random_: random.Random) -> dict:
    names = [*FIELD_TYPES, "bit", "", 3, None]
    return {
        random_.choice(names): random_.choice([*VALUES, *spellings()]) for _ in range(random_.randrange(4))
    }


def _scheme(random_: random.Random):
    presets = [name.lower() for name in PRESET_SCHEMES]
    return random_.choice(
        [_fields(random_), _fields(random_), random_.choice([*presets, "W9", "", 4, None, b"W4"])]
    )


def _pattern(random_: random.Random) -> str:
    return random_.choice(["", "."]).join(random_.choice(PIECES) for _ in range(random_.randrange(1, 6)))


@pytest.mark.filterwarnings("error")
def test_generated_requests_are_planned_or_refused(layers, blocks):
    few = [layer for layer in layers if layer.block in (0, 1, 11, None)]
    outcomes = {True: 0, False: 0}
    for seed in range(COUNT):
        random_ = random.Random(seed)
        request = PlanRequest(
            scheme=_scheme(random_) if seed % 4 == 0 else "W4A16",
            layer_config={_pattern(random_): _scheme(random_) if seed % 2 else "W8A16"},
            ignore_layers=_pattern(random_) if seed % 8 == 0 else "",
            to_quant_block_names=_pattern(random_) if seed % 16 == 0 else None,
        )
        try:
            plan = make_plan(few, request, blocks=blocks)
        except (ConfigError, UnsupportedError):
            outcomes[False] += 1
        else:
            assert Plan.from_json(plan.to_json()) == plan
            outcomes[True] += 1
    assert min(outcomes.values()) > COUNT // 20, outcomes


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from([*FIELD_TYPES, "bit"]) | st.text(max_size=4), ANYTHING, max_size=4))
def test_any_dictionary_is_a_scheme_or_refused(fields):
    try:
        scheme = parse_scheme(fields)
    except AutoRoundError:
        return
    assert QuantizationScheme.from_dict(scheme.to_dict()) == scheme


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    ANYTHING | st.dictionaries(ANYTHING.filter(lambda x: isinstance(x, str | int)), ANYTHING, max_size=2),
    ANYTHING,
    ANYTHING,
)
def test_any_argument_is_planned_or_refused(layers, config, ignored, chosen):
    try:
        make_plan(
            layers[:8], PlanRequest(layer_config=config, ignore_layers=ignored, to_quant_block_names=chosen)
        )
    except AutoRoundError:
        return
