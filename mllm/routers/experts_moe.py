"""Sparsely-gated mixture of experts, as an upcycled model has it (arXiv:1701.06538, 2212.05055)."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.plan import register
from mllm.routers.experts import Experts, Mode


@register("moe", paper="arXiv:1701.06538", stage="experts", trained=True)
@dataclass
class MoE(Experts):
    """Copies of FFNs as experts, the best `top_k` per token, balanced over all choices.

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

    experts: int | tuple[int, ...] = 8
    top_k: int = 2
    mode: Mode = "sparse"
    layers: tuple[int, ...] | None = None
    capacity_factor: float | None = None
    min_capacity: int = 0
    balance: float = 0.01
    z: float = 0.001

    first_only = False
