"""PyramidDrop: fewer visual tokens from stage to stage of the decoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mllm.compressors.base import (
    AttentionRows,
    Budget,
    LayerContext,
    LayerSchedule,
    Positions,
    register,
)


@register("pyramiddrop", paper="arXiv:2410.17247", stage="llm", reference_layers=32)
@dataclass
class PyramidDrop(LayerSchedule):
    """Halve the visual tokens after each quarter of the decoder (PyramidDrop).

    Before each cut the attention that the next layer would pay from the last prompt token,
    averaged over heads, ranks the visual tokens: the layer's own query and key projections on what
    enters it. The best `keep` of the tokens that entered the decoder stay.

    The signal is read in a call of its own, of which the cut needs one query row and all keys;
    the ledger books that call. A fraction is rounded, where the authors' code cuts it off. Their
    code scores the first image of a sample alone; here all images of a sample compete.

    Args:
        layers: rows leave before these decoder layers; None is 8, 16 and 24 of 32, scaled.
        keep: budget of each layer: tokens per image, or a fraction of those that entered.
        positions: `compact` or `original`; None is `compact` (the code).
    """

    layers: tuple[int, ...] | None = None
    keep: tuple[Budget, ...] = (0.5, 0.25, 0.125)
    positions: Positions | None = None

    paper_layers = (8, 16, 24)
    paper_positions = "compact"
    identity = {"keep": (1.0, 1.0, 1.0)}

    def reads(self):
        return {"rows": AttentionRows(when="before", rows="last", heads="mean")}

    def score(self, ctx: LayerContext) -> Tensor:
        return ctx["rows"][:, 0]
