"""PACT: visual tokens that are not asked for leave, the others merge into clusters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import (
    Budget,
    Hidden,
    Keep,
    Keys,
    LayerContext,
    LayerPruner,
    LogitBias,
    Merge,
    Positions,
    Queries,
    Write,
    merge_rows,
    register,
    top_k,
)
from mllm.errors import PlanError


@register("pact", paper="arXiv:2504.08966", stage="llm", reference_layers=28)
@dataclass
class PACT(LayerPruner):
    """Prune unimportant visual tokens, then cluster the rest by the density of keys (PACT).

    At one layer, with the queries and keys that it would have. Importance (EUTI): the softmax over
    visual tokens of ``mean query . key``, neither rotated, mean over heads, times the norm of the
    hidden state; the `keep` best are candidates. Clusters (DBDPC): candidates in order of density,
    ``sum_j exp(-(d_ij / 2)^2)`` with d the cosine distance of rotated keys, all heads together;
    one is a centre if no denser centre is within `distance`. Every candidate goes to its nearest
    centre, and a pruned token too if that is within `retrieve` times `distance`. The cluster is
    the mean of its hidden states, at the place of its centre; later layers attend to it as often
    as it has members (`proportional`, log size on the logits).

    How many stay depends on the input, at most `keep`. Finding the centres asks the device once a
    round. Visual tokens of a sample are one set.

    Args:
        layer: rows leave before this decoder layer; None is the paper's 4 of 28, scaled.
        keep: candidates, of the visual tokens that arrive at the layer.
        distance: between centres.
        retrieve: how much further a pruned token may be from a centre; 0 retrieves none.
        proportional: attend by size; not with flash attention.
        positions: `original` or `compact`; None is `original` (of the centre).
    """

    layer: int | None = None
    keep: Budget = 0.55
    distance: float = 0.21
    retrieve: float = 1.5
    proportional: bool = True
    positions: Positions | None = None

    paper_layer = 4
    actions = ("Keep", "Merge", "Write", "LogitBias")
    differentiable = True  # a mean's members have its gradient
    # A bias of zeros is only equal but for rounding.
    identity = {"keep": 1.0, "distance": 0.0, "proportional": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.distance < 0 or self.retrieve < 0:
            raise PlanError(
                f"pact: distance={self.distance}, retrieve={self.retrieve}",
                argument="distance",
                given=self.distance,
                expected="from 0",
            )
        if not self.proportional:
            self.actions = ("Keep", "Merge", "Write")

    def reads(self):
        return {
            "queries": Queries(rope=False, when="before"),
            "plain": Keys(rope=False, when="before"),
            "keys": Keys(when="before"),
            "hidden": Hidden(),
        }

    def score(self, ctx: LayerContext) -> Tensor:
        query, key = ctx["queries"].float(), ctx["plain"].float()
        there = ctx.visual[:, None, :, None]
        mean = (query * there).sum(2) / there.sum(2).clamp(min=1)  # [batch, heads, head_dim]
        key = key.repeat_interleave(mean.shape[1] // key.shape[1], 1)
        ctx.book(2 * key.shape[1] * key.shape[2] * key.shape[3])
        logits = (key @ mean[..., None])[..., 0] * key.shape[3] ** -0.5
        least = torch.finfo(logits.dtype).min
        weight = logits.masked_fill(~ctx.visual[:, None], least).softmax(2).mean(1)
        return weight * ctx["hidden"].float().norm(dim=2)

    def act(self, ctx: LayerContext) -> list:
        with torch.no_grad():
            centres, into = self._clusters(ctx)
        values = merge_rows(ctx["hidden"], into, ctx.size)
        actions = [Keep(centres), Merge(into), Write(values)]
        if self.proportional:
            weight = ctx.size.masked_fill(into < 0, 0)
            size = torch.zeros_like(weight).scatter_add(1, into.clamp(min=0), weight)
            order = ctx.logical.argsort(dim=1, stable=True)
            log = size.where(centres, 1).clamp(min=1).log().gather(1, order)
            bias = _LogSize(ctx.logical.gather(1, order), log)
            actions += [LogitBias(layer, bias) for layer in range(ctx.layer, ctx.num_layers)]
        return actions

    def _clusters(self, ctx: LayerContext) -> tuple[Tensor, Tensor]:
        """The centres, and the row that each visual row goes into: `[batch, rows]` each."""
        _, limit = ctx.budget(self.keep, ctx.counts())
        score = self.score(ctx).masked_fill(ctx.protected, float("inf"))
        candidates = top_k(score, ctx.visual, limit) | (ctx.visual & ctx.protected)
        keys = F.normalize(ctx["keys"].float().transpose(1, 2).flatten(2), dim=-1)
        same = keys @ keys.transpose(1, 2)
        distance = (1 - (same + same.transpose(1, 2)) / 2).clamp(min=0)
        ctx.book(2 * keys.shape[1] ** 2 * keys.shape[2])

        centres = self._centres(distance, candidates, ctx.protected)
        apart = distance.masked_fill(~centres[:, None], float("inf"))
        nearest, to = apart.min(2)
        own = torch.arange(to.shape[1], device=to.device).expand_as(to)
        found = candidates | (ctx.visual & (nearest <= self.retrieve * self.distance))
        into = torch.where(centres, own, torch.where(found, to, -1))
        return centres, into.masked_fill(~ctx.visual, -1)

    def _centres(self, distance: Tensor, among: Tensor, protected: Tensor) -> Tensor:
        """Candidates without a denser centre near them: bool `[batch, rows]`.

        Protected rows are centres. All that have no denser candidate near them are centres at
        once; those that they cover step back, and so on.
        """
        pair = among[:, :, None] & among[:, None]
        density = (torch.exp(-(distance / 2).square()) * pair).sum(2)
        density = density.masked_fill(protected, float("inf")).masked_fill(~among, -1)
        rank = density.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        near = pair & (distance <= self.distance)
        denser = near & (rank[:, None] < rank[:, :, None])
        centres, left = torch.zeros_like(among), among
        while bool(left.any()):
            new = left & (~(denser & left[:, None]).any(2) | protected)
            centres = centres | new
            left = left & ~new & ~(near & new[:, None]).any(2)
        return centres


@dataclass
class _LogSize:
    """The bias of one layer: how much a key stands for, by logical index.

    Attributes:
        keys: int64 `[batch, rows]`, rising.
        log: fp32 `[batch, rows]`.
    """

    keys: Tensor
    log: Tensor

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        row = torch.searchsorted(self.keys, keys.contiguous()).clamp(max=self.keys.shape[1] - 1)
        there = self.keys.gather(1, row) == keys
        return (
            self.log.gather(1, row)
            .masked_fill(~there, 0)[:, None, None]
            .expand(-1, -1, queries.shape[1], -1)
        )
