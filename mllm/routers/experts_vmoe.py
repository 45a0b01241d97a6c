"""V-MoE's batch-prioritised routing (arXiv:2106.05974): the surest rows go first."""

from __future__ import annotations

from dataclasses import dataclass

from mllm.plan import register
from mllm.routers.experts import Experts, Mode


@register("vmoe", paper="arXiv:2106.05974", stage="experts", trained=True)
@dataclass
class VMoE(Experts):
    """Experts with room for few rows, given to those with the highest scores first.

    Set `capacity_factor` (the paper goes down to 0.15 at inference): without it, nothing is
    dropped. Room is counted per sample, so a batch changes nothing. The scores of the chosen are
    normalised, as sparse upcycling does (arXiv:2212.05055).
    """

    mode: Mode = "second_half"

    prioritised = True
