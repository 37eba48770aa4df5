"""The tokenizer of these tests, made once."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from calibration.words import make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()
