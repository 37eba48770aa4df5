"""Made-up formats are one file (this one) and a row of the table: written, read back, reloaded, resumed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from auto_round.checkpoint.header import nbytes_of
from auto_round.checkpoint.writer import Shard
from auto_round.config import build_options
from auto_round.errors import CheckpointError, ConfigError, Refusal, UnsupportedError
from auto_round.export import table
from auto_round.export.exporter import Exporter, TuningFacts
from auto_round.export.manifest import Manifest
from auto_round.export.planning import Planner
from auto_round.export.verification import WrittenRun
from auto_round.facts.layer import Block, Layer
from auto_round.facts.tensor import TensorSpec
from auto_round.log import Progress
from auto_round.numerics.format import Format
from auto_round.numerics.qtensor import QTensor, QuantizedLayer
from auto_round.pipeline.deciding.plan_together import plan_together
from auto_round.pipeline.separate_runs import runs_of
from auto_round.schemes.plan import Plan
from pipeline.runs import quantize, tree, weights

FILE = "model.boxes"
LARGEST_KL = 1e-3


@dataclass(frozen=True, slots=True)
class Boxes(Exporter):
    """One byte a code, in one file: a line of JSON that says where each box lies, then their bytes.

    Attributes:
        formats: layer -> numbers of its codes; empty until there is a plan.
    """

    formats: tuple[tuple[str, Format], ...] = ()

    noun: ClassVar[str] = "a file of boxes"
    idle: ClassVar[Mapping[str, str]] = {"max_shard_size": "boxes lie in one file"}

    def for_plan(self, plan: Plan, layers: Sequence[Layer]) -> Boxes:
        found = ((name, fmt) for name in plan.quantized if (fmt := plan.format_of(name)) is not None)
        return replace(self, formats=tuple(found))

    def refusals(self, plan: Plan, layers: Sequence[Layer]) -> list[Refusal]:
        wide = [name for name in plan.quantized if (s := plan.scheme_of(name)) and s.bits > 4]
        return [Refusal(self.name, f"boxes hold 4 bits, not more: {wide[0]}", "use 4 bits")] if wide else []

    def spec(self, layer: Layer, fmt: Format) -> Mapping[str, TensorSpec]:
        groups = fmt.group.count(layer.shape[1])
        return {
            f"box/{layer.name}/codes": TensorSpec(torch.uint8, layer.shape),
            f"box/{layer.name}/step": TensorSpec(torch.float32, (layer.shape[0], groups)),
        }

    def encode(self, layer: Layer, q: QuantizedLayer) -> Mapping[str, Tensor]:
        return {
            f"box/{layer.name}/codes": q.weight.codes,
            f"box/{layer.name}/step": q.weight.scale.parts["step"].float(),
        }

    def config(
        self, plan: Plan, layers: Sequence[Layer], blocks: Sequence[Block], facts: TuningFacts | None = None
    ) -> dict[str, Any]:
        return {"quant_method": self.name, "layers": [name for name, _ in self.formats]}

    @property
    def file(self) -> str | None:
        return FILE

    def shards(self, manifest: Manifest) -> tuple[Shard, ...] | None:
        sizes = {name: nbytes_of((spec.dtype, tuple(spec.shape))) for name, spec in manifest.specs.items()}
        listed: dict[str, list[Any]] = {}
        end = 0
        for name, spec in manifest.specs.items():
            listed[name] = [end, str(spec.dtype).removeprefix("torch."), list(spec.shape)]
            end += sizes[name]
        head = json.dumps({"boxes": listed}).encode() + b"\n"
        begins = {name: len(head) + place for name, (place, _, _) in listed.items()}
        return (Shard(FILE, head, begins, len(head) + end),)

    @contextmanager
    def reading(self, folder: Path) -> Iterator[Callable[[str], Tensor]]:
        head, data = (folder / FILE).read_bytes().split(b"\n", 1)
        boxes = json.loads(head)["boxes"]

        def read(name: str) -> Tensor:
            place, dtype, shape = boxes[name]
            spec = (getattr(torch, dtype), tuple(shape))
            octets = bytearray(data[place : place + nbytes_of(spec)])
            return torch.frombuffer(octets, dtype=spec[0]).reshape(shape)

        yield read

    def verify(self, folder: Path, run: WrittenRun) -> dict[str, Any]:
        """The whole model from the file, through Transformers, against the tuned one."""
        from transformers import AutoModelForCausalLM

        formats = dict(self.formats)
        with self.reading(folder) as read:
            state = {name: read(name) for name in run.source.tensors if _kept(name, formats)}
            for name, fmt in formats.items():
                scale = fmt.rule.read({"step": read(f"box/{name}/step").to(torch.float16)})
                state[f"{name}.weight"] = fmt.dequantize(QTensor(read(f"box/{name}/codes"), scale, fmt))
        model = AutoModelForCausalLM.from_config(run.source.config, dtype=torch.float32).eval()
        assert not model.load_state_dict(state, strict=False).unexpected_keys
        ids = run.held_out(8)
        if ids is None:
            return {"tensors": len(state)}
        with torch.no_grad():
            figures = run.compare(ids, model(ids.unsqueeze(0)).logits[0, :-1])
        if not figures["kl"] <= LARGEST_KL:
            raise CheckpointError(f"{folder}: boxes predict something else, KL {figures['kl']:.3g}")
        return {"reader": self.name, **figures}


@dataclass(frozen=True, slots=True)
class Planks(Boxes):
    """The same tensors in a folder of safetensors, with a configuration beside."""

    @property
    def file(self) -> None:
        return None

    def shards(self, manifest: Manifest) -> None:
        return None

    reading = Exporter.reading


@dataclass(frozen=True, slots=True)
class Crates(Boxes):
    """Boxes with a plan of their own."""

    noun: ClassVar[str] = "a crate"

    @classmethod
    def claims(cls, name: str) -> bool:
        return name.startswith("crate")

    @property
    def planner(self) -> Planner:
        return plan_together


def _kept(name: str, formats: Mapping[str, Format]) -> bool:
    return name.removesuffix(".weight") not in formats


@pytest.fixture(autouse=True)
def _one_row(monkeypatch):
    monkeypatch.setitem(table.EXPORTERS, "boxes", Boxes("boxes"))
    monkeypatch.setitem(table.EXPORTERS, "planks", Planks("planks"))
    monkeypatch.setitem(table.EXPORTERS, "crate", Crates("crate"))


@pytest.fixture
def model(tiny):
    return tiny("llama", dtype=torch.float32)


class Killed(Exception):  # noqa: N818  a kill is no error
    pass


def test_written_read_back_and_reloaded(model, tmp_path):
    result = quantize(model, tmp_path / "out", format="boxes,planks,auto_round", scheme="W4A16")
    boxes, planks, packed = result.folders
    assert {file.name for file in boxes.iterdir() if file.suffix != ".json"} == {FILE, "README.md"}
    assert not (boxes / "config.json").exists()
    found = result.report["verified"]
    assert [found[name].get("reader") for name in found] == ["boxes", "planks", None]
    assert all(found[name]["kl"] <= LARGEST_KL for name in found)
    assert result.report["tensors_read_back"] >= 7 * len(result.plan.quantized)
    config = json.loads((planks / "config.json").read_text())["quantization_config"]
    assert config == {"quant_method": "planks", "layers": list(result.plan.quantized)}
    stored, kept = weights(planks), weights(packed)
    assert {name for name in stored if not name.startswith("box/")} < kept.keys()
    assert torch.equal(stored["model.embed_tokens.weight"], kept["model.embed_tokens.weight"])


@pytest.mark.parametrize("name", ["boxes", "planks"])
def test_resumed(model, tmp_path, name):
    given = {"format": name, "scheme": "W4A16"}
    quantize(model, tmp_path / "whole", **given)

    def die(event: Progress) -> None:
        if event.stage == "tune":
            raise Killed

    with pytest.raises(Killed):
        quantize(model, tmp_path / "out", progress=die, **given)
    assert not (tmp_path / "out").exists()
    quantize(model, tmp_path / "out", **given)
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_wrong_file_is_noticed(model, tmp_path, monkeypatch):
    """Codes in another order than they are read in."""
    right = Boxes.encode

    def turned(self, layer, q):
        return {name: box.flip(0) for name, box in right(self, layer, q).items()}

    monkeypatch.setattr(Boxes, "encode", turned)
    with pytest.raises(CheckpointError, match="boxes predict something else"):
        quantize(model, tmp_path / "out", format="boxes", scheme="W4A16")


def test_a_plan_of_its_own_is_a_run_of_its_own(model, tmp_path):
    plain = {"iters": 0, "disable_opt_rtn": True}
    result = quantize(model, tmp_path / "out", format="crate,fake", **plain)
    assert [folder.name for folder in result.folders] == ["crate", "fake"]
    with pytest.raises(ConfigError, match=r"a crate has a plan of its own.*with fake"):
        quantize(model, tmp_path / "no", format="crate,boxes", **plain)
    runs = runs_of(build_options({"model": str(model), "format": "crate,boxes,fake", "scheme": "W2A16"}))
    assert [run.output.formats for run in runs] == [("boxes", "fake"), ("crate",)]
    assert [run.scheme.scheme for run in runs] == ["W2A16", "W4A16"]


def test_what_it_refuses_and_ignores(model, tmp_path, caplog, monkeypatch):
    from auto_round.log import logger

    monkeypatch.setattr(logger, "propagate", True)
    with pytest.raises(UnsupportedError, match="boxes hold 4 bits"):
        quantize(model, tmp_path / "out", format="boxes", scheme="W8A16")
    with pytest.raises(UnsupportedError, match="leave activations alone"):
        quantize(model, tmp_path / "out", format="boxes", scheme="INT8")
    quantize(model, tmp_path / "out", format="boxes", max_shard_size="1MB", iters=0, disable_opt_rtn=True)
    assert "max_shard_size has no effect: boxes lie in one file" in caplog.text


def test_it_is_listed_and_its_name_is_suggested():
    assert set(table.describe_formats()["boxes"]) >= {"W4A16", "W2A16"}
    assert "W8A16" not in table.describe_formats()["boxes"]
    with pytest.raises(ConfigError, match="boxes"):
        table.parse_formats("boxe")
