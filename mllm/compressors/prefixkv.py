"""PrefixKV: one threshold of importance for all layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import Budget, CacheEvent, ColumnMass, register
from mllm.compressors.kv_base import KVMethod, Layer, best, share_out


@register("prefixkv", paper="arXiv:2412.03409", stage="cache")
@dataclass
class PrefixKV(KVMethod):
    """Let every layer keep the same share of its importance (PrefixKV, by the prompt itself).

    Importance is the attention that a token receives from the prompt, averaged over heads. One
    threshold serves all layers: each keeps its best tokens until their sum passes it, and it is
    chosen so that all layers together hold the budget. The authors measure the shares of layers
    on ten samples beforehand; here every prompt measures its own.

    While decoding a layer keeps its share of all tokens so far: when it has one too many, the
    token at a fixed place of what is stored leaves, or the first behind it that may.

    Args:
        budget: slots per layer on average, or a fraction of the prompt; the authors' `ratio` is
            what leaves.
        sinks, window, tokens: see :class:`KVMethod`.
        heads: `shared`, as in the paper, or every KV head chooses for itself.
        hold: whether layers keep to their share while decoding.
        distance: the place: behind the start of what is stored, or before the end of the
            compressed prompt.
    """

    budget: Budget = 0.2
    sinks: int = 1
    window: int | float = 1
    heads: Literal["each", "shared"] = "shared"
    hold: bool = True
    distance: int = -25

    two_pass: ClassVar[bool] = True
    remembers: ClassVar[bool] = False

    def reads(self):
        return {"attention": ColumnMass(heads="none" if self.headwise else "mean")}

    def score(self, event: CacheEvent) -> Tensor:
        x = event["attention"]
        return x if self.headwise else x[:, None]

    def allocate(self, layers: list[Layer]) -> list[Tensor]:
        slots = max(layer.score.shape[-1] for layer in layers)
        before, among, room = [], [], 0
        for layer in layers:
            x = layer.score.masked_fill(~layer.stored, 0)
            order = x.argsort(dim=-1, descending=True, stable=True)
            ranked = x.gather(-1, order) / x.sum(-1, keepdim=True).clamp(min=1e-30)
            above = torch.empty_like(x).scatter(-1, order, ranked.cumsum(-1) - ranked)
            fill = (0, slots - x.shape[-1])
            before.append(F.pad(above, fill))
            among.append(F.pad(layer.free, fill))
            room = room + layer.room.sum(1)
        sizes = [x.shape[1] for x in before]
        counts = share_out(-torch.cat(before, 1), torch.cat(among, 1), room)
        return list(counts.split(sizes, 1))

    def step(self, event: CacheEvent, layer: int) -> None:
        """Scores are not looked at again."""

    def trim(self, event: CacheEvent, layer: Layer, total: Tensor) -> None:
        stored, seen = layer.stored.sum(-1), event.valid.sum(1)[:, None]
        over = (stored - 1) * layer.many[:, None] >= seen * total
        place = total + self.distance if self.distance <= 0 else total * 0 + self.distance
        place = torch.where(place < 1, stored // 2, place)
        behind = layer.stored.long().cumsum(-1) > place[..., None]
        leaves = best(-layer.logical, layer.free & behind, over.long())
        self.dispose(event, layer, layer.stored & ~leaves)
