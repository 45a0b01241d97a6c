"""Dynamic-VLM: the longer a video is, the coarser its frames."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn

from mllm.compressors.base import Context, Grid, Positions, Unprojected, register
from mllm.compressors.elastic import Elastic, linear_flops
from mllm.compressors.pooling import Pooling, Size, Stack


class Projector(nn.Sequential):
    """Two linear layers with a GELU between them, as LLaVA has.

    Args:
        width: of the input.
        out: of the output, and in between.
    """

    def __init__(self, width: int, out: int) -> None:
        super().__init__(nn.Linear(width, out), nn.GELU(), nn.Linear(out, out))

    def flops(self, x: Tensor) -> float:
        """Of one image of `x`, `[images, tokens, width]`."""
        return linear_flops(self, x.shape[1])


@register("dynamicvlm", paper="arXiv:2412.09530", stage="pre_llm", trained=True)
@dataclass
class DynamicVLM(Elastic, Pooling):
    """Share a budget over the frames of a video, and pool each to a square within (Dynamic-VLM).

    A frame gets ``min(keep, total / frames)`` tokens, the largest square within, by adaptive
    average pooling of the tower's features. A projector like LLaVA's makes tokens of what is left,
    and stands for the model's, which is given nothing. A picture, and each view of a tiled one, is
    one frame.

    Args:
        keep: tokens of a picture or frame, at most; None is `most`.
        least, most: between which training draws `keep`, for the whole batch.
        total: tokens of a video; it has one for each frame at least. 12,000 (7B) and 10,000 (14B)
            are the paper's.
        train: `draw`, or `keep`, which trains that many alone.
        positions: `compact` or `original` (the cell's middle token); None is `compact`.
    """

    keep: int | None = None
    least: int = 16
    most: int = 576
    total: int = 12_000
    train: Literal["draw", "keep"] = "draw"
    positions: Positions | None = None

    weights: ClassVar[None] = None  # all numbers alike
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
        return {"projector": Projector(tower[0], width)}

    def trained(self) -> Sequence[int]:
        return range(self.least, self.most + 1)

    def served(self) -> Sequence[int]:
        return range(1, self.most + 1)

    def levels(self, grids: list[Stack]) -> list[list[Size]]:
        sides = [math.isqrt(max(1, min(self.keep, self.total // g.size[0]))) for g in grids]
        return [
            [(g.size[0], min(side, g.size[1]), min(side, g.size[2]))]
            for side, g in zip(sides, grids, strict=True)
        ]

    def made(self, ctx: Context, x: Tensor, size: Size) -> Tensor:
        return ctx.route("projector", super().made(ctx, x, size))
