"""A GGUF file is read back before it gets its name: what is not as it was written is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from auto_round.config import build_options
from auto_round.errors import CheckpointError
from auto_round.log import ignore_progress
from auto_round.pipeline.quantize import run
from export.gguf.small_models import save_small_model, sentencepiece_tokenizer
from pipeline.runs import Stop, stop_after

gguf = pytest.importorskip("gguf")


def test_weights_spoilt_between_the_runs_are_found(tmp_path: Path) -> None:
    model = save_small_model(
        "llama",
        tmp_path / "model",
        hidden_size=256,
        intermediate_size=320,
        tokenizer=sentencepiece_tokenizer(),
    )
    given = {"model": str(model), "format": "gguf:q8_0", "iters": 0, "disable_opt_rtn": True}
    options = build_options({**given, "output_dir": str(tmp_path / "out"), "device_map": "cpu"})
    with pytest.raises(Stop):
        run(options, stop_after(1))
    (path,) = (tmp_path / "out.partial" / "output").glob("*.gguf")
    at = next(t.data_offset for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    data = bytearray(path.read_bytes())
    data[at + 40] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"blk\.0\.ffn_up\.weight on disk is not what was written"):
        run(options, ignore_progress)
    assert not (tmp_path / "out").exists()
