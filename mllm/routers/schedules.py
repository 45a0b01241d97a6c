"""How the share of tokens that a layer works on falls with depth; and draws alike everywhere."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, Literal

Shape = Literal["shiftedcos", "shiftedlinear", "deep", "interleave"]


def ratio(shape: Shape, layer: int, num_layers: int, shift: float) -> float:
    """Share of tokens of one layer, before its limits.

    Args:
        shape: `shiftedcos` is half a cosine wave from 1/2 to -1/2 over the layers, and
            `shiftedlinear` a line; both plus `shift`. `deep` (all layers but the first two and the
            last) and `interleave` (odd layers) are `shift`, and 2 in other layers.
        layer: 0-based decoder layer of `num_layers`.
        num_layers: decoder layers of the model.
        shift: see `shape`.
    """
    share = layer / max(1, num_layers - 1)
    if shape == "shiftedcos":
        return 0.5 * math.cos(math.pi * share) + shift
    if shape == "shiftedlinear":
        return 0.5 - share + shift
    inside = 2 <= layer <= num_layers - 2 if shape == "deep" else layer % 2 == 1
    return shift if inside else 2.0


def ratios(
    shape: Shape, num_layers: int, shift: float, most: float, least: float
) -> dict[int, float]:
    """Share of tokens by layer, of the layers where tokens are routed.

    Args:
        shape, num_layers, shift: see :func:`ratio`.
        most: a layer with a larger share works on all tokens, and has no router.
        least: smallest share.
    """
    raw = {layer: ratio(shape, layer, num_layers, shift) for layer in range(num_layers)}
    return {layer: max(r, least) for layer, r in raw.items() if r <= most}


def draw(choices: Sequence[Any], weights: Sequence[float] | None, seed: int, step: int) -> Any:
    """One of `choices` at random, which `seed` and `step` alone decide.

    So all processes draw alike without telling each other, and a run that goes on after a stop
    draws what it would have drawn. No generator of anybody is touched.

    Args:
        choices: at least one.
        weights: how often each is drawn, from 0 and not all 0; None is equally often.
        seed: for example the plan's.
        step: of the training; each draws anew.
    """
    return random.Random(f"{seed}/{step}").choices(choices, weights)[0]
