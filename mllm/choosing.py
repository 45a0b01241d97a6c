"""Choosing tokens by scores, and the means of those that go together."""

from __future__ import annotations

import torch
from torch import Tensor


def top_k(scores: Tensor, candidates: Tensor, count: Tensor | int) -> Tensor:
    """Mask of the `count` best candidates per row; ties go to the earlier token.

    Args:
        scores: `[batch, tokens]`.
        candidates: bool `[batch, tokens]`; the others are never taken.
        count: int, or int64 `[batch]`.
    """
    scores = scores.float().masked_fill(~candidates, float("-inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    limit = count[:, None] if isinstance(count, Tensor) else count
    return candidates & (rank < limit)


def top_k_each(scores: Tensor, candidates: Tensor, part: Tensor, count: Tensor) -> Tensor:
    """Mask of the best candidates of every part; ties go to the earlier token.

    Args:
        scores, candidates: as in :func:`top_k`.
        part: int64 `[tokens]`, from 0.
        count: int64 `[parts]` or `[batch, parts]`, of each part.
    """
    scores = scores.float().masked_fill(~candidates, float("-inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranked, parts = part[order], torch.arange(count.shape[-1], device=order.device)
    among = (ranked[..., None] == parts).int().cumsum(1).gather(2, ranked[..., None])[..., 0] - 1
    rank = torch.empty_like(order).scatter_(1, order, among)
    return candidates & (rank < count.expand(len(scores), -1)[:, part])


def fill_up(chosen: Tensor, scores: Tensor, candidates: Tensor, count: int) -> Tensor:
    """`chosen` and the best other candidates, `count` in all: bool `[batch, tokens]`."""
    return chosen | top_k(scores, candidates & ~chosen, count - chosen.sum(1))


def farthest(
    distance: Tensor, among: Tensor, count: Tensor | int, steps: int, chosen: Tensor | None = None
) -> Tensor:
    """Mask of `chosen` and, one by one, of the candidates farthest from what is chosen by then.

    Greedy max-min. With nothing chosen, the candidate with the most distant nearest neighbour is
    the first. Ties go to the earlier token.

    Args:
        distance: fp32 `[batch, tokens, tokens]`, symmetric.
        among: bool `[batch, tokens]`, candidates.
        count: int, or int64 `[batch]`; in all, with what is chosen already.
        steps: picks, at most; known on the host, so that the device is not asked.
        chosen: bool `[batch, tokens]`; None is nothing.
    """
    chosen = torch.zeros_like(among) if chosen is None else chosen
    apart = distance.masked_fill(~among[:, None], float("inf"))
    apart.diagonal(dim1=1, dim2=2).fill_(float("inf"))
    empty, limit = ~chosen.any(1, keepdim=True), count
    if isinstance(count, Tensor):
        limit = count[:, None]
    left = limit - chosen.sum(1, keepdim=True)
    nearest = distance.masked_fill(~chosen[:, None], float("inf")).amin(2)
    nearest = torch.where(empty, apart.amin(2), nearest)
    nearest = nearest.masked_fill(~among | chosen, float("-inf"))
    for step in range(steps):
        pick = nearest.argmax(1, keepdim=True)
        more = (nearest.gather(1, pick) > float("-inf")) & (step < left)
        to = distance.gather(1, pick[..., None].expand(-1, -1, distance.shape[2]))[:, 0]
        shrunk = torch.minimum(nearest, to)
        if step == 0:  # the first pick starts the distances to the chosen set
            shrunk = torch.where(empty, to.masked_fill(~among, float("-inf")), shrunk)
        nearest = shrunk.scatter(1, pick, float("-inf"))
        chosen = chosen.scatter(1, pick, chosen.gather(1, pick) | more)
    return chosen


def even_shares(count: int, parts: int) -> Tensor:
    """`count` split over parts as evenly as whole numbers can be: int64 `[parts]`."""
    return (torch.arange(parts + 1) * count // parts).diff()


def merge_rows(values: Tensor, into: Tensor, weight: Tensor | None = None) -> Tensor:
    """Weighted means: a token that receives becomes the mean of itself and its members.

    Args:
        values: `[batch, tokens, width]`.
        into: int64 `[batch, tokens]`, as in :class:`Merge`; a token with -1 counts nowhere.
        weight: `[batch, tokens]`, for example `ctx.size`; None is 1.

    Returns:
        `[batch, tokens, width]`, to be read at the tokens that receive; differentiable.
    """
    weight = torch.ones_like(into, dtype=torch.float32) if weight is None else weight.float()
    weight = weight.masked_fill(into < 0, 0)
    at = into.clamp(min=0)
    total = torch.zeros_like(weight).scatter_add(1, at, weight)
    summed = torch.zeros_like(values, dtype=torch.float32).scatter_add(
        1, at[..., None].expand_as(values), values.float() * weight[..., None]
    )
    return (summed / total.clamp(min=1e-12)[..., None]).to(values.dtype)
