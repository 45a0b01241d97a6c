"""DART: keep a few pivots and the visual tokens that are least like them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import (
    Budget,
    Hidden,
    Keep,
    Keys,
    LayerContext,
    LayerPruner,
    Positions,
    register,
    top_k,
)
from mllm.errors import PlanError


@register("dart", paper="arXiv:2502.11494", stage="llm", reference_layers=32)
@dataclass
class DART(LayerPruner):
    """Keep the visual tokens that duplicate a few pivots least (DART).

    Pivots are the `pivots` visual tokens, and the `text_pivots` text tokens behind the first
    visual one, whose keys at layer `layer - 1` (all heads) have the largest L1 norm.
    Pivot by pivot, in falling order of that norm, visual before text, the tokens whose hidden
    states (through the model's last norm, as in the authors' code) have the least cosine to it
    stay, equally many for each pivot. Visual pivots stay too. No attention is read.

    The budget is exact: visual pivots are in it, and what does not divide goes to the first
    pivots. `extra=True` counts as the authors' code does on LLaVA: rounded down to equal shares,
    the visual pivots on top (128 becomes 132, 320 becomes 324). Their order of the pivots is that
    of a Python set. Several images of a sample are one set of tokens.

    Args:
        layer: rows leave before this decoder layer; None is the paper's layer 2 of 32, scaled.
        keep: visual tokens kept, of those that arrive at the layer.
        pivots: visual pivots; not more than are kept.
        text_pivots: text pivots; fewer where there is less text.
        extra: whether visual pivots come on top of `keep`.
        rope: norms of rotated keys, as in the authors' code. They depend on absolute positions:
            in a padded forward without `position_ids` (generate() gives them) False alone
            chooses as without padding.
        positions: `original` or `compact`; None is `original` (the paper).
    """

    layer: int | None = None
    keep: Budget = 0.222
    pivots: int = 4
    text_pivots: int = 4
    extra: bool = False
    rope: bool = True
    positions: Positions | None = None

    paper_layer = 2
    first_layer = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pivots < 1 or self.text_pivots < 0:
            raise PlanError(
                f"dart: pivots={self.pivots} and text_pivots={self.text_pivots}",
                argument="pivots",
                given=self.pivots,
                expected="pivots from 1, text_pivots from 0",
            )

    def reads(self):
        return {"keys": Keys(rope=self.rope), "hidden": Hidden(norm=True)}

    def select(self, ctx: LayerContext) -> Keep:
        counts, budget = ctx.budget(self.keep, ctx.counts())
        norm = ctx["keys"].float().abs().sum((1, 3)).masked_fill(ctx.protected, float("inf"))
        behind = ctx.text & (ctx.visual.long().cumsum(1) > 0)
        visual, own = _largest(norm, ctx.visual, self.pivots)
        text, other = _largest(norm, behind, self.text_pivots)
        if not self.extra:
            own = own & (torch.arange(own.shape[1], device=own.device) < budget[:, None])
        pivots, real = torch.cat([visual, text], 1), torch.cat([own, other], 1)

        count, number = real.sum(1, keepdim=True).clamp(min=1), real.long().cumsum(1) - 1
        if self.extra:
            share = (budget[:, None] // count).expand_as(number)
        else:
            left = budget[:, None] - own.sum(1, keepdim=True)
            share = left // count + (number < left % count)
        z = F.normalize(ctx["hidden"].float(), dim=-1)
        like = z @ z.gather(1, pivots[..., None].expand(-1, -1, z.shape[2])).transpose(1, 2)
        ctx.book(2 * z.shape[1] * z.shape[2] * pivots.shape[1])

        unlike = (-like).masked_fill(ctx.protected[..., None], float("inf"))
        keep = torch.zeros_like(ctx.visual).scatter(1, visual, own)
        for i in range(pivots.shape[1]):
            quota = share[:, i].masked_fill(~real[:, i], 0)
            keep = keep | top_k(unlike[..., i], ctx.visual & ~keep, quota)
        return Keep(keep, None if self.extra else counts)


def _largest(norm: Tensor, among: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` rows with the largest norm, in falling order, and which of them there are."""
    order = norm.masked_fill(~among, -1).argsort(dim=1, descending=True, stable=True)[:, :count]
    return order, among.gather(1, order)
