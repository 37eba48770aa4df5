"""Makes tasks for lm-evaluation-harness of question files, so that models can be evaluated without a network.

    python benchmarks/offline_tasks.py arc_easy.jsonl piqa.jsonl lambada.jsonl --out tasks
    auto-round eval MODEL --include_path tasks --tasks arc_easy_local,piqa_local,lambada_local

A file is JSON lines of one of two kinds: `query`, `choices` and `gold` (number of the right one) become a
multiple-choice task with `acc` and `acc_norm`; `context` and `continuation` a task of log-likelihood with
`acc` (whether the continuation is what the model would write) and perplexity. A task is called as its file,
with `_local` behind it. The YAML of a task names the absolute path of its file.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

CHOICES = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: multiple_choice
test_split: test
num_fewshot: 0
doc_to_text: "{{{{query.strip()}}}}\\nAnswer:"
doc_to_target: gold
doc_to_choice: choices
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
CONTINUATION = """\
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
output_type: loglikelihood
test_split: test
num_fewshot: 0
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{continuation}}}}"
target_delimiter: ""
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
    aggregation: mean
    higher_is_better: true
metadata:
  version: 1.0
"""
KINDS = {
    frozenset({"query", "choices", "gold"}): CHOICES,
    frozenset({"context", "continuation"}): CONTINUATION,
}


def task_yaml(path: Path) -> tuple[str, str]:
    """Name of the task of a file, and its YAML."""
    with path.open(encoding="utf-8") as file:
        fields = frozenset(json.loads(file.readline()))
    kind = next((text for wanted, text in KINDS.items() if wanted <= fields), None)
    if kind is None:
        sys.exit(f"{path}: expected the fields {' or '.join(', '.join(sorted(k)) for k in KINDS)}")
    name = f"{path.stem}_local"
    return name, kind.format(name=name, path=json.dumps(str(path.resolve())))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON lines of questions")
    parser.add_argument("--out", type=Path, required=True, help="folder of the task files")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for path in args.files:
        name, text = task_yaml(path)
        (args.out / f"{name}.yaml").write_text(text, encoding="utf-8")
        print(name)


if __name__ == "__main__":
    main()
