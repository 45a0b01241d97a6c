"""CMAI: text does not look at the visual tokens that the text around it does not look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mllm.compressors.base import (
    AttentionRows,
    LayerContext,
    LayerMethod,
    LogitBias,
    Positions,
    register,
)
from mllm.errors import PlanError


@register("cmai", paper="arXiv:2411.15453", stage="llm")
@dataclass
class CMAI(LayerMethod):
    """Inhibit attention from text to visual tokens of little focus (CMAI).

    The decoder half of the paper, which has no published code: what is written here follows its
    abstract and its reviews, and no number is claimed. With A the attention that a layer would pay
    (mean over heads), a text token i behind the first image has the focus
    ``F_ij = sum_k A_ik A_kj`` on visual token j, k over the text up to i: what its neighbours look
    at counts by how much i looks at these. The `share` of the visual tokens with the least focus
    gets -inf in that row's attention logits. Text among text and pictures among pictures stay.

    No token leaves, so nothing is saved; reading ahead costs a layer's projections once more.
    A new token has the inhibitions of the last prompt token (`answers`), since what it would look
    at is known only after it has looked.

    Args:
        share: of the visual tokens, hidden from each text token.
        layers: decoder layers; None is all of them.
        answers: whether tokens behind the prompt are inhibited too.
        positions: `original`; nothing is renumbered.
    """

    share: float = 0.25
    layers: tuple[int, ...] | None = None
    answers: bool = True
    positions: Positions | None = None

    actions = ("LogitBias",)
    identity = {"share": 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise PlanError(
                f"cmai: share={self.share!r} is not from 0 to 1",
                argument="share",
                given=self.share,
                expected="0 <= share < 1",
            )

    def at_depth(self, num_layers: int, first_cut: int = 0) -> CMAI:
        return self if self.layers is not None else self.replace(layers=tuple(range(num_layers)))

    def at(self) -> Sequence[int]:
        return (0,) if self.layers is None else self.layers

    def reads(self):
        return {"rows": AttentionRows(rows="text", when="before")}

    def act(self, ctx: LayerContext) -> list:
        text = ctx.queries("rows")
        if not text.shape[1] or not self.share:
            return []
        order = ctx.logical.argsort(dim=1, stable=True)  # rows may stand in another order
        hidden = self._hidden(ctx, text).gather(2, order[:, None].expand(-1, text.shape[1], -1))
        at = ctx.logical.gather(1, text.clamp(min=0))
        last = at.masked_fill(text < 0, -1).amax(1, keepdim=True)
        bias = _Inhibition(
            queries=at.masked_fill(text < 0, torch.iinfo(at.dtype).max),
            keys=ctx.logical.gather(1, order),
            hidden=hidden,
            last=last if self.answers else torch.full_like(last, torch.iinfo(last.dtype).max),
        )
        return [LogitBias(ctx.layer, bias)]

    def _hidden(self, ctx: LayerContext, text: Tensor) -> Tensor:
        """Rows that each text row is not to see: bool `[batch, queries, rows]`."""
        rows, at = ctx["rows"], text.clamp(min=0)
        among = rows.gather(2, at[:, None].expand(-1, text.shape[1], -1))
        among = among * (text >= 0)[:, None]  # text by text
        ctx.book(2 * text.shape[1] ** 2 * rows.shape[2])
        place = torch.arange(rows.shape[2], device=rows.device)
        seen = ctx.visual[:, None] & (place < text[..., None])
        focus = (among @ rows).masked_fill(~seen, float("inf"))
        count = (self.share * seen.sum(2, keepdim=True)).floor()
        # Of equal ones the earlier is hidden first.
        return seen & (focus.argsort(dim=2, stable=True).argsort(dim=2) < count)


@dataclass
class _Inhibition:
    """The bias of one layer: what its text does not see, by logical index.

    Attributes:
        queries: int64 `[batch, n]`, text, rising; the largest number fills up.
        keys: int64 `[batch, rows]`, rising.
        hidden: bool `[batch, n, rows]`.
        last: int64 `[batch, 1]`; tokens behind it are like the last text.
    """

    queries: Tensor
    keys: Tensor
    hidden: Tensor
    last: Tensor

    def __call__(self, queries: Tensor, keys: Tensor) -> Tensor:
        text = (torch.searchsorted(self.queries, queries, right=True) - 1).clamp(min=0)
        known = (self.queries.gather(1, text) == queries) | (queries > self.last)
        row = torch.searchsorted(self.keys, keys).clamp(max=self.keys.shape[1] - 1)
        there = self.keys.gather(1, row) == keys
        hidden = self.hidden.gather(1, text[..., None].expand(-1, -1, self.keys.shape[1]))
        hidden = hidden.gather(2, row[:, None].expand(-1, queries.shape[1], -1))
        hidden = hidden & known[..., None] & there[:, None]
        bias = torch.zeros(hidden.shape, device=hidden.device)
        return bias.masked_fill(hidden, float("-inf"))[:, None]
