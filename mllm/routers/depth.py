"""Routers over depth: which rows a decoder layer works on, and which pass it by.

The engine gathers the rows that take part, runs the branches of the layer on these, stores only
their keys and values in the layer's own cache, and scatters back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm.compressors.base import BranchRows, Hidden, LayerContext, LayerMethod
from mllm.errors import PlanError
from mllm.routers import stats
from mllm.routers.base import choose


class DepthRouter(LayerMethod):
    """A trained stage with one router per routed layer.

    Subclasses have the fields `layers: tuple[int, ...] | None` and `positions`, and give `routed`,
    `parts`, and `route`. `decides` is the field whose value routes layers where none are named.
    """

    differentiable = True
    oracle = "reference"
    actions: ClassVar[tuple[str, ...]] = ("BranchRows",)
    decides: ClassVar[str] = "layers"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("positions", self.positions != "compact", "original: nothing moves")

    def routed(self, num_layers: int) -> dict[int, float]:
        """Share of the rows that take part, by layer, of a model of `num_layers`."""
        raise NotImplementedError

    def parts(self, width: int, heads: int) -> dict[str, nn.Module]:
        """What is learnt, by name; see :class:`mllm.routers.base.RouterBank`."""
        raise NotImplementedError

    def route(self, ctx: LayerContext) -> list[Any]:
        """Actions at a routed layer."""
        raise NotImplementedError

    def demand(self, field: str, fine: bool, expected: str) -> None:
        """PlanError unless a field is `fine`."""
        if not fine:
            value = getattr(self, field)
            raise PlanError(
                f"{self.info.name}: {field}={value!r} is not {expected}",
                argument=field,
                given=value,
                expected=expected,
            )

    def at_depth(self, num_layers: int, first_cut: int = 0) -> DepthRouter:
        own = tuple(self.routed(num_layers)) if self.layers is None else self.layers
        inside = bool(own) and min(own) >= 0 and max(own) < num_layers
        if not inside or len(set(own)) < len(own):
            raise PlanError(
                f"{self.info.name}: "
                + (f"layers {'/'.join(map(str, own))} of {num_layers}" if own
                   else f"its schedule routes none of {num_layers} layers"),
                argument=self.decides if self.layers is None else "layers",
                given=getattr(self, self.decides) if self.layers is None else own,
                expected=f"different layers from 0 to {num_layers - 1}",
            )  # fmt: skip
        return self.replace(layers=tuple(sorted(own)))

    def at(self) -> Sequence[int]:
        return self.layers or ()

    def reads(self):
        return {"hidden": Hidden()}

    def act(self, ctx: LayerContext) -> list[Any]:
        return self.route(ctx)

    @staticmethod
    def rows(ctx: LayerContext) -> Tensor:
        """Rows of all kinds that a router may speak of: bool `[batch, rows]`."""
        rows = ctx.prompt | ctx.answers
        return rows if ctx.decoding else rows & ctx.visual.any(1, keepdim=True)

    @staticmethod
    def scores(ctx: LayerContext, x: Tensor, part: str | None = None) -> Tensor:
        """What a part, by default the layer's own, makes of hidden states: fp32 `[..., out]`."""
        score = ctx.route(str(ctx.layer) if part is None else part, x)
        ctx.book(2.0 * x.shape[1] * x.shape[2] * score.shape[-1])
        return score

    @staticmethod
    def best(
        ctx: LayerContext, scores: Tensor, share: float, among: Tensor | None = None
    ) -> Tensor:
        """Rows that take part: of each sample's the best, rounded down.

        Args:
            ctx: the context.
            scores: fp32 `[batch, rows]`.
            share: of the rows that are there.
            among: bool `[batch, rows]`; None are visual rows.

        Returns:
            bool `[batch, rows]`; protected rows go first.
        """
        if among is None:
            among = ctx.visual
            count = torch.tensor([int(n * share) for n in ctx.counts()], device=scores.device)
        else:
            count = (among.sum(1).double() * share).long()
        ranked = scores.masked_fill(ctx.protected, float("inf"))
        kept = choose(ranked, among, count) | (among & ctx.protected)
        ctx.note(**stats.depth_sums(scores, kept, among))
        return kept

    @staticmethod
    def only(layer: int, rows: Tensor) -> list[BranchRows]:
        """Let `rows`, bool `[batch, rows]`, alone take part in both branches of a layer."""
        return [BranchRows(layer, "attn", rows), BranchRows(layer, "mlp", rows)]
