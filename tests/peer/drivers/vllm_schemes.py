"""What vLLM takes modules for under given `auto-round` configurations; nothing is built."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import vllm.model_executor.layers.quantization.inc.inc as inc
import vllm.model_executor.layers.quantization.inc.schemes.factory as factory
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

KINDS = {"linear": LinearBase, "head": ParallelLMHead, "experts": RoutedExperts}


class Recorded:
    """In place of a scheme: gives back what it was chosen for."""

    def __init__(self, layer_config: Any) -> None:
        self.found = [layer_config.bits, layer_config.group_size, layer_config.sym]

    def get_linear_method(self, *_: Any) -> list[Any]:
        return self.found

    def get_moe_method(self, *_: Any) -> list[Any]:
        return self.found


def scheme(config: dict[str, Any], name: str, kind: str, merged: dict[str, list[str]]) -> Any:
    """`[bits, group_size, sym]`, None for 16 bits, or a text where vLLM stops."""
    layer = KINDS[kind].__new__(KINDS[kind])
    layer.__dict__["moe_config"] = None
    read = inc.INCConfig.from_config(config)
    read.packed_modules_mapping = merged
    try:
        found = read.get_quant_method(layer, name)
    except ValueError as error:
        return str(error)
    return found if isinstance(found, list) else None


if __name__ == "__main__":
    factory.resolve_scheme = Recorded
    inc.UnquantizedFusedMoEMethod = lambda _: None  # it asks for an engine's configuration
    request = json.loads(Path(sys.argv[1]).read_text())
    answers = [
        [scheme(config, name, kind, request["merged"]) for name, kind in request["modules"]]
        for config in request["configs"]
    ]
    Path(request["out"]).write_text(json.dumps(answers))
