"""LLaVA-PruMerge and PruMerge+: outliers of [CLS] attention, with others added to them."""

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
    Keep,
    Merge,
    Positions,
    TokenReducer,
    VisionAttention,
    VisionKeys,
    Write,
    on_device,
    register,
    resolve,
    top_k,
)
from mllm.errors import PlanError

TINY = torch.finfo(torch.float32).tiny  # attention may be far below 1e-12


@register("prumerge", paper="arXiv:2403.15388", stage="pre_llm")
@dataclass
class PruMerge(TokenReducer):
    """Keep the outliers of [CLS] attention and add others to them (LLaVA-PruMerge).

    Attention `a` is one softmax over the full width of the tower's last block. Tokens with `a`
    above Q3 + 1.5 (Q3 - Q1) stay, so their number is the picture's own; `keep` fixes it. Each that
    stays becomes `x_i + sum of a_j x_j` over the `neighbours` tokens, kept or not, with the most
    similar keys; one more token is the sum of `a_j x_j` over all that go. In the sequence they
    stand by falling attention, that token last.

    This is the code; the paper reads the block before and takes a weighted mean. The code takes
    the quartiles over a batch, here every image has its own. Under anyres neighbours are of the
    same tile. Without [CLS] `a` is the attention that a token receives; in each tile it is scaled
    to sum to one at most, as a row of [CLS] does.

    Args:
        keep: visual tokens per image, the one for the rest included; None is adaptive.
        neighbours: tokens that are added to each.
        merge: `sum` (the code), `mean` (the paper's weighted mean) or `none` (selection alone).
        last: read the tower's last block (the code), not the one that feeds the projector.
        positions: `compact` or `original`; None is `compact` (as the paper runs on LLaVA).
    """

    keep: Budget | None = None
    neighbours: int = 32
    merge: Literal["sum", "mean", "none"] = "sum"
    last: bool = True
    positions: Positions | None = None

    site = "pre_projector"
    first = True
    actions = ("Keep", "Merge", "Write")
    # Not with the paper's layout: every token has others added to it, in another order.
    identity = {"keep": 1.0, "merge": "none", "positions": "original"}
    oracle = "rebuild"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours < 0:
            raise PlanError(
                f"{self.info.name}: neighbours={self.neighbours}",
                argument="neighbours",
                given=self.neighbours,
                expected="from 0",
            )

    def reads(self):
        block = 1.0 if self.last else None
        return {
            "features": Features(),
            "attention": VisionAttention(block=block, heads="joint"),
            "keys": VisionKeys(block=block, heads="joint"),
            "grid": Grid(),
        }

    def reduce(self, ctx: Context) -> list:
        x, part = ctx["features"], on_device(ctx["grid"].part, ctx.valid)
        images, tokens, width = x.shape
        a = self._at_most_one(ctx["attention"], part, ctx["grid"].parts)
        own = torch.arange(tokens, device=x.device).expand(images, -1)

        budget = None if self.keep is None else resolve(self.keep, tokens)
        rest = self.merge != "none" and (budget is None or 1 < budget < tokens)
        best, keep = self.choose(a, ctx.valid, None if budget is None else budget - rest)
        gone, seat = ~keep, keep.int().argmin(1, keepdim=True)
        if rest:
            keep = keep | (gone & (own == seat))
        counts = keep.sum(1).tolist() if budget is None else [budget] * images
        into = torch.where(keep, own, seat if rest else -1)

        values = x
        if self.merge != "none":
            rows = keep.int().argsort(dim=1, descending=True, stable=True)[:, : max(counts)]
            merged = self._merged(x, a, ctx["keys"], rows, part)
            ctx.book([2 * n * tokens * (ctx["keys"].shape[2] + width) for n in counts])
            values = x.scatter(1, rows[..., None].expand_as(merged), merged)
        if rest:
            weight = a * gone
            if self.merge == "mean":
                weight = weight / weight.sum(1, keepdim=True).clamp(min=TINY)
            ctx.book(2 * tokens * width)
            summary = (weight[:, None] @ x.float()).to(x.dtype)
            at_seat = (gone & (own == seat))[..., None]
            values = torch.where(at_seat, summary, values)

        # By falling attention, then the others in grid order, then the one for the rest.
        rank = a.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        key = torch.where(best, rank, torch.where(gone, 2 * tokens, tokens) + own)
        place = key.argsort(dim=1).argsort(dim=1)
        return [Keep(keep, counts), Merge(into), Write(values, order=place)]

    def choose(self, a: Tensor, valid: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        """The most attended tokens, and all that stay: bool `[images, tokens]` each.

        `count` of them; None is the rule of the outliers.
        """
        best = top_k(a, valid, self.outliers(a) if count is None else count)
        return best, best

    @staticmethod
    def outliers(a: Tensor) -> Tensor:
        """How many values of each image lie above the upper whisker, at least one."""
        low, high = torch.quantile(a, torch.tensor([0.25, 0.75], device=a.device), dim=1)
        return (a > (high + 1.5 * (high - low))[:, None]).sum(1).clamp(min=1)

    @staticmethod
    def _at_most_one(a: Tensor, part: Tensor, parts: int) -> Tensor:
        """Attention scaled down so that it sums to one at most over every tile."""
        total = a.new_zeros(len(a), parts).index_add(1, part, a)
        return a / total.clamp(min=1)[:, part]

    def _merged(self, x: Tensor, a: Tensor, keys: Tensor, rows: Tensor, part: Tensor) -> Tensor:
        """What stands at `rows`, int64 `[images, n]`: `[images, n, width]`."""
        tokens = x.shape[1]
        keys = F.normalize(keys.float(), dim=-1)
        like = keys.gather(1, rows[..., None].expand(-1, -1, keys.shape[2])) @ keys.transpose(1, 2)
        other = rows[..., None] == torch.arange(tokens, device=x.device)
        other |= part[rows][..., None] != part
        like = like.masked_fill(other, float("-inf"))
        near = like.argsort(dim=2, descending=True, stable=True)[..., : self.neighbours]
        weight = torch.zeros_like(like).scatter(2, near, a[:, None].expand_as(like).gather(2, near))
        weight = weight.masked_fill(other, 0)
        base = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2])).float()
        added = weight @ x.float()
        if self.merge == "sum":
            return (base + added).to(x.dtype)
        mine = a.gather(1, rows)[..., None]
        total = mine + weight.sum(2, keepdim=True)
        return torch.where(total > 0, (mine * base + added) / total.clamp(min=TINY), base).to(x)


