"""The rank of attention maps, by which gamma-MoD chooses the layers that it routes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm.compressors.base import AttentionRows, LayerContext, LayerMethod, Positions
from mllm.plan import MethodInfo


def _all(ctx: LayerContext) -> Tensor:
    return ctx.prompt


@dataclass
class _Ranks(LayerMethod):
    """Reads every layer's attention, and changes nothing."""

    positions: Positions | None = "original"

    info = MethodInfo(name="arank", stage="llm", paper="arXiv:2410.13859")
    actions = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        self.depth, self.found = 0, dict[int, list[float]]()

    def at_depth(self, num_layers: int, first_cut: int = 0) -> _Ranks:
        self.depth = num_layers
        return self

    def at(self) -> Sequence[int]:
        return range(1, self.depth + 1)

    def reads(self):
        return {"rows": AttentionRows(rows=_all, heads="none")}

    def act(self, ctx: LayerContext) -> list[Any]:
        for maps in ctx["rows"].float():
            ranks = torch.linalg.matrix_rank(maps).float()
            self.found.setdefault(ctx.layer - 1, []).append(float(ranks.mean()))
        return []


def arank(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> list[float]:
    """Mean rank of the attention maps of every decoder layer, over heads and samples.

    Layers with the lowest ranks repeat themselves, and lose least when tokens pass them by. A few
    samples of the task suffice; memory is heads x rows x rows of each layer.

    Source: gamma-MoD, arXiv:2410.13859. A singular value counts from torch's default tolerance on.

    Args:
        model: of a supported family, without a plan, under sdpa or eager attention.
        batches: what the processor makes of samples with pictures.

    Returns:
        A number per layer.

    Raises:
        PlanError: the model is patched already, or its attention cannot be read.
    """
    from mllm.patcher import Patched

    probe = _Ranks()
    with Patched(model, [probe]), torch.no_grad():
        for batch in batches:
            model(**batch)
    return [sum(ranks) / len(ranks) for _, ranks in sorted(probe.found.items())]
