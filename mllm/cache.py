"""A KV cache that knows more tokens than it stores: logical length, and validity per slot."""

from __future__ import annotations

import torch
from torch import Tensor

from mllm.compat import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from mllm.errors import CacheMismatchError, PlanError
from mllm.tokens import TokenTable


class SlotLayer(DynamicLayer):
    """One layer's keys and values, with what each slot stands for.

    `get_seq_length()` is the logical length (tokens seen), so positions, slicing of `input_ids`
    and a second turn work as if nothing had been dropped. `get_mask_sizes()` says where the
    stored slots lie in it.

    A layer that sees only a window forgets what no later token can see.

    Attributes:
        window: tokens that a query sees, itself included, in logical distance; None is all.
        valid: bool `[batch, slots]`, false for padding.
        logical: int64 `[batch, slots]`, index in the uncompressed sequence.
        shifts: per kind of stage, how far positions of later tokens move left, int64
            `[batch, 1]` (only under ``positions="compact"``).
        padded: whether any slot is invalid; known without asking the device.
        compressed: whether a plan left tokens out.
    """

    def __init__(self, window: int | None = None, record_past: bool = False) -> None:
        super().__init__()
        self.window, self.is_sliding = window, window is not None
        self.record_past = record_past
        self.compressed = False
        self.seen = 0
        self.valid: Tensor | None = None
        self.logical: Tensor | None = None
        self.shifts: dict[str, Tensor] = {}
        self.padded = False
        self._noted: int | None = None

    @property
    def slots(self) -> int:
        """Stored tokens."""
        return 0 if self.keys is None or not self.is_initialized else self.keys.shape[-2]

    def note(self, valid: Tensor, logical: Tensor, padded: bool, advance: int) -> None:
        """Say what the next `update` will append.

        Args:
            valid, logical: `[batch, slots + new]`, all slots after the update.
            padded: whether any of them is invalid.
            advance: tokens by which the logical length grows.
        """
        self.compressed |= advance != valid.shape[1] - self.slots
        self.valid, self.logical, self.padded, self._noted = valid, logical, padded, advance

    def activate_past_recording(self) -> None:
        """Forget nothing, so that `crop` can go back (assisted decoding)."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        if self._noted is None and self.compressed:
            raise CacheMismatchError(
                "this cache was compressed by a plan and cannot be used without it",
                argument="past_key_values",
                given=f"{self.slots} of {self.seen} tokens stored",
                expected="the patched model, or a new cache",
            )
        advance = key_states.shape[-2] if self._noted is None else self._noted
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        self.seen += advance
        if self._noted is None and self.valid is not None:  # an unpatched model appended
            batch, new = key_states.shape[0], key_states.shape[-2]
            logical = torch.arange(self.seen - new, self.seen, device=keys.device)
            self.valid = torch.cat([self.valid, self.valid.new_ones(batch, new)], 1)
            self.logical = torch.cat([self.logical, logical.expand(batch, new)], 1)
        self._noted = None
        if self.window is not None and not self.record_past:
            self._forget()
        return keys, values

    def _forget(self) -> None:
        """Let go of the oldest slots that no later token of any sample sees."""
        if self.slots < self.window or self.logical is None:
            return
        gone = (self.logical <= self.seen - self.window).all(0).long().cumprod(0)
        if count := int(gone.sum()):
            self.keys, self.values = self.keys[:, :, count:], self.values[:, :, count:]
            self.valid, self.logical = self.valid[:, count:], self.logical[:, count:]

    def get_seq_length(self, *args) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # More slots than tokens: a plan has inserted rows, and makes the masks itself.
        return self.slots + query_length, max(0, self.seen - self.slots)

    def crop(self, tokens_to_remove: int) -> None:
        # The newest tokens are never evicted, so logical and stored tokens go one for one.
        remove = tokens_to_remove if tokens_to_remove <= 0 else tokens_to_remove - self.seen
        if remove >= 0 or not self.is_initialized:
            return
        super().crop(remove)
        self.seen += remove
        if self.valid is not None:
            self.valid, self.logical = self.valid[:, :remove], self.logical[:, :remove]

    def reset(self) -> None:
        super().reset()
        self.seen, self.valid, self.logical, self.padded = 0, None, None, False
        self.shifts, self._noted, self.compressed = {}, None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_rows(lambda t: t.index_select(0, beam_idx.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_rows(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_rows(lambda t: t[indices])

    def _map_rows(self, change) -> None:
        if self.valid is not None:
            self.valid, self.logical = change(self.valid), change(self.logical)
        self.shifts = {name: change(shift) for name, shift in self.shifts.items()}


def adopt(cache: Cache, windows: list[int | None], past_valid: Tensor | None) -> None:
    """Turn the caller's DynamicCache, in place, into one with :class:`SlotLayer` layers.

    Args:
        cache: an empty cache, or one that the unpatched model filled.
        windows: per decoder layer the window that it sees, None is everything.
        past_valid: bool `[batch, slots]`, which stored tokens are not padding.

    Raises:
        PlanError: the cache is of another kind.
    """
    if cache.layers and all(type(layer) is SlotLayer for layer in cache.layers):
        return
    kinds = [DynamicLayer if w is None else DynamicSlidingWindowLayer for w in windows]
    plain = type(cache) is DynamicCache and all(
        type(layer) is kind for layer, kind in zip(cache.layers, kinds, strict=False)
    )
    if not plain or getattr(cache, "offloading", False):
        raise PlanError(
            f"a {type(cache).__name__} with "
            f"{type(cache.layers[0]).__name__ if cache.layers else 'no'} layers cannot hold a "
            "plan's per-layer lengths",
            argument="past_key_values",
            given=type(cache).__name__,
            expected="a DynamicCache (no static, quantised, sliding or offloaded cache)",
        )
    layers = []
    missing = [None] * (len(windows) - len(cache.layers))
    for old, window in zip([*cache.layers, *missing], windows, strict=True):
        layer = SlotLayer(window, getattr(old, "record_past", False))
        if old is not None and old.get_seq_length():
            layer.lazy_initialization(old.keys, old.values)
            layer.keys, layer.values, layer.seen = old.keys, old.values, old.get_seq_length()
            batch, slots = old.keys.shape[0], old.keys.shape[-2]
            ones = torch.ones(batch, slots, dtype=torch.bool, device=old.keys.device)
            layer.valid = ones if past_valid is None else past_valid[:, -slots:].bool()
            layer.padded = not bool(layer.valid.all())
            logical = torch.arange(layer.seen - slots, layer.seen, device=ones.device)
            layer.logical = logical.expand(batch, slots)
        layers.append(layer)
    cache.layers = layers
    cache.layer_class_to_replicate = None


def note_rows(layers: list[SlotLayer], table: TokenTable, padded: bool, advance: int) -> None:
    """Announce the rows of a forward to consecutive layers that all see the same rows."""
    done: dict[int, tuple[Tensor, Tensor]] = {}
    for layer in layers:
        old = layer.valid
        if old is None:
            valid, logical = table.valid, table.logical
        elif id(old) in done:  # layers of one stage share their tensors
            valid, logical = done[id(old)]
        else:
            valid = torch.cat([old, table.valid], 1)
            logical = torch.cat([layer.logical, table.logical], 1)
            done[id(old)] = valid, logical
        layer.note(valid, logical, layer.padded or padded, advance)
