"""LayerSkip: layers are left out at random while training, and every layer learns to answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllm.compressors.base import (
    BranchGate,
    BranchRows,
    Hidden,
    LayerContext,
    LayerMethod,
    Positions,
    register,
)
from mllm.errors import PlanError
from mllm.routers.account import rank
from mllm.routers.schedules import draw


@register("layerskip", paper="arXiv:2404.16710", stage="llm", trained=True)
@dataclass
class LayerSkip(LayerMethod):
    """Teach a model to answer from earlier layers, and let it (LayerSkip).

    In training a sample passes a layer by with a probability that grows with depth, from 0 to
    `dropout`; and what leaves some layers is read by the last norm and the head as if it were the
    last, and has to answer too. These exits are every `every`-th layer, from another one in each
    forward; the deeper, the more they count; the answers' own loss keeps the weight 1. At inference
    nothing changes, unless `exit` is set: then no layer from that one on is run, for prompts with
    pictures and what follows them. Adds no parameters.

    Args:
        dropout: probability that a sample passes the last layer by, in training.
        every: exits are this many layers apart.
        scale: of the exits' losses.
        exit: the first decoder layer that is not run at inference; None runs all.
        positions: `original` is all there is: tokens stay where they are.
    """

    dropout: float = 0.2
    every: int = 4
    scale: float = 1.0
    exit: int | None = None
    positions: Positions | None = None

    differentiable = True
    oracle = "reference"
    actions = ("BranchRows", "BranchGate")
    identity = {}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._depth = 0
        self._demand("dropout", 0 <= self.dropout < 1, "from 0 and below 1")
        self._demand("every", self.every >= 1, "a number from 1")
        self._demand("scale", self.scale >= 0, "a number from 0")
        self._demand("positions", self.positions != "compact", "original: nothing moves")

    def _demand(self, field: str, fine: bool, expected: str) -> None:
        if not fine:
            value = getattr(self, field)
            raise PlanError(
                f"{self.info.name}: {field}={value!r} is not {expected}",
                argument=field,
                given=value,
                expected=expected,
            )

    def at_depth(self, num_layers: int, first_cut: int = 0) -> LayerSkip:
        fine = self.exit is None or 1 <= self.exit < num_layers
        self._demand("exit", fine, f"from 1 to {num_layers - 1}")
        placed = self.replace()
        placed._depth = num_layers
        return placed

    def at(self) -> Sequence[int]:
        return range(1, self._depth)

    def reads(self):
        return {"hidden": Hidden()}

    def act(self, ctx: LayerContext) -> list[Any]:
        branches = ("attn", "mlp")
        if not ctx.learns:
            gone = range(self.exit, ctx.num_layers) if self.exit == ctx.layer else ()
            return [BranchGate(layer, branch, 0.0) for layer in gone for branch in branches]
        if not ctx.state:  # exits are those of all processes, and each drops samples of its own
            ctx.state["offset"] = draw(range(self.every), None, ctx.seed_for(), ctx.learnt)
            generator = torch.Generator().manual_seed(ctx.seed_for(ctx.learnt, rank()))
            size = ctx.num_layers, len(ctx.visual)
            ctx.state["drawn"] = torch.rand(size, generator=generator)
        before = ctx.layer - 1  # the layer that has just run
        if before % self.every == ctx.state["offset"] and self.scale:
            share = self.counts(before) / self.counts(ctx.num_layers - 1)
            ctx.penalise("exits", ctx.answer_loss(ctx["hidden"]), self.scale * share)
        passes = ctx.state["drawn"][ctx.layer] < self.chance(ctx.layer, ctx.num_layers)
        rows = ~passes.to(ctx.visual.device)[:, None].expand_as(ctx.visual)
        return [BranchRows(ctx.layer, branch, rows) for branch in branches]

    def chance(self, layer: int, num_layers: int) -> float:
        """Probability that a sample passes a layer by."""
        return self.dropout * math.expm1(layer * math.log(2) / max(1, num_layers - 1))

    @staticmethod
    def counts(layer: int) -> float:
        """Weight of the exit behind a layer: the sum of all numbers up to its own, from 1."""
        return (layer + 1) * (layer + 2) / 2
