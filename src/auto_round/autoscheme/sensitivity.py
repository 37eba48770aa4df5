"""The scores as a report holds them: for each part of a block what every option is estimated to cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from auto_round.autoscheme.scores import Scores
from auto_round.facts.layer import Block, Layer
from auto_round.models.source import ModelSource
from auto_round.pipeline.writing.planned import kind_of


def sensitivity(scores: Scores, labels: Sequence[str], method: str, source: ModelSource) -> dict[str, Any]:
    """JSON values: `measure` in words, and `layers` with `kind`, `block` and `scores` by option.

    Args:
        scores: of all parts.
        labels: of the options.
        method: how they were measured.
        source: the model.
    """
    layers = {layer.name: layer for layer in source.layers}
    return {
        "measure": f"Estimated divergence when only these layers are rounded, nats per token ({method})",
        "layers": [
            {
                "kind": _kind([layers[name] for name in part.layers], source.blocks),
                "block": part.block,
                "scores": dict(zip(labels, losses, strict=True)),
            }
            for part, losses in scores.items()
        ],
    }


def _kind(layers: Sequence[Layer], blocks: Sequence[Block]) -> str:
    """`self_attn.q_proj+k_proj+v_proj`: the module once, where all layers lie in it."""
    kinds = list(dict.fromkeys(kind_of(layer, blocks) for layer in layers))
    homes = {kind.rpartition(".")[0] for kind in kinds}
    if len(homes) > 1:
        return "+".join(kinds)
    return "+".join([kinds[0], *(kind.rpartition(".")[2] for kind in kinds[1:])])
