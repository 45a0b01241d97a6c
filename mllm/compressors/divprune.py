"""DivPrune: keep the visual tokens that differ most from each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from mllm.compressors.base import (
    Budget,
    Context,
    Features,
    Keep,
    Positions,
    TokenReducer,
    farthest,
    register,
    resolve,
)


@register(
    "divprune",
    paper="arXiv:2503.02175",
    stage="pre_llm",
    licence_note="written from the paper; the authors' code is CC BY-NC 4.0",
)
@dataclass
class DivPrune(TokenReducer):
    """Keep the max-min diverse subset of the projected visual tokens (DivPrune).

    Greedy farthest-point selection under the cosine distance. The first pick is the token with
    the most distant nearest neighbour.

    Args:
        keep: visual tokens kept per image.
        positions: `compact` or `original`; None is `compact` (as the paper runs on LLaVA).
    """

    keep: Budget = 0.098
    positions: Positions | None = None

    def reads(self):
        return {"features": Features()}

    @torch.no_grad()
    def reduce(self, ctx: Context) -> list:
        x = F.normalize(ctx["features"].float(), dim=-1)
        images, tokens, width = x.shape
        same = x @ x.transpose(1, 2)
        # Exactly symmetric, whatever the kernel: two tokens that are nearest to each other are
        # equally isolated, and the earlier one is picked in any batch.
        distance = 1 - (same + same.transpose(1, 2)) / 2
        ctx.book(2 * tokens * tokens * width)

        count = resolve(self.keep, tokens)
        keep = farthest(distance, ctx.valid, count, count)
        return [Keep(keep, ctx.at_most(count))]
