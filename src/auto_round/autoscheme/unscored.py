"""Parts that no prediction depends on, on the rows that were measured: what stands for their sensitivity.

Experts that no token chose, and layers whose outputs only choose what others read, have a score of exactly 0
under every option. Taken at its word, the choice would give them the fewest bits, whatever they do on other
text. So they count as the typical part of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median

from auto_round.autoscheme.parts import Part, ScoringSetting
from auto_round.log import logger

NAMED = 3
"""Layers that the warning names."""


def with_typical(setting: ScoringSetting, scores: Mapping[Part, list[float]]) -> dict[Part, list[float]]:
    """The same scores, and in place of those that are all 0 what a part of this size usually has.

    That is, for each option, the median loss per weight of the other parts that it rounds, times the weights.

    Args:
        setting: what was measured.
        scores: part -> loss of each option, nats per token.
    """
    layers = setting.candidates.layers
    weights = {part: sum(layers[name].weights for name in part.layers) for part in scores}
    rounding = {part: [o for o in setting.options if not setting.keeps(part, o)] for part in scores}
    unscored = [part for part, losses in scores.items() if rounding[part] and not any(losses)]
    scored = [part for part, losses in scores.items() if any(losses)]
    if not unscored or not scored:
        return dict(scores)
    found = dict(scores)
    for part in unscored:
        losses = [0.0] * len(setting.options)
        for option in rounding[part]:
            alike = [scores[p][option] / weights[p] for p in scored if option in rounding[p]]
            losses[option] = weights[part] * median(alike) if alike else 0.0
        found[part] = losses
    names = [name for part in unscored for name in part.layers]
    logger.warning(
        "AutoScheme: no prediction on these rows depends on %d layers (%s%s), so nothing is known of their "
        "sensitivity; they count as the median of the others per weight. More rows (score_nsamples) or "
        "longer ones may reach them; rules of layer_config decide for them",
        len(names),
        ", ".join(names[:NAMED]),
        ", ..." if len(names) > NAMED else "",
    )
    return found
