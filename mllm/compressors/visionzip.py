"""VisionZip: dominant tokens by [CLS] attention, the rest merged into contextual tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

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
    VisionKeys,
    Write,
    register,
    resolve,
    top_k,
)
from mllm.errors import PlanError


@register("visionzip", paper="arXiv:2412.04467", stage="pre_llm")
@dataclass
class VisionZip(TokenReducer):
    """Keep what [CLS] looks at; merge the other tokens into a few contextual ones (VisionZip).

    Works on the features before the projector. As in the official code, [CLS] is itself one of
    the dominant tokens; it takes the row of the first token that goes. The sequence is [CLS],
    dominant tokens in grid order, contextual tokens. A tower without [CLS] is scored by the
    attention that a token receives, and has no [CLS] token to keep. Under anyres all tiles of an
    image compete, where the authors' code takes each by itself.

    Args:
        keep: visual tokens per image, [CLS] included.
        dominant: share of `keep` that is dominant (54 of 64 in the paper).
        cls: keep [CLS] as a token where the tower has one.
        merge: `sum` is target + mean of its members (the code), `mean` the plain average
            (the paper's text).
        positions: `compact` or `original`; None is `compact` (as the paper runs on LLaVA).
    """

    keep: Budget = 64
    dominant: float = 54 / 64
    cls: bool = True
    merge: Literal["sum", "mean"] = "sum"
    positions: Positions | None = None

    site = "pre_projector"
    first = True
    actions = ("Keep", "Merge", "Write")
    # Not with the paper's layout: [CLS] takes a patch's seat, and dominant tokens come first.
    identity = {"keep": 1.0, "cls": False, "positions": "original"}
    oracle = "rebuild"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.dominant <= 1:
            raise PlanError(
                f"visionzip: dominant={self.dominant!r} is not a share of keep",
                argument="dominant",
                given=self.dominant,
                expected="0 < dominant <= 1",
            )

    def reads(self):
        return {
            "features": Features(cls=self.cls),
            "attention": VisionAttention(heads="sum"),
            "keys": VisionKeys(),
        }

    def reduce(self, ctx: Context) -> list:
        x = ctx["features"]
        images, tokens, _ = x.shape
        has_cls = self.cls and "cls" in ctx
        budget = resolve(self.keep, tokens)
        dominant = max(1, math.floor(self.dominant * budget)) - has_cls
        contextual = budget - dominant - has_cls

        chosen = top_k(ctx["attention"], ctx.valid, dominant)
        # Remaining tokens in grid order: a stable sort puts the unchosen first.
        rest = chosen.int().argsort(dim=1, stable=True)[:, : tokens - dominant]
        step = max(1, rest.shape[1] // max(1, contextual))
        at = range(0, step * contextual, step)
        others = torch.tensor([i for i in range(rest.shape[1]) if i not in at]).long()
        targets = rest[:, : step * contextual : step]
        members = rest[:, others.to(x.device, non_blocking=True)]

        into = torch.arange(tokens, device=x.device).repeat(images, 1)
        values = x
        if contextual and members.shape[1]:
            receiver = self._assign(ctx["keys"], targets, members)
            ctx.book(2 * targets.shape[1] * members.shape[1] * ctx["keys"].shape[2])
            into = into.scatter(1, members, receiver)
            values = self._merged(x, targets, members, receiver)
        else:
            into = into.scatter(1, members, -1)

        keep = chosen.scatter(1, targets, True)
        first = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :dominant]
        order = torch.cat([first, targets], 1)
        if has_cls:
            seat = keep.int().argmin(1, keepdim=True)
            keep = keep.scatter(1, seat, True)
            into = into.scatter(1, seat, seat)
            order = torch.cat([seat, order], 1)
            values = values.scatter(1, seat[..., None].expand(-1, -1, x.shape[2]), ctx["cls"])
        place = torch.zeros_like(into).scatter(
            1, order, torch.arange(order.shape[1], device=x.device).expand_as(order)
        )
        return [Keep(keep, [budget] * images), Merge(into), Write(values, order=place)]

    @staticmethod
    def _assign(keys: Tensor, targets: Tensor, members: Tensor) -> Tensor:
        """For every member the index of the most similar target: int64 `[images, members]`."""
        keys = F.normalize(keys.float(), dim=-1)
        width = keys.shape[2]
        of = [keys.gather(1, i[..., None].expand(-1, -1, width)) for i in (members, targets)]
        return targets.gather(1, (of[0] @ of[1].transpose(1, 2)).argmax(2))

    def _merged(self, x: Tensor, targets: Tensor, members: Tensor, receiver: Tensor) -> Tensor:
        """Features with every target replaced by its contextual token (differentiable)."""
        wide = members[..., None].expand(-1, -1, x.shape[2])
        # In fp32: fp16 cannot hold the sum of many members.
        total = torch.zeros_like(x, dtype=torch.float32).scatter_add(
            1, receiver[..., None].expand_as(wide), x.gather(1, wide).float()
        )
        count = torch.zeros_like(total[..., 0]).scatter_add(
            1, receiver, torch.ones_like(receiver, dtype=total.dtype)
        )[..., None]
        if self.merge == "mean":
            merged = (x + total) / (1 + count)
        else:
            merged = x + total / count.clamp(min=1)
        return torch.where(count > 0, merged, x).to(x.dtype)
