"""FEATHER: scores without rotary positions, and a coarse grid that always stays at first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mllm.compressors.base import (
    AttentionRows,
    Budget,
    Grid,
    LayerContext,
    LayerSchedule,
    Positions,
    register,
)
from mllm.errors import PlanError


@register("feather", paper="ICCV 2025", stage="llm", reference_layers=32)
@dataclass
class Feather(LayerSchedule):
    """Two cuts by attention without rotary positions; the first keeps a coarse grid (FEATHER).

    Rotated attention of the last prompt token favours the tokens that come last, which are the
    bottom of the picture. So queries and keys are scored as they are before rotation. At the first
    cut every `stride`-th token of every `stride`-th row stays before any other, within the budget;
    at later cuts attention alone decides.

    The budgets are ours: those of the paper are not known to us.

    Args:
        layers: rows leave before these decoder layers; None is 8 and 16 of 32, scaled.
        keep: budget of each layer: tokens per image, or a fraction of those that entered.
        stride: of the grid, in tokens.
        rope: score rotated queries and keys after all, to see what that does.
        positions: `original` or `compact`; None is `original`.
    """

    layers: tuple[int, ...] | None = None
    keep: tuple[Budget, ...] = (0.25, 0.125)
    stride: int = 3
    rope: bool = False
    positions: Positions | None = None

    paper_layers = (8, 16)
    first_layer = 1
    identity = {"keep": (1.0, 1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stride < 1:
            raise PlanError(
                f"feather: stride={self.stride}", argument="stride", given=self.stride,
                expected="from 1",
            )  # fmt: skip

    def reads(self):
        return {"rows": AttentionRows(rows="last", heads="mean", rope=self.rope), "grid": Grid()}

    def score(self, ctx: LayerContext) -> Tensor:
        score = ctx["rows"][:, 0]
        if ctx.layer != self.layers[0]:
            return score
        grid, middle = ctx["grid"], self.stride // 2
        coarse = (grid.row % self.stride == middle) & (grid.col % self.stride == middle)
        return score + 2.0 * coarse  # attention is at most one
