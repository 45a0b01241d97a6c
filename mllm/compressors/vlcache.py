"""VL-Cache: what the text behind the picture attends to, with budgets by sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllm.compressors.base import AttentionRows, Budget, CacheEvent, LayerContext, register
from mllm.compressors.kv_base import KVMethod, Layer, portions

TINY = torch.finfo(torch.float32).tiny


@register("vlcache", paper="arXiv:2410.23317", stage="cache")
@dataclass
class VLCache(KVMethod):
    """Keep what the text behind the pictures attends to, more where attention is dense (VL-Cache).

    Attention of the prompt's text behind its last visual token is summed. A layer's density is the
    share of these queries' weights that are at least `threshold` of their row's largest; layers
    share the budget beyond the window in proportion to it; what a layer has no tokens for is lost,
    as in the paper. Where no such text is, the last
    `queries` tokens of the prompt rate. Nothing leaves while decoding unless `hold`.

    Args:
        budget: slots per layer and KV head on average, or a fraction of the prompt.
        sinks, tokens, heads, hold: see :class:`KVMethod`.
        window: newest tokens, which stay: a fraction of the budget, or an int.
        threshold: of a row's largest weight, below which weights count as nothing.
        least: share of the prompt that every layer keeps beyond the window.
        queries: prompt tokens that rate where there is no text behind a picture.
    """

    budget: Budget = 0.1
    window: int | float = 0.1
    threshold: float = 0.01
    least: float = 0.01
    queries: int = 1

    two_pass: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("threshold", "least"):
            self.demand(field, 0 <= getattr(self, field) <= 1, "a fraction in [0, 1]")
        self.demand("queries", self.queries > 0, "a whole number from 1")

    def reads(self):
        return {"attention": AttentionRows(rows=self._raters, heads="none")}

    def _raters(self, ctx: LayerContext) -> Tensor:
        return self._behind(ctx.prompt, ctx.prompt & ~ctx.text)

    def _behind(self, prompt: Tensor, visual: Tensor) -> Tensor:
        """Prompt rows that rate: bool `[batch, rows]`."""
        left = prompt.flip(1).long().cumsum(1).flip(1)  # itself included
        more = (visual & prompt).flip(1).long().cumsum(1).flip(1)
        behind = prompt & (more == 0) & (visual & prompt).any(1, keepdim=True)
        newest = prompt & (left <= self.queries)
        return torch.where(behind.any(1, keepdim=True), behind, newest)

    def weigh(self, event: CacheEvent) -> Tensor:
        """Density of the queries' attention: fp32 `[batch]`."""
        x, view = event["attention"], event.cache.view(event.layer, contents=False)
        least = (self.threshold * x.amax(-1, keepdim=True)).clamp(min=TINY)
        rates = torch.zeros_like(event.valid)
        rates[:, event.start :] = self._behind(event.prompt, event.visual)
        later = rates.flip(1).long().cumsum(1).flip(1)[:, None]
        seen = later.expand(-1, view.logical.shape[1], -1).gather(-1, view.logical) * view.valid
        return (x >= least).float().sum((2, 3)).mean(1) / seen.float().sum(2).mean(1).clamp(min=1)

    def allocate(self, layers: list[Layer]) -> list[Tensor]:
        density = torch.stack([layer.weight for layer in layers], -1)
        share = (density / density.sum(-1, keepdim=True).clamp(min=1e-30))[:, None]
        rooms = torch.stack([layer.room for layer in layers], -1)
        counts = portions(share * rooms.sum(-1, keepdim=True)).unbind(-1)
        return [
            n.maximum((layer.many * self.least).ceil().long()[:, None])
            for n, layer in zip(counts, layers, strict=True)
        ]
