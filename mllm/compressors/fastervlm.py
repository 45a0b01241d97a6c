"""FasterVLM: keep the patches that [CLS] attends to most."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.compressors.base import (
    Budget,
    Context,
    Grid,
    Keep,
    Positions,
    TokenReducer,
    VisionAttention,
    even_shares,
    fill_up,
    on_device,
    register,
    resolve,
    top_k_each,
)


@register("fastervlm", paper="arXiv:2412.01818", stage="pre_llm")
@dataclass
class FasterVLM(TokenReducer):
    """Keep the tokens with the highest attention of [CLS] (FasterVLM): plain [CLS] pruning.

    The score is the row of [CLS] in the tower block that feeds the projector, averaged over
    heads; kept tokens stay in the order of the grid. A tower without [CLS] is scored by the
    attention that a token receives from all. As in the authors' code every tile of an anyres image
    (and every frame of a video) keeps equally many; what a tile cannot use, because it is padding,
    goes to the best tokens elsewhere. Unlike there, separators and unpadding stay the model's own.

    Args:
        keep: visual tokens kept per image.
        tiles: each tile has its share; otherwise all tokens of an image compete.
        positions: `compact` or `original`; None is `compact` (as the paper runs on LLaVA).
    """

    keep: Budget = 0.25
    tiles: bool = True
    positions: Positions | None = None

    site = "pre_projector"

    def reads(self):
        return {"attention": VisionAttention(heads="mean"), "grid": Grid()}

    def reduce(self, ctx: Context) -> list:
        score, budget = ctx["attention"], resolve(self.keep, ctx.valid.shape[1])
        keep = ctx.valid & False
        if self.tiles:
            part = on_device(ctx["grid"].part, score)
            shares = on_device(even_shares(budget, ctx["grid"].parts), score)
            keep = top_k_each(score, ctx.valid, part, shares)
        return [Keep(fill_up(keep, score, ctx.valid, budget), ctx.at_most(budget))]
