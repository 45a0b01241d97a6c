"""PrefixKV: one threshold of importance for all layers, measured by the prompt or beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import Budget, CacheEvent, ColumnMass, Fittable, register
from mllm.compressors.kv_base import KVMethod, Layer, best, share_out
from mllm.errors import PlanError


@register("prefixkv", paper="arXiv:2412.03409", stage="cache")
@dataclass
class PrefixKV(Fittable, KVMethod):
    """Let every layer keep the same share of its importance (PrefixKV).

    Importance is the attention that a token receives from the prompt, averaged over heads. One
    threshold serves all layers: each keeps its best tokens until their sum passes it, and it is
    chosen so that all layers together hold the budget. Every prompt measures its own shares of
    layers; the authors measure them on a few samples beforehand, as :func:`mllm.calibrate` does:
    then a layer is cut as soon as it has run.

    While decoding a layer keeps its share of all tokens so far: when it has one too many, the
    token at a fixed place of what is stored leaves, or the first behind it that may.

    Args:
        budget: slots per layer on average, or a fraction of the prompt; the authors' `ratio` is
            what leaves. Not looked at beside `ratios`.
        sinks, window, tokens: see :class:`KVMethod`.
        heads: `shared`, as in the paper, or every KV head chooses for itself.
        hold: whether layers keep to their share while decoding.
        distance: the place: behind the start of what is stored, or before the end of the
            compressed prompt.
        ratios: fraction of the prompt that each layer keeps; None is measured by every prompt.
        calibration: file of :func:`mllm.calibrate` with `ratios`.
    """

    budget: Budget = 0.2
    sinks: int = 1
    window: int | float = 1
    heads: Literal["each", "shared"] = "shared"
    hold: bool = True
    distance: int = -25
    ratios: tuple[float, ...] | None = None
    calibration: str | None = None

    remembers: ClassVar[bool] = False
    sums: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        fine = self.ratios is None or (
            len(self.ratios) > 0 and all(0 < share <= 1 for share in self.ratios)
        )
        self.demand("ratios", fine, "a fraction in (0, 1] for every layer")

    @property
    def two_pass(self) -> bool:
        return self.ratios is None

    @property
    def _everything(self) -> bool:
        if self.ratios is None:
            return super()._everything
        return min(self.ratios) == 1

    def check_depth(self, num_layers: int) -> None:
        if self.ratios is not None and len(self.ratios) != num_layers:
            raise PlanError(
                f"prefixkv: {len(self.ratios)} ratios for {num_layers} decoder layers",
                argument="ratios",
                given=len(self.ratios),
                expected=f"{num_layers} fractions",
            )

    def reads(self):
        return {"attention": ColumnMass(heads="none" if self.headwise else "mean")}

    def score(self, event: CacheEvent) -> Tensor:
        x = event["attention"]
        return x if self.headwise else x[:, None]

    def allocate(self, layers: list[Layer]) -> list[Tensor]:
        if self.ratios is not None:
            return [self._given(layer) for layer in layers]
        slots = max(layer.score.shape[-1] for layer in layers)
        before, among, room = [], [], 0
        for layer in layers:
            fill = (0, slots - layer.score.shape[-1])
            before.append(F.pad(_above(layer.score.masked_fill(~layer.stored, 0)), fill))
            among.append(F.pad(layer.free, fill))
            room = room + layer.room.sum(1)
        sizes = [x.shape[1] for x in before]
        counts = share_out(-torch.cat(before, 1), torch.cat(among, 1), room)
        return list(counts.split(sizes, 1))

    def _given(self, layer: Layer) -> Tensor:
        total = (layer.many.double() * self.ratios[layer.index]).round().long()
        return (total[:, None] - self.fixed(layer).sum(-1)).clamp(min=0)

    def _limit(self, many: Tensor) -> Tensor:
        if self.ratios is None:
            return super()._limit(many)
        mean = sum(self.ratios) / len(self.ratios)
        return (many.double() * mean).round().long().clamp(min=1)

    # Calibration

    def observe(self, event: CacheEvent) -> list[Tensor]:
        """Importance of every token of a layer, by sample: fp32 `[tokens]` each, on the CPU."""
        x, window = self.score(event).mean(1), event.cache.window(event.layer)
        if window is not None:
            x[:, : max(0, event.cache.length - window + 1)] = 0  # not stored any more
        return [own[valid] for own, valid in zip(x.cpu(), event.valid.cpu(), strict=True)]

    def fit(self, seen: list[list[Tensor]], share: float | None) -> dict[str, Any]:
        share = self.budget if share is None else share
        if not isinstance(share, float) or not 0 < share <= 1:
            raise PlanError(
                f"prefixkv: shares of layers are fitted to a fraction of the prompt, not {share!r}",
                argument="share",
                given=share,
                expected="0 < share <= 1",
            )
        kept = torch.stack([self._kept(torch.stack(own), share) for own in seen]).mean(0)
        return {"budget": share, "ratios": tuple(round(max(x, 1e-4), 4) for x in kept.tolist())}

    def _kept(self, x: Tensor, share: float) -> Tensor:
        """The fraction that each layer keeps of one sample: float64 `[layers]`.

        Args:
            x: importance, `[layers, tokens]`.
            share: of the tokens, on average.
        """
        depth, tokens = x.shape
        limit = max(1, round(share * tokens))
        newest = self.window if isinstance(self.window, int) else round(self.window * limit)
        free = torch.ones_like(x, dtype=torch.bool)
        free[:, : self.sinks] = False
        free[:, tokens - min(newest, tokens) :] = False
        fixed = tokens - int(free[0].sum())
        total = torch.tensor([depth * max(0, limit - fixed)])
        counts = share_out(-_above(x)[None], free[None], total)[0]
        return (counts + fixed).double() / tokens

    def step(self, event: CacheEvent, layer: int) -> None:
        """Scores are not looked at again."""

    def trim(self, event: CacheEvent, layer: Layer, total: Tensor) -> None:
        stored, seen = layer.stored.sum(-1), event.valid.sum(1)[:, None]
        over = (stored - 1) * layer.many[:, None] >= seen * total
        place = total + self.distance if self.distance <= 0 else total * 0 + self.distance
        place = torch.where(place < 1, stored // 2, place)
        order = layer.logical.argsort(dim=-1, stable=True)
        rank = layer.stored.long().gather(-1, order).cumsum(-1)
        behind = torch.zeros_like(rank).scatter(-1, order, rank) > place[..., None]
        leaves = best(-layer.logical, layer.free & behind, over.long())
        self.dispose(event, layer, layer.stored & ~leaves)


def _above(x: Tensor) -> Tensor:
    """What better ones hold of the sum of `[..., n]`, for each: the prefix before it."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    ranked = x.gather(-1, order) / x.sum(-1, keepdim=True).clamp(min=1e-30)
    return torch.empty_like(x).scatter(-1, order, ranked.cumsum(-1) - ranked)
