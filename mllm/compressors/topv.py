"""TopV: keep the visual tokens that optimal transport within a layer moves most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import (
    Budget,
    Grid,
    Hidden,
    Keep,
    LayerContext,
    LayerPruner,
    Positions,
    register,
    top_k,
)
from mllm.errors import PlanError


@register("topv", paper="arXiv:2503.18278", stage="llm", reference_layers=32)
@dataclass
class TopV(LayerPruner):
    """Score visual tokens by optimal transport between a layer's input and its MLP's (TopV).

    Sources are the visual tokens that enter layer `layer - 1`, targets the same tokens behind its
    second norm. The cost of moving i to j is ``alpha |s_i - t_j|^2 + beta (1 - exp(-d_ij^2 / 2
    sigma^2)) + gamma c_i``, d their distance in the grid, c the distance of i from its middle, each
    term scaled to [0, 1]. Three Sinkhorn iterations on ``exp(-C / epsilon)`` with uniform marginals
    give the plan, and a token's importance is the sum of its row. With exact marginals that sum
    would be the same for all: it tells something because the iterations end with the columns.
    Part of the budget is a regular subsample of what the score would drop. No attention is read.

    Whatever depends on the source alone is taken up by the scaling of rows: the term of gamma,
    whatever gamma is, and of |s - t|^2 the norm of s, which is nearly all of it where s is a
    residual stream and t behind a norm. So features are compared at length one; otherwise the plan
    knows places only, and the border of the grid scores best.

    No official code or constant was found: the defaults are those of a third-party implementation,
    and no number is claimed for them. Marginals are not theirs (norms of tokens): they end with the
    rows, and then the score is the marginal. Images, tiles and frames are transported apart.

    Args:
        layer: rows leave before this decoder layer; None is behind the paper's layer 2 of 32,
            scaled.
        keep: visual tokens kept, of those that arrive at the layer.
        recover: share of `keep` that is a regular subsample; a fifth, as where half stays by score
            and every fourth of the others on top.
        alpha, beta, gamma, sigma, epsilon: the cost, see above.
        features: `unit` compares s and t at length one, `raw` as they are.
        iterations: of Sinkhorn.
        positions: `original` or `compact`; None is `original`.
    """

    layer: int | None = None
    keep: Budget = 0.5
    recover: float = 0.2
    alpha: float = 1.0
    beta: float = 1.0
    gamma: float = 0.01
    sigma: float = 10.0
    epsilon: float = 0.1
    iterations: int = 3
    features: Literal["unit", "raw"] = "unit"
    positions: Positions | None = None

    paper_layer = 3
    first_layer = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.recover <= 1 or min(self.sigma, self.epsilon, self.iterations) <= 0:
            raise PlanError(
                f"topv: recover={self.recover}, sigma={self.sigma}, epsilon={self.epsilon}, "
                f"iterations={self.iterations}",
                argument="recover",
                given=self.recover,
                expected="0 <= recover <= 1, the others above 0",
            )

    def reads(self):
        before = max(0, (self.layer or 1) - 1)
        return {
            "source": Hidden(layer=before),
            "target": Hidden(layer=before, of="mlp"),
            "grid": Grid(),
        }

    def score(self, ctx: LayerContext) -> Tensor:
        cost, pair = self._cost(ctx)
        kernel = torch.exp(-cost / self.epsilon) * pair
        mass = ctx.visual.float()
        mass = mass / (pair.sum(2).clamp(min=1))  # uniform within each grid
        v = ctx.visual.float()
        for _ in range(self.iterations):
            before = v
            u = mass / (kernel @ v[..., None])[..., 0].clamp(min=1e-30)
            v = mass / (kernel.transpose(1, 2) @ u[..., None])[..., 0].clamp(min=1e-30)
        # Distances of hidden states and of places, and the products with the kernel.
        ctx.book(2 * cost.shape[1] ** 2 * (ctx["source"].shape[2] + 2 + 2 * self.iterations + 2))
        # Against its marginal, so that small grids do not win: the sum of a row is
        # mass (kernel v) / (kernel before). What it is above 1 is taken from the change of v, for
        # next to 1 it would be lost in rounding where the plan is nearly settled.
        moved = torch.stack([v - before, before], 2)
        above, below = (kernel @ moved).unbind(2)
        return above / below.clamp(min=1e-30)

    def _cost(self, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        """The cost of every move, and which there are: `[batch, rows, rows]` each."""
        grid = ctx["grid"]
        part = (grid.image.long() * 4096 + grid.tile) * 4096 + grid.frame
        pair = ctx.visual[:, :, None] & ctx.visual[:, None] & (part[:, :, None] == part[:, None])
        place = torch.stack([grid.row, grid.col], 2).float()
        high = torch.where(pair[..., None], place[:, None], 0).amax(2)
        central = (place - high / 2).norm(dim=2)[..., None].expand(pair.shape)
        near = torch.exp(-torch.cdist(place, place).square() / (2 * self.sigma**2))
        source, target = ctx["source"].float(), ctx["target"].float()
        if self.features == "unit":
            source, target = F.normalize(source, dim=2), F.normalize(target, dim=2)
        moved = torch.cdist(source, target).square()
        terms = ((self.alpha, moved), (self.beta, 1 - near), (self.gamma, central))
        return sum(weight * _scaled(x, pair) for weight, x in terms), pair

    def select(self, ctx: LayerContext) -> Keep:
        counts, limit = ctx.budget(self.keep, ctx.counts())
        score = self.score(ctx).masked_fill(ctx.protected, float("inf"))
        best = (limit - (self.recover * limit).round()).long()
        kept = top_k(score, ctx.visual, best) | (ctx.visual & ctx.protected)
        # Of the others in reading order, those at equal distances.
        rest = ctx.visual & ~kept
        place, left = rest.long().cumsum(1) - 1, rest.sum(1, keepdim=True).clamp(min=1)
        more = (limit - kept.sum(1)).clamp(min=0)[:, None]
        step = (place + 1) * more // left > place * more // left
        return Keep(kept | (rest & step), counts)


def _scaled(x: Tensor, pair: Tensor) -> Tensor:
    """Scaled to [0, 1] over the pairs of a sample."""
    low = x.masked_fill(~pair, float("inf")).amin((1, 2), keepdim=True)
    high = x.masked_fill(~pair, float("-inf")).amax((1, 2), keepdim=True)
    return torch.where(pair, (x - low) / (high - low).clamp(min=1e-12), 0)
