"""gamma-MoD: mixture of depths for a trained model, in layers whose attention has low rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from mllm.compressors.base import BranchGate, LayerContext, Positions, register
from mllm.routers import stats
from mllm.routers.base import Score, choose
from mllm.routers.depth import DepthRouter
from mllm.routers.schedules import ratios


@register("gammamod", paper="arXiv:2410.13859", stage="llm", trained=True)
@dataclass
class GammaMoD(DepthRouter):
    """Let tokens pass layers by where a router's probability says so (gamma-MoD).

    One router of two outputs per layer, for images and text. In training the best `capacity` of
    the rows up to the last image run the layer, and what is behind (questions, answers) always
    runs: masked routing learning. The router is taught its own choices by cross-entropy. At
    inference a row runs where its probability is over a threshold, one for prompts and one for
    later tokens, so how many do is learnt. The MLP of rows that run is multiplied by their
    probability, as in the authors' code; so new routers change the model.

    Args:
        capacity: share of the rows up to the last image that run a routed layer in training.
        threshold: of the probability, for rows of a prompt.
        later: of the probability, for rows behind it.
        auxiliary: coefficient of the cross-entropy.
        layers: routed decoder layers, which the paper chooses by the rank of attention maps; None
            is all but the first two and the last.
        positions: `original` is all there is: tokens stay where they are.
    """

    capacity: float = 0.5
    threshold: float = 0.005
    later: float = 0.5
    auxiliary: float = 0.01
    layers: tuple[int, ...] | None = None
    positions: Positions | None = None

    actions = ("BranchRows", "BranchGate")
    identity = None
    decodes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("capacity", 0 < self.capacity <= 1, "over 0 and at most 1")
        self.demand("threshold", 0 <= self.threshold < 1, "from 0 and below 1")
        self.demand("later", 0 <= self.later < 1, "from 0 and below 1")
        self.demand("auxiliary", self.auxiliary >= 0, "a number from 0")

    def routed(self, num_layers: int) -> dict[int, float]:
        return ratios("deep", num_layers, self.capacity, 1.0, 0.0)

    def parts(self, width: int, heads: int) -> dict[str, nn.Module]:
        return {str(layer): Score(width, 2, bias=False, std=width**-0.5) for layer in self.layers}

    def route(self, ctx: LayerContext) -> list[Any]:
        layer, x = ctx.layer, ctx["hidden"].float()
        # The weight of the layer's own norm is part of what is learnt.
        logits = self.scores(ctx, F.rms_norm(x, x.shape[-1:], eps=1e-6))
        p = logits.softmax(-1)[..., 1]
        rows = self.rows(ctx)
        if ctx.learns:
            behind = ctx.visual.flip(1).long().cumsum(1).flip(1)
            early = rows & (behind > 0)
            # What leaves is rounded down, as in the authors' code.
            count = early.sum(1) - (early.sum(1).double() * (1 - self.capacity)).long()
            taken = choose(p.masked_fill(ctx.protected, float("inf")), early, count)
            taken = taken | (rows & (~early | ctx.protected))
            wrong = F.cross_entropy(logits.transpose(1, 2), taken.long(), reduction="none")
            mean = wrong.masked_fill(~rows, 0).sum() / rows.sum().clamp(min=1)
            ctx.penalise("routing", mean, self.auxiliary)
        else:
            limit = torch.where(ctx.answers, self.later, self.threshold)
            taken = rows & ((p > limit) | ctx.protected)
        if not ctx.decoding:
            ctx.note(**stats.depth_sums(p, taken, rows))
        gate = BranchGate(layer, "mlp", torch.where(taken, p, 1.0))
        return [*self.only(layer, taken | ~rows), gate]
