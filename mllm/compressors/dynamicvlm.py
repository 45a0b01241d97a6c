"""Dynamic-VLM: the longer a video is, the coarser its frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from mllm.compressors.base import Context, Grid, Positions, Unprojected, register
from mllm.compressors.elastic import Elastic, linear_flops, mlp
from mllm.compressors.pooling import Pooling, Size, Stack


class Projection(nn.Module):
    """What makes visual tokens of pooled features: an MLP of two layers, as LLaVA-1.5 has.

    Args:
        width: of the features.
        out: of the tokens, and inside.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layers = mlp(width, out, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def flops(self, x: Tensor) -> float:
        """Of one image of `x`, `[images, tokens, width]`."""
        return linear_flops(self, x.shape[1])


@register("dynamicvlm", paper="arXiv:2412.09530", stage="pre_llm", trained=True)
@dataclass
class DynamicVLM(Elastic, Pooling):
    """Divide a video's tokens among its frames, and pool each frame to a square (Dynamic-VLM).

    With T frames there are ``M = min(keep, total / T)`` tokens for each; the tower's features are
    average-pooled to as many rows as columns, as many as M allows, and projected by an MLP of the
    plan's own, so that the model's projector is given nothing. A picture, and each view of a tiled
    one, is a frame by itself. That the MLP is LLaVA's, and comes behind pooling, is ours.

    Args:
        keep: M at most; None is `most`. Training draws it, unless `train` says otherwise.
        least, most: the range that training draws from, evenly, once for a batch.
        total: tokens of a video; each frame has one at least. The paper has 12,000 for 7B and
            10,000 for 14B.
        train: `draw`, or `keep`, which trains with that one.
        positions: `compact` or `original` (the cell's middle token); None is `compact`.
    """

    keep: int | None = None
    least: int = 16
    most: int = 576
    total: int = 12_000
    train: Literal["draw", "keep"] = "draw"
    positions: Positions | None = None

    weights: ClassVar[None] = None  # all budgets alike
    free = ("keep", "train", "total")
    identity = None
    replaces = True

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise self._wrong("least", "a number from 1", f"1 <= least <= most={self.most}")
        if self.total < 1:
            raise self._wrong("total", "a number of tokens", "a number from 1")
        super().__post_init__()

    def reads(self):
        return {"features": Unprojected(), "grid": Grid()}

    def parts(self, width: int, tower: tuple[int, int]) -> dict[str, nn.Module]:
        return {"projector": Projection(tower[0], width)}

    def trained(self) -> Sequence[int]:
        return range(self.least, self.most + 1)

    def served(self) -> Sequence[int]:
        return range(1, self.most + 1)

    def levels(self, grids: list[Stack]) -> list[list[Size]]:
        return [[self._squares(*grid.size)] for grid in grids]

    def _squares(self, frames: int, rows: int, cols: int) -> Size:
        share = max(1, min(self.keep, self.total // frames))
        side = math.isqrt(share)
        return frames, min(side, rows), min(side, cols)

    def made(self, ctx: Context, x: Tensor, size: Size) -> Tensor:
        return ctx.route("projector", super().made(ctx, x, size))
