"""VMTC: keep what [CLS] looks at, merge clusters of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import (
    Budget,
    Context,
    Features,
    Keep,
    Merge,
    Positions,
    TokenReducer,
    VisionAttention,
    Write,
    merge_rows,
    register,
    resolve,
    top_k,
)
from mllm.errors import PlanError


@register("vmtc", paper="arXiv:2411.15453", stage="pre_llm")
@dataclass
class VMTC(TokenReducer):
    """Keep primary tokens by [CLS] attention; k-means clusters of the others become their means.

    The vision half of the paper, which has no published code: what is written here follows its
    abstract and its reviews, and no number is claimed. The importance of a token is its [CLS]
    attention (mean over heads; a tower without [CLS]: what it receives). The `primary` share of
    the budget are the most important tokens. The others are clustered by k-means under the
    cosine, from means at equal distances in reading order; a cluster becomes the mean of its
    members, weighted by importance, at the place of the most important one. Where a mean has no
    member, the next important token stays by itself, so that the budget is exact.

    Args:
        keep: visual tokens per image, clusters included.
        primary: share of `keep` that is kept as it is.
        rounds: rounds of k-means.
        positions: `compact` or `original`; None is `compact`.
    """

    keep: Budget = 0.25
    primary: float = 0.75
    rounds: int = 10
    positions: Positions | None = None

    site = "pre_projector"
    actions = ("Keep", "Merge", "Write")
    first = True
    oracle = "rebuild"
    # Merging a cluster of one token is only equal but for rounding.
    identity = {"keep": 1.0, "primary": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.primary <= 1 or self.rounds < 0:
            raise PlanError(
                f"vmtc: primary={self.primary!r}, rounds={self.rounds}",
                argument="primary",
                given=self.primary,
                expected="0 <= primary <= 1, rounds from 0",
            )

    def reads(self):
        return {"features": Features(), "importance": VisionAttention(heads="mean")}

    def reduce(self, ctx: Context) -> list:
        x, importance = ctx["features"], ctx["importance"].float()
        images, tokens, width = x.shape
        count = resolve(self.keep, tokens)
        primary = math.ceil(self.primary * count)
        chosen = top_k(importance, ctx.valid, primary)
        clusters = min(count - primary, tokens - primary)
        own = torch.arange(tokens, device=x.device).expand(images, -1)
        if not clusters:
            into = torch.where(chosen, own, -1)
            return [Keep(chosen, [primary] * images), Merge(into), Write(x)]
        with torch.no_grad():
            rest = chosen.int().argsort(dim=1, stable=True)[:, : tokens - primary]
            label = self._clusters(F.normalize(x.float(), dim=-1), chosen, rest, clusters)
            into, keep = _receivers(label, importance, chosen, clusters)
        ctx.book(2 * (self.rounds + 1) * tokens * clusters * width)
        # By the most important of the cluster, since attention can be as small as it likes.
        weight = importance / importance.gather(1, into.clamp(min=0)).clamp(min=1e-37)
        values = merge_rows(x, into, weight.masked_fill(into == own, 1))
        values = torch.where(chosen[..., None], x, values)
        return [Keep(keep, [count] * images), Merge(into), Write(values)]

    def _clusters(self, unit: Tensor, chosen: Tensor, rest: Tensor, clusters: int) -> Tensor:
        """Cluster of each token; those of chosen ones mean nothing: int64 `[images, tokens]`.

        Args:
            unit: `[images, tokens, width]`, of length one.
            chosen: bool `[images, tokens]`, tokens in no cluster.
            rest: int64 `[images, others]`, the others in reading order.
            clusters: how many.
        """
        at = torch.arange(clusters, device=unit.device) * rest.shape[1] // clusters
        means = unit.gather(1, rest[:, at, None].expand(-1, -1, unit.shape[2]))
        weight = (~chosen).float()
        for _ in range(self.rounds):
            label = (unit @ means.transpose(1, 2)).argmax(2)
            total = torch.zeros_like(means).scatter_add(
                1, label[..., None].expand_as(unit), unit * weight[..., None]
            )
            there = torch.zeros_like(means[..., 0]).scatter_add(1, label, weight) > 0
            means = torch.where(there[..., None], F.normalize(total, dim=-1), means)
        return (unit @ means.transpose(1, 2)).argmax(2)


def _receivers(
    label: Tensor, importance: Tensor, chosen: Tensor, clusters: int
) -> tuple[Tensor, Tensor]:
    """The token that each goes into, and the tokens that stay: `[images, tokens]` each.

    Args:
        label: int64 `[images, tokens]`, the cluster of a token that is not chosen.
        importance: fp32 `[images, tokens]`.
        chosen: bool `[images, tokens]`, tokens that stay as they are.
        clusters: tokens that stay besides.
    """
    images, tokens = label.shape
    label = label.masked_fill(chosen, clusters)  # of no cluster
    order = importance.argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    first = rank.new_full((images, clusters + 1), tokens).scatter_reduce(1, label, rank, "amin")
    receives = (rank == first.gather(1, label)) & ~chosen
    # A cluster without members leaves its seat to the next important token.
    missing = clusters - receives.sum(1)
    alone = top_k(importance, ~chosen & ~receives, missing)
    own = torch.arange(tokens, device=label.device).expand_as(label)
    into = order.gather(1, first.clamp(max=tokens - 1)).gather(1, label)
    into = torch.where(chosen | alone, own, into)
    return into, chosen | receives | alone
