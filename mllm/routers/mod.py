"""Mixture of depths: every second layer works on an eighth of the tokens, text included."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.compressors.base import LayerContext, LayerGate, Positions, register
from mllm.routers.base import Score
from mllm.routers.depth import DepthRouter
from mllm.routers.schedules import ratios

#: Inner width of a predictor.
INNER = 64


class Predictor(nn.Module):
    """Guesses from one token alone whether a router would choose it; at first it says yes to all.

    Args:
        width: of hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = Score(width, INNER, std=width**-0.5), Score(INNER)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, fp32 `[..., 1]`, of hidden states `[..., width]`."""
        return self.outer(F.gelu(self.inner(x)))


@register("mod", paper="arXiv:2404.02258", stage="llm", trained=True)
@dataclass
class MoD(DepthRouter):
    """Let tokens of all kinds pass every second layer by (mixture of depths).

    A router per layer ranks the tokens of a sample; the best `capacity` of them run the layer, and
    what it adds to them is multiplied by their score. So the best of the prompt is chosen among
    all of it, which later tokens cannot be: for these, a small predictor guesses from the token
    alone whether the router would choose it. It learns from the router's choices, and teaches
    nothing but itself. Training chooses among the whole sample, answers included.

    Args:
        capacity: share of the rows that run a routed layer.
        scope: `all` rows are routed (the paper), or `visual` ones; then text always runs.
        gate: `raw` multiplies by the score itself (the paper): new routers then silence their
            layers, which suits training from nothing. `tanh` is p-MoD's 1 + 0.2 tanh(score).
        auxiliary: coefficient of the predictors' loss.
        layers: routed decoder layers; None is every second one from the second.
        positions: `original` is all there is: tokens stay where they are.
    """

    capacity: float = 0.125
    scope: Literal["all", "visual"] = "all"
    gate: Literal["raw", "tanh"] = "raw"
    auxiliary: float = 0.01
    layers: tuple[int, ...] | None = None
    positions: Positions | None = None

    actions = ("BranchRows", "LayerGate")
    identity = {"capacity": 1.0, "gate": "tanh"}
    decodes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("capacity", 0 < self.capacity <= 1, "over 0 and at most 1")
        self.demand("auxiliary", self.auxiliary >= 0, "a number from 0")

    def routed(self, num_layers: int) -> dict[int, float]:
        return ratios("interleave", num_layers, self.capacity, 1.0, 0.0)

    def parts(self, width: int, heads: int) -> dict[str, nn.Module]:
        std = width**-0.5 if self.gate == "raw" else 0.0
        found: dict[str, nn.Module] = {str(layer): Score(width, std=std) for layer in self.layers}
        if self.scope == "all":
            found |= {f"{layer}_later": Predictor(width) for layer in self.layers}
        return found

    def route(self, ctx: LayerContext) -> list[Any]:
        if ctx.decoding and self.scope == "visual":
            return []
        x, layer = ctx["hidden"], ctx.layer
        score = self.scores(ctx, x)[..., 0]
        rows = self.rows(ctx)
        if self.scope == "visual":
            among = ctx.visual
            taken = self.best(ctx, score, self.capacity) | (rows & ~among)
        else:
            among = rows
            taken = self._of_all(ctx, x, score, rows)
        weight = score if self.gate == "raw" else 1 + 0.2 * torch.tanh(score)
        return [
            *self.only(layer, taken | ~rows),
            LayerGate(layer, torch.where(taken & among, weight, 1.0)),
        ]

    def _of_all(self, ctx: LayerContext, x: Tensor, score: Tensor, rows: Tensor) -> Tensor:
        """Rows that take part where all are routed: bool `[batch, rows]`."""
        guess = ctx.route(f"{ctx.layer}_later", x.detach())[..., 0]
        ctx.book(2.0 * x.shape[1] * (x.shape[2] + 1) * INNER)
        if ctx.decoding:
            return rows & (guess >= 0)
        ranked = rows if ctx.learns else rows & ctx.prompt
        taken = self.best(ctx, score, self.capacity, among=ranked)
        wrong = F.binary_cross_entropy_with_logits(guess, taken.float(), reduction="none")
        mean = wrong.masked_fill(~rows, 0).sum() / rows.sum().clamp(min=1)
        ctx.penalise("predictor", mean, self.auxiliary)
        return taken | (rows & ~ranked & (guess >= 0))
