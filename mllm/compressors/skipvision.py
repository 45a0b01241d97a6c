"""Skip-Vision's removal: an answer starts with few visual tokens in the cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mllm.compressors.base import (
    AttentionRows,
    Budget,
    CacheCompressor,
    CacheEvent,
    register,
    top_k,
)


@register("skipvision", paper="arXiv:2503.21817", stage="cache")
@dataclass
class SkipVision(CacheCompressor):
    """Forget most visual tokens in all layers before an answer starts (Skip-Vision's removal).

    The paper trains a model with a few summary tokens per picture; the many others pass by the
    FFNs, and leave the cache when the prompt has been read. An ordinary model has no summary
    tokens, so a rule says which visual tokens stay; all others leave all layers and heads. Passing
    by the FFNs is not part of this: without training it does harm.

    Args:
        budget: visual tokens of a sample that stay, separators counted: an int, or a fraction.
            The paper's models have about one summary token in eight. Protected tokens stay beyond
            it.
        rule: `uniform`, evenly spaced among the sample's visual tokens; `top`, what the last
            prompt token attends to most, averaged over heads and layers.
    """

    budget: Budget = 0.125
    rule: Literal["uniform", "top"] = "uniform"

    identity = {"budget": 1.0}
    watches: ClassVar[bool] = False

    def reads(self):
        return {"attention": AttentionRows(rows="last", heads="mean")} if self.rule == "top" else {}

    def layer_end(self, event: CacheEvent) -> None:
        if self.rule == "top":
            state = event.cache.state
            state["skipvision"] = state.get("skipvision", 0) + event["attention"][:, 0]

    def prefill_end(self, event: CacheEvent) -> None:
        drop = torch.zeros_like(event.valid)
        drop[:, event.start :] = event.visual & ~self._stay(event)
        event.cache.evict(drop=drop)

    def _stay(self, event: CacheEvent) -> Tensor:
        """Visual rows that stay: bool `[batch, rows]`."""
        there = event.visual & event.entered[0][1]  # stages before the LLM took others away
        many = event.visual.sum(1)
        if isinstance(self.budget, int):
            count = many.clamp(max=self.budget)
        else:
            count = (many.double() * self.budget).round().long().clamp(min=1)
        if self.rule == "top":
            score = event.cache.state.pop("skipvision")[:, event.start :]
            stay = top_k(score, there, count)
        else:
            place, left = there.long().cumsum(1) - 1, there.sum(1, keepdim=True).clamp(min=1)
            # Every so many places this passes a multiple of `left`, `count` times in all.
            stay = there & (place * count[:, None] % left < count[:, None])
        return stay if event.protected is None else stay | event.protected
