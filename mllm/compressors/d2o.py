"""D2O: heavy hitters with budgets by layer, and what leaves is merged where it fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mllm.compressors.base import Budget, CacheEvent, ColumnMass, register
from mllm.compressors.kv_base import KVMethod, Layer, portions
from mllm.compressors.kv_merge import merge_into, most_alike


@register("d2o", paper="arXiv:2406.13035", stage="cache")
@dataclass
class D2O(KVMethod):
    """H2O with more room where attention is flat, and with merging of what leaves (D2O).

    A layer's peak is the variance of the attention that its tokens receive, of every query head,
    scaled to [0, 1] among the heads of the layer and averaged over them; layers share the budget
    beyond sinks and window in proportion to exp(-peak). What a layer has no tokens for is lost, as
    in the authors' code. Within a layer H2O's scores decide, at every step.

    A token that leaves goes into the stored one whose key has the highest cosine, if that cosine
    is at least the threshold: a moving average, of each layer and head, of the mean cosine of what
    leaves. Other tokens are dropped. Means are weighted by e to the cosine, and by e for the token
    that receives. The authors' code takes the plain mean of vectors scaled by their cosine, which
    shrinks them; `weights=cosine` weighs as it does and adds up to one. Their filter looks at
    all heads together, though each lets go of other tokens; here every head has its own.

    Args:
        budget: slots per layer and KV head, averaged over the layers that are compressed, or a
            fraction of the prompt.
        sinks, tokens, heads, hold: see :class:`KVMethod`.
        window: newest tokens, which stay; the authors halve the budget.
        skip: first layers, which keep everything.
        skip_last: last layers, which keep everything.
        merge: whether tokens merge; otherwise all that leave are dropped.
        weights: `exp` or `cosine`, what a merged token weighs.
        decay: of the threshold, what a new mean leaves of it.
    """

    budget: Budget = 0.2
    sinks: int = 4
    window: int | float = 0.5
    hold: bool = True
    skip: int = 2
    skip_last: int = 1
    merge: bool = True
    weights: Literal["exp", "cosine"] = "exp"
    decay: float = 0.5

    oracle = "reference"
    two_pass: ClassVar[bool] = True
    adds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("skip", "skip_last"):
            self.demand(field, getattr(self, field) >= 0, "a whole number from 0")
        self.demand("decay", 0 <= self.decay <= 1, "a fraction in [0, 1]")

    def reads(self):
        return {"attention": ColumnMass(heads="none")}

    def weigh(self, event: CacheEvent) -> Tensor:
        """The layer's peak: fp32 `[batch]`."""
        there = event.valid[:, None]
        x = event["attention"].masked_fill(~there, 0)
        many = there.sum(-1, keepdim=True).clamp(min=2)
        far = (x - x.sum(-1, keepdim=True) / many).masked_fill(~there, 0)
        spread = far.square().sum(-1) / (many[..., 0] - 1)
        low, high = spread.aminmax(dim=1, keepdim=True)
        return ((spread - low) / (high - low + 1e-6)).mean(1)

    def allocate(self, layers: list[Layer]) -> list[Tensor]:
        cut = [layer for layer in layers if not self._whole(layer)]
        counts = [layer.free.sum(-1) for layer in layers]
        if not cut:
            return counts
        flat = (-torch.stack([layer.weight for layer in cut], -1)).softmax(-1)[:, None]
        rooms = torch.stack([layer.room for layer in cut], -1)
        shares = iter(portions(flat * rooms.sum(-1, keepdim=True)).unbind(-1))
        return [
            n if self._whole(layer) else next(shares)
            for n, layer in zip(counts, layers, strict=True)
        ]

    def leaves_whole(self, layer: int, depth: int) -> bool:
        return layer < self.skip or layer >= depth - self.skip_last

    def _whole(self, layer: Layer) -> bool:
        return self.leaves_whole(layer.index, layer.depth)

    def prefill_end(self, event: CacheEvent) -> None:
        if event.cache.depth <= self.skip + self.skip_last:
            event.note(f"d2o: all {event.cache.depth} layers are skipped")
        super().prefill_end(event)

    def trim(self, event: CacheEvent, layer: Layer, total: Tensor) -> None:
        if not self._whole(layer):
            super().trim(event, layer, total)

    def dispose(self, event: CacheEvent, layer: Layer, keep: Tensor) -> None:
        if self._whole(layer):
            return
        if not self.merge:
            return super().dispose(event, layer, keep)
        gone = layer.stored & ~keep
        like, nearest = most_alike(event, layer, keep, gone)
        threshold = self._threshold(event, layer, like, gone)
        share = like.exp() if self.weights == "exp" else like.clamp(min=0)
        own = torch.e if self.weights == "exp" else 1.0
        share = torch.where(gone, share, own)
        merged = gone & (like >= threshold[..., None])
        merge_into(event, layer, keep, merged, nearest, share)

    def _threshold(self, event: CacheEvent, layer: Layer, like: Tensor, gone: Tensor) -> Tensor:
        """The moving average with the tokens that leave now: fp32 `[batch, heads]`."""
        many = gone.sum(-1)
        mean = like.sum(-1) / many.clamp(min=1)
        known, name = event.cache.samples(layer.index), self._name("threshold")
        before = known.get(name, torch.full_like(mean, -torch.inf))
        mixed = self.decay * before + (1 - self.decay) * mean
        now = torch.where(before.isinf(), mean, mixed)
        known[name] = torch.where(many > 0, now, before)
        return known[name]
