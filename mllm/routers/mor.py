"""Mixture of recursions: a span of layers is run in rounds, and fewer tokens run each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.compressors.base import LayerContext, Positions, Write, register
from mllm.routers import stats
from mllm.routers.base import Score, choose
from mllm.routers.depth import DepthRouter


@register("mor", paper="arXiv:2507.10524", stage="llm", trained=True)
@dataclass
class MoR(DepthRouter):
    """Let tokens of all kinds leave a span of layers after as many rounds as they need (MoR).

    The layers between the first and the last are cut into rounds of equally many, the recursions.
    All tokens of a sample run the first of them; the further ones run only what has run the one
    before. A token that is out goes on behind the span. The paper trains models from nothing, whose
    recursions are the same layers again; here each is the layers that stand there, with weights and
    caches of their own, so that a trained model starts as it was: an experiment.

    Under expert choice a router per recursion ranks the tokens of a sample, and what the recursion
    adds to those that run is multiplied by `scale` times the sigmoid of their score. Later tokens
    cannot be ranked among those to come: they go on where the score is not negative, which the
    router learns from its own choices. Under token choice one router before the span gives each
    token its number of recursions, of equal ones the largest; it learns through what all of them
    add to the token.

    Args:
        recursions: how many.
        routing: `expert` (the paper) or `token` choice.
        least: share of the rows that run the last recursion under expert choice; shares fall evenly
            from 1. None is 1 / recursions (the paper).
        scale: see above; at 2 new routers change nothing.
        auxiliary: coefficient of the cross-entropy between scores and choices, or, under token
            choice, of the load-balance loss.
        layers: the span, which ends before the last decoder layer; None is all between the first
            and the last, but for those at the end that make no whole recursion.
        positions: `original` is all there is: tokens stay where they are.
    """

    recursions: int = 2
    routing: Literal["expert", "token"] = "expert"
    least: float | None = None
    scale: float = 2.0
    auxiliary: float = 0.001
    layers: tuple[int, ...] | None = None
    positions: Positions | None = None

    actions = ("BranchRows", "Write")
    identity = {"least": 1.0}
    decides: ClassVar[str] = "recursions"
    decodes = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("recursions", self.recursions >= 2, "a number from 2")
        fine = self.least is None or 0 < self.least <= 1
        self.demand("least", fine, "None, or over 0 and at most 1")
        self.demand("scale", self.scale > 0, "over 0")
        self.demand("auxiliary", self.auxiliary >= 0, "a number from 0")

    def share(self, number: int) -> float:
        """Share of the rows that run a recursion under expert choice, counted from 0."""
        least = 1 / self.recursions if self.least is None else self.least
        return 1 - (1 - least) * number / (self.recursions - 1)

    def routed(self, num_layers: int) -> dict[int, float]:
        each = (num_layers - 2) // self.recursions
        return {1 + i: self.share(i // each) for i in range(each * self.recursions)}

    def at_depth(self, num_layers: int, first_cut: int = 0) -> MoR:
        placed = super().at_depth(num_layers, first_cut)
        first, last = placed.layers[0], placed.layers[-1]
        whole = last - first + 1 == len(placed.layers) and last < num_layers - 1
        placed.demand(
            "layers",
            whole and len(placed.layers) % self.recursions == 0,
            f"{self.recursions} times as many layers in a row, before the last of {num_layers}",
        )
        return placed

    def at(self) -> tuple[int, ...]:
        """The first layer of every recursion, and the layer behind the span."""
        return (*self.layers[:: len(self.layers) // self.recursions], self.layers[-1] + 1)

    def parts(self, width: int, heads: int) -> dict[str, nn.Module]:
        if self.routing == "token":
            return {str(self.layers[0]): Score(width, self.recursions)}
        return {str(layer): Score(width) for layer in self.at()[:-1]}

    def route(self, ctx: LayerContext) -> list[Any]:
        x, rows, number = ctx["hidden"], self.rows(ctx), self.at().index(ctx.layer)
        then = {name: ctx.bring(value, ctx.state["index"]) for name, value in ctx.state.items()}
        found: list[Any] = []
        if number:  # a recursion has run
            added = x.float() - then["start"].float()
            x = (x.float() + (then["weight"] - 1)[..., None] * added).to(x.dtype)
            found.append(Write(x, rows=then["taken"] & rows))
        if number == self.recursions:
            return found
        choice = self._by_expert if self.routing == "expert" else self._by_token
        now = choice(ctx, x, rows, number, then)
        ctx.state.update(now, index=ctx.index)
        block = range(ctx.layer, self.at()[number + 1])
        return found + [a for i in block for a in self.only(i, now["taken"] | ~rows)]

    def _by_expert(
        self, ctx: LayerContext, x: Tensor, rows: Tensor, number: int, then: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Who runs a recursion, and how much what it adds to them counts."""
        score = self.scores(ctx, x)[..., 0]
        taken = self._best(ctx, score, then["taken"] & rows, rows, number) if number else rows
        if not ctx.decoding:
            ctx.note(**stats.depth_sums(score, taken, rows))
        weight = torch.where(taken, self.scale * score.sigmoid(), 1.0)
        return {"start": x, "taken": taken, "weight": weight}

    def _best(
        self, ctx: LayerContext, score: Tensor, among: Tensor, rows: Tensor, number: int
    ) -> Tensor:
        """Rows `among` those of the recursion before that go on: bool `[batch, rows]`."""
        later = among & (score >= 0)
        if ctx.decoding:
            return later
        ranked = rows if ctx.learns else rows & ctx.prompt
        # Rounded down, but not for what floats lack to a whole number.
        count = (ranked.sum(1).double() * self.share(number) + 1e-6).long()
        among = among & ranked
        taken = choose(score.masked_fill(ctx.protected, float("inf")), among, count)
        taken = taken | (among & ctx.protected)
        wrong = F.binary_cross_entropy_with_logits(score, taken.float(), reduction="none")
        mean = wrong.masked_fill(~among, 0).sum() / among.sum().clamp(min=1)
        ctx.penalise("recursion", mean, self.auxiliary)
        return taken | (later & ~ranked)

    def _by_token(
        self, ctx: LayerContext, x: Tensor, rows: Tensor, number: int, then: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """As :meth:`_by_expert`; `depth` recursions of every row are known from the first on."""
        if not number:
            p = self.scores(ctx, x).softmax(-1)
            depth = self.recursions - p.flip(-1).argmax(-1)
            depth = depth.masked_fill(ctx.protected, self.recursions)
            self._balance(ctx, p, depth, rows)
            own = p.gather(-1, depth[..., None] - 1)[..., 0]
            then = {"start": x, "depth": depth, "p": own}
        taken = rows & (then["depth"] > number)
        if not ctx.decoding:
            ctx.note(**stats.depth_sums(then["p"], taken, rows))
        # 1 in value and the probability in gradient, where this recursion is a row's last.
        learnt = 1 + (then["p"] - then["p"].detach())
        weight = torch.where(taken & (then["depth"] == number + 1), learnt, 1.0)
        return {**then, "taken": taken, "weight": weight}

    def _balance(self, ctx: LayerContext, p: Tensor, depth: Tensor, rows: Tensor) -> None:
        taken, n = F.one_hot(depth - 1, self.recursions), rows.sum().clamp(min=1)
        mean, load = ((x * rows[..., None]).sum((0, 1)) / n for x in (p, taken))
        ctx.penalise("recursion", (mean * load).sum() * self.recursions, self.auxiliary)
