"""Headers: ours are read by the reference implementation, hostile ones end in one kind of error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from auto_round.checkpoint.header import build_header, parse_json_object
from auto_round.checkpoint.reader import Checkpoint
from auto_round.errors import CheckpointError, ConfigError

GOOD = save(
    {
        "a.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "b.weight": torch.arange(8, dtype=torch.int16),
        "c": torch.tensor(True),
    }
)
HEAD_BYTES = 8 + int.from_bytes(GOOD[:8], "little")


def with_header(entries: Any, data: bytes = b"\0" * 8) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def open_bytes(folder: Path, data: bytes) -> Checkpoint:
    (folder / "model.safetensors").write_bytes(data)
    return Checkpoint.open(folder)


BAD = {
    "no bytes": (b"", "too short"),
    "seven bytes": (b"\0" * 7, "too short"),
    "header length zero": (b"\0" * 8, "brace"),
    "header longer than the file": ((1000).to_bytes(8, "little") + b"{}", "truncated inside its header"),
    "header length of 2^64 - 1": (b"\xff" * 8 + b"{}", "above the limit"),
    "not UTF-8": (with_header(b'{"\xff": 1}'), "utf-8"),
    "not JSON": (with_header(b"{nonsense}"), "Expecting property name"),
    "not an object": (with_header(b"[]"), "brace"),
    "bytes after the object": (with_header(b"{}{}"), "Extra data"),
    "deep nesting": (with_header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"), "nested too deeply"),
    "endless number": (with_header(b'{"a":' + b"1" * 200_000 + b"}"), "200000 digits"),
    "duplicate name": (with_header(b'{"a":1,"a":2}'), '"a" occurs twice'),
    "lone surrogate": (with_header(b'{"\\ud800":1}'), "surrogates"),
    "metadata not strings": (with_header({"__metadata__": {"a": 1}}, b""), "map strings to strings"),
    "metadata not a map": (with_header({"__metadata__": 3}, b""), "map strings to strings"),
    "entry not a map": (with_header({"a": 3}), "exactly dtype, shape and data_offsets"),
    "entry without shape": (with_header({"a": {"dtype": "F32", "data_offsets": [0, 8]}}), "exactly dtype"),
    "unknown dtype": (
        with_header({"a": entry("F33")}),
        "tensor \"a\": dtype 'F33' is not supported; did you mean",
    ),
    "dtype not a string": (with_header({"a": entry([])}), "is not supported"),
    "negative size": (with_header({"a": entry(shape=[-1, -2])}), "sizes from 0 up"),
    "fractional size": (with_header({"a": entry(shape=[2.0])}), "sizes from 0 up"),
    "boolean size": (with_header({"a": entry(shape=[True, 2])}), "sizes from 0 up"),
    "shape not a list": (with_header({"a": entry(shape=2)}), "sizes from 0 up"),
    "rank 65": (with_header({"a": entry(shape=[1] * 64 + [2])}), "at most 64 sizes"),
    "huge beside zero": (
        with_header({"a": entry(shape=[0, 2**40, 2**40], offsets=[0, 0])}, b""),
        "too large",
    ),
    "overflowing product": (with_header({"a": entry(shape=[2**32, 2**32])}), "too large"),
    "offsets reversed": (with_header({"a": entry(offsets=[8, 0])}), "must be [begin, end]"),
    "three offsets": (with_header({"a": entry(offsets=[0, 4, 8])}), "must be [begin, end]"),
    "length differs from shape": (
        with_header({"a": entry(shape=[3])}),
        "takes 12 bytes, but it has 8 at offset",
    ),
    "overlap": (with_header({"a": entry(), "b": entry(offsets=[4, 12])}, b"\0" * 12), "overlaps"),
    "hole": (with_header({"a": entry(), "b": entry(offsets=[12, 20])}, b"\0" * 20), "leaves a hole"),
    "hole at the start": (with_header({"a": entry(offsets=[4, 12])}, b"\0" * 12), "leaves a hole"),
    "truncated data": (with_header({"a": entry()}, b"\0" * 7), 'truncated: tensor "a" takes bytes'),
    "bytes left over": (with_header({"a": entry()}, b"\0" * 9), "1 bytes after the last tensor"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_header_is_named(case: str, tmp_path: Path) -> None:
    data, message = BAD[case]
    with pytest.raises(CheckpointError) as caught:
        open_bytes(tmp_path, data)
    assert message in str(caught.value)
    assert "model.safetensors" in str(caught.value)


def test_offset_of_truncation_is_exact(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"file ends at {len(GOOD) - 3}"):
        open_bytes(tmp_path, GOOD[:-3])


def corruptions() -> st.SearchStrategy[bytes]:
    flip = st.tuples(st.integers(0, HEAD_BYTES - 1), st.integers(1, 255))
    flips = st.lists(flip, min_size=1, max_size=3).map(lambda pairs: _flipped(GOOD, pairs))
    cut = st.integers(0, len(GOOD) - 1).map(lambda n: GOOD[:n])
    digits = st.tuples(st.integers(8, HEAD_BYTES - 1), st.sampled_from(b'0123456789-"{}[],:.e'))
    edits = st.lists(digits, min_size=1, max_size=4).map(lambda pairs: _replaced(GOOD, pairs))
    return st.one_of(flips, cut, edits, st.binary(max_size=64))


def _flipped(data: bytes, pairs: list[tuple[int, int]]) -> bytes:
    out = bytearray(data)
    for at, mask in pairs:
        out[at] ^= mask
    return bytes(out)


def _replaced(data: bytes, pairs: list[tuple[int, int]]) -> bytes:
    out = bytearray(data)
    for at, value in pairs:
        out[at] = value
    return bytes(out)


@settings(max_examples=400, deadline=None)
@given(data=corruptions())
def test_corrupt_file_is_refused_or_read_as_the_reference_does(data: bytes, tmp_path_factory: Any) -> None:
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    try:
        with open_bytes(folder, data) as checkpoint:
            ours = {name: checkpoint.read(name) for name in checkpoint.names}
    except (CheckpointError, ConfigError):
        return
    try:
        with safe_open(folder / "model.safetensors", "pt") as reference:
            assert set(reference.keys()) == set(ours)
            for name, tensor in ours.items():
                theirs = reference.get_tensor(name)
                assert theirs.dtype == tensor.dtype
                assert theirs.shape == tensor.shape
                assert (
                    theirs.reshape(-1).view(torch.uint8).tolist()
                    == tensor.reshape(-1).view(torch.uint8).tolist()
                )
    except SafetensorError as error:  # pragma: no cover
        pytest.fail(f"accepted what the reference refuses: {error}")


@settings(max_examples=100, deadline=None)
@given(text=st.one_of(st.binary(max_size=40), st.text(max_size=40).map(str.encode)))
def test_json_parser_raises_one_error_only(text: bytes) -> None:
    try:
        parsed = parse_json_object(text, "file")
    except CheckpointError:
        return
    assert parsed == json.loads(text)


def test_built_header_aligns_every_tensor() -> None:
    specs = {
        "bytes": (torch.uint8, (13,)),
        "half": (torch.float16, (3,)),
        "long": (torch.int64, (1,)),
        "word": (torch.int32, (5,)),
        "half2": (torch.bfloat16, (1,)),
    }
    head, begins = build_header(specs)
    assert len(head) % 8 == 0
    assert all(begin % specs[name][0].itemsize == 0 for name, begin in begins.items())
    assert list(begins) == ["long", "word", "half", "half2", "bytes"]
