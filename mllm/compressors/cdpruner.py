"""CDPruner: keep tokens that are relevant to the question and unlike each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import (
    Budget,
    Context,
    Features,
    Grid,
    Joint,
    Keep,
    Positions,
    TextEmbeds,
    TokenReducer,
    even_shares,
    on_device,
    register,
    resolve,
)
from mllm.errors import PlanError


@register("cdpruner", paper="arXiv:2506.10967", stage="pre_llm")
@dataclass
class CDPruner(TokenReducer):
    """Keep the greedy MAP set of a determinantal point process given the question (CDPruner).

    The kernel is ``diag(q) S diag(q)``: S the cosines of the projected tokens, q how relevant a
    token is to the question, scaled to (0, 1] within each image (the authors' code scales over
    the batch, so that a choice would depend on its neighbours). Picking goes by the Cholesky
    update of the fast greedy algorithm, O(keep^2 tokens) for an image.

    `relevance="clip"` is the paper: cosines of patches and question in CLIP's joint space. Only
    for models whose tower is a CLIP, with its text half beside them (:mod:`mllm.joint`).
    `relevance="llm"` takes the cosines of projected tokens with the embeddings of the question's
    words, a stand-in where there is no text tower: it needs nothing more, and is the default. The
    paper's figures on LLaVA are those of "clip". The sign follows the space: in CLIP's, patches
    are like the words that they do not show, which the authors' code answers with a minus; an LLM
    that reads its tokens has no such inversion, and what OpenVINO GenAI makes of CDPruner for
    models without CLIP takes the plain mean.

    Args:
        keep: visual tokens kept per image.
        relevance: where the question is compared with the picture.
        negate: relevance is the negated mean cosine; None is yes for "clip" and no for "llm".
        tiles: under anyres each tile has its share of `keep` and is compared with itself alone, as
            in the authors' code; otherwise all tokens of an image are one set. What a tile is too
            small for goes to the others.
        theta: weight of relevance against diversity, q becomes exp(theta / (2 (1 - theta)) q);
            None is q itself.
        positions: `compact` or `original`; None is `compact` (as the paper runs on LLaVA).
    """

    keep: Budget = 0.222
    relevance: Literal["llm", "clip"] = "llm"
    negate: bool | None = None
    theta: float | None = None
    tiles: bool = True
    positions: Positions | None = None

    named = ("relevance",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.theta is not None and not 0 <= self.theta < 1:
            raise PlanError(
                f"cdpruner: theta={self.theta!r} is not from 0 to 1",
                argument="theta",
                given=self.theta,
                expected="0 <= theta < 1",
            )

    def reads(self):
        clip = self.relevance == "clip"
        return {
            "features": Features(), "text": Joint() if clip else TextEmbeds(), "grid": Grid()
        }  # fmt: skip

    @torch.no_grad()
    def reduce(self, ctx: Context) -> list:
        x = F.normalize(ctx["features"].float(), dim=-1)
        images, tokens, width = x.shape
        count = resolve(self.keep, tokens)
        same = x @ x.transpose(1, 2)
        same = (same + same.transpose(1, 2)) / 2  # exactly symmetric, so that ties are ties
        ctx.book(2 * tokens * tokens * width + count * (count - 1) * tokens)
        part = shares = None
        if self.tiles and any(ctx["grid"].tiles):
            part = on_device(ctx["grid"].part, same)
            shares = on_device(even_shares(count, ctx["grid"].parts), same)
        keep = greedy_map(same, self._relevance(ctx, x), ctx.valid, count, part, shares)
        return [Keep(keep, ctx.at_most(count))]

    def _relevance(self, ctx: Context, x: Tensor) -> Tensor:
        """q: fp32 `[images, tokens]`."""
        text = ctx["text"]
        if self.relevance == "clip":
            x, words = F.normalize(text.patches.float(), dim=-1), text.text
        else:
            words = text.embeds
        words = F.normalize(words.float(), dim=-1) * text.valid[..., None]
        # The mean of cosines is the cosine with the mean of unit vectors.
        mean = words.sum(1) / text.valid.sum(1, keepdim=True).clamp(min=1)
        ctx.book(2 * x.shape[1] * x.shape[2])
        q = (x @ mean[..., None])[..., 0]
        negate = self.relevance == "clip" if self.negate is None else self.negate
        q = -q if negate else q
        low = q.masked_fill(~ctx.valid, float("inf")).amin(1, keepdim=True)
        high = q.masked_fill(~ctx.valid, float("-inf")).amax(1, keepdim=True)
        q = (q - low + 1e-6) / (high - low).clamp(min=1e-6)
        if self.theta is not None:
            q = torch.exp(self.theta / (2 * (1 - self.theta)) * q)
        return q


def greedy_map(
    same: Tensor, weight: Tensor, among: Tensor, count: int, part: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """Greedy MAP of the DPP with kernel ``diag(weight) same diag(weight)``; ties to the earlier.

    Args:
        same: fp32 `[images, tokens, tokens]`, similarities.
        weight: fp32 `[images, tokens]`, qualities.
        among: bool `[images, tokens]`, tokens that may be picked.
        count: picks, at most.
        part: int64 `[tokens]`; tokens of several parts have nothing to do with each other.
        shares: int64 `[parts]`, picks of each part, before those that others cannot make.

    Returns:
        bool `[images, tokens]`.
    """
    images, tokens, _ = same.shape
    rows = torch.arange(images, device=same.device)
    gain = weight.square() * same.diagonal(dim1=1, dim2=2)
    factor = same.new_zeros(images, count, tokens)
    keep = torch.zeros_like(among)
    if part is not None:
        same = same * (part[:, None] == part)
        left = shares.repeat(images, 1)
    for i in range(count):
        # The determinant grows by the factor `gain` with each pick.
        free = among & ~keep
        if part is not None:
            own = free & (left[:, part] > 0)
            free = torch.where(own.any(1, keepdim=True), own, free)
        pick = gain.masked_fill(~free, float("-inf")).argmax(1)
        best = gain[rows, pick][:, None]
        kernel = weight[rows, pick][:, None] * same[rows, pick] * weight
        own = factor[rows, :i, pick]
        step = kernel - (own[:, None] @ factor[:, :i])[:, 0]
        # Where nothing new is left, what is computed is rounding.
        step = torch.where(best > 1e-9, step / best.clamp(min=1e-9).sqrt(), 0)
        factor[:, i] = step
        gain = (gain - step.square()).clamp(min=0)
        keep[rows, pick] = True
        if part is not None:
            left[rows, part[pick]] -= 1
    return keep & among
