"""PACT: visual tokens that are not asked for leave, the others merge into clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
from mllm.plan import resolve

#: Halvings of the interval in which a distance for a number of clusters is looked for.
HALVINGS = 12


@register("pact", paper="arXiv:2504.08966", stage="llm", reference_layers=28)
@dataclass
class PACT(LayerPruner):
    """Prune unimportant visual tokens, then cluster the rest by the density of keys (PACT).

    At one layer, with the queries and keys that it would have. Importance (EUTI): the softmax over
    all up to the last visual token of ``mean query . key``, neither rotated, mean over heads, times
    the norm of the hidden state; the `keep` best visual tokens are candidates. Clusters (DBDPC):
    candidates in order of density, ``sum_j exp(-(d_ij / 2)^2)`` with d the cosine distance of
    rotated keys, all heads together; one is a centre if no denser centre is within `distance`.
    Every candidate goes to its nearest centre, and a pruned token too if that is within `retrieve`
    times `distance`. The cluster is the mean of its hidden states, at the place of its centre;
    later layers attend to it as often as it has members (`proportional`, log size on the logits).

    How many stay depends on the input, at most `keep`. With `clusters`, which is ours, each sample
    gets the smallest distance that leaves it no more; a sweep's budget sets this. Finding the
    centres asks the device once a round. Visual tokens of a sample are one set.

    Args:
        layer: rows leave before this decoder layer; None is the paper's 4 of 28, scaled.
        keep: candidates, of the visual tokens that arrive at the layer.
        distance: between centres.
        clusters: how many at most, of the visual tokens that arrive, in place of `distance`.
        retrieve: how much further a pruned token may be from a centre; 0 retrieves none.
        prefix: the text before the last visual token asks and is asked for too, as in the authors'
            code; or visual tokens alone.
        queries: `mean` asks once, with the mean query; `each` is the mean of what every query
            attends to, without causal mask (the authors' code has it, switched off).
        proportional: attend by size; not with flash attention.
        positions: `original` or `compact`; None is `original` (of the centre).
    """

    layer: int | None = None
    keep: Budget = 0.55
    distance: float = 0.21
    clusters: Budget | None = None
    retrieve: float = 1.5
    prefix: bool = True
    queries: Literal["mean", "each"] = "mean"
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

    def leaving(self, count: int, tokens: int) -> PACT:
        more = resolve(self.keep, tokens) < count
        return self.replace(clusters=count, keep=count if more else self.keep)

    def score(self, ctx: LayerContext) -> Tensor:
        query, key = ctx["queries"].float(), ctx["plain"].float()
        there = asking = self._asked(ctx)[:, None]  # [batch, 1, rows]
        if self.queries == "mean":
            count = there.sum(2).clamp(min=1)[..., None, None]
            query = (query * there[..., None]).sum(2, keepdim=True) / count
            asking = torch.ones_like(there[..., :1])
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        ctx.book(2 * query.shape[1] * query.shape[2] * key.shape[2] * key.shape[3])
        logits = query @ key.transpose(2, 3) * key.shape[3] ** -0.5
        least = torch.finfo(logits.dtype).min
        weight = logits.masked_fill(~there[:, :, None], least).softmax(3) * asking[..., None]
        weight = weight.sum(2) / asking.sum(2, keepdim=True).clamp(min=1)
        return weight.mean(1) * ctx["hidden"].float().norm(dim=2)

    def _asked(self, ctx: LayerContext) -> Tensor:
        """Rows whose queries and keys count: bool `[batch, rows]`."""
        if not self.prefix:
            return ctx.visual
        last = ctx.logical.masked_fill(~ctx.visual, -1).amax(1, keepdim=True)
        return ctx.visual | (ctx.prompt & (ctx.logical <= last))

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

        pair = candidates[:, :, None] & candidates[:, None]
        density = (torch.exp(-(distance / 2).square()) * pair).sum(2)
        density = density.masked_fill(ctx.protected, float("inf")).masked_fill(~candidates, -1)
        rank = density.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        paired = distance.masked_fill(~pair, float("inf"))
        reach = self._reach(ctx, paired, rank, candidates)
        centres = self._centres(paired, rank, candidates, ctx.protected, reach)
        apart = distance.masked_fill(~centres[:, None], float("inf"))
        nearest, to = apart.min(2)
        own = torch.arange(to.shape[1], device=to.device).expand_as(to)
        found = candidates | (ctx.visual & (nearest <= self.retrieve * reach))
        into = torch.where(centres, own, torch.where(found, to, -1))
        return centres, into.masked_fill(~ctx.visual, -1)

    def _reach(
        self, ctx: LayerContext, distance: Tensor, rank: Tensor, among: Tensor
    ) -> Tensor:
        """The distance between centres of each sample: `[batch, 1]`."""
        high = torch.full_like(distance[..., 0], self.distance)[:, :1]
        if self.clusters is None:
            return high
        _, most = ctx.budget(self.clusters, ctx.counts())
        low, high = torch.zeros_like(high), torch.full_like(high, 2.0)
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            found = self._centres(distance, rank, among, ctx.protected, middle).sum(1)
            few = (found <= most)[:, None]
            low, high = torch.where(few, low, middle), torch.where(few, middle, high)
        return high

    @staticmethod
    def _centres(
        distance: Tensor, rank: Tensor, among: Tensor, protected: Tensor, reach: Tensor
    ) -> Tensor:
        """Candidates without a denser centre near them: bool `[batch, rows]`.

        Protected rows are centres. All that have no denser candidate near them are centres at
        once; those that they cover step back, and so on.

        Args:
            distance: `[batch, rows, rows]`, infinite where not both are candidates.
            rank: int64 `[batch, rows]`, the densest first.
            among: bool `[batch, rows]`, the candidates.
            protected: bool `[batch, rows]`.
            reach: `[batch, 1]`, how near is near.
        """
        near = distance <= reach[..., None]
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
