"""Croc: in a stage of training, most visual tokens are hidden behind learnt ones and told again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.compressors.base import (
    Hidden,
    LayerContext,
    LayerMethod,
    LogitBias,
    Positions,
    Write,
    on_device,
    register,
    top_k,
)
from mllm.compressors.elastic import Attention, linear_flops, mlp
from mllm.errors import DataError
from mllm.routers.account import rank
from mllm.routers.depth import DepthRouter
from mllm.tokens import gather_rows


def assign(cost: np.ndarray) -> np.ndarray:
    """A column of its own for every row, so that the sum of their costs is least.

    The Hungarian algorithm by shortest augmenting paths, O(rows^2 * columns).

    Args:
        cost: fp64 `[rows, columns]`, no more rows than columns.

    Returns:
        int64 `[rows]`.
    """
    rows, columns = cost.shape
    of_row, of_column = np.zeros(rows), np.zeros(columns)  # dual prices
    owner, column = np.full(columns, -1), np.full(rows, -1)
    for start in range(rows):
        reach, before = np.full(columns, np.inf), np.full(columns, -1)
        closed, row, last, far = np.zeros(columns, dtype=bool), start, -1, 0.0
        while row >= 0:
            slack = far + cost[row] - of_row[row] - of_column
            nearer = ~closed & (slack < reach)
            reach[nearer], before[nearer] = slack[nearer], last
            last = int(np.where(closed, np.inf, reach).argmin())
            closed[last], far, row = True, reach[last], owner[last]
        gained = far - reach[closed]
        held = owner[closed]
        of_row[start] += far
        of_row[held[held >= 0]] += gained[held >= 0]
        of_column[closed] -= gained
        while last >= 0:  # along the path every row moves on to the next column
            earlier = before[last]
            owner[last] = start if earlier < 0 else owner[earlier]
            column[owner[last]] = last
            last = earlier
    return column


class Pool(nn.Module):
    """Learnt tokens that stand for visual ones.

    Args:
        size: how many.
        width: of each.
        apart: whether a sample has each of them once at most.
    """

    def __init__(self, size: int, width: int, apart: bool) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(size, width) * 0.02)
        self.size, self.apart = size, apart

    def forward(self, x: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """The token of the pool that is matched with each of `x`, `[..., width]`.

        Args:
            x: `[..., width]`, samples behind each other.
            counts: of each sample; None is one.
        """
        with torch.no_grad():
            own, pool = x.flatten(0, -2).float(), self.tokens.float()
            product = own @ pool.T
            cost = own.square().sum(1, keepdim=True) + pool.square().sum(1) - 2 * product
            cost = cost.clamp(min=0).sqrt()
            if self.apart:
                parts = cost.double().cpu().split([len(own)] if counts is None else list(counts))
                found = [torch.from_numpy(assign(part.numpy())) for part in parts]
                index = torch.cat(found).to(x.device)
            else:
                index = cost.argmin(1)
        return self.tokens[index].view_as(x)

    def flops(self, x: Tensor, counts: Sequence[int]) -> float:
        """Of one sample, on average."""
        return 2.0 * x.numel() * self.size / len(counts)


class Teller(nn.Module):
    """Tells visual tokens from hidden states: one layer as in BERT, without dropout.

    Args:
        width: of both.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        self.attention, self.ffn = Attention(width, heads), mlp(width, 4 * width, width)
        self.norm_attention, self.norm_ffn = (nn.LayerNorm(width, eps=1e-12) for _ in range(2))
        self.resize = nn.Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """`[batch, n, width]` of the same, and bool `[batch, n]`."""
        mask = None
        if valid is not None:  # no softmax over nothing
            mask = (valid | ~valid.any(1, keepdim=True))[:, None, None]
        x = self.norm_attention(x + self.attention(x, x, x, mask))
        return self.resize(self.norm_ffn(x + self.ffn(x)))

    def flops(self, x: Tensor, valid: Tensor) -> float:
        """Of one sample."""
        n = x.shape[1]
        return self.attention.flops(n, n) + linear_flops(self.ffn, n) + linear_flops(self.resize, n)


