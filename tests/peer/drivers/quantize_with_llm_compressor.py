"""Round models plainly with llm-compressor: a job is a model, a scheme or groups of settings, rows."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM


def quantize(job: dict[str, Any]) -> None:
    """Round one model; `<folder>.json` says `{"folder"}` or `{"error"}`."""
    try:
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
        rows = Dataset.from_list(
            [{"input_ids": row, "attention_mask": [1] * len(row)} for row in job["rows"]]
        )
        named = isinstance(job["scheme"], str)
        what = {"targets": "Linear", "scheme": job["scheme"]} if named else {"config_groups": job["scheme"]}
        recipe = QuantizationModifier(ignore=["lm_head"], **what)
        oneshot(
            model=model,
            recipe=recipe,
            dataset=rows,
            num_calibration_samples=len(job["rows"]),
            max_seq_length=max(map(len, job["rows"])),
        )
        model.save_pretrained(job["folder"], save_compressed=True)
        facts = {"folder": job["folder"]}
    except Exception:  # noqa: BLE001  the test that asked for this job fails with it, the others go on
        facts = {"error": traceback.format_exc()}
    Path(job["folder"] + ".json").write_text(json.dumps(facts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text())["jobs"]:
        quantize(job)
