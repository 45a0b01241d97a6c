"""SnapKV, and what shares its scores: PyramidKV and AdaKV."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import AttentionRows, Budget, CacheEvent, register
from mllm.compressors.kv_base import KVMethod, Layer, portions, received, share_out


@register("snapkv", paper="arXiv:2404.14469", stage="cache")
@dataclass
class SnapKV(KVMethod):
    """Keep what the newest prompt tokens attend to, and its neighbours (SnapKV).

    The attention of the last `window` queries is summed and pooled along the sequence, and every
    KV head keeps its best tokens. Query heads that share a KV head are joined after pooling, so
    that no head is stored twice. Defaults are those of the authors' LongBench runs; their class
    has `pool=avg:kernel=5`. Nothing leaves while decoding unless `hold`.

    Args:
        budget: slots per layer and KV head, the window included, or a fraction of the prompt.
        sinks, tokens, heads, hold: see :class:`KVMethod`.
        window: newest prompt tokens: they rate, and stay.
        kernel: neighbours that are pooled, the token included: odd.
        pool: `max` or `avg`.
        gqa: `mean` or `max` over query heads that share a KV head.
    """

    budget: Budget = 2048
    window: int = 32
    kernel: int = 7
    pool: Literal["max", "avg"] = "max"
    gqa: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("kernel", self.kernel > 0 and self.kernel % 2 == 1, "an odd number from 1")
        self.demand("window", self.window > 0, "a whole number from 1: these tokens rate")

    def reads(self):
        return {"attention": AttentionRows(rows="window", heads="none", window=self.window)}

    def score(self, event: CacheEvent) -> Tensor:
        raw = received(event["attention"])
        order = event.valid.long().cumsum(1)
        rates = (order > order[:, -1:] - self.window)[:, None] & event.valid[:, None]
        old = raw.masked_fill(rates, 0)
        if self.pool == "max":
            pooled = F.max_pool1d(old, self.kernel, 1, self.kernel // 2)
        else:
            pooled = F.avg_pool1d(old, self.kernel, 1, self.kernel // 2)
        return torch.where(rates, raw, pooled)


@register("pyramidkv", paper="arXiv:2406.02069", stage="cache")
@dataclass
class PyramidKV(SnapKV):
    """SnapKV with a budget that falls from layer to layer (PyramidKV).

    Beyond the window, budgets fall evenly from the first layer to the last, whose share is
    1 / `beta` of the mean; where a prompt is too short for the first one, the slope is less. What
    the authors' code loses by rounding down is kept: layers hold `budget` on average.

    Args:
        budget: slots per layer and KV head on average, or a fraction of the prompt.
        sinks, tokens, heads, hold: see :class:`KVMethod`.
        window, kernel, pool, gqa: see :class:`SnapKV`.
        beta: how steep the pyramid is.
    """

    kernel: int = 5
    pool: Literal["max", "avg"] = "avg"
    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("beta", self.beta > 0, "a whole number from 1")

    def allocate(self, layers: list[Layer]) -> list[Tensor]:
        return [self._height(layer) for layer in layers]

    def _height(self, layer: Layer) -> Tensor:
        mean, steps = layer.room, max(1, layer.depth - 1)
        there, every = layer.free.sum(-1), layer.stored.sum(-1)
        least = mean // self.beta
        most = 2 * mean - least
        most = torch.where(most > there, there, most)
        least = 2 * mean - most

        def below(i: int) -> Tensor:  # all layers before layer i
            return (2 * steps * i * most - (most - least) * i * (i - 1)) // (2 * steps)

        height = below(layer.index + 1) - below(layer.index)
        return torch.where((every < 2 * mean) | (layer.depth == 1), mean, height)


@register("adakv", paper="arXiv:2407.11550", stage="cache")
@dataclass
class AdaKV(SnapKV):
    """SnapKV with a budget for every head, by how its attention is spread (AdaKV).

    The best tokens of all KV heads of a layer together say how many each head keeps; `floor` of
    its budget every head has for sure. Heads really store unequally many.

    Args:
        budget: slots per layer and KV head on average, or a fraction of the prompt.
        sinks, tokens, hold: see :class:`KVMethod`.
        heads: `each`; the method has no sense where heads share.
        window, kernel, pool, gqa: see :class:`SnapKV`.
        floor: share of its budget that a head has for sure: 0.5 in the authors' code, 0.2 in
            others.
    """

    budget: Budget = 512
    floor: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("floor", 0 <= self.floor <= 1, "a fraction in [0, 1]")
        self.demand("heads", self.heads == "each", "each; where heads share, use snapkv")

    def allocate(self, layers: list[Layer]) -> list[Tensor]:
        counts = []
        for layer in layers:
            own = share_out(layer.score, layer.free, layer.room.sum(1))
            counts.append(portions(own * (1 - self.floor) + layer.room * self.floor))
        return counts