@register("croc", paper="arXiv:2410.14332", stage="llm", trained=True)
@dataclass
class Croc(LayerMethod):
    """Hide visual tokens behind a pool of learnt ones, and let the LLM tell them again (Croc).

    A stage of training, between the projector's and that of instructions. In each forward that
    learns, a share of the visual tokens, drawn anew, is replaced by the tokens of a pool that they
    are matched with; the prompt, up to the first answer, sees itself in both directions; and from
    what leaves the LLM a head tells all visual tokens as they were, a smooth L1 loss beside that of
    the answers. At inference nothing changes and no token leaves.

    As in the authors' code: the size of the pool, the share, the loss and what it is told of
    (visual tokens of length one). Otherwise: there the model is given tokens of length one, too,
    which a trained model does not know; the head has a learnt embedding of 576 places, where here
    places are what hidden states know of them; and the pool starts from deviations of 1 there, of
    0.02 here.

    Args:
        share: of a sample's visual tokens that is replaced.
        pool: learnt tokens.
        match: `hungarian`, the paper's: no token of the pool twice in a sample, the sum of
            distances least, found on the host; `nearest`, the released code's.
        mixed: whether the prompt sees itself in both directions; not with flash attention.
        weight: of the loss that tells visual tokens.
        beta: of smooth L1: below it the loss is square.
        positions: `original` is all there is: tokens stay where they are.
    """

    share: float = 0.75
    pool: int = 2048
    match: Literal["hungarian", "nearest"] = "hungarian"
    mixed: bool = True
    weight: float = 10.0
    beta: float = 0.01
    positions: Positions | None = None

    differentiable = True
    oracle = "reference"
    actions = ("LogitBias", "Write")
    identity = {}
    scaffold = True

    demand = DepthRouter.demand

    def __post_init__(self) -> None:
        super().__post_init__()
        self._depth = 0
        self.demand("share", 0 < self.share <= 1, "above 0 and at most 1")
        self.demand("pool", self.pool >= 1, "a number from 1")
        self.demand("weight", self.weight >= 0, "a number from 0")
        self.demand("beta", self.beta > 0, "a number above 0")
        self.demand("positions", self.positions != "compact", "original: nothing moves")
        self.actions = ("LogitBias", "Write") if self.mixed else ("Write",)

    def at_depth(self, num_layers: int, first_cut: int = 0) -> Croc:
        placed = self.replace()
        placed._depth = num_layers
        return placed

    def at(self) -> Sequence[int]:
        return (0, self._depth)

    def reads(self):
        return {"hidden": Hidden()}

    def parts(self, width: int, heads: int) -> dict[str, nn.Module]:
        return {"pool": Pool(self.pool, width, self.match == "hungarian"), "teller": Teller(width)}

    def act(self, ctx: LayerContext) -> list[Any]:
        if not ctx.learns:
            return []
        return self._hide(ctx) if ctx.layer == 0 else self._tell(ctx)

    def _hide(self, ctx: LayerContext) -> list[Any]:
        hidden = ctx["hidden"]
        ctx.state["shown"] = hidden.detach(), ctx.index
        counts = [n - int(n * (1 - self.share)) for n in ctx.counts()]
        if self.match == "hungarian" and max(counts) > self.pool:
            raise DataError(
                f"croc: {max(counts)} visual tokens of a sample are matched with a pool of "
                f"{self.pool}, and each has one of its own",
                argument="pool", given=self.pool,
                expected=f"a pool from {max(counts)}, or match=nearest",
            )  # fmt: skip
        generator = torch.Generator().manual_seed(ctx.seed_for(ctx.learnt, rank()))
        drawn = on_device(torch.rand(ctx.visual.shape, generator=generator), hidden)
        rows = top_k(drawn, ctx.visual, on_device(torch.tensor(counts), hidden))
        learnt = ctx.route("pool", hidden.detach()[rows], counts)
        values = hidden.masked_scatter(rows[..., None], learnt.to(hidden))
        found: list[Any] = [Write(values, rows=rows)]
        if self.mixed:
            # Answers, and what lies between them, are behind the first one.
            behind = ctx.logical.masked_fill(~ctx.answers, torch.iinfo(torch.long).max)
            first = behind.amin(1)[:, None]

            def show(queries: Tensor, keys: Tensor) -> Tensor:
                seen = (keys < first)[:, None, None].expand(-1, -1, queries.shape[1], -1)
                return torch.zeros(seen.shape, device=seen.device).masked_fill(seen, float("inf"))

            found += [LogitBias(layer, show) for layer in range(ctx.num_layers)]
        return found

    def _tell(self, ctx: LayerContext) -> list[Any]:
        counts, (shown, then) = ctx.counts(), ctx.state["shown"]
        order = (~ctx.visual).long().argsort(dim=1, stable=True)[:, : max(counts)]
        valid = ctx.visual.gather(1, order)
        told = ctx.route("teller", gather_rows(ctx["hidden"], order), valid)[valid]
        wanted = F.normalize(gather_rows(ctx.bring(shown, then), order)[valid].float(), dim=1)
        loss = F.smooth_l1_loss(told.float(), wanted, beta=self.beta)
        ctx.penalise("telling", loss, self.weight)
        return []
