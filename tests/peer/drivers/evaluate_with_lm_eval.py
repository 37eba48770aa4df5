"""Call lm-evaluation-harness directly: what its own functions say of folders."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text())
    manager = TaskManager(include_path=request["tasks"], include_defaults=False)
    found = {}
    for folder in request["folders"]:
        results = simple_evaluate(
            model="hf",
            model_args={"pretrained": folder, "dtype": request["dtype"]},
            tasks=request["names"],
            limit=request["limit"],
            batch_size=request["batch_size"],
            device="cpu",
            task_manager=manager,
        )
        found[folder] = results["results"]
    Path(request["out"]).write_text(json.dumps(found, default=str))


main()
