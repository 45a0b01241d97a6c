"""MoH: mixture of heads; every token chooses the attention heads that speak to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.compressors.base import HeadGate, Hidden, LayerContext, LayerMethod, Positions, register
from mllm.errors import PlanError
from mllm.routers.base import Score


@register("moh", paper="arXiv:2410.11842", stage="llm", trained=True)
@dataclass
class MoH(LayerMethod):
    """Sum attention heads by learnt weights, most of them zero for any one token (MoH).

    The first `shared` heads speak to every token, and of the others the best ones, so that `active`
    of all do. Their outputs are weighted by two softmaxes, whose means are 1, and by a third that
    shares out between the kinds; new routers give every head that speaks the weight 1. Keys and
    values of all heads are computed and stored, and silent heads are multiplied by zero: this is
    about quality per active head, and saves no time.

    Args:
        shared: share of the heads that always speak.
        active: share of the heads that speak to a token, `shared` included.
        balance: coefficient of the load-balance loss, averaged over layers.
        layers: decoder layers; None is all of them.
        positions: `original` is all there is: tokens stay where they are.
    """

    shared: float = 0.5
    active: float = 0.75
    balance: float = 0.01
    layers: tuple[int, ...] | None = None
    positions: Positions | None = None

    differentiable = True
    decodes = True
    oracle = "reference"
    actions = ("HeadGate",)
    identity = {"active": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        self._demand("shared", 0 < self.shared < 1, "between 0 and 1")
        self._demand("active", self.shared < self.active <= 1, "over shared and at most 1")
        self._demand("balance", self.balance >= 0, "a number from 0")
        self._demand("positions", self.positions != "compact", "original: nothing moves")

    def _demand(self, field: str, fine: bool, expected: str) -> None:
        if not fine:
            value = getattr(self, field)
            raise PlanError(
                f"{self.info.name}: {field}={value!r} is not {expected}",
                argument=field,
                given=value,
                expected=expected,
            )

    def at_depth(self, num_layers: int, first_cut: int = 0) -> MoH:
        own = tuple(range(num_layers)) if self.layers is None else self.layers
        fine = bool(own) and min(own) >= 0 and max(own) < num_layers and len(set(own)) == len(own)
        self._demand("layers", fine, f"different layers from 0 to {num_layers - 1}")
        return self.replace(layers=tuple(sorted(own)))

    def at(self) -> Sequence[int]:
        return self.layers or ()

    def reads(self):
        return {"hidden": Hidden()}

    def parts(self, width: int, heads: int) -> dict[str, nn.Module]:
        self._counts(heads)
        return {str(layer): Score(width, heads + 2, bias=False) for layer in self.layers}

    def _counts(self, heads: int) -> tuple[int, int]:
        """Heads that always speak, and how many of the others do."""
        shared, active = round(self.shared * heads), round(self.active * heads)
        self._demand("shared", 1 <= shared < heads, f"a share that leaves some of {heads} heads")
        self._demand("active", shared < active, f"more of {heads} heads than are shared")
        return shared, active - shared

    def act(self, ctx: LayerContext) -> list[Any]:
        x = ctx["hidden"].float()
        # The weight of the layer's own norm is part of what is learnt.
        x = F.rms_norm(x, x.shape[-1:], eps=1e-6)
        scores = ctx.route(str(ctx.layer), x)
        ctx.book(2.0 * x.shape[1] * x.shape[2] * scores.shape[-1])
        heads = scores.shape[-1] - 2
        shared, chosen = self._counts(heads)
        always, routed, kinds = scores.split([shared, heads - shared, 2], -1)
        order = routed.argsort(dim=-1, descending=True, stable=True)[..., :chosen]
        speaks = torch.zeros_like(routed).scatter(-1, order, 1.0)
        self._balance(ctx, routed, speaks)
        between = _mean_one(kinds)
        gate = torch.cat([
            between[..., :1] * _mean_one(always), between[..., 1:] * _mean_one(routed, speaks)
        ], -1)  # fmt: skip
        return [HeadGate(ctx.layer, gate)]

    def _balance(self, ctx: LayerContext, routed: Tensor, speaks: Tensor) -> None:
        rows = (ctx.prompt | ctx.answers)[..., None]
        if not ctx.decoding:
            rows = rows & ctx.visual.any(1)[:, None, None]
        n = rows.sum().clamp(min=1)
        p, taken = ((x * rows).sum((0, 1)) / n for x in (routed.softmax(-1), speaks))
        loss = (p * taken).mean() * routed.shape[-1] ** 2
        ctx.penalise("heads", loss, self.balance / len(self.layers))


def _mean_one(scores: Tensor, among: Tensor | None = None) -> Tensor:
    """A softmax times the number of its terms, zero at the others; 1 exactly for equal scores.

    Args:
        scores: fp32 `[..., terms]`.
        among: 1 for terms that count and 0 for others; None is all.
    """
    weight = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    weight = weight if among is None else weight * among
    count = float(scores.shape[-1]) if among is None else among.sum(-1, keepdim=True)
    return count * weight / weight.sum(-1, keepdim=True)
