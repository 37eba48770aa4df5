"""Runs that write the importances that they measure."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from auto_round.checkpoint.record import RECORD
from auto_round.config import build_options
from auto_round.errors import ConfigError
from auto_round.export.gguf.imatrix import Importances, read_imatrix
from auto_round.log import Progress, ignore_progress
from auto_round.pipeline.quantize import run
from export.gguf.small_models import save_small_model
from pipeline.runs import tree

pytest.importorskip("gguf")

TUNED, LENGTH = 6, 24
GENERATOR = torch.Generator().manual_seed(3)
ROWS = torch.randint(3, 250, (TUNED + 2, LENGTH), generator=GENERATOR).tolist()

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model("llama", tmp_path_factory.mktemp("llama") / "m", hidden_size=256)


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Folder of a run that wrote `imatrix.gguf` beside its output; equal settings give the same folder."""
    made: dict[str, Path] = {}

    def make(**given: Any) -> Path:
        key = json.dumps(given, sort_keys=True)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole")
            _run(model, made[key] / "out", save_imatrix=str(made[key] / "imatrix.gguf"), **given)
        return made[key]

    return make


def _run(
    model: Path, out: Path, progress: Callable[[Progress], None] = ignore_progress, **given: Any
) -> None:
    options = {
        "model": str(model),
        "output_dir": str(out),
        "format": "gguf:q2_k",
        "iters": 0,
        "nsamples": TUNED,
        "seqlen": LENGTH,
        "batch_size": 2,
        "device_map": "cpu",
        "amp": False,
        **given,
    }
    run(build_options(options), progress, dataset=ROWS)


def _measured(folder: Path) -> dict[str, Tensor]:
    """Mean squares of the inputs of all linear layers, by hooks on the whole model."""
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    sums: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, 0) + args[0].double().square().sum(dim=(0, 1))

        return add

    for name, module in loaded.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook(name))
    with torch.no_grad():
        for row in ROWS[:TUNED]:
            loaded(input_ids=torch.tensor([row]))
    found = {"output.weight": sums["lm_head"]}
    for block in range(2):
        for theirs, name in NAMES.items():
            found[f"blk.{block}.{name}.weight"] = sums[f"model.layers.{block}.{theirs}"]
    return {name: (total / (TUNED * LENGTH)).float() for name, total in found.items()}


def _check(found: Importances, wanted: dict[str, Tensor]) -> None:
    assert found.rows.keys() == wanted.keys()
    for name, mean in wanted.items():
        torch.testing.assert_close(found.rows[name], mean.unsqueeze(0), rtol=1e-4, atol=1e-7, msg=name)
        assert found.counts[name].tolist() == [TUNED * LENGTH]


def test_the_file_says_what_flows_into_each_expert(tmp_path: Path) -> None:
    """Stacks of experts have a row each, counted over the tokens that reached it."""
    folder = save_small_model("qwen3_moe", tmp_path / "m", hidden_size=256, moe_intermediate_size=64)
    path = tmp_path / "imatrix.gguf"
    _run(folder, tmp_path / "out", save_imatrix=str(path), format="gguf:q4_0", disable_opt_rtn=False)
    found = read_imatrix(path)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for block in range(2):
        experts = loaded.model.layers[block].mlp.experts
        sums, counts = torch.zeros(len(experts.down_proj), 256), torch.zeros(len(experts.down_proj))

        def look(module: nn.Module, args: tuple[Tensor, ...], sums=sums, counts=counts) -> None:  # type: ignore[no-untyped-def]
            hidden, chosen, _ = args
            for token, its in zip(hidden, chosen, strict=True):
                sums[its] += token.square()
                counts[its] += 1

        experts.register_forward_pre_hook(look)
        with torch.no_grad():
            for row in ROWS[:TUNED]:
                loaded(input_ids=torch.tensor([row]))
        wanted = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], 1.0)
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            stack = f"blk.{block}.{name}.weight"
            assert torch.equal(found.counts[stack], counts)
            torch.testing.assert_close(found.rows[stack], wanted, rtol=1e-3, atol=1e-6)
        inner = f"blk.{block}.ffn_down_exps.weight"
        assert torch.equal(found.counts[inner], counts)
        assert found.rows[inner].shape == (len(counts), 64)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"iters": 2, "nblocks": 2},
        {"iters": 1, "disable_opt_rtn": True},
        {"ignore_layers": "v_proj"},
        {"format": "gguf:q8_0", "iters": 1},
    ],
    ids=["searched", "tuned", "tuned from plain", "kept layers", "eight bits"],
)
def test_the_file_says_what_flows_in(given: dict[str, Any], model: Path, whole: Callable[..., Path]) -> None:
    """All linear layers, also those that stay in 16 bits: the file is for any quantizer."""
    folder = whole(**given)
    _check(read_imatrix(folder / "imatrix.gguf"), _measured(model))
    assert sorted(path.name for path in folder.iterdir()) == ["imatrix.gguf", "out"]


