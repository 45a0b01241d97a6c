"""Routers over depth: which rows a decoder layer works on, and which pass it by.

The engine gathers the rows that take part, runs the branches of the layer on these, stores only
their keys and values in the layer's own cache, and scatters back. Text always takes part.
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
    `parts`, and `route`.
    """

    differentiable = True
    oracle = "reference"
    actions: ClassVar[tuple[str, ...]] = ("BranchRows",)

    def routed(self, num_layers: int) -> dict[int, float]:
        """Share of the visual tokens that take part, by layer, of a model of `num_layers`."""
        raise NotImplementedError

    def parts(self, width: int) -> dict[str, nn.Module]:
        """What is learnt, by name, for hidden states of `width`; see :class:`RouterBank`."""
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
                argument="max_ratio" if self.layers is None else "layers",
                given=getattr(self, "max_ratio", None) if self.layers is None else own,
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
    def scores(ctx: LayerContext, x: Tensor, part: str | None = None) -> Tensor:
        """What a part, by default the layer's own, makes of hidden states: fp32 `[..., out]`."""
        score = ctx.route(str(ctx.layer) if part is None else part, x)
        ctx.book(2.0 * x.shape[1] * x.shape[2] * score.shape[-1])
        return score

    @staticmethod
    def best(ctx: LayerContext, scores: Tensor, share: float) -> Tensor:
        """Visual rows that take part: of each sample's the best, rounded down.

        Args:
            ctx: the context.
            scores: fp32 `[batch, rows]`.
            share: of the visual rows that are there.

        Returns:
            bool `[batch, rows]`; protected rows go first.
        """
        count = torch.tensor([int(n * share) for n in ctx.counts()], device=scores.device)
        ranked = scores.masked_fill(ctx.protected, float("inf"))
        kept = choose(ranked, ctx.visual, count) | (ctx.visual & ctx.protected)
        stats.note(ctx.state, ctx.layer, scores, kept, ctx.visual)
        return kept

    @staticmethod
    def only(layer: int, rows: Tensor) -> list[BranchRows]:
        """Let `rows`, bool `[batch, rows]`, alone take part in both branches of a layer."""
        return [BranchRows(layer, "attn", rows), BranchRows(layer, "mlp", rows)]
