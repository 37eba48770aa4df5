"""A tiny LLaVA with a real processor, and data sets of random images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from auto_round.testing.tiny_models import VOCABULARY, tiny_tokenizer
from sweep.multimodal import FAMILIES
from sweep.outcome import save_config

SIDE = 28
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}\n{% endfor %}"
)


def llava_with_processor(folder: Path) -> Path:
    """Write the model, its tokenizer and its processor."""
    from transformers import AutoConfig, CLIPImageProcessor, LlavaProcessor

    sizes = dict(FAMILIES["llava"].config)
    sizes["text_config"] = {**sizes["text_config"], "vocab_size": VOCABULARY + 8}
    save_config(AutoConfig.for_model("llava", **sizes | {"image_token_index": VOCABULARY}), folder)
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    LlavaProcessor(
        images,
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        num_additional_image_tokens=1,
    ).save_pretrained(folder)
    return folder


def picture(path: Path, seed: int, size: tuple[int, int] = (40, 32)) -> str:
    """Write a random image; returns its name."""
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.name


def conversations(folder: Path, count: int = 8) -> list[dict[str, Any]]:
    """Records with an image each, of different lengths; images lie in the folder."""
    folder.mkdir(exist_ok=True)
    return [
        {
            "messages": [
                {"role": "user", "content": "<image>\nWhat is this?"},
                {"role": "assistant", "content": "Nothing but noise" + "!" * number},
            ],
            "images": [picture(folder / f"{number}.png", number)],
        }
        for number in range(count)
    ]


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    """Write records as JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
