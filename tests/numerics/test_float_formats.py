"""Every floating format passes the kit of all formats."""

import pytest

from auto_round.numerics.presets_float import FLOAT_FORMATS
from auto_round.numerics.scale_float import OverTensor
from auto_round.numerics.scale_power import PowerOfTwo
from auto_round.testing.format_kit import check_format


def spare(fmt):
    """How much larger than the range asks for a step may be."""
    if isinstance(fmt.rule, PowerOfTwo):
        return 2.0
    return 1 + 2.0**-4 if isinstance(fmt.rule, OverTensor) else 1.0  # half a spacing of the groups' numbers


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_every_row_of_the_table_passes_the_kit(name):
    check_format(FLOAT_FORMATS[name], spare=spare(FLOAT_FORMATS[name]))
