"""PLPHP: every layer and head prunes visual tokens, by how much the layer looks at pictures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mllm.compressors.base import AttentionRows, Budget, register
from mllm.compressors.kv_base import KVMethod, Layer


@register("plphp", paper="arXiv:2502.14504", stage="cache")
@dataclass
class PLPHP(KVMethod):
    """Prune visual tokens per layer and head, fewer where the layer looks at pictures (PLPHP).

    A layer's gaze is the attention of the last prompt token to visual tokens, averaged over heads.
    Layers whose gaze is at least `attentive` keep `budget + spread` of the visual tokens, those
    below `indifferent` keep `budget - spread`, the others `budget`, and every KV head chooses its
    own. Text stays, and at a budget of 1.0 everything does. There is no public code; constants
    are the paper's as far as known.

    Args:
        budget: visual tokens per layer and KV head: an int, or a fraction.
        spread: of the budget, as a fraction of the visual tokens.
        attentive, indifferent: bounds of the gaze.
        skip: first layers, which keep everything.
        sinks, window: see :class:`KVMethod`; visual tokens among them count.
        tokens, heads, hold: see :class:`KVMethod`.
    """

    budget: Budget = 0.4
    window: int | float = 0
    tokens: Literal["prompt", "visual"] = "visual"
    spread: float = 0.3
    attentive: float = 0.25
    indifferent: float = 0.1
    skip: int = 2

    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("spread", "attentive", "indifferent"):
            self.demand(field, 0 <= getattr(self, field) <= 1, "a fraction in [0, 1]")
        self.demand("skip", self.skip >= 0, "a whole number from 0")

    def reads(self):
        return {"attention": AttentionRows(rows="last", heads="none")}

    def allocate(self, layers: list[Layer]) -> list[Tensor]:
        return [self._kept(layer) for layer in layers]

    def _kept(self, layer: Layer) -> Tensor:
        gaze = (layer.score * (layer.stored & layer.visual)).sum(-1).mean(1)
        step = (gaze >= self.attentive).int() - (gaze < self.indifferent).int()
        share = self.budget
        if isinstance(share, int):
            share = share / layer.many.clamp(min=1)
        wanted = (share + step * self.spread) * layer.many
        kept = (wanted.clamp(min=0) - 1e-4).ceil().long()
        if layer.index < self.skip:
            kept = layer.many
        return (kept[:, None] - self.fixed(layer).sum(-1)).clamp(min=0)
