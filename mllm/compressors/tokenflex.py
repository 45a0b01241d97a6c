"""TokenFLEX: a projector that makes as many tokens as are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from mllm.compressors.base import Context, Grid, Positions, Unprojected, register
from mllm.compressors.elastic import Elastic, linear_flops
from mllm.compressors.pooling import PoolingWithin, Size


class SwiGLU(nn.Module):
    """LayerNorm, and an MLP with a gate.

    Args:
        width: of the input, `[..., width]`.
        out: of the output.
        ratio: of the inner width to `width`.
    """

    def __init__(self, width: int, out: int, ratio: int = 3) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate, self.up = (nn.Linear(width, ratio * width) for _ in range(2))
        self.down = nn.Linear(ratio * width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.down(F.silu(self.gate(x)) * self.up(x))

    def flops(self, x: Tensor) -> float:
        """Of one image of `x`, `[images, tokens, width]`."""
        return linear_flops(self, x.shape[1])


@register("tokenflex", paper="arXiv:2504.03154", stage="pre_llm", trained=True)
@dataclass
class TokenFLEX(Elastic, PoolingWithin):
    """Pool the tower's features to a grid that is drawn in training, and project it (TokenFLEX).

    The grid is made larger bilinearly until each side is a multiple of the wanted one, and
    average-pooled; a LayerNorm and an MLP with a gate, the same for all grids, stand for the
    model's projector, which is given nothing.

    Args:
        keep: visual tokens per image, one of `counts`; None is the most. The largest grid of the
            picture's shape within it; the grids of a tiled picture share it by their size.
        counts: budgets of training.
        train: `draw` has one of them in each forward; `sum` all, their losses averaged; `keep`
            that one alone.
        weights: how often each of `counts` is drawn; None is equally often. The paper has the
            larger ones more often, at rates that it does not give.
        positions: `compact` or `original` (the cell's middle token); None is `compact`.
    """

    keep: int | None = None
    counts: tuple[int, ...] = (64, 144, 256)
    train: Literal["draw", "sum", "keep"] = "draw"
    weights: tuple[float, ...] | None = None
    positions: Positions | None = None

    identity = None
    replaces = True

    def reads(self):
        return {"features": Unprojected(), "grid": Grid()}

    def parts(self, width: int, tower: tuple[int, int]) -> dict[str, nn.Module]:
        return {"projector": SwiGLU(tower[0], width)}

    def trained(self) -> Sequence[int]:
        return self.counts

    def mean(self, x: Tensor, size: Size) -> Tensor:
        full = tuple(-(-n // m) * m for n, m in zip(x.shape[2:], size, strict=True))
        if full != x.shape[2:]:
            x = F.interpolate(x, full, mode="trilinear", align_corners=True)
        return F.avg_pool3d(x, [n // m for n, m in zip(full, size, strict=True)])

    def made(self, ctx: Context, x: Tensor, size: Size) -> Tensor:
        return ctx.route("projector", super().made(ctx, x, size))
