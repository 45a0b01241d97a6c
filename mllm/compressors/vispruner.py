"""VisPruner: the tokens that [CLS] looks at, and among the others those that repeat nobody."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import (
    Budget,
    Context,
    Features,
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
from mllm.errors import PlanError


@register("vispruner", paper="arXiv:2412.01818v2", stage="pre_llm")
@dataclass
class VisPruner(TokenReducer):
    """Half of the tokens by [CLS] attention, half by how little they repeat (VisPruner).

    The share `important` of the budget goes to the tokens with the highest attention of [CLS]. The
    others, by falling attention, lose `step` tokens a round until the rest of the budget is left:
    of the tokens at even places those go that are most like some token at an odd place, by the
    cosine of features before the projector; then come the even ones that stay, by rising
    similarity, and the odd ones.

    Under anyres each tile has its share of the important tokens, while duplicates are looked for in
    the whole image, `step` for each tile a round; the authors treat tiles apart. Their code loses
    a token where a round has an odd number; here none is lost. Without [CLS] the score is the
    attention that a token receives, and behind projectors that join patches features are those
    behind it.

    Args:
        keep: visual tokens kept per image.
        important: share of `keep` that is chosen by attention.
        step: tokens that leave in a round.
        positions: `compact` or `original`; None is `compact` (as the paper runs on LLaVA).
    """

    keep: Budget = 128 / 576
    important: float = 0.5
    step: int = 8
    positions: Positions | None = None

    site = "pre_projector"
    first = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise PlanError(
                f"vispruner: important={self.important!r} is not a share of keep",
                argument="important",
                given=self.important,
                expected="0 <= important <= 1",
            )
        if self.step < 1:
            raise PlanError(
                f"vispruner: step={self.step}", argument="step", given=self.step, expected="from 1"
            )

    def reads(self):
        return {
            "features": Features(), "attention": VisionAttention(heads="mean"), "grid": Grid()
        }  # fmt: skip

    @torch.no_grad()
    def reduce(self, ctx: Context) -> list:
        score, x, places = ctx["attention"], ctx["features"], ctx["grid"]
        images, tokens, width = x.shape
        budget = resolve(self.keep, tokens)
        first = int(self.important * budget)
        shares = on_device(even_shares(first, places.parts), score)
        keep = top_k_each(score, ctx.valid, on_device(places.part, score), shares)
        keep = fill_up(keep, score, ctx.valid, first)
        if first < budget < tokens:
            ctx.book(2 * tokens * tokens * width)
            others = score.masked_fill(keep, -torch.inf)
            rest = others.argsort(dim=1, descending=True, stable=True)
            rest = self._without_repeats(
                x, rest[:, : tokens - first], budget - first, self.step * places.parts
            )
            keep = keep.scatter(1, rest, True)
        elif first < budget:
            keep = ctx.valid
        return [Keep(keep, [budget] * images)]

    @staticmethod
    def _without_repeats(x: Tensor, rest: Tensor, count: int, step: int) -> Tensor:
        """`count` of the tokens in `rest`, int64 `[images, n]`, that repeat little."""
        unit = F.normalize(x.float(), dim=-1)
        like = unit @ unit.transpose(1, 2)
        while rest.shape[1] > count:
            even, odd = rest[:, ::2], rest[:, 1::2]
            pairs = like.gather(1, even[..., None].expand(-1, -1, like.shape[2]))
            pairs = pairs.gather(2, odd[:, None].expand(-1, even.shape[1], -1))
            order = pairs.amax(2).argsort(dim=1, stable=True)
            left = even.shape[1] - min(step, even.shape[1], rest.shape[1] - count)
            rest = torch.cat([even.gather(1, order[:, :left]), odd], 1)
        return rest
