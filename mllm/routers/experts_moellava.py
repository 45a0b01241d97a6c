"""MoE-LLaVA (arXiv:2401.15947): FFNs of every second decoder layer become four experts, top-2."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.plan import register
from mllm.routers.experts import Experts


@register("moellava", paper="arXiv:2401.15947", stage="experts", trained=True)
@dataclass
class MoELLaVA(Experts):
    """Copies of the FFN of every second decoder layer as experts, the best two per token.

    The scores of the chosen two are normalised, and the second choice is the second best (the
    authors' library draws it at random). `capacity_factor` counts rows per sample, without padding.
    """

    experts: int | tuple[int, ...] = 4
