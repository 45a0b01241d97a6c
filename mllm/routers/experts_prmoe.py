"""PR-MoE of DeepSpeed-MoE (arXiv:2201.05596): a pyramid of experts beside the dense FFN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm.plan import register
from mllm.routers.experts import ExpertLayer, Experts


@register("prmoe", paper="arXiv:2201.05596", stage="experts", trained=True)
@dataclass
class PRMoE(Experts):
    """One expert per token beside the FFN itself, mixed by a learnt softmax of two.

    `experts` may rise with the layers (`experts=4/4/8/8`). The weight of the one expert is 1 in
    value and the score in gradient, so that a model starts as it was; the paper multiplies with the
    score itself.
    """

    experts: int | tuple[int, ...] = 4
    top_k: int = 1

    def build(
        self, layer: int, experts: int, own: range, weights: dict[str, Tensor],
        act: Callable[[Tensor], Tensor], draw: torch.Generator,
    ) -> ExpertLayer:  # fmt: skip
        made = super().build(layer, experts, own, weights, act, draw)
        made.mix_weight = nn.Parameter(torch.zeros(2, made.gate.shape[1]).to(made.gate.device))
        made.mix_bias = nn.Parameter(torch.zeros(2).to(made.gate.device))
        return made

    def start(self, weights: dict[str, Tensor], own: range) -> dict[str, Tensor]:
        shared = {f"shared_{name}": w for name, w in weights.items()}
        return super().start(weights, own) | shared
