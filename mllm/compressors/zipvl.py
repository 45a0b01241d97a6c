"""ZipVL: every layer attends among the tokens that carry most of the attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.compressors.base import (
    AttentionRows,
    BranchRows,
    LayerContext,
    LayerMethod,
    Positions,
    register,
    top_k,
)
from mllm.errors import PlanError


@register("zipvl", paper="arXiv:2410.08584", stage="llm")
@dataclass
class ZipVL(LayerMethod):
    """Attend only among as many tokens as carry `tau` of the attention mass (ZipVL).

    Before each layer a few probe rows are read: the last `recent` prompt tokens and `spread` more.
    The p tokens with the largest sums carry the share tau of what these rows pay; which p tokens
    are important is told by the sum divided by the number of probes that see the token (that pay
    more than 0), so that early tokens have no advantage. Text and picture are treated alike. The
    others pass the layer's attention on the residual, run its MLP, and are not stored in its
    cache, so that p is of each sample and layer. The last prompt token always takes part.

    The authors draw probes at random; here they are spread by the golden ratio over the prompt, so
    that a sample's do not depend on its batch. Their numbers (64 and 64) are unverified. Reading
    ahead costs the layer's projections once more. Not here: quantised storage (v1), and choosing
    anew while answering.

    Args:
        tau: share of the mass; 1 is everything.
        recent: probes at the end of the prompt.
        spread: probes over the prompt.
        layers: decoder layers; None is all of them.
        positions: `original`; nothing is renumbered.
    """

    tau: float = 0.975
    recent: int = 64
    spread: int = 64
    layers: tuple[int, ...] | None = None
    positions: Positions | None = None

    actions = ("BranchRows",)
    identity = {"tau": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.tau <= 1 or self.recent < 1 or self.spread < 0:
            raise PlanError(
                f"zipvl: tau={self.tau}, recent={self.recent}, spread={self.spread}",
                argument="tau",
                given=self.tau,
                expected="0 < tau <= 1, recent from 1, spread from 0",
            )

    def at_depth(self, num_layers: int, first_cut: int = 0) -> ZipVL:
        return self if self.layers is not None else self.replace(layers=tuple(range(num_layers)))

    def at(self) -> Sequence[int]:
        return (0,) if self.layers is None else self.layers

    def reads(self):
        return {"rows": AttentionRows(rows=self.probes, when="before")}

    def probes(self, ctx: LayerContext) -> Tensor:
        """Rows that are asked: bool `[batch, rows]`."""
        place = ctx.prompt.long().cumsum(1)  # from 1
        count = place[:, -1:]
        turn = torch.arange(1, self.spread + 1, device=place.device) * 0.6180339887498949
        at = (turn.frac() * count).long() + 1
        rows = torch.searchsorted(place, at).clamp(max=place.shape[1] - 1)
        asked = torch.zeros_like(ctx.prompt).scatter(1, rows, True)
        return ctx.prompt & (asked | (place > count - self.recent))

    def act(self, ctx: LayerContext) -> list:
        if self.tau == 1:
            return []
        rows = ctx["rows"]
        mass = rows.sum(1).masked_fill(~ctx.prompt, 0)
        ranked = mass.sort(dim=1, descending=True).values
        needed = (ranked.cumsum(1) < self.tau * ranked.sum(1, keepdim=True)).sum(1) + 1
        seers = (rows > 0).sum(1)
        important = top_k(mass / seers.clamp(min=1), ctx.prompt, needed)
        place = torch.arange(rows.shape[2], device=rows.device)
        last = place == torch.where(ctx.prompt, place, -1).amax(1, keepdim=True)
        return [BranchRows(ctx.layer, "attn", important | last | ~ctx.prompt)]
