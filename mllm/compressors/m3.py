"""M3: nested grids of visual tokens, one model for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from mllm.compressors.base import Positions, register
from mllm.compressors.elastic import Elastic
from mllm.compressors.pooling import PoolingWithin


@register("m3", paper="arXiv:2405.17430", stage="pre_llm", trained=True)
@dataclass
class M3(Elastic, PoolingWithin):
    """Average-pool projected tokens to one of several grids; the model learns them all (M3).

    Training averages the loss over all grids, so a step has as many forward passes. Adds no
    parameters: what learns is the model, and a model that has not learnt it is `ggem` with p = 1.

    Args:
        keep: visual tokens per image, one of `scales`; None is the most. The largest grid of the
            picture's shape within it; the grids of a tiled picture share it by their size.
        scales: budgets that the model learns.
        train: `sum` is the paper's; `draw` has one of them in each forward, `keep` that one alone.
        weights: how often each of `scales` is drawn; None is equally often.
        positions: `compact` or `original` (the cell's middle token); None is `compact`.
    """

    keep: int | None = None
    scales: tuple[int, ...] = (576, 144, 36, 9, 1)
    train: Literal["sum", "draw", "keep"] = "sum"
    weights: tuple[float, ...] | None = None
    positions: Positions | None = None

    identity = {"keep": 576}

    def trained(self) -> Sequence[int]:
        return self.scales
