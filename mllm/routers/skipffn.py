"""Skip-Vision: most visual tokens pass FFNs by and leave the cache; a summary of them stays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.compressors.base import (
    BranchRows,
    Budget,
    Evict,
    Hidden,
    Insert,
    LayerContext,
    LayerMethod,
    Positions,
    register,
)
from mllm.routers.base import Score


class Summary(nn.Module):
    """What each token is worth in a summary.

    Args:
        width: of hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = Score(width)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, fp32 `[..., 1]`, of hidden states `[..., width]`."""
        return self.score(F.layer_norm(x.float(), x.shape[-1:]))


@register("skipffn", paper="arXiv:2503.21817", stage="llm", trained=True)
@dataclass
class SkipFFN(LayerMethod):
    """Let most visual tokens pass every FFN by, and forget them before an answer (Skip-Vision).

    All tokens take part in attention. Of the visual ones a few, evenly spaced, run the FFNs as text
    does, the last one among them. Behind it, where it stays, stands a summary of the others: their
    mean under a learnt softmax, which starts as the plain mean. When the prompt has been read, the
    others leave the cache of every layer. The paper's models choose by scale, and have two
    summaries. In models that add features to visual tokens in their first layers, all this begins
    behind these.

    Args:
        budget: visual tokens of a sample that run the FFNs: an int, or a share of them.
        summary: whether a summary of the others is inserted.
        evict: whether the others leave the cache.
        positions: `original` or `compact`; None is `original`.
    """

    budget: Budget = 0.125
    summary: bool = True
    evict: bool = True
    positions: Positions | None = None

    differentiable = True
    oracle = "reference"
    actions = ("BranchRows", "Insert", "Evict")
    identity = {"budget": 1.0, "summary": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._first = 0
        if not self.summary:
            self.actions = ("BranchRows", "Evict")

    def at_depth(self, num_layers: int, first_cut: int = 0) -> SkipFFN:
        placed = self.replace()
        placed._first = first_cut if self.summary else 0
        return placed

    def at(self) -> Sequence[int]:
        return (self._first,)

    def reads(self):
        return {"hidden": Hidden()}

    def parts(self, width: int, heads: int) -> dict[str, nn.Module]:
        return {"summary": Summary(width)} if self.summary else {}

    def act(self, ctx: LayerContext) -> list[Any]:
        skipped = ctx.visual & ~self._runs(ctx.visual) & ~ctx.protected
        layers = range(ctx.num_layers)
        found: list[Any] = [BranchRows(i, "mlp", ~skipped) for i in layers[ctx.layer :]]
        if self.summary:
            x = ctx["hidden"]
            scores = ctx.route("summary", x)[..., 0].masked_fill(~skipped, float("-inf"))
            some = skipped.any(1)
            weight = scores.masked_fill(~some[:, None], 0).softmax(-1)
            rows = (weight[:, None] @ x.float()).to(x.dtype)
            ctx.book(4.0 * x.shape[1] * x.shape[2])
            place = torch.arange(x.shape[1], device=x.device)
            last = torch.where(ctx.visual, place, -1).amax(1)
            found.append(Insert(rows, torch.where(some, last, -1)))
        if self.evict:
            found.append(Evict(layers, skipped))
        return found

    def _runs(self, visual: Tensor) -> Tensor:
        """Visual rows that run the FFNs: bool `[batch, rows]`."""
        many = visual.sum(1)
        if isinstance(self.budget, int):
            count = many.clamp(max=self.budget)
        else:
            count = (many.double() * self.budget).round().long().clamp(min=1)
        place = visual.long().cumsum(1)
        # Every so many places this passes a multiple of `many`, `count` times, the last at the end.
        return place * count[:, None] % many.clamp(min=1)[:, None] < count[:, None]
