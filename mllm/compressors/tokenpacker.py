"""TokenPacker: coarse tokens gather what the fine ones around them know."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.compressors.base import (
    BlockFeatures,
    Context,
    Grid,
    Positions,
    Unprojected,
    register,
    remembered,
)
from mllm.compressors.elastic import Attention, check_heads, linear_flops, mlp, start
from mllm.compressors.pooling import PoolingWithin, Size

# Blocks 11, 15, 21 and 22 of 24 are the released model's (CLIP's hidden states 12, 16, 22, 23).
LEVELS = (11 / 24, 15 / 24, 21 / 24, 22 / 24)


@remembered
def regions(size: Size, coarse: Size) -> tuple[Tensor, Tensor | None]:
    """Tokens of a grid that each cell of a coarser one covers, as adaptive pooling has them.

    Returns:
        int64 `[cells, most]`, and bool of the same shape, false for fillers; None without any.
    """
    spans = [
        [range(i * n // m, -(-(i + 1) * n // m)) for i in range(m)]
        for n, m in zip(size, coarse, strict=True)
    ]
    cells = [
        [(f * size[1] + r) * size[2] + c for f, r, c in itertools.product(*cell)]
        for cell in itertools.product(*spans)
    ]
    most = max(map(len, cells))
    at = torch.tensor([cell + cell[:1] * (most - len(cell)) for cell in cells])
    there = torch.arange(most) < torch.tensor([[len(cell)] for cell in cells])
    return at, None if bool(there.all()) else there


class Packer(nn.Module):
    """Point-to-region attention, and a projector behind it.

    Args:
        width: of the features that queries are made of.
        block: of a tower block; that of the attention.
        out: of the new tokens.
        heads: of the attention.
    """

    def __init__(self, width: int, block: int, out: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, block, bias=False)
        self.key, self.value = (mlp(len(LEVELS) * block, block, block) for _ in range(2))
        self.norm_query, self.norm_key, self.norm_value = (
            nn.LayerNorm(block, eps=1e-6) for _ in range(3)
        )
        self.attention = Attention(block, heads)
        self.project = mlp(block, out, out)
        start(self)

    def forward(self, coarse: Tensor, fine: Tensor, at: Tensor, there: Tensor | None) -> Tensor:
        """`[images, cells, out]`.

        Args:
            coarse: `[images, cells, width]`.
            fine: `[images, tokens, levels x block]`.
            at, there: see :func:`regions`.
        """
        images, cells, _ = coarse.shape
        query = self.norm_query(self.query(coarse)).flatten(0, 1)[:, None]
        key, value = (
            x[:, at].flatten(0, 1)
            for x in (self.norm_key(self.key(fine)), self.norm_value(self.value(fine)))
        )
        mask = None if there is None else there.repeat(images, 1)[:, None, None]
        packed = self.attention(query, key, value, mask)
        return self.project(packed.view(images, cells, -1))

    def flops(self, coarse: Tensor, fine: Tensor, at: Tensor, there: Tensor | None) -> float:
        """Of one image."""
        cells, most = at.shape
        around = linear_flops(self.query, cells) + linear_flops(self.project, cells)
        levels = linear_flops(self.key, fine.shape[1]) + linear_flops(self.value, fine.shape[1])
        return around + levels + cells * self.attention.flops(1, most)


@register("tokenpacker", paper="arXiv:2407.02392", stage="pre_llm", trained=True)
@dataclass
class TokenPacker(PoolingWithin):
    """Let each token of a coarse grid attend to the fine ones in its region (TokenPacker).

    Queries are the tower's features, made smaller bilinearly; keys and values are those of four
    tower blocks. Their attention and a projector stand for the model's, which is given nothing.

    Args:
        keep: visual tokens per image; the largest grid of the picture's shape within it: 144, 64
            and 36 of 24 x 24 are the paper's scales 2, 3 and 4. Each is trained on its own.
        heads: of the attention.
        positions: `compact` or `original` (the region's middle token); None is `compact`.
    """

    keep: int = 144
    heads: int = 8
    positions: Positions | None = None

    identity = None
    replaces = True

    def reads(self):
        return {"features": Unprojected(), "levels": BlockFeatures(LEVELS), "grid": Grid()}

    def parts(self, width: int, tower: tuple[int, int]) -> dict[str, nn.Module]:
        check_heads("tokenpacker", self.heads, tower[1])
        return {"packer": Packer(*tower, width, self.heads)}

    def source(self, ctx: Context) -> Tensor:
        return torch.cat([ctx["features"], ctx["levels"]], 2)

    def made(self, ctx: Context, x: Tensor, size: Size) -> Tensor:
        fine, levels = x.split([ctx["features"].shape[2], ctx["levels"].shape[2]], 1)
        coarse = F.interpolate(fine.float(), size, mode="trilinear").to(x)
        at, there = (
            None if t is None else t.to(x.device) for t in regions(tuple(x.shape[2:]), size)
        )
        coarse, levels = (t.flatten(2).transpose(1, 2) for t in (coarse, levels))
        return ctx.route("packer", coarse, levels, at, there)
