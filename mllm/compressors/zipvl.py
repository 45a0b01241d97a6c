"""ZipVL: every layer attends among the tokens that carry most of the attention.

The others are stored in fewer bits (version 1 of the paper) or not at all (version 2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.cache.quantised import Quantised
from mllm.compressors.base import (
    AttentionRows,
    BranchRows,
    CacheEvent,
    Keys,
    LayerContext,
    LayerMethod,
    Positions,
    Preset,
    Values,
    register,
    top_k,
)
from mllm.compressors.kivi import Quantiser
from mllm.errors import PlanError

__all__ = ["ZipVL", "ZipVLCache", "ZipVLPrefill"]


@register("zipvl_prefill", paper="arXiv:2410.08584", stage="llm")
@dataclass
class ZipVLPrefill(LayerMethod):
    """Attend only among as many tokens as carry `tau` of the attention (first part of ZipVL).

    Before each layer a few probe rows are read: the last `recent` prompt tokens and `spread` more.
    The p tokens with the largest sums carry the share tau of what these rows pay; which p tokens
    are important is told by the sum divided by the number of probes that see the token (that pay
    more than 0), so that early tokens have no advantage. Text and picture are treated alike. The
    others pass the layer's attention on the residual and run its MLP, so that p is of each sample
    and layer. The last prompt token always takes part.

    The authors draw probes at random; here they are spread by the golden ratio over the prompt, so
    that a sample's do not depend on its batch. Their numbers (64 and 64) are unverified. Reading
    ahead costs the layer's projections once more. Quantised storage, and choosing anew while
    answering, are `zipvl_cache`'s.

    Args:
        tau: share of the mass; 1 is everything.
        recent: probes at the end of the prompt.
        spread: probes over the prompt.
        layers: decoder layers; None is all of them.
        store: store the others all the same, so that the answer sees them.
        positions: `original`; nothing is renumbered.
    """

    tau: float = 0.975
    recent: int = 64
    spread: int = 64
    layers: tuple[int, ...] | None = None
    store: bool = False
    positions: Positions | None = None

    actions = ("BranchRows",)
    identity = {"tau": 1.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_probes(self)

    def at_depth(self, num_layers: int, first_cut: int = 0) -> ZipVLPrefill:
        return self if self.layers is not None else self.replace(layers=tuple(range(num_layers)))

    def at(self) -> Sequence[int]:
        return (0,) if self.layers is None else self.layers

    def reads(self):
        found: dict[str, Any] = {"rows": AttentionRows(rows=self.probes, when="before")}
        if self.store and self.tau < 1:
            found |= {"keys": Keys(when="before"), "values": Values(when="before")}
        return found

    def probes(self, ctx: LayerContext) -> Tensor:
        """Rows that are asked: bool `[batch, rows]`."""
        place = ctx.prompt.long().cumsum(1)  # from 1
        count = place[:, -1:]
        turn = torch.arange(1, self.spread + 1, device=place.device) * 0.6180339887498949
        at = (turn.frac() * count).long() + 1
        rows = torch.searchsorted(place, at).clamp(max=place.shape[1] - 1)
        asked = torch.zeros_like(ctx.prompt).scatter(1, rows, True)
        return ctx.prompt & (asked | (place > count - self.recent))

    def act(self, ctx: LayerContext) -> list:
        if self.tau == 1:
            return []
        rows = ctx["rows"]
        mass = rows.sum(1).masked_fill(~ctx.prompt, 0)
        seers = (rows > 0).sum(1)
        important = top_k(mass / seers.clamp(min=1), ctx.prompt, _needed(mass, self.tau))
        place = torch.arange(rows.shape[2], device=rows.device)
        last = place == torch.where(ctx.prompt, place, -1).amax(1, keepdim=True)
        rows = important | last | ctx.protected | ~ctx.prompt
        stored = (ctx["keys"], ctx["values"]) if self.store else None
        return [BranchRows(ctx.layer, "attn", rows, stored)]


@register("zipvl_cache", paper="arXiv:2410.08584", stage="cache")
@dataclass
class ZipVLCache(Quantiser):
    """Store important tokens in more bits than others (second part of ZipVL).

    When a prompt ends, the tokens that `zipvl_prefill:store=true` has set aside in a layer are
    quantised to `low` bits, all others to `high`; without that stage all are important. Every
    `every` tokens of an answer, the newest of them looks at these: as many as carry `tau` of its
    attention to them, the most attended, are important. Older tokens are not touched again. What
    is left of an answer when the next prompt ends counts as important.

    Groups are those of `kivi`, keys by channel and values by token; the paper takes the quantiser
    of ZipCache.

    Args:
        high, low: bits of important and of other tokens: 2, 4, 8, or 16, which changes nothing.
        evict: let other tokens go instead, and quantise nothing (version 2).
        tau: share of the attention.
        every: tokens of an answer that are decided together.
        group_size: see :class:`KIVI`.
    """

    high: int = 4
    low: int = 2
    evict: bool = False
    tau: float = 0.975
    every: int = 100
    group_size: int = 32

    identity = {"high": 16, "low": 16}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand_bits("high", "low")
        self.demand("tau", 0 < self.tau <= 1, "a fraction in (0, 1]")
        self.demand("every", self.every > 0, "a whole number from 1")
        self.demand("group_size", self.group_size > 0, "a whole number from 1")

    @property
    def stores(self) -> bool:
        return not self.evict

    @property
    def _nothing(self) -> bool:
        return self.tau == 1 if self.evict else self.high == self.low == 16

    def reads(self):
        return {} if self._nothing else {"row": AttentionRows(rows="last")}

    def due(self, cache: Any) -> bool:
        return cache.length + 1 - cache.state.get(self.info.name, cache.length) >= self.every

    def prefill_end(self, event: CacheEvent) -> None:
        event.cache.state[self.info.name] = event.cache.length
        if self._nothing or self.evict:
            return
        for layer in range(event.cache.depth):
            if not event.cache.holds(layer):
                continue
            view = event.cache.view(layer, contents=False)
            aside = view.columns.get("aside")
            if aside is not None:
                less = _named(aside & view.valid, view.logical, event.cache, layer)
                self._put(event, layer, less, self.low)
            self._put(event, layer, event.valid, self.high)

    def decode_step(self, event: CacheEvent) -> None:
        cache, name = event.cache, self.info.name
        first = min(cache.state.setdefault(name, cache.length), cache.length)
        if cache.length - first < self.every or self._nothing:
            return
        cache.state[name] = cache.length
        for layer in range(cache.depth):
            if not cache.holds(layer):
                continue
            view = cache.view(layer, contents=False)
            new = _named(view.valid & (view.logical >= first), view.logical, cache, layer)
            unimportant = new & ~self._important(event, layer, new)
            if self.evict:
                cache.evict(layer, drop=unimportant)
            else:
                self._put(event, layer, unimportant, self.low)
                self._put(event, layer, event.valid, self.high)

    def _important(self, event: CacheEvent, layer: int, new: Tensor) -> Tensor:
        """Of the `new` tokens those that matter: bool, shaped like `new`."""
        if self.tau == 1 or event.phase == "verify":  # no row was read
            return new
        mass = event["row", layer][:, -1]
        wide = new.any(1) if new.dim() == 3 else new
        mass = mass.masked_fill(~wide, 0)
        found = top_k(mass, wide, _needed(mass, self.tau))
        return new & (found[:, None] if new.dim() == 3 else found)

    def verify_end(self, event: CacheEvent) -> None:
        self.decode_step(event)

    def _put(self, event: CacheEvent, layer: int, tokens: Tensor, bits: int) -> None:
        def make(keys: Tensor, values: Tensor, valid: Tensor) -> Quantised:
            return Quantised.of(keys, values, valid, bits, bits, self.group_size)

        window = event.cache.window(layer)
        if window is not None:  # groups are of what the layer still sees, in any batch
            tokens = tokens.clone()
            tokens[..., : max(0, event.cache.length - window + 1)] = False
        event.cache.convert(layer, make, tokens=tokens)


@register("zipvl", paper="arXiv:2410.08584", stage="preset")
@dataclass
class ZipVL(Preset):
    """Attend among few tokens, and store the others in fewer bits, or not at all (ZipVL).

    `zipvl_prefill` and `zipvl_cache`.

    Args:
        tau: share of the attention that important tokens carry.
        recent: probes at the end of the prompt.
        spread: probes over the prompt.
        high, low: bits of important and of other tokens.
        evict: store important tokens alone, as they are: version 2 of the paper.
        every: tokens of an answer that are decided together.
        group_size: see :class:`KIVI`.
        layers: decoder layers that attend among few; None is all of them.
        positions: `original`; nothing is renumbered.
    """

    tau: float = 0.975
    recent: int = 64
    spread: int = 64
    high: int = 4
    low: int = 2
    evict: bool = False
    every: int = 100
    group_size: int = 32
    layers: tuple[int, ...] | None = None
    positions: Positions | None = None

    identity = {"tau": 1.0, "high": 16, "low": 16}
    oracle = "reference"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expand()

    def expand(self) -> list:
        return [
            ZipVLPrefill(
                tau=self.tau, recent=self.recent, spread=self.spread, layers=self.layers,
                store=not self.evict, positions=self.positions,
            ),
            ZipVLCache(
                high=self.high, low=self.low, evict=self.evict, tau=self.tau, every=self.every,
                group_size=self.group_size,
            ),
        ]  # fmt: skip


def _needed(mass: Tensor, tau: float) -> Tensor:
    """How few of the largest sums `[batch, rows]` carry `tau` of them: int64 `[batch]`."""
    ranked = mass.sort(dim=1, descending=True).values
    return (ranked.cumsum(1) < tau * ranked.sum(1, keepdim=True)).sum(1) + 1


def _named(slots: Tensor, logical: Tensor, cache: Any, layer: int) -> Tensor:
    """Slots, bool `[batch, kv_heads, slots]`, by logical index; without heads if all are alike."""
    if not cache.apart(layer):
        slots, logical = slots[:, 0], logical[:, 0]
    found = slots.new_zeros(*slots.shape[:-1], cache.length + 1)
    return found.scatter(-1, torch.where(slots, logical, cache.length), True)[..., :-1]


def _check_probes(stage: Any) -> None:
    if not 0 < stage.tau <= 1 or stage.recent < 1 or stage.spread < 0:
        raise PlanError(
            f"{stage.info.name}: tau={stage.tau}, recent={stage.recent}, spread={stage.spread}",
            argument="tau",
            given=stage.tau,
            expected="0 < tau <= 1, recent from 1, spread from 0",
        )
