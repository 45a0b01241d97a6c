"""MoE-LLaVA (arXiv:2401.15947): FFNs of every second decoder layer become four experts, top-2."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.plan import register
from mllm.routers.experts import Experts, Mode


@register("moellava", paper="arXiv:2401.15947", stage="experts", trained=True)
@dataclass
class MoELLaVA(Experts):
    """Copies of the FFN of every second decoder layer as experts, the best two per token.

    The scores of the chosen two are normalised, and the second choice is the second best (the
    authors' library draws it at random). `capacity_factor` counts rows per sample, without padding.

    Args:
        experts: of every layer that has some, or of each of these layers in turn.
        top_k: experts that a row goes to.
        mode: decoder layers: every second from the first ("sparse"), all ("dense"), or a half.
        layers: 0-based decoder layers, instead of `mode`.
        capacity_factor: room of an expert, as a multiple of an even share of the choices of a
            sample without its padding; none is room for all.
        min_capacity: rows that an expert has room for at least.
        balance: coefficient of the load-balance loss, of each layer; the layers are summed.
        z: coefficient of the router z-loss (arXiv:2202.08906), of each layer.
    """

    experts: int | tuple[int, ...] = 4
    top_k: int = 2
    mode: Mode = "sparse"
    layers: tuple[int, ...] | None = None
    capacity_factor: float | None = None
    min_capacity: int = 0
    balance: float = 0.01
    z: float = 0.0
