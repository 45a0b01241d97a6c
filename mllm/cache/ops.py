"""What a method may do with a cache: operations that name tokens by their logical index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm import compat
from mllm.cache.adoption import CacheMark, tell_compressed
from mllm.cache.landmarks import landmarked
from mllm.cache.layer import LayerState, Make, SlotLayer
from mllm.cache.looking import CacheView, Layers
from mllm.cache.lowrank import Fit, Rank, factored
from mllm.cache.segments import Offloaded, Part, Segment, _headwise
from mllm.cache.slots import SlotTable
from mllm.errors import CacheMismatchError, PlanError

if TYPE_CHECKING:
    from mllm.models.base import Family


@dataclass(frozen=True)
class Snapshot:
    """A cache as it was: made by :meth:`KVCache.snapshot`."""

    layers: list[LayerState]
    mark: CacheMark


class KVCache(CacheView):
    """Operations on the cache of a patched model, beside those of :class:`CacheView`.

    Made by :meth:`mllm.patcher.Patched.kv`; a :class:`~mllm.compressors.base.CacheCompressor` gets
    one with every event. Tokens are named by logical index: their place in the sequence as if
    nothing had ever been dropped, padding included. `layers` is one 0-based layer, several, or None
    for all of them. Nothing here changes the logical length except `crop` and `rollback`.
    """

    # Changing what is stored

    def evict(
        self,
        layers: Layers = None,
        *,
        keep: Tensor | None = None,
        drop: Tensor | None = None,
        heads: list[int] | None = None,
    ) -> None:
        """Let tokens go from layers that have run, earlier ones too. Memory is really freed.

        Exactly one of `keep` and `drop` names tokens: bool `[batch, length]`, or int64
        `[batch, n]` of logical indices where -1 names nothing. With an axis of heads,
        `[batch, heads, length or n]`, every KV head has its own. Tokens that are not stored are
        ignored.

        Args:
            layers: where.
            keep: what stays; everything else goes.
            drop: what goes.
            heads: KV heads that are meant, the axis of `keep` or `drop` follows them; the others
                keep what they have. None is all.

        Raises:
            CacheMismatchError: a layer that has not run, or a selection of another batch.
            PlanError: heads would differ under flash attention, which has no mask per head.
        """
        if (keep is None) == (drop is None):
            raise CacheMismatchError(
                "evict takes either keep or drop", argument="keep", given="both or none",
                expected="one of them",
            )
        tokens = drop if keep is None else keep
        stays: dict[SlotTable, Tensor] = {}
        shared: dict = {}
        for layer in self._chosen(layers):
            table = layer.table
            if table not in stays:
                stays[table] = self._stays(layer, tokens, drop is None, heads)
            if stays[table].dim() == 3:
                refuse_flash(self._family)
            layer.retain(stays[table], self._certain, shared)
        tell_compressed(self.cache)

    def _stays(
        self, layer: SlotLayer, tokens: Tensor, wanted: bool, heads: list[int] | None
    ) -> Tensor:
        """Which slots stay if `tokens` do (`wanted`), or go: bool, with heads where they differ."""
        logical = layer.table.logical
        wide = heads is not None or tokens.dim() == 3 or logical.dim() == 3
        count = layer.heads if heads is None else len(heads)
        if tokens.shape[0] != logical.shape[0] or (tokens.dim() == 3 and tokens.shape[1] != count):
            raise CacheMismatchError(
                "the selection is not of this cache's shape",
                argument="keep or drop",
                given=tuple(tokens.shape),
                expected=f"batch {logical.shape[0]} and, if there is an axis of heads, {count}",
            )
        tokens = tokens.to(logical.device)
        if wide:
            tokens = tokens if tokens.dim() == 3 else tokens[:, None].expand(-1, count, -1)
            logical = _headwise(logical, layer.heads)
            logical = logical if heads is None else logical[:, heads]
        if tokens.dtype != torch.bool:
            marks = logical.new_zeros(*tokens.shape[:-1], self.length + 1, dtype=torch.bool)
            nothing = (tokens < 0) | (tokens > self.length)
            tokens = marks.scatter(-1, tokens.masked_fill(nothing, self.length), True)
            tokens = tokens[..., :-1]
        named = tokens.gather(-1, logical.clamp(max=tokens.shape[-1] - 1))
        named = named & (logical < tokens.shape[-1])
        stays = (named == wanted) | (logical >= self.length)
        if heads is None:
            return stays
        every = stays.new_ones(stays.shape[0], layer.heads, stays.shape[2])
        every[:, heads] = stays
        return every

    def retain(self, layers: Layers, keep: Tensor) -> None:
        """Let go of slots, as `view` shows them, where :meth:`evict` names tokens.

        Args:
            layers: where; all of them show as many slots.
            keep: bool `[batch, slots]` or `[batch, kv_heads, slots]`, what stays.

        Raises:
            CacheMismatchError, PlanError: as :meth:`evict`.
        """
        shared: dict = {}
        for layer in self._chosen(layers):
            batch, shown = layer.table.valid.shape[0], layer.slots - self._hidden
            if keep.shape not in ((batch, shown), (batch, layer.heads, shown)):
                raise CacheMismatchError(
                    "the selection is not of this layer's shape",
                    argument="keep",
                    given=tuple(keep.shape),
                    expected=f"batch {batch}, {shown} slots, and {layer.heads} heads, if any",
                )
            stays = _headwise(keep, layer.heads) if layer.table.headwise else keep
            if stays.dim() == 3:
                refuse_flash(self._family)
            stays = F.pad(stays, (0, self._hidden), value=True) if self._hidden else stays
            layer.retain(stays, self._certain, shared)
        tell_compressed(self.cache)

    def settle(self, layers: Layers = None) -> None:
        """Bring stored tokens into their order; a step that lets one go puts the new one there.

        Costs a copy of what is out of order, and nothing otherwise.

        Args:
            layers: where.
        """
        shared: dict = {}
        for layer in self._chosen(layers):
            layer.settle(shared)

    def merge(
        self,
        layers: Layers,
        into: Tensor,
        weight: Tensor | None = None,
        *,
        heads: list[int] | None = None,
        part: Part = "both",
    ) -> None:
        """Fold tokens into others: a receiver becomes the weighted mean of all that it stands for.

        Keys are averaged as they are stored, after rotary embedding; see :meth:`unrotate`.
        Receivers are stored plainly; what receives nothing stays in the form that it is in.

        Args:
            layers: where.
            into: int64 `[batch, length]` or `[batch, heads, length]`: per token the logical index
                of its receiver, its own if it stays, -1 if it is dropped. A token whose receiver
                is not stored is dropped.
            weight: float, the shape of `into`; None is 1 for every token.
            heads: KV heads that are meant; None is all.
            part: what is averaged; of the rest the receiver keeps its own.

        Raises:
            CacheMismatchError, PlanError: as :meth:`evict`.
        """
        shared: dict = {}
        for layer in self._chosen(layers):
            apart = into.dim() == 3 or heads is not None or layer.table.headwise
            if apart:
                refuse_flash(self._family)
            logical, valid = (
                _headwise(t, layer.heads) for t in (layer.table.logical, layer.table.valid)
            )
            chosen = list(range(layer.heads)) if heads is None else heads
            receiver, own = logical.clone(), logical[:, chosen]
            receiver[:, chosen] = self._per_slot(into, own, own)
            if not bool((valid & (receiver != logical)).any()):
                continue
            share = torch.ones_like(logical, dtype=torch.float32)
            if weight is not None:
                ones = torch.ones_like(own, dtype=torch.float32)
                share[:, chosen] = self._per_slot(weight.float(), own, ones)
            keys, values, new = _merged(layer, receiver, share, logical, valid, part)
            stays = receiver == logical
            stays, new = (stays, new) if apart else (stays[:, 0], new[:, 0])
            layer.exchange(keys, values, new, stays, self._certain, shared)
        tell_compressed(self.cache)

    def _per_slot(self, tokens: Tensor, logical: Tensor, otherwise: Tensor) -> Tensor:
        """Values by logical index, `[batch, (heads,) length]`, as one per slot."""
        if tokens.shape[-1] != self.length or tokens.shape[0] != logical.shape[0]:
            raise CacheMismatchError(
                "the merge is not of this cache's shape",
                argument="into",
                given=tuple(tokens.shape),
                expected=f"batch {logical.shape[0]}, one value for each of {self.length} tokens",
            )
        tokens = tokens.to(logical.device)
        tokens = tokens if tokens.dim() == 3 else tokens[:, None].expand(-1, logical.shape[1], -1)
        found = tokens.gather(-1, logical.clamp(max=self.length - 1))
        return torch.where(logical < self.length, found, otherwise)

    def convert(
        self,
        layers: Layers,
        make: Make,
        leave: int = 0,
        *,
        tokens: Tensor | None = None,
        blocks: int | None = None,
    ) -> None:
        """Store tokens in another form: the door for quantised and low-rank segments.

        Takes what is stored plainly and leaves earlier converted segments alone, so a method may
        call it again as tokens come. Under `tokens` or `blocks`, samples and heads may convert
        unequally many: what is converted comes to stand before what stays plain, and joins an
        earlier segment that can `join` it.

        Args:
            layers: where.
            make: from keys and values `[batch, kv_heads, slots, dim]` and their validity, bool
                `[batch, kv_heads, slots]`, a :class:`Segment` of as many slots.
            leave: newest slots that stay plain, if neither of the following is given.
            tokens: bool `[batch, length]` or `[batch, kv_heads, length]`, what is converted.
            blocks: of every head the oldest tokens that fill whole blocks of so many, among
                those that later tokens can see.

        Raises:
            PlanError: heads would differ under flash attention.
        """
        leave += self._hidden
        chosen: dict[Any, Tensor] = {}
        shared: dict = {}
        for layer in self._chosen(layers):
            if blocks is None or layer.segments[-1].slots - self._hidden >= blocks:
                layer.settle(shared)
            plain = layer.segments[-1]
            if tokens is None and blocks is None:
                layer.compressed |= self._convert_all_but(layer, make, leave)
                continue
            if not plain.grows or plain.slots - self._hidden < (blocks or 1):
                continue
            key = layer.table, layer.window, plain.slots
            if key not in chosen:
                chosen[key] = self._which(layer, tokens, blocks)[..., -plain.slots :]
            if chosen[key].dim() == 3:
                refuse_flash(self._family)
            layer.convert(chosen[key], make, self._certain, shared)
        tell_compressed(self.cache)

    def _which(self, layer: SlotLayer, tokens: Tensor | None, blocks: int | None) -> Tensor:
        """Slots that are converted: bool `[batch, slots]`, with heads where they differ."""
        table, plain = layer.table, layer.segments[-1].slots
        if tokens is not None:
            stays = self._stays(layer, tokens, True, None)
            certain = table.logical < self.length
            return stays & (certain if certain.dim() == stays.dim() else certain[:, None])
        seen = table.valid & (table.logical < self.length)
        if layer.window is not None:
            seen = seen & (table.logical > self.length - layer.window)
        seen[..., : layer.slots - plain] = False
        rank = seen.long().cumsum(-1)
        return seen & (rank <= rank[..., -1:] // blocks * blocks)

    def _convert_all_but(self, layer: SlotLayer, make: Make, leave: int) -> bool:
        """Convert all plain slots but the newest, in their order; whether there were any."""
        if (span := _plain(layer, leave)) is None:
            return False
        layer.remember(self._certain)
        plain, (start, stop) = layer.segments[-1], span
        valid = _headwise(layer.table.valid, layer.heads)[..., start:stop]
        old = plain.first(stop - start)
        rest = [plain.last(leave)] if leave else []
        layer.segments = [*layer.segments[:-1], make(old.keys(), old.values(), valid), *rest]
        return True

    def lowrank(self, layers: Layers, keys: Rank, values: Rank) -> list[Fit]:
        """Store tokens in low-rank factors, the left one shared by layers.

        Takes what is stored plainly, as :meth:`convert` does. Layers that always hold the same
        tokens are factored together, others apart; where heads hold different tokens all stays as
        it is.

        Args:
            layers: where.
            keys, values: ranks: an int, or a fraction of the full rank, which is the lesser of the
                tokens and of the width of all layers together. What has full rank stays as it is.

        Returns:
            What became of the tokens, for every set of layers that are factored together.
        """
        self.settle(layers)
        chosen, together, fits = self._chosen(layers), {}, []
        for i, layer in enumerate(self.cache.layers):
            span = _plain(layer, self._hidden) if layer in chosen else None
            if span is not None and not layer.table.headwise:
                together.setdefault((self._alike[i], layer.table, *span), []).append(i)
        for (_, table, start, stop), numbers in together.items():
            plain = [self.cache.layers[i].segments[-1].first(stop - start) for i in numbers]
            segments, fit = factored(
                [x.keys() for x in plain],
                [x.values() for x in plain],
                table.valid[:, start:stop],
                table.position[..., start:stop],
                [self.rotary(i) for i in numbers],
                keys,
                values,
            )
            fits.append(replace(fit, layers=tuple(numbers)))
            for i, segment in zip(numbers, segments, strict=True):
                self._exchange(i, segment, fit)
        return fits

    def _exchange(self, layer: int, segment: Segment, fit: Fit) -> None:
        """Put a segment of factors where the same tokens are stored plainly, and settled."""
        stored = self.cache.layers[layer]
        self._convert_all_but(stored, lambda k, v, valid: segment, self._hidden)
        if (fit.keys, fit.values) != fit.full:  # or an unpatched model may go on
            stored.compressed = True
            tell_compressed(self.cache)

    def landmarks(
        self, layers: Layers, *, rank: Rank, size: int, local: int, outliers: int,
        many: Callable[[int], int],
    ) -> list[Fit]:  # fmt: skip
        """Store tokens in chunks, of which a step attends to the best; values go to the host.

        Takes what is stored plainly, as :meth:`convert` does. Layers with a window, and those whose
        heads hold different tokens, stay as they are.

        Args:
            layers: where.
            rank: of a layer's keys over all heads; see :meth:`lowrank`.
            size: tokens of a chunk.
            local, outliers: chunks that are kept as they are; see
                :func:`mllm.cache.landmarks.landmarked`.
            many: from the tokens of a sample the number of chunks that a step chooses.

        Returns:
            What became of the keys, for every layer that changed.
        """
        self.settle(layers)
        chosen, fits = self._chosen(layers), []
        for i, layer in enumerate(self.cache.layers):
            span = _plain(layer, self._hidden) if layer in chosen else None
            if span is None or layer.window is not None or layer.table.headwise:
                continue
            start, stop = span
            plain = layer.segments[-1].first(stop - start)
            segment, fit = landmarked(
                plain.keys(), plain.values(), layer.table.valid[:, start:stop],
                layer.table.position[..., start:stop], self.rotary(i),
                rank=rank, size=size, local=local, outliers=outliers, many=many,
            )  # fmt: skip
            self._exchange(i, segment, fit)
            fits.append(replace(fit, layers=(i,)))
        return fits

    def offload(self, layers: Layers = None, part: Part = "both", leave: int = 0) -> None:
        """Move keys, values or both to host memory; they visit the device to be attended to.

        Args:
            layers, leave: as in :meth:`convert`.
            part: what moves.
        """
        self.settle(layers)
        for layer in self._chosen(layers):
            self._convert_all_but(
                layer, lambda k, v, valid: Offloaded.of(k, v, part), leave + self._hidden
            )

    # The whole cache

    def snapshot(self) -> Snapshot:
        """The cache as it is now; costs no memory until something is evicted."""
        return Snapshot([layer.state() for layer in self.cache.layers], self.cache.mllm.copy())

    def rollback(self, snapshot: Snapshot) -> None:
        """Be what the cache was; a snapshot can be used several times."""
        for layer, state in zip(self.cache.layers, snapshot.layers, strict=True):
            layer.restore(state)
        self.cache.mllm = snapshot.mark.copy()

    def crop(self, length: int) -> None:
        """Forget all tokens from logical index `length` on, candidates too."""
        if length < 0:
            raise CacheMismatchError(
                "a cache cannot be cropped to less than nothing", argument="length",
                given=length, expected="tokens that stay, from 0",
            )  # fmt: skip
        if (over := self.cache.get_seq_length() - length) > 0:
            self.cache.crop(-over)

    def reorder(self, index: Tensor) -> None:
        """Samples in another order, with repetition: int64 `[batch]`."""
        index = index.clone()  # layers share what they do by it, and the caller may write to it
        self._rows(lambda t: t.index_select(0, index.to(t.device)))
        self.cache.reorder_cache(index)

    def select(self, index: Tensor) -> None:
        """Only some samples: int64 `[n]`."""
        index = index.clone()
        self._rows(lambda t: t[index.to(t.device)])
        self.cache.batch_select_indices(index)

    def repeat(self, times: int) -> None:
        """Every sample `times` times, copies side by side."""
        self._rows(lambda t: t.repeat_interleave(times, 0))
        self.cache.batch_repeat_interleave(times)

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """What the cache knows of samples beside its layers goes through `change`."""
        batches = [len(x.table.valid) for x in self.cache.layers if x.table is not None]
        self.cache.mllm.rows(change, batches[0] if batches else 1)


def refuse_flash(family: Family) -> None:
    """PlanError under flash attention: it cannot mask heads differently."""
    name = compat.attention_name(family.attention(0))
    if "flash" in name:
        raise PlanError(
            f"heads cannot hold different tokens under {name}",
            argument="attn_implementation",
            given=name,
            expected="sdpa or eager, or the same tokens for all heads",
        )


def _plain(layer: SlotLayer, leave: int) -> tuple[int, int] | None:
    """Slots of a layer that are stored plainly, but for the newest: from, to; None is none."""
    if not layer.segments or not layer.segments[-1].grows or layer.segments[-1].slots <= leave:
        return None
    return layer.slots - layer.segments[-1].slots, layer.slots - leave


def _merged(
    layer: SlotLayer, receiver: Tensor, share: Tensor, logical: Tensor, valid: Tensor, part: Part
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values `[batch, kv_heads, slots, dim]` with every receiver's mean in its slot.

    And which slots have one: bool `[batch, kv_heads, slots]`.
    """
    slots, most = logical.shape[-1], max(int(logical.max()), int(receiver.max())) + 1
    columns = torch.arange(slots, device=logical.device).expand_as(logical)
    nowhere = logical.masked_fill(~valid, most)
    where = logical.new_full((*logical.shape[:-1], most + 1), -1).scatter(-1, nowhere, columns)
    where[..., most] = -1
    target = where.gather(-1, receiver.masked_fill(receiver < 0, most))
    gives = valid & (target >= 0)
    target, share = target.clamp(min=0), share * gives
    total = torch.zeros_like(share).scatter_add(-1, target, share)
    several = torch.zeros_like(target).scatter_add(-1, target, gives.long()) > 1

    def mean(x: Tensor) -> Tensor:
        at = target[..., None].expand(x.shape)
        summed = torch.zeros_like(x, dtype=torch.float32)
        summed = summed.scatter_add(2, at, x.float() * share[..., None])
        return torch.where(several[..., None], (summed / total[..., None]).to(x.dtype), x)

    sides = {"both": (True, True), "keys": (True, False), "values": (False, True)}[part]
    keys, values = (
        mean(x) if side else x.clone()
        for x, side in zip((layer.keys, layer.values), sides, strict=True)
    )
    return keys, values, several & valid
