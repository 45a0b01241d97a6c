"""One layer of a cache that knows more tokens than it stores, and what each slot stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm import compat, kernels
from mllm.cache.segments import (
    Dense,
    Packed,
    Segment,
    _gather,
    _headwise,
    _stored,
    attend,
    joined,
)
from mllm.cache.sharing import Change
from mllm.cache.slots import SlotTable
from mllm.compat import DynamicLayer
from mllm.errors import CacheMismatchError


@dataclass
class LayerState:
    """A layer as it was: made by :meth:`SlotLayer.state`."""

    segments: list[Segment]
    table: SlotTable | None
    seen: int
    intact: int
    compressed: bool
    shifts: dict[str, Tensor]
    samples: dict[str, Tensor]


#: From keys and values `[batch, kv_heads, slots, dim]` and their validity, bool, to a segment.
Make = Callable[[Tensor, Tensor, Tensor], Segment]


class SlotLayer(DynamicLayer):
    """One layer's keys and values, with what each slot stands for.

    `get_seq_length()` is the logical length (tokens seen), so positions, slicing of `input_ids`
    and a second turn work as if nothing had been dropped. `get_mask_sizes()` says where the
    stored slots lie in it.

    A layer that sees only a window forgets what no later token can see.

    Attributes:
        window: tokens that a query sees, itself included, in logical distance; None is all.
        segments: storage, oldest slots first.
        table: what the slots stand for; None before the first token.
        shifts: per kind of stage, how far positions of later tokens move left, int64
            `[batch, 1]` (only under ``positions="compact"``).
        samples: what methods keep of every sample, `[batch, ...]` each.
        seen: logical length.
        intact: every token from this one on has exactly one column.
        compressed: whether this layer holds other tokens than it was shown.
        planned: whether any layer of the cache is compressed.
        foreign: whether an unpatched model appended.
        heads: KV heads, once there are any keys.
        record_past: whether a window forgets nothing (assisted decoding).
        journals: whether `crop` can undo evictions made from now on.
        served: whether attention of this forward knows what to do with `mllm_layer`; see
            :meth:`update`.
    """

    def __init__(self, window: int | None = None, record_past: bool = False) -> None:
        # Not the base's: it assigns `keys` and `values`, which are computed here.
        self.is_initialized = False
        self.window, self.is_sliding = window, window is not None
        self.record_past = record_past
        self._clear()

    def _clear(self) -> None:
        self.segments: list[Segment] = []
        self.table: SlotTable | None = None
        self.shifts: dict[str, Tensor] = {}
        self.samples: dict[str, Tensor] = {}
        self.seen = self.intact = 0
        self.compressed = self.planned = self.foreign = self.journals = self.served = False
        self._added = 0
        self._noted: tuple[SlotTable, int, int | None] | None = None
        self._shifting: dict[str, Tensor] = {}
        self._journal: list[tuple[int, LayerState]] = []

    @property
    def slots(self) -> int:
        """Columns of the stored rectangle."""
        return sum(segment.slots for segment in self.segments)

    @property
    def keys(self) -> Tensor | None:
        """`[batch, kv_heads, slots, head_dim]`; a view as long as there is one dense segment."""
        return self.joined([segment.keys() for segment in self.segments])

    @property
    def values(self) -> Tensor | None:
        """`[batch, kv_heads, slots, value_dim]`."""
        return self.joined([segment.values() for segment in self.segments])

    @staticmethod
    def joined(parts: list[Tensor]) -> Tensor | None:
        """Columns of several segments; one is given as it is."""
        return torch.cat(parts, 2) if len(parts) > 1 else parts[0] if parts else None

    @property
    def padded(self) -> bool:
        """Whether any cell is invalid; known without asking the device."""
        return self.table is not None and self.table.padded

    def note(self, table: SlotTable, advance: int, intact: int, dropped: bool = False) -> None:
        """Say what the next `update` will append.

        Args:
            table: all slots after the update.
            advance: tokens by which the logical length grows.
            intact: every token of this forward from this logical index on gets a slot.
            dropped: some token gets none, though another sample may fill the rectangle.
        """
        dropped = dropped or advance != table.slots - self.slots
        self.compressed |= dropped
        self._noted = table, advance, intact if dropped else None

    def shift(self, kind: str, delta: Tensor) -> None:
        """Say what an entry of `shifts` will be from the next `update` on."""
        self._shifting[kind] = delta

    def unannounce(self) -> None:
        """Take back what a forward pass has said that broke off before it stored anything."""
        self._noted, self._shifting = None, {}

    def activate_past_recording(self) -> None:
        """Forget nothing, so that `crop` can go back (assisted decoding)."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.heads = key_states.shape[1]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Append, and return what is attended to.

        Where a segment selects and there is one new token, that depends on its query, and where a
        kernel attends to what is stored as it lies, nobody needs it otherwise: the keys that are
        returned are only the new ones, and lead the attention function to this layer.
        """
        if self._noted is None and (self.compressed or self.planned):
            raise CacheMismatchError(
                "this cache was compressed by a plan and cannot be used without it",
                argument="past_key_values",
                given=f"{self.slots} of {self.seen} tokens stored",
                expected="the patched model, or a new cache",
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, new = key_states.shape[0], key_states.shape[-2]
        if self._noted is None:  # an unpatched model
            self.foreign, advance, intact = True, new, None
            rows = SlotTable.plain(batch, self.seen, self.seen + new, key_states.device)
            table = rows if self.table is None else self.table.cat(rows)
        else:
            table, advance, intact = self._noted
        asks = self.served and self._noted is not None and new == 1
        self._append(key_states, value_states)
        self.table, self._added = table, new
        self.shifts |= self._shifting
        self.unannounce()
        self.seen += advance
        if intact is not None:
            self.intact = max(self.intact, intact)
        if asks and (self.selects or self._by_kernel(key_states)):
            keys, values = key_states.view_as(key_states), value_states
            keys.mllm_layer = self
        else:
            keys, values = self.keys, self.values
        if self.window is not None and not self.record_past:
            self._forget()
        return keys, values

    def set_aside(self, new: SlotTable, keys: Tensor, values: Tensor, hidden: int) -> None:
        """Store rows that took no part in the attention that has just run.

        Args:
            new: what they stand for; they get the column `aside`.
            keys, values: `[batch, kv_heads, rows, dim]`.
            hidden: newest slots that are candidates of assisted decoding, and stay the newest.
        """
        old = self.table
        if "aside" not in old.columns:
            old = old.with_columns(aside=torch.zeros_like(old.valid))
        self._append(keys, values)
        both = old.cat(new.with_columns(aside=torch.ones_like(new.valid)))
        columns = both.columns
        if hidden:
            place = torch.arange(self.slots, device=keys.device)
            first, moved = old.slots - hidden, place[old.slots :]
            order = torch.cat([place[:first], moved, place[first : old.slots]])
            columns = {n: t[..., order] for n, t in columns.items()}
            last, start = self.segments[-1], self.slots - self.segments[-1].slots
            own = (order[start:] - start).expand(len(keys), -1)
            self.segments[-1] = last.take(own, columns["valid"][..., start:])
        self.table = SlotTable(columns, both.padded, ordered=False)
        self.compressed, self.intact = True, self.seen - hidden

    @property
    def selects(self) -> bool:
        """Whether one new token attends to less than is stored."""
        return any(getattr(segment, "selects", False) for segment in self.segments)

    def _by_kernel(self, like: Tensor) -> bool:
        """Whether a kernel is at hand for some of what is stored."""
        names = {getattr(segment, "kernel", None) for segment in self.segments} - {None}
        # A window forgets before attention asks.
        return self.window is None and any(kernels.considered(name, like) for name in names)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
        """What one new token, which is stored already, reads: `[batch, heads, 1, value_dim]`.

        Args:
            query, scaling: as in :meth:`attended`.
            mask: `[batch or 1, 1 or heads, 1, slots]`, bool or additive, or `[batch, slots]`; None
                is everything.
        """
        seen = None
        if mask is not None:
            mask = mask[:, None, None].bool() if mask.dim() == 2 else mask
            seen = mask[:, :, 0, : self.slots]
            seen = (seen if seen.dtype == torch.bool else seen == 0).expand(*query.shape[:2], -1)
        parts, start = [], 0
        for segment in self.segments:
            own = None if seen is None else seen[..., start : start + segment.slots]
            if hasattr(segment, "kernel"):
                parts.append(segment.attend(query, own, scaling))
            else:
                parts.append(attend(query, segment.keys(), segment.values(), own, scaling))
            start += segment.slots
        return joined(parts).to(query.dtype)

    def attended(
        self, query: Tensor, mask: Tensor | None, scaling: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and mask of one new token, which is stored already.

        Args:
            query: `[batch, heads, 1, head_dim]`.
            mask: of all slots, `[batch or 1, 1 or heads, 1, slots]`; None is everything.
            scaling: factor of the logits; None is `head_dim ** -0.5`.
        """
        batch, heads = query.shape[:2]
        parts, start = [], 0
        for segment in self.segments:
            if getattr(segment, "selects", False):
                keys, values, index = segment.attended(query, scaling)
            else:
                keys, values = segment.keys(), segment.values()
                index = torch.arange(segment.slots, device=query.device)
                index = index.expand(batch, self.heads, -1)
            parts.append((keys, values, torch.where(index < 0, -1, index + start)))
            start += segment.slots
        keys, values, index = (torch.cat(part, 2) for part in zip(*parts, strict=True))
        index = index.repeat_interleave(heads // self.heads, 1)[:, :, None]
        there = index >= 0
        if mask is not None:
            mask = mask[..., :start].expand(batch, heads, -1, -1)
            seen = mask if mask.dtype == torch.bool else mask == 0
            there = there & seen.gather(3, index.clamp(min=0))
        return keys, values, compat.mask_like(there, query if mask is None else mask)

    def _append(self, keys: Tensor, values: Tensor) -> None:
        if self.segments and self.segments[-1].grows:
            self.segments[-1].append(keys, values)
        else:
            owned = (t.clone(memory_format=torch.contiguous_format) for t in (keys, values))
            self.segments.append(Dense.of(*owned))

    def _forget(self) -> None:
        """Let go of the oldest slots that no later token of any sample sees."""
        if self.slots < self.window:
            return
        newest, limit = self.table.newest, self.seen - self.window
        gone = next((i for i, logical in enumerate(newest) if logical > limit), len(newest))
        if gone:
            self.table = self.table.last(self.slots - gone)
        for segment in list(self.segments):
            if not gone:
                break
            here = min(gone, segment.slots)
            gone -= here
            self.segments.pop(0)
            if here < segment.slots:
                self.segments.insert(0, segment.last(segment.slots - here))

    def retain(
        self, keep: Tensor, as_of: int | None = None, shared: dict | None = None,
        remembered: bool = False,
    ) -> None:  # fmt: skip
        """Let go of every slot that is not in `keep`; logical length stays.

        Args:
            keep: bool `[batch, slots]` or `[batch, kv_heads, slots]`.
            as_of: tokens that the decision looked at. If `crop` takes any of them back, it takes
                the decision back. None is all tokens seen; later ones are all in `keep`.
            shared: filled with what layers of one table have in common; give the same one to all
                layers that keep the same slots.
            remembered: :meth:`remember` was called, or there is nothing to undo.
        """
        if not remembered:
            self.remember(as_of)
        if not self.segments:
            return
        keep = self.table.real(keep)
        shared = {} if shared is None else shared
        if not self._closed(keep, as_of, shared):
            key = self.table, tuple(segment.slots for segment in self.segments)
            if key not in shared:
                shared[key] = self._compacted(keep)
            self._take(*shared[key])
        self.compressed = True
        self.intact = self.seen if as_of is None else min(as_of, self.seen)

    def _closed(self, keep: Tensor, as_of: int | None, shared: dict) -> bool:
        """Let a column go in place, which one new token has made too many; whether that was done.

        The token takes the place of the one that leaves, in every head, and nothing else moves.
        Not in a layer with a window, which forgets from the front, and not under candidates, which
        stay the newest.
        """
        certain = as_of is None or as_of >= self.seen
        if self._added != 1 or self.window is not None or not certain or len(self.segments) > 1:
            return False
        (plain,) = self.segments
        if not isinstance(plain, Dense) or not plain.writable:
            return False
        key = self.table, "closed"
        if key not in shared:
            shared[key] = self.table.closed(keep)
        if shared[key] is None:
            return False
        gap, self.table = shared[key]
        if gap is not None:
            plain.close(gap)
        return True

    def _take(self, parts: list[tuple[Tensor, Tensor]], table: SlotTable) -> None:
        """Of every segment the columns that stay; see :meth:`_compacted`."""
        segments = [x.take(*part) for x, part in zip(self.segments, parts, strict=True)]
        self.segments, self.table = [segment for segment in segments if segment.slots], table

    def settle(self, shared: dict | None = None) -> None:
        """Bring tokens back into their order, which steps that let one go give up.

        Args:
            shared: as in :meth:`retain`.
        """
        if self.table is None or self.table.ordered or not self.segments:
            return
        shared = {} if shared is None else shared
        key = self.table, "settled"
        if key not in shared:
            shared[key] = self._compacted(self.table.valid)
        self._take(*shared[key])

    def exchange(
        self, keys: Tensor, values: Tensor, new: Tensor, keep: Tensor, as_of: int | None = None,
        shared: dict | None = None,
    ) -> None:  # fmt: skip
        """Let go of every slot that is not in `keep`, and give others new keys and values.

        These are stored plainly, behind what stays in another form.

        Args:
            keys, values: `[batch, kv_heads, slots, dim]`; where nothing is `new`, what is stored.
            new: bool `[batch, slots]` or `[batch, kv_heads, slots]`, slots that are exchanged.
            keep: bool, the same shape.
            as_of, shared: as in :meth:`retain`.
        """
        self.remember(as_of)
        if all(isinstance(segment, Dense | Packed) for segment in self.segments):
            self.segments = [Dense.of(keys, values)]
            self.retain(keep, as_of, shared, remembered=True)
            return
        last, place = self.segments[-1], torch.arange(self.slots, device=keep.device)
        plain = new | (place >= self.slots - last.slots * last.grows)
        keep = self.table.real(keep)
        index, moved = self.table.compact(keep & plain)
        self.retain(keep & ~plain, as_of, remembered=True)
        if moved.slots:
            own = (_gather(x, index) for x in (keys, values))
            self.segments.append(_stored(*own, moved.valid))
            self.table = moved.behind([self.table])

    def _compacted(self, keep: Tensor) -> tuple[list[tuple[Tensor, Tensor]], SlotTable]:
        """For every segment the columns that stay and which cells of them do; the new table."""
        if len(self.segments) == 1:
            index, table = self.table.compact(keep)
            return [(index, table.valid)], table
        parts, tables, at = [], [], 0
        for segment, part in zip(self.segments, self._parts(), strict=True):
            index, table = part.compact(keep[..., at : at + segment.slots])
            parts.append((index, table.valid))
            tables.append(table)
            at += segment.slots
        return parts, tables[-1].behind(tables[:-1])

    def _parts(self) -> list[SlotTable]:
        """What the slots of every segment stand for."""
        parts, at = [], 0
        for segment in self.segments:
            at += segment.slots
            parts.append(self.table.first(at).last(segment.slots))
        return parts

    def convert(
        self, chosen: Tensor, make: Make, as_of: int | None = None, shared: dict | None = None
    ) -> None:
        """Store chosen tokens of the last segment in another form; they come before the rest.

        Where an earlier segment can `join` the new one, both become one, without gaps.

        Args:
            chosen: bool `[batch, slots]` or `[batch, kv_heads, slots]`, of the last segment.
            make: see :meth:`KVCache.convert`.
            as_of: tokens that the decision looked at, as in :meth:`retain`.
            shared: as in :meth:`retain`, for layers whose `chosen` is the same.
        """
        shared = {} if shared is None else shared
        key = self.table, self.window, tuple(segment.slots for segment in self.segments)
        if key not in shared:
            shared[key] = self._divided(chosen)
        index, moved, rest_index, rest, joined = shared[key]
        if not moved.slots:
            return
        self.remember(as_of)
        plain, segments, tables = self.segments[-1], self.segments[:-1], self._parts()[:-1]
        taken = plain.take(index, moved.valid)
        valid = _headwise(moved.valid, self.heads)
        made, at, whole = make(taken.keys(), taken.values(), valid), None, None
        for i, segment in enumerate(segments):
            whole = segment.join(made) if hasattr(segment, "join") else None
            if whole is not None:
                at = i
                break
        if at is None:
            segments, tables = [*segments, made], [*tables, moved]
        else:
            if at not in joined:
                table = moved.behind([tables[at]])
                joined[at] = table.compact(table.valid)
            index, tables[at] = joined[at]
            segments[at] = whole.take(index, tables[at].valid)
        if rest.slots:
            segments, tables = [*segments, plain.take(rest_index, rest.valid)], [*tables, rest]
        if ("table", at) not in joined:
            joined["table", at] = tables[-1].behind(tables[:-1])
        self.segments, self.table = segments, joined["table", at]
        self.compressed = True
        self.intact = self.seen if as_of is None else min(as_of, self.seen)

    def _divided(self, chosen: Tensor) -> tuple:
        """Chosen slots of the last segment, and the others: index and table of each.

        And room for what layers have in common that `join` these slots to others.
        """
        part = self._parts()[-1]
        return *part.compact(part.real(chosen)), *part.compact(part.real(~chosen)), {}

    def remember(self, as_of: int | None = None) -> None:
        """Before a change: keep what `crop` needs to undo it."""
        if self.journals and (as_of is None or as_of >= self.seen):
            self._journal.append((self.seen, self.state()))

    def state(self) -> LayerState:
        """What :meth:`restore` needs to come back here."""
        segments = [segment.held() for segment in self.segments]
        return LayerState(
            segments, self.table, self.seen, self.intact, self.compressed, dict(self.shifts),
            _copies(self.samples),
        )  # fmt: skip

    def restore(self, state: LayerState) -> None:
        """Be what the layer was; the state can be used again."""
        self.segments = [segment.held() for segment in state.segments]
        self.table, self.seen, self.intact = state.table, state.seen, state.intact
        self.compressed, self.shifts = state.compressed, dict(state.shifts)
        self.samples, self._journal = _copies(state.samples), []
        self.unannounce()

    def get_seq_length(self, *args) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Below zero there are more slots than tokens, and a plan says which of them are seen; new
        # rows stand where they belong all the same.
        return self.slots + query_length, self.seen - self.slots

    def crop(self, tokens_to_remove: int) -> None:
        """Take the newest tokens back: `-n` of them, or down to `n` (logical tokens).

        Evictions that looked at them are undone if they were journalled.
        """
        if not self.is_initialized:
            return
        tokens_to_remove = int(tokens_to_remove)  # transformers 5.17 counts in tensors
        target = tokens_to_remove if tokens_to_remove > 0 else self.seen + tokens_to_remove
        target = max(0, min(target, self.seen))
        undone = [state for seen, state in self._journal if seen > target]
        if undone:
            self.restore(undone[0])
        self._journal = []
        if target < self.seen:
            if self.window is not None and not self.record_past and self.seen >= self.window:
                raise CacheMismatchError(
                    f"a layer that sees {self.window} tokens has forgotten what it would see of "
                    f"{target}",
                    argument="past_key_values",
                    given=target,
                    expected=f"{self.seen} tokens, or a snapshot from before",
                )
            self._crop(target)
        if self.window is not None and self.record_past:
            self._forget()

    def _crop(self, length: int) -> None:
        if length >= self.intact:
            left = self.slots - (self.seen - length)
            self.table = self.table.first(left)
            segments = []
            for segment in self.segments:
                here = min(left, segment.slots)
                left -= here
                if here:
                    segments.append(segment if here == segment.slots else segment.first(here))
            self.segments = segments
        elif self.shifts or self.window is not None:
            raise CacheMismatchError(
                f"a cache with renumbered positions or a window cannot go back to {length} tokens",
                argument="past_key_values",
                given=length,
                expected=f"at least {self.intact} tokens",
            )
        else:
            self.retain(self.table.logical < length, remembered=True)
        self.seen, self.intact = length, min(self.intact, length)

    def reset(self) -> None:
        self.is_initialized = False
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda t: t.index_select(0, beam_idx.to(t.device)), beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda t: t.repeat_interleave(repeats, dim=0), ("repeat", repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda t: t[indices.to(t.device)], indices)

    def _rows(self, apply: Callable[[Tensor], Tensor], key: Any) -> None:
        change = Change(apply, key)
        self.segments = [segment.rows(change) for segment in self.segments]
        if self.table is not None:
            self.table = self.table.map(change, key)
        self.shifts = {name: change(shift) for name, shift in self.shifts.items()}
        self.samples = {name: change(value) for name, value in self.samples.items()}
        self._journal = []


def _copies(samples: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of samples that may be changed in place."""
    return {name: value.clone() for name, value in samples.items()}
