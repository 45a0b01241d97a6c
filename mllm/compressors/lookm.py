"""LOOK-M: text first, and what leaves is merged into what stays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mllm.compressors.base import Budget, CacheEvent, ColumnMass, register
from mllm.compressors.kv_base import KVMethod, Layer
from mllm.compressors.kv_merge import merge_into, most_alike


@register("lookm", paper="arXiv:2406.18139", stage="cache")
@dataclass
class LookM(KVMethod):
    """Keep text before pictures, and merge what leaves into what is most like it (LOOK-M).

    Half of the budget are the newest tokens; the rest are text tokens by the attention that they
    receive from the prompt, and only then visual ones. Keys and values of a token that leaves go
    into the stored token whose key has the highest cosine. `pivot` moves it half way there before
    the mean is taken. The authors' `weighted` scales what is added and divides by its number, so
    that vectors shrink; here weights add up to one.

    Args:
        budget: slots per layer and KV head, or a fraction of the prompt.
        sinks, tokens, heads, hold: see :class:`KVMethod`.
        window: newest tokens, which stay: a fraction of the budget, or an int.
        merge: `pivot`, `mean`, `weighted` (by cosine, and only what is more alike than the
            average), or `none`.
    """

    budget: Budget = 0.2
    window: int | float = 0.5
    merge: Literal["pivot", "mean", "weighted", "none"] = "pivot"

    oracle = "reference"
    sums: ClassVar[bool] = True

    def reads(self):
        return {"attention": ColumnMass(heads="none")}

    def rank(self, layer: Layer) -> Tensor:
        below = -1 / layer.score.clamp(min=1e-30)  # the same order, and less than any text
        return torch.where(layer.visual, below, layer.score)

    def dispose(self, event: CacheEvent, layer: Layer, keep: Tensor) -> None:
        if self.merge == "none":
            return super().dispose(event, layer, keep)
        gone = layer.stored & ~keep
        like, nearest = most_alike(event, layer, keep, gone)
        share = torch.ones_like(like)
        if self.merge == "pivot":
            joined = torch.zeros_like(like).scatter_add(-1, nearest, gone.float())
            share = torch.where(gone, 0.5, 1 + joined / 2)
        elif self.merge == "weighted":
            share = torch.where(gone, like.clamp(min=0), 1.0)
            gone = gone & (like >= (like * gone).sum(-1, True) / gone.sum(-1, True).clamp(min=1))
        merge_into(event, layer, keep, gone, nearest, share)