def test_writing_it_changes_nothing_else(model: Path, tmp_path: Path) -> None:
    given = {"ignore_layers": "mlp,v_proj"}
    _run(model, tmp_path / "without", **given)
    beside = tmp_path / "with" / "beside" / "imatrix.gguf"  # in a folder that is not there yet
    _run(model, tmp_path / "with", save_imatrix=str(beside), **given)
    without, both = (tree(tmp_path / d) for d in ("without", "with"))
    assert both[file := str(Path("beside") / "imatrix.gguf")][:4] == b"GGUF"
    # The record of the folder names its files, and something else was asked for.
    records = [json.loads(files.pop(RECORD))["files"] for files in (without, both)]
    assert records[1].pop(file) == len(both.pop(file))
    assert records[0] == records[1]
    assert both == without


@pytest.mark.parametrize("given", [{}, {"iters": 2}], ids=["searched", "tuned"])
@pytest.mark.parametrize("stage", ["tune 1", "tune 2", "verify 1"])
def test_killed_run_writes_the_same_file(
    stage: str, given: dict[str, Any], model: Path, whole: Callable[..., Path], tmp_path: Path
) -> None:
    class Killed(Exception):  # noqa: N818
        pass

    def die(event: Progress) -> None:
        if f"{event.stage} {event.done}" == stage:
            raise Killed

    path = tmp_path / "imatrix.gguf"
    with pytest.raises(Killed):
        _run(model, tmp_path / "out", die, save_imatrix=str(path), **given)
    assert not path.exists()
    _run(model, tmp_path / "out", save_imatrix=str(path), **given)
    assert path.read_bytes() == (whole(**given) / "imatrix.gguf").read_bytes()


def test_a_run_that_kept_nothing_is_not_continued(model: Path, tmp_path: Path) -> None:
    def die(event: Progress) -> None:
        if event.stage == "tune":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _run(model, tmp_path / "out", die)
    with pytest.raises(ConfigError, match="save_imatrix: false then, true now"):
        _run(model, tmp_path / "out", save_imatrix=str(tmp_path / "imatrix.gguf"))


def test_it_steers_a_run_of_ours(model: Path, whole: Callable[..., Path], tmp_path: Path) -> None:
    path = whole() / "imatrix.gguf"
    options = {"model": str(model), "format": "gguf:q2_k_s", "iters": 0, "device_map": "cpu"}
    plain, steered = (
        run(build_options({**options, "output_dir": str(tmp_path / name), **given}))
        for name, given in (("plain", {"disable_opt_rtn": True}), ("steered", {"imatrix": str(path)}))
    )
    files = [next(r.folders[0].glob("*.gguf")).read_bytes() for r in (plain, steered)]
    assert len(files[0]) == len(files[1])
    assert files[0] != files[1]


def test_only_importances_are_replaced(model: Path, whole: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "precious.gguf"
    path.write_bytes(b"something else")
    with pytest.raises(ConfigError, match="something else lies there"):
        _run(model, tmp_path / "out", save_imatrix=str(path))
    assert path.read_bytes() == b"something else"
    earlier = (whole(iters=2) / "imatrix.gguf").read_bytes()
    path.write_bytes(earlier + b"of an earlier run")
    _run(model, tmp_path / "again", save_imatrix=str(path))
    assert len(path.read_bytes()) == len(earlier)
    with pytest.raises(ConfigError, match="is a folder"):
        _run(model, tmp_path / "more", save_imatrix=str(tmp_path))


def test_experts_lie_on_top_of_each_other() -> None:
    from auto_round.export.gguf.model import GgufModel
    from auto_round.export.gguf.tensors import GgufTensor, TensorRows
    from auto_round.schemes.gguf_mixture import MixtureFacts

    tensors = (
        GgufTensor(
            "qkv.weight", (6, 8), tuple(TensorRows(f"{n}.weight", 2 * i, 2) for i, n in enumerate("qkv"))
        ),
        GgufTensor("exps.weight", (3, 2, 8), tuple(TensorRows(f"e{i}.weight", 2 * i, 2) for i in range(3))),
        GgufTensor("unseen.weight", (2, 8), (TensorRows("u.weight", 0, 2),)),
    )
    described = GgufModel("llama", {}, tensors, MixtureFacts("llama", 1, 2, 2, 3), {})
    means = {f"e{i}.weight": (torch.rand(8) + 0.1, 5 + i) for i in (0, 2)}
    means |= {f"{name}.weight": (torch.full((8,), 2.0), 9) for name in "qkv"}
    found = Importances.of_sources(described, means)
    assert set(found.rows) == {"qkv.weight", "exps.weight"}
    assert found.counts["exps.weight"].tolist() == [5.0, 0.0, 7.0]
    assert torch.equal(found.rows["exps.weight"][2], means["e2.weight"][0])
    again = found.for_sources(described)
    assert torch.equal(again["e0.weight"], means["e0.weight"][0])
    assert torch.equal(again["q.weight"], torch.full((8,), 2.0))
