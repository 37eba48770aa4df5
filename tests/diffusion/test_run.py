"""Runs over tiny pipelines, from captions to a folder that diffusers loads."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers", exc_type=ImportError)

from auto_round.cli.main import main
from auto_round.config import build_options
from auto_round.diffusion.prepare import prepare_pipeline
from auto_round.diffusion.run import run_pipeline
from auto_round.errors import CheckpointError, ConfigError, MissingError, UnsupportedError
from auto_round.models.component import ComponentSource
from auto_round.models.pipeline_folder import PipelineFolder
from diffusion.runs import SHORT, WHOLE, Killed, job, killed_after, part, tree
from diffusion.tiny import CAPTIONS, FAMILIES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def flux(tiny, tmp_path_factory):
    """A run in two formats that also compares pictures."""
    out = tmp_path_factory.mktemp("flux") / "out"
    return run_pipeline(job(tiny("flux"), "flux", out, **WHOLE))


def test_tuning_beats_rounding_on_captions_it_never_saw(flux):
    blocks = part(flux)["blocks"]
    assert [block["unit"] for block in blocks] == [
        "transformer_blocks.0",
        "transformer_blocks.1",
        "single_transformer_blocks.0",
        "single_transformer_blocks.1",
    ]
    assert all(block["loss"] <= block["initial_loss"] for block in blocks)
    assert sum(b["loss"] for b in blocks) < 0.95 * sum(b["initial_loss"] for b in blocks)
    rows = part(flux)["rows"]
    assert (rows["tuned"], rows["held_out"]) == (10, 4)
    assert 0 < part(flux)["held_out"]["relative_error"] < 0.05


def test_the_folders_load_as_what_was_tuned(flux):
    checked = part(flux)["verified"]
    assert checked["auto_round"]["error"] < 1e-4
    assert checked["fake"]["error"] < 1e-4
    assert checked["auto_round"]["rows"] == 2
    config = json.loads((flux.folders[0] / "transformer" / "config.json").read_text())
    assert config["_class_name"] == "FluxTransformer2DModel"
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "auto-round"
    assert quantization["block_name_to_quantize"] == ["transformer_blocks", "single_transformer_blocks"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_are_what_was_tuned_whatever_they_are_loaded_in(flux, dtype):
    """diffusers casts scales to the dtype of the model, so they are made to bear it."""
    import diffusers

    kind, (packed, plain) = diffusers.FluxTransformer2DModel, flux.folders
    layers = dict(kind.from_pretrained(plain / "transformer", dtype=torch.float32).named_modules())
    found = 0
    for name, module in kind.from_pretrained(packed / "transformer", dtype=dtype).named_modules():
        if type(module).__name__ == "QuantLinear":
            assert torch.equal(module.dequantize(torch.float32), layers[name].weight)
            found += 1
    assert found == part(flux)["layers"]["quantized"]


def test_modulation_and_what_lies_outside_the_blocks_is_kept(flux):
    kept = {line["kind"]: line["reason"] for line in part(flux)["plan"] if line["bits"] > 8}
    assert "modulation" in kept["norm1.linear"]
    assert "modulation" in kept["norm1_context.linear"]
    assert "modulation" in kept["norm.linear"]
    assert "outside" in kept["proj_out"] or "outside" in kept["x_embedder"]
    quantized = {line["kind"] for line in part(flux)["plan"] if line["bits"] == 2}
    assert {"attn.to_q", "attn.add_q_proj", "ff_context.net.*", "proj_mlp", "proj_out"} <= quantized


def test_everything_else_is_as_it_was(flux, tiny):
    source = tree(tiny("flux"))
    for folder in flux.folders:
        found = tree(folder)
        others = {name: data for name, data in source.items() if not name.startswith("transformer/")}
        assert all(found[name] == data for name, data in others.items())


def test_pictures_are_compared_and_drawn(flux):
    shown = flux.report["pictures"]
    assert shown["pictures"] == 1
    assert shown["psnr"] > 20
    assert 0 < shown["ssim"] <= 1
    assert shown["latent_error"] < 0.1
    from PIL import Image

    with Image.open(flux.folders[0] / shown["sheet"]) as sheet:
        assert sheet.size[0] > 3 * 16
    page = (flux.folders[0].parent / "report.html").read_text()
    assert "data:image/png;base64," in page
    assert "modulation by the timestep" in page
    assert "Error by denoising step" in page


def test_killed_and_continued_it_gives_the_same_bytes(flux, tiny, tmp_path):
    for blocks in (1, 3):  # inside the first list of blocks, and inside the second
        with pytest.raises(Killed):
            run_pipeline(job(tiny("flux"), "flux", tmp_path / "out", **WHOLE), killed_after(blocks))
    run_pipeline(job(tiny("flux"), "flux", tmp_path / "out", **WHOLE))
    assert tree(tmp_path / "out") == tree(flux.folders[0].parent)


def test_the_same_again_does_nothing(flux, tiny):
    out = flux.folders[0].parent
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    given = {**WHOLE, "report": False}
    again = run_pipeline(job(tiny("flux"), "flux", out, **given))
    assert again.report == json.loads((out / "report.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize(
    "given",
    [
        {"steps_per_caption": 1},
        {"num_inference_steps": 4},
        {"guidance_scale": 1.0},
        {"generator_seed": 5},
        {"pipeline_args": {"height": 16, "width": 32, "max_sequence_length": 16}},
        {"prompt": "another"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_another_way_of_drawing_is_another_run(flux, tiny, given):
    from auto_round.diffusion.run import _asked

    out = flux.folders[0].parent
    one, other = (job(tiny("flux"), "flux", out, **{**WHOLE, **more}) for more in ({}, given))
    assert _asked(one) != _asked(other)
    for each in (one, other):
        each.close()


def test_blocks_are_read_when_they_are_called(tiny):
    import diffusers

    source = ComponentSource.open(tiny("flux") / "transformer", diffusers.FluxTransformer2DModel)
    found = []
    for load in (source.streamed, source.whole):
        with load(CPU, torch.float32) as model:
            pipeline = PipelineFolder.open(tiny("flux")).load(torch.float32, CPU, {"transformer": model})
            noise = torch.Generator().manual_seed(0)
            call = {"num_inference_steps": 2, "output_type": "latent", **FAMILIES["flux"][1]}
            found.append(pipeline(prompt=["a cat"], generator=noise, **call).images)
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "flux"])
def test_every_family(tiny, tmp_path, name):
    result = run_pipeline(job(tiny(name), name, tmp_path / "out", prompt="a red cat", iters=40))
    for found in result.report["components"].values():
        blocks = found["blocks"]
        assert all(block["loss"] <= block["initial_loss"] for block in blocks)
        assert sum(b["loss"] for b in blocks) < sum(b["initial_loss"] for b in blocks)
        assert found["verified"]["auto_round"]["error"] < 1e-9
        assert found["held_out"]["relative_error"] < 0.1
    assert result.report["pictures"]["psnr"] > 20
    pipeline = PipelineFolder.open(result.folders[0])
    for component, found in result.report["components"].items():
        model = pipeline.kind(component).from_pretrained(pipeline.folder / component)
        assert type(model.hf_quantizer).__name__ == "AutoRoundQuantizer"  # diffusers' own
        packed = [module for module in model.modules() if type(module).__name__ == "QuantLinear"]
        assert len(packed) == found["layers"]["quantized"]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "flux"])
def test_every_family_killed_and_continued(tiny, tmp_path, name):
    whole, out = tmp_path / "whole", tmp_path / "out"
    run_pipeline(job(tiny(name), name, whole, iters=4))
    with pytest.raises(Killed):
        run_pipeline(job(tiny(name), name, out, iters=4), killed_after(1))
    run_pipeline(job(tiny(name), name, out, iters=4))
    assert tree(out) == tree(whole)


@pytest.mark.slow
def test_plain_rounding_needs_no_captions(tiny, tmp_path):
    options = {"iters": 0, "disable_opt_rtn": True, "bits": 4}
    made = job(tiny("sd3"), "sd3", tmp_path / "out", **options)
    assert made.captions == ()
    result = run_pipeline(made)
    assert part(result)["verified"]["auto_round"] == {"loaded": True}


BAD = {
    "no such component": ({"components": "transformr"}, ConfigError, "did you mean|transformer"),
    "a component that is no denoiser": ({"components": "vae"}, UnsupportedError, "AutoencoderKL"),
    "no such argument": ({"pipeline_args": {"hight": 16}}, ConfigError, "height"),
    "an argument of ours": ({"pipeline_args": {"generator": 1}}, ConfigError, "generator"),
    "a format that diffusers does not load": ({"format": "auto_gptq"}, UnsupportedError, "diffusers"),
    "a scheme that the folder cannot hold": ({"bits": 5}, UnsupportedError, "5 bits"),
    "two kinds of prompts": ({"prompt": "a", "prompt_file": "b.txt"}, ConfigError, "one of them"),
    "no such prompts": ({"prompt_file": "nowhere.tsv"}, ConfigError, "nowhere.tsv"),
    "metrics without pictures": ({"metrics": "clip"}, ConfigError, "--prompt"),
    "metrics without weights": ({"metrics": "clip", "prompt": "a cat"}, UnsupportedError, "clip"),
    "predictions of tokens": ({"enable_alg_ext": True}, ConfigError, "enable_alg_ext"),
    "all blocks by predictions": ({"distill_steps": 2}, ConfigError, "distill_steps"),
    "an output head": ({"quant_lm_head": True}, ConfigError, "quant_lm_head"),
    "an empty prompt": ({"prompt": " "}, ConfigError, 'option "prompt" cannot be'),
    "pictures of nothing": ({"image_save_dir": "pictures"}, ConfigError, "--prompt"),
    "pictures below a file": (
        {"prompt": "a cat", "image_save_dir": f"{__file__}/pictures"},
        ConfigError,
        "is a file, expected a folder",
    ),
    "arguments that are no mapping": ({"pipeline_args": "height:16"}, ConfigError, "{height:512,width:512}"),
    "budgets": ({"avg_bits": 3, "scheme_options": "W2A16,W4A16"}, ConfigError, "avg_bits"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_is_refused_before_any_work(tiny, tmp_path, name):
    given, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        job(tiny("flux"), "flux", tmp_path / "out", **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("given", [{"format": "gguf:q4_0"}, {"scheme": "GGUF:Q4_0"}], ids=str)
def test_gguf_types_of_a_pipeline_are_refused_for_what_they_are(tiny, tmp_path, caplog, given):
    """Steps of pipelines are bfloat16, which we say ourselves: nothing blames a user's `scale_dtype`."""
    with pytest.raises(UnsupportedError, match="diffusers does not load it") as error:
        prepare_pipeline(build_options({"model": str(tiny("flux")), "output_dir": str(tmp_path), **given}))
    assert "scale_dtype" not in caplog.text + str(error.value)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [("nowhere.tsv", "no such file"), ("mbpp", "captions"), ("empty.tsv", "caption")],
)
def test_data_without_captions_is_refused(tiny, tmp_path, monkeypatch, dataset, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.tsv").write_text("id\twords\n")
    options = build_options({"model": str(tiny("flux")), "output_dir": "out", "dataset": dataset, **SHORT})
    with pytest.raises(ConfigError, match=message):
        prepare_pipeline(options)


@pytest.mark.parametrize("data", [5, {"caption": "a cat"}, [], [1], [b"a cat"]], ids=repr)
def test_captions_from_python_that_are_none(tiny, tmp_path, data):
    options = build_options({"model": str(tiny("flux")), "output_dir": str(tmp_path / "out"), **SHORT})
    with pytest.raises(ConfigError, match="caption"):
        prepare_pipeline(options, dataset=data)


DAMAGED = {
    "a component is gone": (["vae"], CheckpointError, "not there: vae"),
    "a configuration is gone": (["transformer/config.json"], MissingError, "config.json is missing"),
    "weights are gone": (
        ["transformer/diffusion_pytorch_model.safetensors"],
        ConfigError,
        "transformer has neither",
    ),
    "an encoder's configuration is gone": (["text_encoder_2/config.json"], MissingError, "config.json"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_folders_that_are_not_whole(tiny, tmp_path, name):
    gone, kind, message = DAMAGED[name]
    folder = tmp_path / "in"
    shutil.copytree(tiny("flux"), folder)
    for path in gone:
        (shutil.rmtree if (folder / path).is_dir() else os.remove)(folder / path)
    with pytest.raises(kind, match=message):
        job(folder, "flux", tmp_path / "out", components="transformer,text_encoder_2")


def test_a_quantized_pipeline_is_refused(tiny, flux, tmp_path):
    with pytest.raises(UnsupportedError, match="quantized already"):
        job(flux.folders[0], "flux", tmp_path / "out")


@pytest.mark.parametrize("given", [{"max_sequence_length": 1000}, {"height": "large", "width": 16}], ids=repr)
def test_what_a_pipeline_cannot_draw_is_said_in_its_own_words(tiny, tmp_path, given):
    with pytest.raises(ConfigError, match="FluxPipeline does not draw captions as asked"):
        run_pipeline(job(tiny("flux"), "flux", tmp_path / "out", pipeline_args=given))
    assert not (tmp_path / "out").exists()


def test_a_pipeline_of_an_unknown_class_is_refused(tiny, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(tiny("flux"), folder)
    index = json.loads((tiny("flux") / "model_index.json").read_text())
    index["transformer"] = ["diffusers", "AllegroTransformer3DModel"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedError, match="AllegroTransformer3DModel"):
        job(folder, "flux", tmp_path / "out")
    del index["transformer"]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UnsupportedError, match="no transformer"):
        job(folder, "flux", tmp_path / "out")


def test_a_name_on_a_hub_is_asked_once_and_only_by_runs(monkeypatch):
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoSibling

    from auto_round import AutoRound
    from auto_round.models.hub import holds_pipeline

    asked = []

    class Info:
        siblings = (RepoSibling("model_index.json"), RepoSibling("transformer/config.json"))

    def info(self, name, **_):
        asked.append(name)
        if "pipeline" not in name:
            raise OSError("no network")
        return Info

    monkeypatch.setattr(HfApi, "model_info", info)
    assert AutoRound("some/pipeline").options.model.model == "some/pipeline"
    assert not asked
    assert holds_pipeline("some/pipeline")
    assert not holds_pipeline("some/model")
    assert not holds_pipeline("model")
    assert asked == ["some/pipeline", "some/model"]


def test_command_shows_the_plan(tiny, tmp_path, capsys):
    words = ["--output_dir", str(tmp_path), "--dry_run", "--num_inference_steps", "6", "--device", "cpu"]
    assert main([str(tiny("flux")), *words]) == 0
    said = capsys.readouterr().out
    assert "modulation by the timestep" in said
    assert "6 steps a caption, of which 4 are tuned on" in said
    assert main([str(tiny("flux")), *words, "--components", "text_encoder_2"]) == 0
    assert "nothing is denoised" in capsys.readouterr().out
    assert main(["inspect", str(tiny("flux"))]) == 2
    assert "is a pipeline of diffusers" in capsys.readouterr().err


@pytest.mark.slow
def test_command_and_class(tiny, tmp_path, capsys):
    import diffusers

    from auto_round import AutoRound

    captions = tmp_path / "captions.tsv"
    captions.write_text("id\tcaption\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(CAPTIONS)))
    arguments = {"height": 16, "width": 16, "max_sequence_length": 16}
    words = ["--pipeline_args", json.dumps(arguments), "--num_inference_steps", "2", "--nsamples", "3"]
    words += ["--iters", "2", "--dataset", str(captions), "--output_dir", str(tmp_path), "--device", "cpu"]
    assert main([str(tiny("flux")), *words]) == 0
    assert "times smaller" in capsys.readouterr().out
    live = diffusers.FluxPipeline.from_pretrained(tiny("flux"))
    given = {"pipeline_args": arguments, "num_inference_steps": 2, "nsamples": 3, "iters": 2}
    rounder = AutoRound(live, dataset=CAPTIONS, device_map="cpu", **given)
    loaded, (folder,) = rounder.quantize_and_save(tmp_path / "out")
    assert type(loaded).__name__ == "FluxPipeline"
    assert (folder / "model_index.json").is_file()
    with pytest.raises(UnsupportedError, match="quantize_and_save"):
        rounder.quantize()
