"""The sanity row of methods on the KV cache: tokens drawn at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mllm.compressors.base import CacheEvent, register
from mllm.compressors.kv_base import KVMethod


@register("randomkv", stage="cache")
@dataclass
class RandomKV(KVMethod):
    """Keep stored tokens drawn at random: what a method on the KV cache must beat.

    Every layer and KV head draws for itself. Seeded by the plan and the sample's pictures.

    Args:
        budget: slots per layer and KV head, or a fraction of the prompt.
        sinks, window, tokens, heads, hold: see :class:`KVMethod`.
        seed: another draw.
    """

    seed: int = 0

    draws = True
    remembers: ClassVar[bool] = False

    def score(self, event: CacheEvent) -> Tensor:
        return self.step(event, event.layer)

    def step(self, event: CacheEvent, layer: int) -> Tensor:
        heads = event.cache.view(layer, contents=False).logical.shape[1]
        tokens = event.valid.shape[1]
        # One column of draws per token, from the first real one on: padding draws nothing.
        drawn = [torch.rand(tokens, heads, generator=g) for g in event.generators(layer)]
        drawn = torch.stack(drawn).to(event.valid.device, non_blocking=True)
        order = (event.valid.cumsum(1) - 1).clamp(min=0)
        return drawn.gather(1, order[..., None].expand(-1, -1, heads)).transpose(1, 2)
