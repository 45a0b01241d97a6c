"""The sanity rows of every report: random, uniform stride, average pooling, a smaller picture.

They read nothing of the picture's content. A method that does not beat them at its budget has
not shown that its choice of tokens matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mllm.compressors.base import (
    Budget,
    Context,
    Keep,
    LayerContext,
    LayerPruner,
    Pool,
    Positions,
    Resize,
    TokenReducer,
    register,
    resolve,
    top_k,
)


def grid_within(budget: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The largest (rows, cols) of the picture's shape with at most `budget` cells."""
    rows = max(1, min(grid[0], budget, int((budget * grid[0] / grid[1]) ** 0.5 + 1e-9)))
    return rows, max(1, min(grid[1], budget // rows))


@register("random", stage="pre_llm")
@dataclass
class Random(TokenReducer):
    """Keep visual tokens drawn at random, seeded by the plan and the image's content.

    Args:
        keep: visual tokens kept per image.
        seed: another draw.
        positions: `compact` or `original`; None is `compact`, like the methods it is
            compared with.
    """

    keep: Budget = 0.5
    seed: int = 0
    positions: Positions | None = None

    draws = True

    def reduce(self, ctx: Context) -> list:
        images, tokens = ctx.valid.shape
        draws = torch.stack([torch.rand(tokens, generator=g) for g in ctx.generators()])
        draws, count = draws.to(ctx.valid.device, non_blocking=True), resolve(self.keep, tokens)
        return [Keep(top_k(draws, ctx.valid, count), ctx.at_most(count))]


@register("randomllm", stage="llm", reference_layers=32)
@dataclass
class RandomLLM(LayerPruner):
    """Keep visual tokens drawn at random at a decoder layer: what FastV and its kind must beat.

    Args:
        layer: rows leave before this decoder layer; None is FastV's layer 2 of 32, scaled.
        keep: visual tokens kept, of those that arrive at the layer.
        seed: another draw.
        positions: `original` or `compact`; None is `original`, like FastV.
    """

    layer: int | None = None
    keep: Budget = 0.5
    seed: int = 0
    positions: Positions | None = None

    draws = True
    paper_layer = 2

    def score(self, ctx: LayerContext) -> torch.Tensor:
        draws = [torch.rand(max(ctx.n_entered), generator=g) for g in ctx.generators()]
        order = (ctx.visual.cumsum(1) - 1).clamp(0, max(ctx.n_entered) - 1)
        return torch.stack(draws).to(order.device, non_blocking=True).gather(1, order)


@register("stride", stage="pre_llm")
@dataclass
class Stride(TokenReducer):
    """Keep visual tokens at equal distances in reading order.

    Args:
        keep: visual tokens kept per image.
        positions: `compact` or `original`; None is `compact`.
    """

    keep: Budget = 0.5
    positions: Positions | None = None

    def reduce(self, ctx: Context) -> list:
        tokens = ctx.valid.shape[1]
        count = resolve(self.keep, tokens)
        rows = (torch.arange(count) * tokens + tokens // 2) // count
        keep = torch.zeros_like(ctx.valid)
        keep[:, rows.to(keep.device, non_blocking=True)] = True
        whole = min(ctx.counts()) == tokens
        return [Keep(keep & ctx.valid, ctx.at_most(count) if whole else None)]


@register("avgpool", stage="pre_llm")
@dataclass
class AvgPool(TokenReducer):
    """Average-pool the grid of projected tokens to at most `keep` cells.

    Args:
        keep: visual tokens per image; the largest grid of the picture's shape within it.
        positions: `compact` or `original` (the cell's middle token); None is `compact`.
    """

    keep: Budget = 0.25
    positions: Positions | None = None

    first = True
    actions = ("Pool",)
    oracle = "rebuild"

    def reduce(self, ctx: Context) -> list:
        return [Pool(grid_within(resolve(self.keep, ctx.valid.shape[1]), ctx.grid))]


@register("downsample", stage="pre_llm")
@dataclass
class Downsample(TokenReducer):
    """Shrink the picture itself until the tower yields at most `keep` tokens.

    The tower runs on the smaller picture with interpolated position embeddings, so this row is
    also cheaper in the tower.

    Args:
        keep: visual tokens per image; the largest grid of the picture's shape within it.
        positions: `compact` or `original` (the middle token of the area); None is `compact`.
    """

    keep: Budget = 0.25
    positions: Positions | None = None

    site = "pixels"
    first = True
    actions = ("Resize",)
    oracle = "rebuild"

    def reduce(self, ctx: Context) -> list:
        return [Resize(grid_within(resolve(self.keep, ctx.valid.shape[1]), ctx.grid))]
