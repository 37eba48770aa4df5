"""Every floating format passes the kit of all formats."""

import pytest

from auto_round.numerics.presets_float import FLOAT_FORMATS
from auto_round.testing.format_kit import check_format


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_every_row_of_the_table_passes_the_kit(name):
    check_format(FLOAT_FORMATS[name], spare=2.0)
