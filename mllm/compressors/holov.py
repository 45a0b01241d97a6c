"""HoloV: every strip of the picture gets a share of the tokens, by attention and variety."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import (
    Budget,
    Context,
    Features,
    Keep,
    Positions,
    TokenReducer,
    VisionAttention,
    register,
    resolve,
    top_k,
)
from mllm.errors import PlanError


@register("holov", paper="arXiv:2510.02912", stage="pre_llm")
@dataclass
class HoloV(TokenReducer):
    """Share the budget out to strips of the picture; in each the best attended tokens stay (HoloV).

    The tokens in reading order are cut into `crops` strips of equal length. A token scores
    ``a + beta gamma V``: a its [CLS] attention, V the variance of its cosines within the strip,
    gamma = mean a / mean V over the image. A strip's quota is its share of the strips' mean scores
    (to the power tau), rounded down, at most its length; what is left goes one by one to the
    strips with the largest share. Within a strip attention alone decides, as in the authors' code
    (which also brings in the factor beta; the paper has gamma V + a). Bringing pruned tokens back
    in the decoder, of which the paper speaks, is not in that code and not here.

    Under anyres the strips are those of the whole sequence.
    Attention is a mean over heads; a tower without [CLS] is scored by what a token receives. The
    variance is taken before the projector, where a family has that site.

    Args:
        keep: visual tokens kept per image.
        crops: strips; None is 16 of 576 tokens at the paper's budget of a ninth, more as the
            picture grows and fewer as the budget does, as the authors do on Qwen2.5-VL.
        beta: weight of variety against attention.
        tau: power of a strip's mean score.
        positions: `compact` or `original`; None is `compact` (as the paper runs on LLaVA).
    """

    keep: Budget = 1 / 9
    crops: int | None = 16
    beta: float = 0.09
    tau: float = 1.0
    positions: Positions | None = None

    site = "pre_projector"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.crops is not None and self.crops < 1:
            raise PlanError(
                f"holov: crops={self.crops}", argument="crops", given=self.crops, expected="from 1"
            )

    def reads(self):
        return {"features": Features(), "attention": VisionAttention(heads="mean")}

    @torch.no_grad()
    def reduce(self, ctx: Context) -> list:
        x = F.normalize(ctx["features"].float(), dim=-1)
        images, tokens, width = x.shape
        count = resolve(self.keep, tokens)
        crops = min(tokens, self.crops or max(1, 1024 * tokens // (576 * count)))
        at, real = _strips(tokens, crops)
        at, real = (t.to(x.device, non_blocking=True) for t in (at, real))
        there = real & ctx.valid[:, at]  # [images, crops, length]
        attention = ctx["attention"].float()[:, at] * there
        ctx.book(2 * at.numel() * at.shape[1] * width)

        score = self._score(x[:, at] * there[..., None], attention, there)
        length = there.sum(2)
        weight = (score.sum(2) / length.clamp(min=1)).pow(self.tau)
        budget = length.sum(1, keepdim=True).clamp(max=count)
        quota = _quotas(weight, length, budget, at.shape[1])
        chosen = top_k(attention.flatten(0, 1), there.flatten(0, 1), quota.flatten())
        flat = at.masked_fill(~real, tokens).flatten().expand(images, -1)
        keep = torch.zeros(images, tokens + 1, dtype=torch.bool, device=x.device)
        keep = keep.scatter(1, flat, chosen.view(images, -1))[:, :tokens]
        return [Keep(keep, ctx.at_most(count))]

    def _score(self, x: Tensor, attention: Tensor, there: Tensor) -> Tensor:
        """fp32 `[images, crops, length]`, zero where no token is."""
        same = x @ x.transpose(2, 3)
        same.diagonal(dim1=2, dim2=3).zero_()
        others = (there.sum(2) - 1).clamp(min=1)[..., None]
        mean = same.sum(3) / others
        # A token's own similarity counts as the zero that it was set to.
        apart = (same - mean[..., None]).square() * there[:, :, None]
        variety = apart.sum(3) / others * there
        gamma = attention.sum((1, 2)) / variety.sum((1, 2)).clamp(min=1e-12)
        return attention + self.beta * gamma[:, None, None] * variety


def _strips(tokens: int, crops: int) -> tuple[Tensor, Tensor]:
    """Tokens of each strip, `[crops, length]`, and which there are; the first are one longer."""
    size = tokens // crops + (torch.arange(crops) < tokens % crops)
    place = torch.arange(-(-tokens // crops))
    real = place < size[:, None]
    return ((size.cumsum(0) - size)[:, None] + place).masked_fill(~real, 0), real


def _quotas(weight: Tensor, length: Tensor, budget: Tensor, most: int) -> Tensor:
    """Tokens of each strip: int64 `[images, crops]`, `budget` `[images, 1]` together.

    Args:
        weight: `[images, crops]`, not negative.
        length: tokens that each strip has, at most `most`.
        budget: int64 `[images, 1]`, not more than there are.
        most: length of the longest strip.
    """
    share = weight / weight.sum(1, keepdim=True).clamp(min=1e-12)
    quota = torch.minimum((share * budget).floor().long(), length)
    left = (budget - quota.sum(1, keepdim=True)).clamp(min=0)
    # Seats that are free, in rounds; in each the largest share comes first.
    rank = share.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    place = torch.arange(most, device=weight.device)
    free = place < (length - quota)[..., None]
    turn = place * weight.shape[1] + rank[..., None]
    return quota + top_k(-turn.flatten(1), free.flatten(1), left[:, 0]).view_as(free).sum(2)
