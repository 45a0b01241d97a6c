"""Video-CCAM: learnt queries that stand in time read a video up to where they stand."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm.compressors.base import (
    Context,
    Grid,
    Positions,
    TokenReducer,
    Unprojected,
    register,
    resolve,
)
from mllm.compressors.elastic import Attention, check_heads, linear_flops, spread, start
from mllm.compressors.pooling import placed
from mllm.compressors.tokenflex import SwiGLU


class CausalQueries(nn.Module):
    """Queries in an order, each of which attends to all frames up to its own.

    Args:
        width: of the tower's features.
        out: of the new tokens.
        count: of queries.
        hidden: their width.
        heads: of the attention.
    """

    def __init__(self, width: int, out: int, count: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, hidden), std=0.02))
        self.norm_query, self.norm_key = nn.LayerNorm(hidden), nn.LayerNorm(width)
        self.attention = Attention(hidden, heads, width)
        self.ffn = SwiGLU(hidden, hidden, 4)
        self.project = nn.Linear(hidden, out)
        start(self)

    def forward(self, x: Tensor, frame: Tensor, count: int) -> Tensor:
        """`[images, count, out]`.

        Args:
            x: `[images, tokens, width]`.
            frame: int64 `[tokens]`, from 0; the last one is the last frame.
            count: queries that are asked, evenly over all.
        """
        every, frames = len(self.queries), frame[-1] + 1
        at = (2 * torch.arange(count, device=x.device) + 1) * every // (2 * count)
        own, x = self.queries[at][None], self.norm_key(x)
        seen = frame < -(-(at[:, None] + 1) * frames // every)
        own = own + self.attention(self.norm_query(own), x, x, seen)
        return self.project(own + self.ffn(own))

    def flops(self, x: Tensor, frame: Tensor, count: int) -> float:
        """Of one image."""
        behind = linear_flops(self.ffn, count) + linear_flops(self.project, count)
        return self.attention.flops(count, x.shape[1]) + behind


@register("videoccam", paper="arXiv:2408.14023", stage="pre_llm", trained=True)
@dataclass
class VideoCCAM(TokenReducer):
    """Let learnt queries read a video by cross-attention that is causal over frames (Video-CCAM).

    Query i of N attends to the first ceil(i T / N) of T frames, so a video of any length is N
    tokens in the order of time. One attention and an FFN with a gate stand for the model's
    projector, which is given nothing. A picture, tiled or not, is one frame: all of it is read.

    Args:
        keep: visual tokens per picture or video: so many queries, trained together. One with fewer
            tokens of its own keeps that many, of queries evenly spaced.
        hidden: width of queries.
        heads: of the attention.
        positions: `compact` or `original`; None is `compact`. Queries have no place of their own:
            they stand at tokens evenly spaced in reading order.
    """

    keep: int = 1024
    hidden: int = 1024
    heads: int = 16
    positions: Positions | None = None

    first = True
    replaces = True
    identity = None
    actions = ("Keep", "Merge", "Write")
    oracle = "rebuild"

    def reads(self):
        return {"features": Unprojected(), "grid": Grid()}

    def parts(self, width: int, tower: tuple[int, int]) -> dict[str, nn.Module]:
        check_heads("videoccam", self.heads, self.hidden)
        return {"queries": CausalQueries(tower[0], width, self.keep, self.hidden, self.heads)}

    def reduce(self, ctx: Context) -> list:
        x, frame = ctx["features"], ctx["grid"].frame
        count = resolve(self.keep, x.shape[1])
        if not frame[-1]:
            ctx.remark("one frame, of which every query sees all")
        made = ctx.route("queries", x, frame.to(x.device, non_blocking=True), count)
        return placed(ctx, *spread(x.shape[1], count), made)
