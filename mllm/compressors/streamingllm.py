"""StreamingLLM: the first tokens and the newest ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from mllm.compressors.base import Budget, CacheEvent, register
from mllm.compressors.kv_base import KVMethod


@register("streamingllm", paper="arXiv:2309.17453", stage="cache")
@dataclass
class StreamingLLM(KVMethod):
    """Keep the first tokens and the newest ones, at every step (StreamingLLM).

    Tokens stay where they were: the paper numbers stored tokens anew, which rows and columns of
    pictures do not allow. A picture in the middle of a long prompt is forgotten; `tokens=visual`
    keeps the text.

    Args:
        budget: slots per layer, the paper's 4 + 512, or a fraction of the prompt.
        sinks: first tokens, which never leave.
        window: newest tokens that stay even where a budget has no room for the sinks.
        tokens: `prompt`, or `visual` ones alone may leave, the oldest first.
        heads: without effect; all heads keep the same.
        hold: whether tokens leave at every step of an answer too.
    """

    budget: Budget = 516
    sinks: int = 4
    window: int | float = 1
    heads: Literal["each", "shared"] = "shared"
    hold: bool = True

    remembers: ClassVar[bool] = False
    alike: ClassVar[bool] = True

    def score(self, event: CacheEvent) -> Tensor:
        return event.valid.long().cumsum(1)[:, None].float()

    def step(self, event: CacheEvent, layer: int) -> Tensor:
        return self.score(event)
