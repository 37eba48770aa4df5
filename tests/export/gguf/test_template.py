"""Templates whose tensors are no rows of the checkpoint: transposed halves, and what no mixture touches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from auto_round.checkpoint.reader import Checkpoint
from auto_round.config import build_options
from auto_round.errors import CheckpointError
from auto_round.numerics.presets import GGUF_FORMATS
from auto_round.pipeline.quantize import run
from auto_round.pipeline.result import Result
from export.gguf.small_models import save_small_model

gguf = pytest.importorskip("gguf")

LAYER = "model.layers.0.self_attn.o_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model("qwen3", tmp_path_factory.mktemp("qwen3") / "m", head_dim=16)


def _template(model: Path, path: Path, *, spoiled: bool = False) -> Tensor:
    """A file with one matrix cut in two, the second half transposed; returns that matrix."""
    writer = gguf.GGUFWriter(path, "somebody")
    writer.add_block_count(2)
    with Checkpoint.open(model) as checkpoint:
        weights = {name: checkpoint.read(name) for name in checkpoint.names}
    whole = weights.pop(f"{LAYER}.weight")
    above, below = whole.half().chunk(2)
    below = below.T.contiguous()
    if spoiled:
        below[3, 5] *= 2
    writer.add_tensor("above.weight", above.numpy())
    writer.add_tensor("below.weight", below.numpy())
    writer.add_tensor("blk.0.shortconv.conv.weight", torch.ones(64, 3).half().numpy())
    for name, weight in weights.items():
        writer.add_tensor(name, weight.half().numpy() if weight.dim() > 1 else weight.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return whole


def _run(model: Path, out: Path, template: Path, **given: Any) -> Result:
    options = {"model": str(model), "output_dir": str(out), "format": "gguf:q8_0", "device_map": "cpu"}
    rows = ROWS if given["iters"] else None
    return run(build_options({**options, "gguf_template": str(template), **given}), dataset=rows)


ROWS = torch.randint(3, 250, (8, 24), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.mark.parametrize(
    "given",
    [{"iters": 0, "disable_opt_rtn": True}, {"iters": 1, "nsamples": 4, "seqlen": 24, "batch_size": 2}],
    ids=["rounded", "tuned"],
)
def test_a_transposed_half_is_rounded_where_it_lies(
    given: dict[str, Any], model: Path, tmp_path: Path
) -> None:
    whole = _template(model, tmp_path / "template.gguf")
    result = _run(model, tmp_path / "out", tmp_path / "template.gguf", **given)
    entry = result.plan.entries[LAYER]
    assert entry.scheme is None
    assert "transposed" in entry.reason
    (file,) = (tmp_path / "out").glob("*.gguf")
    there = {t.name: t for t in gguf.GGUFReader(file).tensors}
    above, below = whole.chunk(2)
    fmt = GGUF_FORMATS["q8_0"]
    for name, weight in (("above.weight", above), ("below.weight", below.half().float().T.contiguous())):
        stored = torch.tensor(gguf.quants.dequantize(there[name].data, there[name].tensor_type))
        step = weight.reshape(weight.shape[0], -1, 32).abs().amax(-1, keepdim=True) / 127
        error = (stored - weight).reshape(step.shape[0], -1, 32).abs() / step
        assert there[name].tensor_type.name == "Q8_0"
        assert float(error.max()) < 1, "about half a step; numbers out of order are off by many"
        if given.get("disable_opt_rtn"):
            torch.testing.assert_close(stored, fmt.dequantize(fmt.quantize(weight)))


def test_another_number_in_it_is_noticed(model: Path, tmp_path: Path) -> None:
    _template(model, tmp_path / "template.gguf", spoiled=True)
    with pytest.raises(CheckpointError, match=r"o_proj \[64, 64\] are not all in it"):
        _run(model, tmp_path / "out", tmp_path / "template.gguf", iters=0, disable_opt_rtn=True)


def test_what_no_mixture_touches_keeps_its_type(model: Path, tmp_path: Path) -> None:
    """llama.cpp multiplies convolutions in the type that the converter gave them."""
    _template(model, tmp_path / "template.gguf")
    _run(model, tmp_path / "out", tmp_path / "template.gguf", iters=0, disable_opt_rtn=True)
    (file,) = (tmp_path / "out").glob("*.gguf")
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
    assert types["blk.0.shortconv.conv.weight"] == "F16"
    assert types["model.norm.weight"] == "F32"
