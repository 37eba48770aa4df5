"""Importances in llama.cpp's files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from auto_round.errors import CheckpointError
from auto_round.export.gguf.imatrix import Importances, read_imatrix, write_imatrix
from auto_round.export.gguf.model import GgufModel
from auto_round.export.gguf.tensors import GgufTensor, TensorRows
from auto_round.schemes.gguf_mixture import MixtureFacts

pytest.importorskip("gguf")

ROWS = {"blk.0.attn_q.weight": torch.rand(1, 8) + 0.1, "blk.0.ffn_up_exps.weight": torch.rand(3, 8) + 0.1}
COUNTS = {
    "blk.0.attn_q.weight": torch.tensor([40.0]),
    "blk.0.ffn_up_exps.weight": torch.tensor([5.0, 0.0, 9.0]),
}


def _legacy(rows: dict[str, torch.Tensor], calls: int = 3) -> bytes:
    data = struct.pack("<i", len(rows))
    for name, values in rows.items():
        numbers = (values * calls).flatten().tolist()
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(numbers))
        data += struct.pack(f"<{len(numbers)}f", *numbers)
    return data + struct.pack("<i", 7) + struct.pack("<i", 4) + b"text"


def _model() -> GgufModel:
    experts = tuple(TensorRows(f"e{i}.weight", 2 * i, 2) for i in range(3))
    tensors = (
        GgufTensor("blk.0.attn_q.weight", (4, 8), (TensorRows("q.weight", 0, 4),)),
        GgufTensor("blk.0.ffn_up_exps.weight", (3, 2, 8), experts),
    )
    return GgufModel("llama", {}, tensors, MixtureFacts("llama", 1, 2, 2, 3), {})


def test_written_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.gguf"
    write_imatrix(path, Importances(ROWS, COUNTS, ("books",)))
    found = read_imatrix(path)
    assert found.datasets == ("books",)
    torch.testing.assert_close(found.rows["blk.0.attn_q.weight"], ROWS["blk.0.attn_q.weight"])
    experts = found.rows["blk.0.ffn_up_exps.weight"]
    torch.testing.assert_close(experts[0], ROWS["blk.0.ffn_up_exps.weight"][0])
    assert bool((experts[1] == 1).all()), "an expert without tokens weighs all inputs alike"


def test_legacy_file(tmp_path: Path) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(_legacy({"blk.0.attn_q.weight": ROWS["blk.0.attn_q.weight"]}))
    found = read_imatrix(path)
    torch.testing.assert_close(found.rows["blk.0.attn_q.weight"], ROWS["blk.0.attn_q.weight"])
    assert found.datasets == ("text",)


@pytest.mark.parametrize("cut", [0, 3, 9, 30])
def test_damaged_legacy_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "imatrix.dat"
    path.write_bytes(_legacy({"blk.0.attn_q.weight": ROWS["blk.0.attn_q.weight"]})[:cut])
    with pytest.raises(CheckpointError, match=r"imatrix\.dat"):
        read_imatrix(path)


def test_every_expert_gets_its_row() -> None:
    found = Importances(ROWS, COUNTS).for_sources(_model())
    assert set(found) == {"q.weight", "e0.weight", "e1.weight", "e2.weight"}
    for i in range(3):
        assert torch.equal(found[f"e{i}.weight"], ROWS["blk.0.ffn_up_exps.weight"][i])


def test_importances_of_another_model_are_refused() -> None:
    with pytest.raises(CheckpointError, match="another model"):
        Importances({"blk.0.attn_q.weight": torch.ones(1, 9)}, {}).for_sources(_model())
    with pytest.raises(CheckpointError, match="no importance"):
        Importances({"other": torch.ones(1, 8)}, {}).for_sources(_model())
