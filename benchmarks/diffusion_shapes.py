"""Do tuned weights draw pictures that are closer to the original's than rounded ones do?

`train FOLDER` trains a small FLUX on generated pictures of coloured shapes with captions (a few minutes on
one core). `compare FOLDER OUT` quantizes it by rounding and by tuning, and prints a JSON line for each: PSNR
and SSIM of pictures of captions that were not tuned on, and the error of the transformer's predictions on
held-out ones. `sheet OUT FILE` puts pictures of such a comparison side by side.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from auto_round.diffusion.sheet import TIMES
from auto_round.testing.small_flux import clip_encoder, flux_pipeline, t5_encoder, word_tokenizer

SIZE = 16
SHAPES, COLOURS = ("circle", "square", "triangle"), ("red", "green", "blue", "yellow")
PLACES, GROUNDS = ("left", "right", "middle"), ("black", "white", "grey")
RGB = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.8, 0.2),
    "blue": (0.15, 0.2, 0.9),
    "yellow": (0.95, 0.85, 0.1),
    "black": (0.02, 0.02, 0.02),
    "white": (0.97, 0.97, 0.97),
    "grey": (0.5, 0.5, 0.5),
}
WORDS = ["a", "on", "the", "in", "ground", *SHAPES, *COLOURS, *PLACES, *GROUNDS]
CALL = {"height": SIZE, "width": SIZE, "max_sequence_length": 12}


def captions() -> list[str]:
    """All captions, in a fixed random order."""
    made = [
        f"a {colour} {shape} in the {place} on a {ground} ground"
        for colour, shape, place, ground in itertools.product(COLOURS, SHAPES, PLACES, GROUNDS)
    ]
    random.Random(0).shuffle(made)
    return made


def picture(caption: str, chance: random.Random) -> Tensor:
    """A picture of a caption, `[3, SIZE, SIZE]` from -1 to 1; size and place vary a little."""
    _, colour, shape, _, _, place, _, _, ground, _ = caption.split()
    radius = chance.uniform(3.2, 4.6)
    x = {"left": 4.5, "middle": 7.5, "right": 10.5}[place] + chance.uniform(-0.7, 0.7)
    y = 7.5 + chance.uniform(-1.5, 1.5)
    at = torch.arange(SIZE, dtype=torch.float32)
    dx, dy = (at[None, :] - x).abs(), at[:, None] - y
    inside = {
        "circle": radius - (dx**2 + dy**2).sqrt(),
        "square": 0.85 * radius - torch.maximum(dx, dy.abs()),
        "triangle": torch.minimum(radius * 0.8 - dy, (dy + radius) * 0.6 - dx),
    }[shape]
    cover = (inside + 0.5).clamp(0, 1)
    front, back = (torch.tensor(RGB[name])[:, None, None] for name in (colour, ground))
    return 2 * (cover * front + (1 - cover) * back) - 1


def pictures_of(texts: list[str], each: int, chance: random.Random) -> Tensor:
    """Some pictures of every caption, `[captions, each, 3, SIZE, SIZE]`."""
    return torch.stack([torch.stack([picture(text, chance) for _ in range(each)]) for text in texts])


def build() -> Any:
    """The pipeline with random weights; its text encoders stay as they are."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )
    shape = {"num_layers": 2, "num_single_layers": 4, "num_attention_heads": 2, "attention_head_dim": 32}
    shape |= {"axes_dims_rope": (8, 12, 12), "guidance_embeds": False}
    encoders = (
        clip_encoder(num_hidden_layers=1, max_position_embeddings=12),
        t5_encoder(d_model=64, num_layers=1, num_heads=4),
    )
    return flux_pipeline(shape, vae, encoders, [word_tokenizer(WORDS, 12)] * 2)


