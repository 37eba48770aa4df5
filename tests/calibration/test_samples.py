from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from auto_round.calibration.records import Conversation, Sample, Tokens, samples_of
from auto_round.errors import ConfigError

TALK = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes"}]


def plain(sample: Sample) -> object:
    """Return a sample as values that compare."""
    if isinstance(sample, Tokens):
        return sample.ids.tolist(), None if sample.mask is None else sample.mask.int().tolist()
    return [dict(m) for m in sample.messages] if isinstance(sample, Conversation) else sample


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ("text", ["text"]),
        (["a", "b"], ["a", "b"]),
        ({"text": "a", "id": 3}, ["a"]),
        ({"content": "a", "score": 0.5}, ["a"]),
        ({"odd": "a"}, ["a"]),
        ({"odd": None}, [""]),
        ([1, 2, 3], [([1, 2, 3], None)]),
        ((1, 2), [([1, 2], None)]),
        ([], [([], None)]),
        (torch.tensor([1, 2]), [([1, 2], None)]),
        (np.array([[1, 2], [3, 4]], dtype=np.int32), [([1, 2], None), ([3, 4], None)]),
        ([torch.tensor([1, 2]), [3]], [([1, 2], None), ([3], None)]),
        ({"input_ids": [1, 2], "attention_mask": [0, 1]}, [([1, 2], [0, 1])]),
        (
            BatchEncoding({"input_ids": torch.tensor([[1, 2], [3, 4]]), "attention_mask": torch.ones(2, 2)}),
            [([1, 2], [1, 1]), ([3, 4], [1, 1])],
        ),
        ({"messages": TALK, "prompt": "hello"}, [TALK]),
        ({"conversations": [{"from": "human", "value": "a"}]}, [[{"role": "user", "content": "a"}]]),
        (TALK, [TALK]),
        ({"text": ["a", "b"]}, ["a", "b"]),
    ],
)
def test_records_of_all_shapes(record: object, wanted: list[object]) -> None:
    assert [plain(sample) for sample in samples_of(record, (), "it")] == wanted


def test_registered_fields_are_joined() -> None:
    record = {"text": "task", "code": "x = 1", "id": 3}
    assert list(samples_of(record, ("text", "code"), "it")) == ["task\nx = 1"]
    assert list(samples_of({"text": None, "code": "x"}, ("text", "code"), "it")) == ["\nx"]


@pytest.mark.parametrize(
    ("record", "fields", "words"),
    [
        (3, (), "it is of type int"),
        (None, (), "it is of type NoneType"),
        ({"text": 3}, (), 'field "text" of it is of type int'),
        ({"colour": 3}, (), 'field "colour" of it is of type int'),
        ({"a": "x", "b": "y"}, (), r"has the fields \['a', 'b'\]; expected one of"),
        ({"a": "x"}, ("text",), r"no field \['text'\]; it has \['a'\]"),
        ({"text": 3, "b": 1}, ("text",), 'field "text" of it is of type int'),
        (torch.tensor([0.5]), (), "float32"),
        (torch.zeros(1, 2, 3, dtype=torch.int64), (), r"\(1, 2, 3\)"),
        ({"input_ids": [[1, 2], [3]]}, (), "not a rectangle"),
        ({"input_ids": ["a"]}, (), "not a rectangle"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, (), "attention mask has shape"),
        ([1, -2], (), "token id -2"),
        ({"messages": [{"role": "user", "text": "a"}]}, (), "expected role and content"),
    ],
)
def test_other_records_are_config_errors(record: object, fields: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        list(samples_of(record, fields, "it"))
