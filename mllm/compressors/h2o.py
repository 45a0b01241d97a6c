"""H2O: heavy hitters, the tokens that received most attention so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mllm.compressors.base import Budget, ColumnMass, register
from mllm.compressors.kv_base import KVMethod


@register("h2o", paper="arXiv:2306.14048", stage="cache")
@dataclass
class H2O(KVMethod):
    """Keep what received most attention so far, and the newest tokens, at every step (H2O).

    The attention that a token receives is summed over all queries of the conversation. Query heads
    that share a KV head are averaged; the paper has none. Stored tokens keep their positions.

    Args:
        budget: slots per layer and KV head, or a fraction of the prompt.
        sinks, tokens, heads: see :class:`KVMethod`.
        window: newest tokens, which stay; the paper halves the budget.
        hold: whether tokens leave at every step of an answer too.
        visible: divide by the number of the prompt's queries that see a token, which are more for
            early ones.
    """

    budget: Budget = 0.2
    window: int | float = 0.5
    hold: bool = True
    visible: bool = False

    adds: ClassVar[bool] = True

    def reads(self):
        return {"attention": ColumnMass(heads="none", visible=self.visible)}
