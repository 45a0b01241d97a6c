"""What methods that let stored tokens go have in common: a scorer, an allocator, a disposer.

A method scores the tokens of a layer (`score`), says how many of them each layer and head keeps
(`allocate`), and lets the others go (`dispose`). Everything else is here: budgets, protected
tokens, batches, and the steps of a long answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mllm.compressors.base import Budget, CacheCompressor, CacheEvent, on_device
from mllm.errors import PlanError

__all__ = ["KVMethod", "Layer", "best", "portions", "received", "share_out"]


@dataclass
class Layer:
    """One layer as allocators and disposers see it. `heads` is 1 where all hold and score alike.

    Attributes:
        index: 0-based layer; `depth` is how many there are.
        logical: int64 `[batch, heads, slots]`, names of the stored tokens.
        stored: bool `[batch, heads, slots]`, false for padding and for what no later token sees.
        visual: bool `[batch, heads, slots]`.
        free: bool `[batch, heads, slots]`, tokens that may leave.
        score: fp32 `[batch, heads, slots]`.
        room: int64 `[batch, heads]`, how many of them an even budget keeps.
        many: int64 `[batch]`, tokens so far, or visual ones, if the budget counts these alone.
        limit: int64 `[batch]`, the budget itself, protected tokens included.
        weight: what the method's `weigh` gave.
        others: layers that let the same tokens go.
    """

    index: int
    depth: int
    logical: Tensor
    stored: Tensor
    visual: Tensor
    free: Tensor
    score: Tensor
    room: Tensor
    many: Tensor
    limit: Tensor
    weight: Tensor | None = None
    others: Sequence[int] = ()


@dataclass
class KVMethod(CacheCompressor):
    """Base of methods that keep the best tokens of every layer; subclasses say which are best.

    Subclasses declare a signal `attention`, or override `score` and `step`.

    Args:
        budget: slots per layer and KV head: an int, or a fraction of the tokens so far when a
            prompt ends. 1.0 keeps everything, answers too.
        sinks: first tokens, which never leave.
        window: newest tokens, which never leave: an int, or a fraction of the budget. Where a
            fraction of a short prompt has no room for them, at most half of it is theirs.
        tokens: which may leave: all, or `visual` ones, and then the budget counts these alone.
        heads: KV heads of a layer choose for themselves, or share one choice, as flash attention
            needs it.
        hold: hold the budget while answers grow: every new token may push out another.
    """

    budget: Budget = 0.25
    sinks: int = 0
    window: int | float = 32
    tokens: Literal["prompt", "visual"] = "prompt"
    heads: Literal["each", "shared"] = "each"
    hold: bool = False

    identity = {"budget": 1.0}
    gqa: ClassVar[str] = "mean"  # of the query heads that share a KV head
    two_pass: ClassVar[bool] = False  # whether `allocate` needs all layers at once
    adds: ClassVar[bool] = False  # whether scores of an earlier turn count
    sums: ClassVar[bool] = False  # whether scores of a prompt's earlier chunks count
    remembers: ClassVar[bool] = True  # whether scores add up while decoding
    alike: ClassVar[bool] = False  # whether layers that hold the same tokens let the same ones go
    chunks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole = isinstance(self.window, int)
        self.demand("sinks", self.sinks >= 0, "a whole number from 0")
        share = "a whole number from 0, or a fraction in [0, 1]"
        self.demand("window", self.window >= 0 and (whole or self.window <= 1), share)
        least = self.sinks + (self.window if whole else 0)
        if isinstance(self.budget, int) and self.tokens == "prompt" and self.budget < least:
            raise PlanError(
                f"{self.info.name}: budget={self.budget} is less than sinks + window, the {least} "
                "slots that never leave",
                argument="budget",
                given=self.budget,
                expected=f"at least {least}, or less sinks and window",
            )

    @property
    def headwise(self) -> bool:
        return self.heads == "each"

    @property
    def keeps(self) -> bool:
        return self.two_pass or self._holds or self.adds or self.sums or self.tokens == "visual"

    @property
    def watches(self) -> bool:
        return self._holds and self.remembers

    # Scorer

    def score(self, event: CacheEvent) -> Tensor:
        """Scores at the end of a layer: fp32 `[batch, heads or kv_heads or 1, length]`."""
        return received(event["attention"])

    def weigh(self, event: CacheEvent) -> Tensor | None:
        """What `allocate` needs to know of a layer beside its scores: `[batch]`."""

    def step(self, event: CacheEvent, layer: int) -> Tensor:
        """What a decode step adds to the scores of a layer: shaped like those."""
        return received(event["attention", layer])

    def rank(self, layer: Layer) -> Tensor:
        """What tokens are chosen by, `[batch, heads, slots]`: their scores."""
        return layer.score

    # Allocator

    def allocate(self, layers: list[Layer]) -> list[Tensor]:
        """Free tokens that each of the layers keeps: int64 `[batch, heads]`.

        Given one layer after another, or all of them if `two_pass`. What is said of a sample of
        which nothing has to leave is not looked at.
        """
        return [layer.room for layer in layers]

    # Disposer

    def dispose(self, event: CacheEvent, layer: Layer, keep: Tensor) -> None:
        """Let go of what is not in `keep`: bool `[batch, heads, slots]`."""
        keep = keep[:, 0] if keep.shape[1] == 1 else keep
        event.cache.retain([layer.index, *layer.others], keep)

    # Events

    def layer_end(self, event: CacheEvent) -> None:
        if not event.cache.holds(event.layer):
            return
        self._note(event)
        found = self.score(event), self.weigh(event)
        if self.two_pass:
            event.cache.state.setdefault(self.info.name, {})[event.layer] = found
        else:
            self._cut(event, {event.layer: found})

    def prefill_end(self, event: CacheEvent) -> None:
        if self.two_pass:
            self._cut(event, event.cache.state.pop(self.info.name, {}))

    def chunk_end(self, event: CacheEvent) -> None:
        if self.two_pass:
            self._cut(event, event.cache.state.pop(self.info.name, {}))

    def decode_step(self, event: CacheEvent) -> None:
        if not self._holds:
            return
        alike = self.alike and event.protected is None
        groups: dict[Any, list[int]] = {}
        for index in range(event.cache.depth):
            # Else nothing was stored when the prompt ended.
            if self._name("total") in event.cache.samples(index):
                key = event.cache.same(index) if alike else index
                groups.setdefault(key, []).append(index)
        blind = event.phase == "verify" and self.remembers  # no rows were read
        for index, *others in groups.values():
            known = event.cache.samples(index)
            score = None if blind else self.step(event, index)
            apart = self.headwise or event.cache.apart(index)
            kept = (known[x] for x in self._kept_samples())
            layer = self._see(event, index, score, *kept, apart)
            layer.others = others
            self.trim(event, layer, known[self._name("total")])

    def trim(self, event: CacheEvent, layer: Layer, total: Tensor) -> None:
        """Hold the budget of a layer when new tokens have come.

        Args:
            event: a decode step, or the end of a verification.
            layer: the layer.
            total: int64 `[batch, heads]`, what it was given when the prompt ended.
        """
        self._keep(event, layer, (total - self.fixed(layer).sum(-1)).clamp(min=0))

    def verify_end(self, event: CacheEvent) -> None:
        self.decode_step(event)

    # What the events share

    @property
    def _everything(self) -> bool:
        return isinstance(self.budget, float) and self.budget == 1

    @property
    def _holds(self) -> bool:
        return self.hold and self.tokens == "prompt" and not self._everything

    def _kept_samples(self) -> tuple[str, str]:
        return self._name("many"), self._name("limit")

    def _name(self, what: str) -> str:
        return f"{self.info.name}_{what}"

    def _cut(self, event: CacheEvent, found: dict[int, tuple[Tensor, Tensor | None]]) -> None:
        layers = []
        apart = self.headwise or any(event.cache.apart(index) for index in found)
        for index, (score, weight) in found.items():
            event.cache.settle(index)  # among equal scores the earlier token stays
            many = self._many(event, index)
            layer = self._see(event, index, score, many, self._limit(many), apart)
            layer.weight = weight
            layers.append(layer)
        if not layers:
            return
        fits = torch.stack([(x.free.sum(-1) <= x.room).all(1) for x in layers]).all(0)[:, None]
        for layer, count in zip(layers, self.allocate(layers), strict=True):
            count = torch.where(fits, layer.room, count)
            if self._holds:
                known, total = event.cache.samples(layer.index), count + self.fixed(layer).sum(-1)
                for what in ("many", "limit"):
                    known[self._name(what)] = getattr(layer, what)
                known[self._name("total")] = total
            self._keep(event, layer, count)

    def _many(self, event: CacheEvent, index: int) -> Tensor:
        """Tokens of each sample that the budget counts: int64 `[batch]`."""
        if self.tokens == "prompt":
            return on_device(torch.tensor(event.lengths), event.valid)
        known = event.cache.samples(index)
        many = (event.visual & event.prompt).sum(1) + known.get(self._name("many"), 0)
        known[self._name("many")] = many
        return many

    def _limit(self, many: Tensor) -> Tensor:
        """The budget of each sample: int64 `[batch]`."""
        if isinstance(self.budget, int):
            return torch.full_like(many, self.budget)
        return (many.double() * self.budget).round().long().clamp(min=1)

    def _see(
        self, event: CacheEvent, index: int, score: Tensor | None, many: Tensor, limit: Tensor,
        apart: bool,
    ) -> Layer:  # fmt: skip
        """A layer as it is now; `apart` says whether each of its heads is looked at."""
        view = event.cache.view(index, contents=False)
        heads = view.logical.shape[1]

        def own(x: Tensor) -> Tensor:
            return x if apart else x[:, :1]

        logical, stored, visual = map(own, (view.logical, view.valid, view.visual))
        if (window := event.cache.window(index)) is not None:
            stored = stored & (logical > event.cache.length - window)
        guarded = self._guarded(event, limit)
        guarded = guarded[:, None].expand(-1, logical.shape[1], -1).gather(-1, logical)
        pinned = view.columns.get("pinned")
        if event.protected is not None:
            named = torch.zeros_like(event.valid)
            named[:, event.start :] = event.protected
            now = named[:, None].expand(-1, heads, -1).gather(-1, view.logical)
            pinned = now if pinned is None else now | pinned
            event.cache.annotate(index, pinned=pinned if event.cache.apart(index) else pinned[:, 0])
        if pinned is not None:
            guarded = guarded | own(pinned)
        counted = stored & visual if self.tokens == "visual" else stored
        points = torch.zeros(logical.shape, device=logical.device)
        if score is not None:
            score = self._per_head(score, heads).expand(-1, logical.shape[1], -1)
            points = score.gather(-1, logical)
        before = view.columns.get(self._name("score"))
        again = self.adds or event.phase != "prefill" or (self.sums and not event.begins)
        if before is not None and again:
            points = points + own(before)
        layer = Layer(
            index, event.cache.depth, logical, stored, visual, counted & ~guarded, points,
            limit[:, None].expand(logical.shape[:2]), many, limit,
        )  # fmt: skip
        layer.room = (layer.room - self.fixed(layer).sum(-1)).clamp(min=0)
        return layer

    def fixed(self, layer: Layer) -> Tensor:
        """Tokens that the budget counts and that may not leave: bool `[batch, heads, slots]`."""
        counted = layer.visual if self.tokens == "visual" else layer.stored
        return counted & layer.stored & ~layer.free

    def _guarded(self, event: CacheEvent, limit: Tensor) -> Tensor:
        """Sinks and window: bool `[batch, length]`."""
        whole = isinstance(self.window, int)
        newest = limit.new_full(limit.shape, self.window) if whole else limit * self.window
        newest = newest.round().long()
        first = torch.full_like(newest, self.sinks)
        if self.tokens == "prompt":
            tight = first + newest > limit
            newest = torch.where(tight, newest.minimum((limit // 2).clamp(min=1)), newest)
            first = first.minimum(limit - newest)
        order = event.valid.long().cumsum(1)
        old, young = order <= first[:, None], order > order[:, -1:] - newest[:, None]
        return event.valid & (old | young)

    def _per_head(self, x: Tensor, heads: int) -> Tensor:
        """Scores `[batch, heads or kv_heads or 1, length]` of those that choose."""
        if not self.headwise:
            return x.mean(1, keepdim=True)
        if x.shape[1] <= heads:
            return x
        x = x.unflatten(1, (heads, -1))
        return x.amax(2) if self.gqa == "max" else x.mean(2)

    def _keep(self, event: CacheEvent, layer: Layer, count: Tensor) -> None:
        more = (self.adds or self.sums) and not event.ends
        if self.watches or more or ((self.adds or self.sums) and not event.begins):
            score = layer.score if self.watches or more else torch.zeros_like(layer.score)
            score = score[:, 0] if score.shape[1] == 1 else score
            event.cache.annotate(layer.index, **{self._name("score"): score})
        name = None if event.phase == "prefill" else layer.logical
        chosen = best(self.rank(layer), layer.free, count, name)
        keep = layer.stored & ~layer.free | chosen
        self.dispose(event, layer, keep)

    def _note(self, event: CacheEvent) -> None:
        """Tell the ledger where protected tokens do not fit."""
        name, window, budget = self.info.name, self.window, self.budget
        if self.tokens == "visual" or not isinstance(window, int) or not event.ends:
            return
        for tokens in event.lengths:
            if window > tokens:
                event.note(f"{name}: window={window} is cut to the {tokens} tokens that there are")
                continue
            slots = round(budget * tokens) if isinstance(budget, float) else tokens
            if self.sinks + window > slots < tokens:
                event.note(
                    f"{name}: budget={budget} of {tokens} tokens has no room for sinks and window, "
                    "which get less"
                )


def received(x: Tensor) -> Tensor:
    """What every token receives, `[batch, heads, length]`, of rows or of a column sum."""
    return x.sum(2) if x.dim() == 4 else x


def best(score: Tensor, among: Tensor, count: Tensor, name: Tensor | None = None) -> Tensor:
    """The `count` best of each row; ties go to the earlier one.

    Args:
        score: `[..., n]`.
        among: bool `[..., n]`; the others are never taken.
        count: int64 `[...]`.
        name: int64 `[..., n]`, lower for earlier ones; None is their order.
    """
    over = among.sum(-1, keepdim=True) - count[..., None]
    if score.numel() and int(over.max()) <= 1:  # a step of an answer: nothing has to be sorted
        place = torch.arange(score.shape[-1], device=score.device) if name is None else name
        score = score.float().masked_fill(~among, torch.inf)
        worst = torch.where(score == score.amin(-1, keepdim=True), place, -1)
        worst = worst.argmax(-1, keepdim=True)
        return among & ~torch.zeros_like(among).scatter(-1, worst, over > 0)
    score = score.float().masked_fill(~among, -torch.inf)
    if name is None:
        order = score.argsort(dim=-1, descending=True, stable=True)
    else:
        order = name.argsort(dim=-1, stable=True)
        by_name = score.gather(-1, order)
        order = order.gather(-1, by_name.argsort(dim=-1, descending=True, stable=True))
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return among & (rank < count[..., None])


def share_out(score: Tensor, among: Tensor, total: Tensor) -> Tensor:
    """How many of the `total` best of all groups are in each.

    Args:
        score: `[batch, groups, n]`.
        among: bool `[batch, groups, n]`.
        total: int64 `[batch]`.

    Returns:
        int64 `[batch, groups]`.
    """
    taken = best(score.flatten(1), among.flatten(1), total)
    return taken.unflatten(1, score.shape[1:]).sum(-1)


def portions(real: Tensor) -> Tensor:
    """Whole numbers near `[..., n]` real ones that add up to the same, rounded."""
    ends = real.double().cumsum(-1).round().long()
    return ends.diff(dim=-1, prepend=torch.zeros_like(ends[..., :1]))
