"""Sparsely-gated mixture of experts, as an upcycled model has it (arXiv:1701.06538, 2212.05055)."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.plan import register
from mllm.routers.experts import Experts


@register("moe", paper="arXiv:1701.06538", stage="experts", trained=True)
@dataclass
class MoE(Experts):
    """Copies of FFNs as experts, the best `top_k` per token, balanced over all choices."""

    z: float = 0.001

    first_only = False
