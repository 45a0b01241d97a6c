"""HiRED: a budget for every tile of a high-resolution picture, from a glance at the whole."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.compressors.base import (
    Budget,
    Context,
    Grid,
    Keep,
    Places,
    Positions,
    TokenReducer,
    VisionAttention,
    fill_up,
    on_device,
    register,
    remembered,
    resolve,
    top_k,
    top_k_each,
)
from mllm.errors import PlanError


@register("hired", paper="arXiv:2408.10945", stage="pre_llm")
@dataclass
class HiRED(TokenReducer):
    """Give each tile a budget by the attention on its part of the whole picture (HiRED).

    Under anyres the base view has `alpha` of the budget. The best `1 - alpha` of the base view's
    patches by the attention of [CLS] in the tower's first block are marked, and the tiles share
    the rest of the budget by the marks in their region. Within the base view and each tile the
    tokens with the highest [CLS] attention in the block that feeds the projector stay. A picture
    without tiles keeps the best of those.

    The authors' code counts marks over stripes of the raster; here regions are rectangles. What
    rounding or padding leaves over goes to the best tokens of all tiles, where their code spends
    less. Separators stay with their rows; their code has none. Without [CLS] scores are the
    attention that a token receives.

    Args:
        keep: visual tokens kept per image.
        alpha: share of the budget that the base view has.
        positions: `compact` or `original`; None is `compact` (the code).
    """

    keep: Budget = 0.2
    alpha: float = 0.5
    positions: Positions | None = None

    site = "pre_projector"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise PlanError(
                f"hired: alpha={self.alpha!r} is not a share of keep",
                argument="alpha",
                given=self.alpha,
                expected="0 <= alpha <= 1",
            )

    def reads(self):
        return {
            "early": VisionAttention(block=0), "attention": VisionAttention(), "grid": Grid()
        }  # fmt: skip

    def reduce(self, ctx: Context) -> list:
        score, valid, places = ctx["attention"], ctx.valid, ctx["grid"]
        budget = resolve(self.keep, valid.shape[1])
        if not places.tiles[0]:
            return [Keep(top_k(score, valid, budget), ctx.at_most(budget))]
        region, count = regions(places)
        region = on_device(region, valid)
        base = on_device(places.part == 0, valid)
        full = min(int(self.alpha * budget), count)
        marked = top_k(ctx["early"], valid & base, int(count * (1 - self.alpha)))
        marks = torch.zeros(len(score), places.parts, dtype=torch.long, device=score.device)
        marks = marks.index_add(1, region, marked.long())
        shares = marks * (budget - full) // marks.sum(1, keepdim=True).clamp(min=1)
        shares[:, 0] = full
        keep = top_k_each(score, valid, on_device(places.part, valid), shares)
        keep = fill_up(keep, score, valid & ~base, budget)
        return [Keep(fill_up(keep, score, valid, budget), ctx.at_most(budget))]


@remembered
def regions(places: Places) -> tuple[Tensor, int]:
    """The tile that shows the place of each patch of the base view, int64 `[tokens]`.

    It is 0 in tiles. Also the number of patches of the base view.
    """
    (rows, cols), whole = places.tiles, places.part == 0
    height, width = (int(at[whole].max()) + 1 for at in (places.row, places.col))
    region = 1 + places.row * rows // height * cols + places.col * cols // width
    return torch.where(whole, region, 0), int(whole.sum())
