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
from auto_round.models.folder import FolderSource
from auto_round.numerics.presets import GGUF_FORMATS
from auto_round.pipeline.quantize import run
from auto_round.pipeline.result import Result
from export.gguf.small_models import save_small_model
from sweep.outcome import save_family

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


ROWS = torch.randint(3, 120, (8, 24), generator=torch.Generator().manual_seed(1)).tolist()


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


EXPERTS = "model.layers.0.mlp.experts"


def _with_experts(model: Path, path: Path) -> dict[str, Tensor]:
    """A file with experts as llama.cpp has them, gate and up apart; returns those tensors."""
    writer = gguf.GGUFWriter(path, "somebody")
    writer.add_block_count(2)
    stacks: dict[str, list[Tensor]] = {}
    with FolderSource.open(model) as source:
        for layer in source.layers:
            if layer.fused:
                around, _, projection = layer.name.rpartition(".")
                stacks.setdefault(f"{around.rpartition('.')[0]}.{projection}", []).append(source.read(layer))
        inside = {layer.tensor for layer in source.layers if layer.fused}
        weights = {name: source.read_tensor(name) for name in source.tensors if name not in inside}
    for name, weight in (weights | {name: torch.stack(found) for name, found in stacks.items()}).items():
        called = f"blk.{name}_exps.weight" if name in stacks else name
        writer.add_tensor(called, (weight.half() if weight.dim() > 1 else weight.float()).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: torch.stack(found) for name, found in stacks.items()}


@pytest.mark.parametrize("family", ["gpt_oss", pytest.param("granitemoe", marks=pytest.mark.slow)])
def test_experts_of_one_tensor_are_layers_of_the_plan(family: str, tmp_path: Path) -> None:
    """Stored `[in, out]` with rows in turn (gpt-oss) or `[out, in]`, they are found matrix by matrix."""
    model = save_family(family, tmp_path / "m")
    stacks = _with_experts(model, tmp_path / "template.gguf")
    plain = _run(model, tmp_path / "plain", tmp_path / "template.gguf", iters=0, disable_opt_rtn=True)
    experts = [name for name in plain.plan.entries if ".experts." in name]
    assert experts
    assert {plain.plan.entries[name].label for name in experts} == {"Q8_0"}
    (file,) = (tmp_path / "plain").glob("*.gguf")
    there = {t.name: t for t in gguf.GGUFReader(file).tensors}
    fmt = GGUF_FORMATS["q8_0"]
    for name, weight in stacks.items():
        found = there[f"blk.{name}_exps.weight"]
        stored = torch.tensor(gguf.quants.dequantize(found.data, found.tensor_type))
        rows = weight.float().flatten(0, 1)
        torch.testing.assert_close(stored.reshape(rows.shape), fmt.dequantize(fmt.quantize(rows)))


@pytest.mark.slow
@pytest.mark.parametrize("given", [{"iters": 1}, {"iters": 0, "ignore_layers": "experts"}], ids=str)
def test_such_experts_are_tuned_or_kept(given: dict[str, Any], tmp_path: Path) -> None:
    model = save_family("gpt_oss", tmp_path / "m")
    _with_experts(model, tmp_path / "template.gguf")
    result = _run(model, tmp_path / "out", tmp_path / "template.gguf", nsamples=4, seqlen=24, **given)
    (file,) = (tmp_path / "out").glob("*.gguf")
    types = {t.tensor_type.name for t in gguf.GGUFReader(file).tensors if "_exps" in t.name}
    assert types == ({"F32"} if "ignore_layers" in given else {"Q8_0"})
    assert result.report["verified"]["gguf:q8_0"]["tensors"] > 0
