"""BTP: from stage to stage less variety and more attention, then no visual token at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import (
    AttentionRows,
    Budget,
    Calibrated,
    Grid,
    Hidden,
    Keep,
    LayerContext,
    Positions,
    farthest,
    fill_up,
    on_device,
    register,
    top_k,
)
from mllm.errors import PlanError

#: Further than any two cells of a picture.
ELSEWHERE = 1e6


@register("btp", paper="arXiv:2505.22038", stage="llm", reference_layers=32)
@dataclass
class BTP(Calibrated):
    """Balance what this layer and what later layers need, in three cuts (Balanced Token Pruning).

    Each cut keeps the union of three choices, of shares of its budget: tokens spread over the
    picture (farthest first on the grid, by Manhattan distance, from the first token), tokens by
    attention, and tokens with different hidden states (farthest first by cosine distance, as in
    DivPrune). What the union lacks is filled up farthest first; what it has too many goes from the
    last choice. The score is the raw logit of the last prompt token in the layer that has just
    run, averaged over heads. It is rebalanced, because it favours late tokens: of the
    `over`-fold choice the tokens among the first `budget` of those that arrive come first. From
    layer `end` on there is no visual token.

    Defaults are those of the authors' code for LLaVA-1.5: 288, 144 and 48 of 576 tokens before
    layers 3, 6 and 14 and none from 22 on, 129 on average. Their code for Qwen2.5-VL is
    ``btp:layers=3/6/15:keep=0.5/0.25/0.125:spatial=0/0/0:attention=0.12/0.4/1:diversity=0/0/0:``
    ``over=1/1/1.2:end=22``. Their second stage counts tokens twice that two of its choices have in
    common; here a budget is met exactly. They choose the layers where hidden states change
    sharply: :func:`mllm.calibrate`.

    Args:
        layers: rows leave before these decoder layers; None is 3, 6 and 14 of 32, scaled.
        keep: budget of each layer: tokens per image, or a fraction of those that entered.
        spatial, attention, diversity: shares of each budget.
        over: how many times the share of attention is looked at to rebalance it; 1 does not.
        end: all visual tokens leave before this layer; None is 22 of 32, scaled, 0 is never.
        calibration: file of :func:`mllm.calibrate` with layers and budgets.
        positions: `original` or `compact`; None is `original` (the code).
    """

    layers: tuple[int, ...] | None = None
    keep: tuple[Budget, ...] = (1 / 2, 1 / 4, 1 / 12)
    spatial: tuple[float, ...] = (0.5, 0.0, 0.0)
    attention: tuple[float, ...] = (0.3, 0.9, 1.0)
    diversity: tuple[float, ...] = (0.3, 0.1, 0.0)
    over: tuple[float, ...] = (3.7, 1.5, 1.2)
    end: int | None = None
    calibration: str | None = None
    positions: Positions | None = None

    paper_layers = (3, 6, 14)
    paper_end = 22
    first_layer = 1
    identity = {"keep": (1.0, 1.0, 1.0), "end": 0}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("spatial", "attention", "diversity", "over"):
            shares = getattr(self, name)
            fits = all(x >= 1 if name == "over" else 0 <= x <= 1 for x in shares)
            if len(shares) != len(self.keep) or not fits:
                raise PlanError(
                    f"btp: {name}={'/'.join(map(str, shares))} for {len(self.keep)} budgets",
                    argument=name,
                    given=shares,
                    expected="one number per budget, "
                    + ("from 1" if name == "over" else "from 0 to 1"),
                )
        if self.layers and self.end and self.end <= self.layers[-1]:
            raise PlanError(
                f"btp: all tokens leave before layer {self.end}, and some before "
                f"layer {self.layers[-1]}",
                argument="end",
                given=self.end,
                expected=f"above {self.layers[-1]}, or 0 for never",
            )

    def at_depth(self, num_layers: int, first_cut: int = 0) -> BTP:
        fixed = super().at_depth(num_layers, first_cut)
        return fixed.replace(end=self._end(num_layers, fixed.layers[-1]))

    def _end(self, num_layers: int, after: int) -> int:
        """The layer behind layer `after` before which all leave, 0 for never."""
        if self.end is not None:
            return self.end
        scaled = round(self.paper_end * num_layers / self.info.reference_layers)
        end = max(after + 1, scaled)
        return end if end < num_layers else 0

    def at(self) -> tuple[int, ...]:
        return (*self.layers, self.end) if self.end else self.layers

    def for_average(self, average: float, tokens: int, num_layers: int) -> BTP:
        fixed = self.at_depth(num_layers)
        depth = fixed.end or num_layers  # behind it are none
        own = super(BTP, fixed.replace(end=0)).for_average(
            average * num_layers / depth, tokens, depth
        )
        return own.replace(end=fixed.end)

    def reads(self):
        return {
            "rows": AttentionRows(rows="last", heads="mean", softmax=False),
            "hidden": Hidden(),
            "grid": Grid(),
        }

    @torch.no_grad()
    def select(self, ctx: LayerContext) -> Keep:
        if ctx.layer == self.end:
            return Keep(torch.zeros_like(ctx.visual), [0] * len(ctx.n_images))
        stage, arriving = self.layers.index(ctx.layer), max(ctx.counts())
        counts, budget = ctx.budget(self.keep[stage], ctx.n_entered)
        rows = ctx.visual.int().argsort(dim=1, descending=True, stable=True)[:, :arriving]
        there = ctx.visual.gather(1, rows)
        owed = ctx.protected.gather(1, rows) & there
        # Behind a layer's window logits are -inf, and these tokens are candidates still.
        score = ctx["rows"][:, 0].gather(1, rows).clamp(min=torch.finfo(torch.float32).min)
        score = score.masked_fill(owed, float("inf"))

        def part(share: float, times: float = 1.0) -> tuple[list[int], Tensor]:
            """The tokens of every sample that are a share of its budget, also int64 `[batch]`."""
            own = [int(times * int(share * n)) for n in counts]
            return own, on_device(torch.tensor(own), score)

        attended, limit = part(self.attention[stage])
        _, over = part(self.attention[stage], self.over[stage])
        front = torch.arange(arriving, device=score.device) < budget[:, None]
        best = top_k(score, top_k(score, there, over) & (front | owed), limit)
        best = fill_up(best, score, there, limit)
        keep = fill_up(top_k(score, owed, budget), score, best, budget)

        spread, limit = part(self.spatial[stage])
        if any(spread):
            start = there & (there.cumsum(1) == 1) & (limit > 0)[:, None]
            even = farthest(self._places(ctx, rows), there, limit, max(spread), start)
            keep = fill_up(keep, score, even, budget)
        varied, limit = part(self.diversity[stage])
        each = zip(counts, attended, spread, varied, strict=True)
        missing = max(n - max(own) for n, *own in each)
        if any(varied) or missing:
            apart = self._differences(ctx, rows)
            keep = fill_up(keep, score, farthest(apart, there, limit, max(varied)), budget)
            keep = farthest(apart, there, budget, missing, keep)
        return Keep(torch.zeros_like(ctx.visual).scatter(1, rows, keep), counts)

    def _differences(self, ctx: LayerContext, rows: Tensor) -> Tensor:
        """Cosine distances of hidden states: fp32 `[batch, tokens, tokens]`."""
        x = F.normalize(ctx["hidden"].float(), dim=-1)
        x = x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))
        ctx.book(2 * x.shape[1] * x.shape[1] * x.shape[2])
        same = x @ x.transpose(1, 2)
        return 1 - (same + same.transpose(1, 2)) / 2  # exactly symmetric, whatever the kernel

    def _places(self, ctx: LayerContext, rows: Tensor) -> Tensor:
        """Manhattan distances of tokens: fp32 `[batch, tokens, tokens]`."""
        grid = ctx["grid"]
        row, col = grid.row.gather(1, rows), grid.col.gather(1, rows)
        apart = (row[:, :, None] - row[:, None]).abs() + (col[:, :, None] - col[:, None]).abs()
        place = torch.stack([grid.image, grid.tile, grid.frame], -1)
        place = place.gather(1, rows[..., None].expand(-1, -1, 3))
        return apart.masked_fill((place[:, :, None] != place[:, None]).any(3), ELSEWHERE)

    def observes(self) -> dict[str, Any]:
        return {"first": Hidden(layer=0), "now": Hidden()}

    def observe(self, ctx: LayerContext) -> list[Tensor]:
        before, now = ctx.state.get("before", ctx["first"]), ctx["now"]
        ctx.state["before"] = now
        like = F.cosine_similarity(before.float(), now.float(), dim=-1)
        like = like.masked_fill(~ctx.visual, 0).sum(1) / ctx.visual.sum(1).clamp(min=1)
        return list((1 - like).cpu())

    def fit(self, seen: list[list[Tensor]], share: float | None) -> dict[str, Any]:
        """Layers behind those that change the picture most, at a distance from each other.

        The paper puts its stages around the layers with sharp changes; how it chooses among them
        is not known to us. Here the sharpest change before `end` is taken, and the next that is
        at least a tenth of the depth away, the first layer left out. A `share` scales the budgets.
        """
        changes = torch.tensor([[float(x) for x in own] for own in seen]).mean(0).tolist()
        depth = len(changes) + 1
        end = self._end(depth, len(self.keep) + 1)
        rising = sorted(range(2, end or depth), key=lambda i: (-changes[i - 1], i))
        for gap in range(max(1, depth // 10), 0, -1):
            layers: list[int] = []
            for layer in rising:
                if len(layers) < len(self.keep) and all(abs(layer - i) >= gap for i in layers):
                    layers.append(layer)
            if len(layers) == len(self.keep):
                fitted = self.replace(layers=tuple(sorted(layers)), end=end)
                break
        else:
            raise PlanError(
                f"btp: {len(self.keep)} cuts do not fit into {depth} decoder layers",
                argument="keep",
                given=len(self.keep),
                expected=f"at most {max(0, len(rising))} budgets",
            )
        keep = self.keep
        if share is not None:
            of = 100_000
            keep = tuple(k / of for k in fitted.for_average(share * of, of, depth).keep)
        return {"layers": fitted.layers, "end": end, "keep": keep}
