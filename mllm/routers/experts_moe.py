"""Sparsely-gated mixture of experts, as an upcycled model has it (arXiv:1701.06538, 2212.05055)."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.plan import register
from mllm.routers.experts import Experts, Mode


@register("moe", paper="arXiv:1701.06538", stage="experts", trained=True)
@dataclass
class MoE(Experts):
    """Copies of FFNs as experts, the best `top_k` per token, balanced over all choices."""

    experts: int | tuple[int, ...] = 8
    top_k: int = 2
    mode: Mode = "sparse"
    layers: tuple[int, ...] | None = None
    capacity_factor: float | None = None
    min_capacity: int = 0
    balance: float = 0.01
    z: float = 0.001

    first_only = False
