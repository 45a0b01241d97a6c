"""MQT: learnt queries in an order, of which the first ones are enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.compressors.base import (
    Context,
    Grid,
    Positions,
    TokenReducer,
    Unprojected,
    register,
    remembered,
    resolve,
)
from mllm.compressors.elastic import (
    Attention,
    Elastic,
    check_heads,
    linear_flops,
    spread,
    start,
)
from mllm.compressors.pooling import placed, shares, stacks
from mllm.errors import PlanError


@remembered
def sincos(width: int, side: int) -> Tensor:
    """Sines and cosines of column, then of row, of a square: fp32 `[side**2, width]`."""
    wave = 10_000 ** -(torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * wave
    own = torch.cat([angle.sin(), angle.cos()], 1)
    return torch.cat([own.repeat(side, 1), own.repeat_interleave(side, 0)], 1)


def on_grid(places: Tensor, size: tuple[int, int]) -> Tensor:
    """Places of a square, `[side**2, width]`, over a grid of (rows, cols): `[1, tokens, width]`."""
    side = math.isqrt(len(places))
    square = places.T.unflatten(1, (side, side))[None]
    return F.interpolate(square, size, mode="bicubic").flatten(2).transpose(1, 2)


def check_places(name: str, width: int) -> None:
    """PlanError unless features of a width can have places."""
    if width % 4:
        raise PlanError(
            f"{name}: places take four parts of the width, and {width} has not",
            argument="model", given=width, expected="a model whose width is a multiple of 4",
        )  # fmt: skip


class Resampler(nn.Module):
    """Queries that attend to a grid by place.

    Args:
        width: of the tower's features.
        out: of the new tokens.
        side: queries lie on a square of `side` x `side`.
        heads: of the attention.
    """

    def __init__(self, width: int, out: int, side: int, heads: int) -> None:
        super().__init__()
        self.side = side
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(side**2, width), std=0.02))
        self.norm_query, self.norm_key, self.norm_value = (
            nn.LayerNorm(width, eps=1e-6) for _ in range(3)
        )
        self.attention = Attention(width, heads)
        start(self)
        self.project = nn.Linear(width, out, bias=False)
        nn.init.normal_(self.project.weight, std=out**-0.5)

    def forward(self, x: Tensor, size: tuple[int, int], count: int) -> Tensor:
        """`[images, count, out]` from `[images, rows x cols, width]` and (rows, cols)."""
        places = sincos(x.shape[2], self.side).to(x.device)
        keys = on_grid(places, size)
        query = self.norm_query(self.queries[:count] + places[:count].to(x.dtype))[None]
        made = self.attention(query, self.norm_key(keys.to(x.dtype)), self.norm_value(x))
        return self.project(made)

    def flops(self, x: Tensor, size: tuple[int, int], count: int) -> float:
        """Of one image."""
        projecting = linear_flops(self.project, count)
        return self.attention.flops(count, x.shape[1]) + projecting


@register("mqt", paper="arXiv:2405.19315", stage="pre_llm", trained=True)
@dataclass
class MQT(Elastic, TokenReducer):
    """Let the first of an ordered set of learnt queries read the tower's features (MQT).

    One attention stands for the model's projector, which is given nothing. As in the authors'
    code, its keys are the places alone, so what a query reads of is learnt, and not chosen by the
    picture. Training draws how many queries there are, all even numbers alike.

    Args:
        keep: visual tokens per image: so many queries; None is all. Each grid of a tiled
            picture, and each frame of a video, has its own, in number by its size.
        queries: in all, a square.
        heads: of the attention.
        train: `draw`, or `keep`, which trains that many alone, as the paper's first stage does.
        weights: how often each of 2, 4, ... queries is drawn; None is equally often.
        positions: `compact` or `original`; None is `compact`. Queries have no place of their own:
            they stand at tokens evenly spaced in reading order.
    """

    keep: int | None = None
    queries: int = 256
    heads: int = 16
    train: Literal["draw", "keep"] = "draw"
    weights: tuple[float, ...] | None = None
    positions: Positions | None = None

    first = True
    actions = ("Keep", "Merge", "Write")
    oracle = "rebuild"
    identity = None
    replaces = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries < 4 or math.isqrt(self.queries) ** 2 != self.queries:
            raise self._wrong("queries", "a square number from 4", "for example 256")

    def reads(self):
        return {"features": Unprojected(), "grid": Grid()}

    def parts(self, width: int, tower: tuple[int, int]) -> dict[str, nn.Module]:
        check_heads("mqt", self.heads, tower[0])
        check_places("mqt", tower[0])
        side = math.isqrt(self.queries)
        return {"resampler": Resampler(tower[0], width, side, self.heads)}

    def trained(self) -> Sequence[int]:
        return range(2, self.queries + 1, 2)

    def served(self) -> Sequence[int]:
        return range(1, self.queries + 1)

    def reduce(self, ctx: Context) -> list:
        x, grids = ctx["features"], []
        for stack in stacks(ctx["grid"]):
            frames, rows, cols = stack.size
            grids += [(stack.start + i * rows * cols, rows, cols) for i in range(frames)]
        sizes = [rows * cols for _, rows, cols in grids]
        at, into, made = [], [], []
        counts = shares(resolve(self.keep, x.shape[1]), sizes)
        for (begin, *size), tokens, count in zip(grids, sizes, counts, strict=True):
            own = x[:, begin : begin + tokens]
            if count:
                made.append(ctx.route("resampler", own, tuple(size), count))
            seat, goes = spread(tokens, count)
            at.append(seat + begin)
            into.append(torch.where(goes < 0, -1, goes + begin))
        return placed(ctx, torch.cat(at), torch.cat(into), torch.cat(made, 1))
