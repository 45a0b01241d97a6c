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

        gone = ~ctx.valid
        neighbours = distance.masked_fill(gone[:, None, :], float("inf"))
        neighbours.diagonal(dim1=1, dim2=2).fill_(float("inf"))
        nearest = neighbours.amin(2).masked_fill(gone, float("-inf"))
        keep = torch.zeros_like(ctx.valid)
        rows = torch.arange(images, device=x.device)
        for _ in range(resolve(self.keep, tokens)):
            pick = nearest.argmax(1)
            # The first pick starts the distances to the chosen set; later ones shrink them.
            started = keep.any(1, keepdim=True)
            to_pick = distance[rows, pick]
            nearest = torch.where(started, torch.minimum(nearest, to_pick), to_pick)
            keep[rows, pick] = True
            nearest = nearest.masked_fill(gone | keep, float("-inf"))
        return [Keep(keep & ctx.valid, ctx.at_most(resolve(self.keep, tokens)))]
