"""FastV: drop the visual tokens that the last prompt token hardly attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mllm.compressors.base import (
    AttentionRows,
    Budget,
    Context,
    LayerPruner,
    Positions,
    register,
)


@register("fastv", paper="arXiv:2403.06764", stage="llm", reference_layers=32)
@dataclass
class FastV(LayerPruner):
    """Drop the visual tokens that the last prompt token attends to least (FastV).

    The score is the attention of the last prompt token at layer `layer - 1`, averaged over
    heads, as in the official code (the paper's text says "received from all tokens").

    Args:
        layer: rows leave before this decoder layer; None is the paper's layer 2 of 32, scaled.
        keep: visual tokens kept, of those that arrive at the layer.
        positions: `original` or `compact`; None is `original` (the paper).
    """

    layer: int | None = None
    keep: Budget = 0.5
    positions: Positions | None = None

    paper_layer = 2
    first_layer = 1

    def reads(self):
        return {"rows": AttentionRows(rows="last", heads="mean")}

    def score(self, ctx: Context) -> Tensor:
        return ctx["rows"][:, 0]
