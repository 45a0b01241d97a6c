"""SparseVLM: text that resembles the picture rates the visual tokens; clusters of the rest stay."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mllm.compressors.base import (
    AttentionRows,
    Budget,
    Hidden,
    Keep,
    LayerContext,
    LayerSchedule,
    Merge,
    Positions,
    Rotary,
    TextEmbeds,
    Write,
    merge_rows,
    on_device,
    register,
    resolve,
    top_k,
)
from mllm.errors import PlanError

#: Tokens that stay of 576 by version and nominal budget, as the authors' code has them.
PUBLISHED = {
    "1.5": {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    "2.0": {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
PAPER_TOKENS = 576


@register("sparsevlm", paper="arXiv:2410.04417", stage="llm", reference_layers=32)
@dataclass
class SparseVLM(LayerSchedule):
    """Let the text tokens that resemble the picture rate its tokens (SparseVLM).

    Raters are the text tokens `t` behind the first image whose mean over the visual tokens of
    softmax(V T')_t is above the mean over text, from what enters the decoder. At three layers the
    attention that raters have just paid ranks the visual tokens. Version 1.5 recycles: of those
    that go, the best `recycle` form one cluster per `cluster` tokens (density peaks of k nearest
    neighbours), and each cluster stays as the mean of its members, beyond the budget. Version 2.0
    recycles nothing, divides attention by the bias of rotary positions (that of queries and keys
    of ones, at least 0.01 of its value at distance 0), and averages only the heads that look at
    the picture most.

    A cluster stands where its centre stood; in the authors' code all of them stand behind the kept
    tokens. Ties go to the earlier token, where the code adds noise. If no text is above the mean,
    all text behind the image rates. The rank rule of version 1 is not offered: its counts cannot
    be set.

    Args:
        version: `1.5` or `2.0`: what the fields that are None default to.
        budget: published schedule to follow where `keep` is None: 192, 128, 96 or 64 of 576.
        layers: rows leave before these decoder layers; None is 3, 7 and 16 of 32, scaled.
        keep: budget of each layer, without clusters: tokens per image, or a fraction of those
            that entered; None is the published schedule.
        recycle: share of the tokens that go that is clustered; None is 0.3 or 0.0.
        cluster: tokens per cluster.
        heads: share of the heads that count; None is 1.0 or 14 of 32.
        gravity: divide by the rotary bias; None is false or true.
        positions: `compact` or `original`; None is `compact` in 1.5 and `original` in 2.0.
    """

    version: Literal["1.5", "2.0"] = "1.5"
    budget: int = 192
    layers: tuple[int, ...] | None = None
    keep: tuple[Budget, ...] | None = None
    recycle: float | None = None
    cluster: int = 10
    heads: float | None = None
    gravity: bool | None = None
    positions: Positions | None = None

    paper_layers = (3, 7, 16)
    first_layer = 1
    actions = ("Keep", "Merge", "Write")
    identity = {"keep": (1.0, 1.0, 1.0)}
    oracle = "reference"

    @property
    def paper_positions(self) -> Positions:
        return "compact" if self.version == "1.5" else "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, fits, expected in (
            ("recycle", self.recycle, 0 <= self.share <= 1, "0 <= recycle <= 1"),
            ("cluster", self.cluster, self.cluster >= 1, "from 1"),
            ("heads", self.heads, 0 < self.head_share <= 1, "0 < heads <= 1"),
        ):
            if not fits:
                raise PlanError(
                    f"sparsevlm: {name}={value!r}", argument=name, given=value, expected=expected
                )

    @property
    def differentiable(self) -> bool:
        return self.share > 0  # a cluster's members have the gradient of their mean

    def budgets(self) -> tuple[Budget, ...]:
        if self.keep is not None:
            return self.keep
        published = PUBLISHED[self.version]
        if self.budget not in published:
            raise PlanError(
                f"sparsevlm {self.version} publishes no schedule for budget={self.budget}",
                argument="budget",
                given=self.budget,
                expected=", ".join(map(str, published)) + ", or keep=a/b/c",
            )
        return tuple(n / PAPER_TOKENS for n in published[self.budget])

    def for_average(self, average: float, tokens: int, num_layers: int) -> SparseVLM:
        """As in :class:`LayerSchedule`, clusters included."""
        found, aim = self, average
        for _ in range(8):
            found = super().for_average(aim, tokens, num_layers)
            off = average - found._average(tokens, num_layers)
            if abs(off) < 0.5:
                break
            aim += off
        return found

    def _average(self, tokens: int, num_layers: int) -> float:
        """Tokens of an image that layers see, clusters included."""
        there, ends = tokens, [*self.layers[1:], num_layers]
        seen = tokens * self.layers[0]
        for layer, keep, end in zip(self.layers, self.budgets(), ends, strict=True):
            kept = min(there, resolve(keep, tokens))
            there = kept + self._recycled(there - kept)[1]
            seen += there * (end - layer)
        return seen / num_layers

    def _recycled(self, gone: int) -> tuple[int, int]:
        """Of tokens that go, how many are clustered, and into how many clusters."""
        taken = min(gone, int(self.share * gone) + 1) if gone and self.share else 0
        return taken, min(taken, taken // self.cluster + 1)

    @property
    def new(self) -> bool:
        return self.version == "2.0"

    def reads(self):
        signals = {
            "rows": AttentionRows(rows=self.raters, heads="none" if self.by_head else "mean"),
            "text": TextEmbeds("question"),
            "inputs": Hidden(layer=0),
        }
        if self.bias:
            signals["rotary"] = Rotary()
        return signals | ({"hidden": Hidden()} if self.share else {})

    @property
    def share(self) -> float:
        return (0.0 if self.new else 0.3) if self.recycle is None else self.recycle

    @property
    def bias(self) -> bool:
        return self.new if self.gravity is None else self.gravity

    @property
    def head_share(self) -> float:
        return (14 / 32 if self.new else 1.0) if self.heads is None else self.heads

    @property
    def by_head(self) -> bool:
        return self.head_share < 1

    def raters(self, ctx: LayerContext) -> Tensor:
        """Text rows that rate, bool `[batch, rows]`: chosen once, by what enters the decoder."""
        if "raters" not in ctx.state:
            text, x = ctx["text"], ctx["inputs"].float()
            like = x @ text.embeds.float().transpose(1, 2)
            ctx.state["flops"] = 2.0 * x.shape[1] * x.shape[2] * text.valid.shape[1]
            like = like.masked_fill(~text.valid[:, None], -torch.inf)
            like = like.masked_fill(~text.valid.any(1)[:, None, None], 0).softmax(-1)
            rate = (like * ctx.visual[..., None]).sum(1) / ctx.visual.sum(1, True).clamp(min=1)
            rate = rate * text.valid
            mean = rate.sum(1, True) / text.valid.sum(1, True).clamp(min=1)
            above = text.valid & (rate > mean)
            chosen = torch.where(above.any(1, keepdim=True), above, text.valid).int()
            mask = torch.zeros_like(ctx.visual, dtype=torch.int).scatter_add(1, text.rows, chosen)
            ctx.state["raters"] = mask > 0, ctx.index
        return ctx.bring(*ctx.state["raters"])

    def score(self, ctx: LayerContext) -> Tensor:
        if ctx.state.get("layer") != ctx.layer:
            ctx.state["layer"], ctx.state["score"] = ctx.layer, self._rated(ctx)
        return ctx.state["score"]

    def _rated(self, ctx: LayerContext) -> Tensor:
        """Mean attention of the raters: `[batch, rows]`."""
        x, queries = ctx["rows"], ctx.queries("rows")
        if self.bias:
            pull = self._pull(ctx["rotary"], queries)
            ctx.book(2.0 * queries.shape[1] * x.shape[-1] * ctx["rotary"].shape[2])
            x = x / (pull[:, None] if x.dim() == 4 else pull)
        if self.by_head:
            mass = (x * ctx.visual[:, None, None]).sum((2, 3))
            count = max(1, round(self.head_share * x.shape[1]))
            best = top_k(mass, torch.ones_like(mass, dtype=torch.bool), count)
            x = (x * best[..., None, None]).sum(1) / count
        return x.sum(1) / (queries >= 0).sum(1, True).clamp(min=1)

    @staticmethod
    def _pull(rotary: Tensor, queries: Tensor) -> Tensor:
        """What rotary positions alone make of queries and keys of ones: `[batch, queries, rows]`.

        It is 1 at distance 0.
        """
        angles = rotary.float()  # cosines and sines, each of them twice
        at = queries.clamp(min=0)[..., None].expand(-1, -1, angles.shape[2])
        pull = angles.gather(1, at) @ angles.transpose(1, 2) / (angles.shape[2] / 2)
        return pull.clamp(min=0.01)

    def act(self, ctx: LayerContext) -> list:
        with torch.no_grad():
            kept, into, stay = self._select(ctx)
        if into is None:
            return [kept]
        values = merge_rows(ctx["hidden"], into)
        return [kept, Merge(into), Write(values, rows=stay)]

    def _select(self, ctx: LayerContext) -> tuple[Keep, Tensor | None, Tensor | None]:
        """What stays, the row that each visual row goes into, and the rows of clusters.

        The last two, `[batch, rows]` each, are None where nothing is recycled.
        """
        kept = self.select(ctx)
        ctx.book(ctx.state.pop("flops", 0.0))
        go = [there - n for there, n in zip(ctx.counts(), kept.counts, strict=True)]
        taken, clusters = zip(*(self._recycled(n) for n in go), strict=True)
        if not max(taken):
            return kept, None, None
        gone = ctx.visual & ~kept.mask
        count, many = (on_device(torch.tensor(n), gone) for n in (taken, clusters))
        recycled = top_k(self.score(ctx), gone & ~ctx.protected, count)
        rows = recycled.int().argsort(dim=1, descending=True, stable=True)[:, : max(taken)]
        valid = recycled.gather(1, rows)
        x = ctx["hidden"].gather(1, rows[..., None].expand(-1, -1, ctx["hidden"].shape[2]))
        ctx.book(2 * x.shape[1] ** 2 * x.shape[2])
        centre = rows.gather(1, density_peaks(x, valid, many))
        own = torch.arange(gone.shape[1], device=gone.device).expand_as(gone)
        into = torch.where(gone, -1, own)
        into = into.scatter(1, rows, torch.where(valid, centre, into.gather(1, rows)))
        stay = recycled & (into == own)
        counts = [n + more for n, more in zip(kept.counts, clusters, strict=True)]
        return Keep(kept.mask | stay, counts), into, stay


def density_peaks(x: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """The centre that each vector belongs to: int64 `[batch, n]`, among the n (DPC-kNN).

    A centre has many near neighbours and is far from vectors that have more.

    Args:
        x: `[batch, n, width]`.
        valid: bool `[batch, n]`; the others are no centres and nobody's neighbours.
        count: int64 `[batch]`, clusters, and the neighbours that count, the vector itself included.
    """
    x = x.float()
    # Without the product of matrices, which puts equal vectors apart.
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[2] ** 0.5
    own = torch.arange(x.shape[1], device=x.device)
    near = apart.masked_fill(~valid[:, None], torch.inf).sort(2).values
    counted = (own < count[:, None, None]) & (near < torch.inf)
    spread = near.square().masked_fill(~counted, 0).sum(2) / counted.sum(2).clamp(min=1)
    denser = spread[:, None] < spread[..., None]
    denser |= (spread[:, None] == spread[..., None]) & (own < own[:, None])
    denser &= valid[:, None]
    alone = apart.masked_fill(~(valid[:, None] & valid[..., None]), 0).amax((1, 2))[:, None]
    gap = apart.masked_fill(~denser, torch.inf).amin(2)
    gap = torch.where(denser.any(2), gap, alone)
    centre = top_k(torch.exp(-spread) * gap, valid, count)
    nearest = apart.masked_fill(~centre[:, None], torch.inf).argmin(2)
    return torch.where(centre, own, nearest)
