"""Without the packages that only some options need: all imports work, and such an option says which it is."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from auto_round.testing.tiny_models import save_tiny_model
from pipeline.runs import SIZES

ABSENT = (
    *("accelerate", "compressed_tensors", "datasets", "gguf", "gptqmodel", "llama_cpp", "modelscope"),
    *("matplotlib", "pandas", "peft", "pyarrow", "triton"),
)
pytestmark = pytest.mark.slow
TRITON_ONLY = {"auto_round.kernels.triton_code"}
"""Modules that nothing imports where Triton is missing."""

DRIVER = """
import importlib, json, pkgutil, sys
absent, requests = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(absent))
import auto_round
found = pkgutil.walk_packages(auto_round.__path__, "auto_round.")
names = [module.name for module in found if "__main__" not in module.name]
failed = {}
for name in names:
    try:
        importlib.import_module(name)
    except ImportError as error:
        failed[name] = str(error)
from auto_round.cli.main import main
codes = [main(request) for request in requests]
print(json.dumps([failed, codes]))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one process says, in which the packages cannot be imported, to one request after the other."""
    folder = tmp_path_factory.mktemp("absent")
    model = save_tiny_model("llama", folder / "model", **SIZES)
    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"text": "abc def " * 40}) + "\n" for _ in range(12))
    )
    (folder / "rows.parquet").write_bytes(b"PAR1")
    short = [
        "--nsamples",
        "4",
        "--seqlen",
        "16",
        "--batch_size",
        "2",
        "--group_size",
        "32",
        "--device",
        "cpu",
    ]
    given = ["--model", str(model), "--output_dir", str(folder / "out")]
    requests = {
        "gguf": [*given, "--format", "gguf:q4_k_m", "--iters", "0"],
        "datasets": [*given, *short, "--dataset", "NeelNanda/pile-10k"],
        "pyarrow": [*given, *short, "--dataset", str(folder / "rows.parquet")],
        "report": [*given, *short, "--report"],
        "modelscope": [*given, *short, "--dataset", "swift/pile-val-backup", "--platform", "model_scope"],
        "": [*given, *short, "--iters", "1", "--dataset", str(folder / "rows.jsonl")],
    }
    run = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps([ABSENT, list(requests.values())])],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    failed, codes = json.loads(run.stdout.splitlines()[-1])
    errors = [line for line in run.stderr.splitlines() if line.startswith("auto-round: error")]
    return {"failed": failed, "codes": dict(zip(requests, codes, strict=True)), "errors": errors}


def test_everything_imports(answers: dict[str, Any]) -> None:
    assert answers["failed"].keys() == TRITON_ONLY


def test_options_name_the_package_they_need(answers: dict[str, Any]) -> None:
    codes = answers["codes"]
    assert codes.pop("") == 0
    assert set(codes.values()) == {2}
    for name, error in zip(codes, answers["errors"], strict=True):
        said = error.replace('"', "")
        assert f"pip install {name}" in said or f"pip install auto-round[{name}]" in said
