"""ToMe: tokens that are alike merge, block after block, inside the vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mllm.compressors.base import (
    Budget,
    Merge,
    Positions,
    TowerContext,
    TowerReducer,
    register,
    resolve,
)
from mllm.errors import PlanError


@register(
    "tome",
    paper="arXiv:2210.09461",
    stage="pre_llm",
    licence_note="written from the paper; the authors' code is CC BY-NC 4.0",
)
@dataclass
class ToMe(TowerReducer):
    """Merge the most similar pairs of a bipartite matching in every tower block (ToMe).

    Between attention and MLP the tokens are dealt out to two sets by turns, [CLS], which stays,
    among the first. Every token of the first set proposes to the one of the second whose key
    (mean over heads) has the largest cosine to its own; the r best proposals merge, as a mean
    weighted by size. Later blocks attend to a token as often as it has members (log size on its
    logits). Tokens keep the order of the picture, and a merged one the place of its receiver;
    the authors' code puts the second set behind the first.

    Args:
        keep: patches that leave the tower, per image. As many merge in each block that the
            projector sees as are needed to get there.
        inflect: the schedule: 0 is as many in every block, -1 falls to none in the last, 1 rises
            from none in the first.
        r: pairs per block instead of `keep` and `inflect`: one number for all blocks, or one for
            each from the first on.
        proportional: attend by size; a tower trained with masked patches is better without.
        positions: `compact` or `original` (of the receiver); None is `compact`.
    """

    keep: Budget = 0.333
    inflect: float = 0.0
    r: tuple[int, ...] | None = None
    proportional: bool = True
    positions: Positions | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not -1 <= self.inflect <= 1 or any(r < 0 for r in self.r or ()):
            raise PlanError(
                f"tome: inflect={self.inflect} and r={self.r} are no schedule",
                argument="inflect",
                given=self.inflect,
                expected="-1 <= inflect <= 1, r from 0",
            )

    def blocks(self, depth: int) -> Sequence[int]:
        return range(depth if self.r is None or len(self.r) == 1 else min(depth, len(self.r)))

    def merge(self, ctx: TowerContext) -> Merge:
        keys = F.normalize(ctx["keys"].float(), dim=-1)
        images, tokens, width = keys.shape
        own = torch.arange(tokens, device=keys.device)
        first, second = own[::2], own[1::2]
        most = min(len(first) - (ctx.prefix + 1) // 2, len(second) - ctx.prefix // 2)
        pairs = self._pairs(ctx, tokens - ctx.prefix, most)
        if not pairs:
            return Merge(own.expand(images, -1))

        like = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
        ctx.book(2 * len(first) * len(second) * width)
        staying = (first < ctx.prefix)[:, None] | (second < ctx.prefix)
        best, to = like.masked_fill(staying, float("-inf")).max(2)
        gone = best.argsort(dim=1, descending=True, stable=True)[:, :pairs]
        return Merge(own.repeat(images, 1).scatter(1, first[gone], second[to.gather(1, gone)]))

    def _pairs(self, ctx: TowerContext, there: int, most: int) -> int:
        """Pairs that merge in this block, of `there` patches; `most` are possible."""
        if self.r is not None:
            return min(self.r[0 if len(self.r) == 1 else ctx.block], most)
        target = resolve(self.keep, ctx.patches)
        done, depth = ctx.block + 1, ctx.depth
        # The integral of a line from 1 - inflect to 1 + inflect, as a share of the whole.
        share = (1 - self.inflect) * done / depth + self.inflect * (done / depth) ** 2
        left = ctx.patches - round((ctx.patches - target) * share)
        left = min(left, target * 2 ** (depth - done))  # no block can do more than halve
        if done == depth and there - left > most:
            raise PlanError(
                f"tome: pairs leave at least {there - most} of {ctx.patches} patches after "
                f"{depth} blocks of this schedule",
                argument="keep",
                given=self.keep,
                expected=f"keep >= {there - most}",
            )
        return max(0, min(there - left, most))
