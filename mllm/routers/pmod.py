"""p-MoD: mixture of depths on visual tokens, with fewer of them the deeper the layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mllm.compressors.base import BranchGate, LayerContext, Positions, Write, register
from mllm.routers.base import Score
from mllm.routers.depth import DepthRouter
from mllm.routers.schedules import Shape, ratio, ratios


@register("pmod", paper="arXiv:2412.04449", stage="llm", reference_layers=32, trained=True)
@dataclass
class PMoD(DepthRouter):
    """Let visual tokens pass layers by, more of them the deeper the layer (p-MoD).

    A router per layer gives every visual token a weight `1 + scale * tanh(s)`. The tokens with the
    largest weights run the layer, their MLP output multiplied by the weight; the others pass by,
    multiplied by theirs, so that the router learns from both (symmetric reweighting). Attention is
    not weighted, as in the released code. Text always runs, at weight 1. New routers give every
    token the weight 1.

    Args:
        schedule: `shiftedcos` (the paper) or `shiftedlinear` decay of the share of tokens with
            depth; `deep` and `interleave` are the fixed shares of its ablations.
        max_ratio: layers with a larger share have no router and run all tokens.
        min_ratio: smallest share.
        shift: the share of the middle layer, or the fixed share.
        scale: weights lie within 1 - scale and 1 + scale.
        layers: routed decoder layers; None is where the schedule says.
        positions: `original` is all there is: tokens stay where they are.
    """

    schedule: Shape = "shiftedcos"
    max_ratio: float = 0.85
    min_ratio: float = 0.15
    shift: float = 0.5
    scale: float = 0.2
    layers: tuple[int, ...] | None = None
    positions: Positions | None = None

    actions = ("BranchRows", "BranchGate", "Write")
    identity = {"max_ratio": 1.0, "min_ratio": 1.0}
    decides = "max_ratio"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("max_ratio", 0 < self.max_ratio <= 1, "over 0 and at most 1")
        fine = 0 < self.min_ratio <= self.max_ratio
        self.demand("min_ratio", fine, "over 0 and at most max_ratio, or layers would be empty")
        self.demand("scale", 0 < self.scale < 1, "between 0 and 1")

    def routed(self, num_layers: int) -> dict[int, float]:
        return ratios(self.schedule, num_layers, self.shift, self.max_ratio, self.min_ratio)

    def parts(self, width: int, heads: int) -> dict[str, nn.Module]:
        return {str(layer): Score(width) for layer in self.layers}

    def route(self, ctx: LayerContext) -> list[Any]:
        x, layer = ctx["hidden"], ctx.layer
        score = self.scores(ctx, x)[..., 0]
        share = max(ratio(self.schedule, layer, ctx.num_layers, self.shift), self.min_ratio)
        kept = self.best(ctx, score, min(1.0, share))
        weight = 1 + self.scale * torch.tanh(score)
        gate = BranchGate(layer, "mlp", torch.where(kept, weight, 1.0))
        if share >= 1:  # nothing to gather, and nothing passes by
            return [gate]
        skipped = ctx.visual & ~kept
        return [
            *self.only(layer, ~skipped),
            gate,
            Write(weight[..., None].to(x.dtype) * x, rows=skipped),  # as precise as the gate
        ]
