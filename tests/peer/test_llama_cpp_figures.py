"""`auto-round eval` of GGUF files gives llama.cpp's own perplexity and divergence of the same tokens."""

from __future__ import annotations

import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peer.peers import Peer
from peer.test_lm_eval import ROOT, run_there
from pipeline.runs import quantize

pytestmark = pytest.mark.peer

LLAMA_CPP = Peer("PEER_LLAMA_CPP", "llama-cpp-python and what this package needs")
TOOL = "PEER_LLAMA_PERPLEXITY"
"""Variable that names llama.cpp's program."""

LENGTH, TOKENS, MORE = 128, 2048, 8
"""Tokens of a row and of all rows; rows that llama.cpp's tool measures besides."""
FORMS = ("gguf:f16", "gguf:q4_0", "gguf:mxfp4")


@dataclass(frozen=True)
class Measured:
    """Files, and what `auto-round eval` says of each of them beside the first."""

    text: Path
    files: dict[str, Path]
    ours: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def measured(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    LLAMA_CPP.python()
    root = tmp_path_factory.mktemp("figures")
    text = root / "text.txt"
    text.write_text("\n".join(f.read_text() for f in sorted((ROOT / "docs").glob("[ft]*.md"))))
    files = {}
    for form in FORMS:
        out = root / form.partition(":")[2]
        quantize(demo, out, format=form, iters=0, disable_opt_rtn=True, group_size=None, dataset=None)
        (files[form],) = out.glob("*.gguf")
    ours = {form: evaluated(files[form], files[FORMS[0]], text, root) for form in FORMS[1:]}
    return Measured(text, files, ours)


def evaluated(file: Path, original: Path, text: Path, root: Path) -> dict[str, Any]:
    """Figures of a file and its original, both run by llama.cpp."""
    out = root / f"{file.stem}-{file.parent.name}.json"
    words = ["eval", str(file), "--original", str(original), "--text", str(text), "--output", str(out)]
    words += ["--gguf_engine", "llama_cpp", "--seqlen", str(LENGTH), "--skip", str(LENGTH // 2)]
    words += ["--tokens", str(TOKENS), "--cache_dir", str(root / "cache")]
    run_there(LLAMA_CPP, ["-m", "auto_round", *words])
    found: dict[str, Any] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("form", FORMS[1:])
def test_figures_from_its_logits(measured: Measured, tmp_path: Path, form: str) -> None:
    files = [str(measured.files[name]) for name in (FORMS[0], form)]
    request = {"files": files, "text": str(measured.text), "n_ctx": LENGTH, "tokens": TOKENS}
    LLAMA_CPP.run("measure_with_llama_cpp.py", {**request, "out": str(tmp_path / "out.json")}, tmp_path)
    theirs, ours = json.loads((tmp_path / "out.json").read_text()), measured.ours[form]
    assert ours["positions"] == theirs["positions"]
    both = [ours[name]["value"] for name in ("perplexity_original", "perplexity")]
    assert both == pytest.approx(theirs["perplexity"], rel=1e-6)
    assert ours["kl"]["mean"]["value"] == pytest.approx(theirs["kl"]["mean"], rel=1e-5)
    assert ours["kl"]["median"]["value"] == pytest.approx(theirs["kl"]["median"], rel=1e-4)
    assert ours["kl"]["p99"]["value"] == pytest.approx(theirs["kl"]["p99"], rel=1e-4)
    assert ours["kl"]["largest"] == pytest.approx(theirs["kl"]["largest"], rel=1e-4)


@pytest.mark.parametrize("form", FORMS[1:])
def test_figures_that_its_tool_prints(measured: Measured, tmp_path: Path, form: str) -> None:
    """The tool keeps the original's log-probabilities in 16 bits, and cuts them 16 nats below the largest.

    Its attention is the plain one here, as in the binding: the other moves KL by a percent. It prints
    figures of all rows so far behind each row. What it says at its end is lost at times, since its log is
    written by a thread that is not waited for: so it goes on for some rows more.
    """
    program = os.environ.get(TOOL)
    if not program:
        pytest.skip(f"{TOOL} names no llama-perplexity (see tests/peer/README.md)")
    rows = TOKENS // LENGTH
    base = ["-fa", "off", "-c", str(LENGTH), "-b", str(LENGTH), "--chunks", str(rows + MORE), "-t", "1"]
    base += ["--kl-divergence-base", str(tmp_path / "base.kld")]
    first = said(program, "-m", str(measured.files[FORMS[0]]), "-f", str(measured.text), *base)
    second = said(program, "-m", str(measured.files[form]), "--kl-divergence", *base)
    ours = measured.ours[form]
    printed = float(found(rf"\[{rows}\]([0-9.]+)", first))
    assert ours["perplexity_original"]["value"] == pytest.approx(printed, abs=1e-4)
    line = found(rf"^ +{rows} +([0-9].*)$", second)
    perplexity, _, divergence, rms, same = (float(n) for n in re.findall(r"(-?[0-9.]+) \u00b1", line))
    assert ours["perplexity"]["value"] == pytest.approx(perplexity, abs=1e-4)
    assert ours["kl"]["mean"]["value"] == pytest.approx(divergence, abs=2e-5)
    assert 100 * ours["probability_difference"]["rms"]["value"] == pytest.approx(rms, abs=2e-3)
    assert 100 * ours["same_top"]["value"] == pytest.approx(same, abs=1e-3)


def said(program: str, *words: str) -> str:
    """What the tool prints."""
    done = subprocess.run([program, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


def found(pattern: str, text: str) -> str:
    """The number that a line holds."""
    match = re.search(pattern, text, re.MULTILINE)
    assert match is not None, text[-3000:]
    return match[1]