def train_vae(vae: Any, pictures: Tensor, steps: int) -> float:
    """Train the autoencoder, and scale its latents to unit variance; returns the last loss."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    generator, loss = torch.Generator().manual_seed(2), torch.zeros(())
    for _ in range(steps):
        some = pictures[torch.randint(len(pictures), (32,), generator=generator)]
        latents = vae.encode(some).latent_dist
        loss = functional.mse_loss(vae.decode(latents.sample()).sample, some) + 1e-4 * latents.kl().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        found = vae.encode(pictures[:256]).latent_dist.mean
    vae.register_to_config(shift_factor=float(found.mean()), scaling_factor=float(1 / found.std()))
    return float(loss.detach())


def packed_latents(pipeline: Any, pictures: Tensor) -> Tensor:
    """What the transformer is to end with for pictures, `[n, tokens, channels]`."""
    config = pipeline.vae.config
    with torch.no_grad():
        found = torch.cat([pipeline.vae.encode(some).latent_dist.mean for some in pictures.split(128)])
    side = found.shape[-1]
    scaled = (found - config.shift_factor) * config.scaling_factor
    return pipeline._pack_latents(scaled, len(scaled), 4, side, side)


def train_transformer(pipeline: Any, pictures: Tensor, steps: int) -> float:
    """Train by flow matching; returns the mean loss of the last hundred steps.

    Args:
        pipeline: everything but its transformer is trained.
        pictures: `[captions, each, 3, SIZE, SIZE]`.
        steps: of the optimizer.
    """
    model, (count, each) = pipeline.transformer, pictures.shape[:2]
    latents = packed_latents(pipeline, pictures.flatten(0, 1)).unflatten(0, (count, each))
    with torch.no_grad():
        given = pipeline.encode_prompt(prompt=captions(), prompt_2=None, max_sequence_length=12)
    embeds, pooled, text_ids = given
    side = int(latents.shape[2] ** 0.5)
    ids = pipeline._prepare_latent_image_ids(1, side, side, torch.device("cpu"), torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator, losses = torch.Generator().manual_seed(1), list[float]()
    for step in range(steps):
        texts = torch.randint(count, (64,), generator=generator)
        clean = latents[texts, torch.randint(each, (64,), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.sigmoid(torch.randn(64, generator=generator) * 1.2)
        found = model(
            hidden_states=torch.lerp(clean, noise, t[:, None, None]),
            timestep=t,
            pooled_projections=pooled[texts],
            encoder_hidden_states=embeds[texts],
            txt_ids=text_ids,
            img_ids=ids,
            return_dict=False,
        )[0]
        loss = functional.mse_loss(found, noise - clean)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 50 == 0:
            print(json.dumps({"step": step, "loss": sum(losses[-50:]) / len(losses[-50:])}), flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


def train(folder: Path, steps: int) -> None:
    """Train both parts and save the pipeline."""
    torch.manual_seed(0)
    begin, pipeline = time.perf_counter(), build()
    pictures = pictures_of(captions(), 12, random.Random(1))
    vae = train_vae(pipeline.vae, pictures.flatten(0, 1), max(50, steps // 4))
    loss = train_transformer(pipeline, pictures, steps)
    pipeline.vae.eval()
    pipeline.transformer.eval()
    pipeline.save_pretrained(folder)
    seconds = time.perf_counter() - begin
    print(json.dumps({"steps": steps, "vae_loss": vae, "loss": loss, "seconds": round(seconds, 1)}))


METHODS: dict[str, dict[str, Any]] = {
    "rounded": {"iters": 0, "disable_opt_rtn": True},
    "searched": {"iters": 0, "disable_opt_rtn": False},
    "tuned": {"iters": 200},
}


def compare(folder: Path, out: Path, words: argparse.Namespace) -> None:
    """Quantize by each method and bits, and say how far the pictures are from the original's."""
    from auto_round.config import build_options
    from auto_round.diffusion.prepare import prepare_pipeline
    from auto_round.diffusion.run import run_pipeline

    texts, count = captions(), words.count
    shown = out / "prompts.txt"
    out.mkdir(parents=True, exist_ok=True)
    shown.write_text("\n".join(texts[-count:]) + "\n", encoding="utf-8")
    for bits, (name, given) in itertools.product((4, 2), METHODS.items()):
        if name not in words.methods.split(","):
            continue
        options = build_options(
            {
                "model": str(folder),
                "output_dir": str(out / f"w{bits}-{name}"),
                "bits": bits,
                "group_size": 32,
                "nsamples": 32,
                "num_inference_steps": words.steps or 8,
                "generator_seed": 1000,
                "pipeline_args": CALL,
                "prompt_file": str(shown),
                "amp": False,
                "overwrite": True,
                **given,
                **({"iters": words.iters} if given["iters"] else {}),
            }
        )
        result = run_pipeline(prepare_pipeline(options, dataset=texts[: -count - 8]))
        part, pictures = result.report["components"]["transformer"], result.report["pictures"]
        held = part.get("held_out", {}).get("relative_error", math.nan)
        print(
            json.dumps(
                {
                    "bits": bits,
                    "method": name,
                    "psnr": round(pictures["psnr"], 3),
                    "ssim": round(pictures["ssim"], 4),
                    "latent_error": round(pictures["latent_error"], 5),
                    "held_out_error": held,
                    "pictures": pictures["pictures"],
                    "seconds": round(result.seconds, 1),
                }
            ),
            flush=True,
        )


def sheet(out: Path, file: Path, rows: int = 6, side: int = 64) -> None:
    """Draw the pictures of a comparison: the original's, then each result's and how far it is from it.

    Args:
        out: where `compare` left its folders.
        file: PNG file.
        rows: captions that are shown.
        side: pixels of a picture.
    """
    from PIL import Image, ImageChops, ImageDraw

    found = [f"w{bits}-{name}" for bits in (4, 2) for name in METHODS]
    found = [name for name in found if (out / name / "pictures").is_dir()]
    texts = (out / "prompts.txt").read_text(encoding="utf-8").splitlines()[:rows]
    step, top = side + 4, 14
    drawn = Image.new("RGB", ((2 * len(found) + 1) * step + 4, top + rows * (step + top)), "white")
    pen = ImageDraw.Draw(drawn)
    titles = ["original", *(title for name in found for title in (name, f"difference x {TIMES}"))]
    for column, title in enumerate(titles):
        pen.text((4 + column * step, 2), title.replace("difference", "diff."), fill="black")
    for row, text in enumerate(texts):
        line = top + row * (step + top)
        pen.text((4, line), text, fill="black")
        original = Image.open(out / found[0] / "pictures" / f"{row:03d}-original.png")
        shown = [original]
        for name in found:
            result = Image.open(out / name / "pictures" / f"{row:03d}-quantized.png")
            shown += [result, ImageChops.difference(result, original).point(lambda value: TIMES * value)]
        for column, picture in enumerate(shown):
            drawn.paste(picture.resize((side, side), 0), (4 + column * step, line + top))
    drawn.quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)


def main() -> None:
    """Read the words and do one of both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("train", "compare", "sheet"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--steps", type=int, help="of training; of denoising")
    parser.add_argument("--count", type=int, default=16, help="pictures that are compared")
    parser.add_argument("--methods", default=",".join(METHODS), help="comma list")
    parser.add_argument("--iters", type=int, default=200, help="tuning steps a block")
    words = parser.parse_args()
    if words.what == "train":
        train(words.folder, words.steps or 1200)
    elif words.what == "sheet":
        sheet(words.folder, words.out)
    else:
        out = words.out or words.folder.with_name("compared")
        compare(words.folder, out, words)


if __name__ == "__main__":
    main()
