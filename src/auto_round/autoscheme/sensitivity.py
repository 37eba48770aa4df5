"""The scores as a report holds them: for each part of a block what every option is estimated to cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from auto_round.autoscheme.candidates import Candidates
from auto_round.autoscheme.scores import Scores
from auto_round.facts.layer import Block, Layer
from auto_round.pipeline.writing.planned import kind_of


def sensitivity(
    scores: Scores, candidates: Candidates, method: str, blocks: Sequence[Block]
) -> dict[str, Any]:
    """JSON values: `measure` in words, and `layers` with `kind`, `block` and `scores` by option.

    Args:
        scores: of all parts.
        candidates: what can be chosen.
        method: how they were measured.
        blocks: of the model.
    """
    layers, labels = candidates.layers, candidates.labels
    return {
        "measure": f"Estimated divergence when only these layers are rounded, nats per token ({method})",
        "layers": [
            {
                "kind": _kind([layers[name] for name in part.layers], blocks),
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