@register("prumergeplus", paper="arXiv:2403.15388", stage="pre_llm")
@dataclass
class PruMergePlus(PruMerge):
    """PruMerge with tokens at equal distances beside the outliers (PruMerge+).

    Of `n` outliers among `N` tokens, every `int(int(N / n) / 3)`-th token stays as well: about four
    times as many in all. Under a fixed `keep` the share `important` is chosen by attention and the
    others stand at equal distances among those left.

    Args:
        keep: visual tokens per image, the one for the rest included; None is adaptive.
        important: share of `keep` that is chosen by attention.
        neighbours, merge, last, positions: as in :class:`PruMerge`.
    """

    important: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise PlanError(
                f"prumergeplus: important={self.important!r} is not a share of keep",
                argument="important",
                given=self.important,
                expected="0 <= important <= 1",
            )

    def choose(self, a: Tensor, valid: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
        tokens = a.shape[1]
        own = torch.arange(tokens, device=a.device)
        if count is None:
            found = self.outliers(a)
            step = (tokens // found // 3).clamp(min=1)[:, None]
            best = top_k(a, valid, found)
            # The authors' range ends before the last token.
            return best, best | ((own % step == 0) & (own < tokens - 1))
        first = max(1, round(self.important * count))
        best = top_k(a, valid, first)
        left, more = tokens - first, count - first
        rest = best.int().argsort(dim=1, stable=True)[:, :left]
        even = (torch.arange(more) * left + left // 2) // max(1, more)
        return best, best.scatter(1, rest[:, on_device(even, a)], True)
