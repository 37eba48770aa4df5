"""What docs/diffusion.md shows, typed in its order: each block of commands and Python, with a tiny FLUX."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("diffusers", exc_type=ImportError)

from diffusion.tiny import CAPTIONS, flux, save
from e2e.test_documents import Reader

pytestmark = [pytest.mark.slow, pytest.mark.net]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "diffusion.md"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHORTER = {
    "--dataset captions.tsv": "--dataset captions.tsv --iters 2 --nsamples 3 --overwrite",
    "--num_inference_steps 20": "--num_inference_steps 2",
    "num_inference_steps=20": "num_inference_steps=2, iters=2, nsamples=3, pipeline_args=SMALL",
    "{height:512,width:512}": "{height:16,width:16,max_sequence_length:16}",
}
"""What is too long for a test, and what stands for it."""
SMALL = {"height": 16, "width": 16, "max_sequence_length": 16}


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """Commands of an environment with this package and its extra for pipelines.

    `DIFFUSION_PYTHON` may name the Python of one that is there already.
    """
    if named := os.environ.get("DIFFUSION_PYTHON"):
        return Path(named).parent
    home = tmp_path_factory.mktemp("diffusion") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    install = [home / "bin" / "python", "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt"]
    subprocess.run([*install, f"{ROOT}[diffusion,report]"], check=True)
    return home / "bin"


def blocks():
    """Kind and text of each block of the page, shortened; every shortening is of something that is there."""
    found = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    whole = "".join(text for _, text in found)
    assert all(words in whole for words in SHORTER)
    for kind, text in found:
        for words, fewer in SHORTER.items():
            text = text.replace(words, fewer)
        yield kind, text


def test_the_page(commands, tmp_path):
    reader = Reader(tmp_path, commands, tmp_path)
    save(flux, tmp_path / "black-forest-labs" / "FLUX.1-dev")
    table = "".join(f"{i}\t{text}\n" for i, text in enumerate(CAPTIONS))
    (tmp_path / "captions.tsv").write_text("id\tcaption\n" + table, encoding="utf-8")
    said = []
    for kind, text in blocks():
        if kind == "python":
            said.append(reader.run(commands / "python", "-c", f"SMALL = {SMALL}\n{text}"))
        else:
            said += [reader.run(*shlex.split(line)) for line in text.splitlines() if line.strip()]
    assert len(said) >= 4
    folders = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.glob("**/report.json")}
    assert "FLUX.1-dev-w4" in folders
    assert any("text_encoder_2" in words for words in said)
