"""What a method may look at in a cache, and the columns that it may add."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.cache.adoption import cache_bytes
from mllm.cache.layer import SlotLayer
from mllm.cache.rotary import Rotary
from mllm.cache.segments import _headwise
from mllm.errors import CacheMismatchError

if TYPE_CHECKING:
    from mllm.models.base import Family

Layers = int | Iterable[int] | None
_OWN = ("valid", "visual", "logical", "position0", "position1", "position2")


@dataclass(frozen=True)
class SlotView:
    """One layer as a padded rectangle. Cells that are not `valid` hold anything.

    Attributes:
        keys: `[batch, kv_heads, slots, head_dim]`, after rotary embedding. Not to be written.
        values: `[batch, kv_heads, slots, value_dim]`. Not to be written.
        valid: bool `[batch, kv_heads, slots]`.
        visual: bool, the same shape.
        logical: int64, the same shape: index in the uncompressed sequence.
        position: int64 `[1 or 3, batch, kv_heads, slots]`, what the keys were rotated by.
        columns: further columns that methods added, `[batch, kv_heads, slots]` each.
    """

    keys: Tensor | None
    values: Tensor | None
    valid: Tensor
    visual: Tensor
    logical: Tensor
    position: Tensor
    columns: dict[str, Tensor]


class CacheView:
    """The cache of a patched model without the operations that change what it stores.

    Args:
        cache: a cache that the patched model has filled or adopted.
        family: the model's adapter.
        ran: layers that have run in the current forward; None is all.
        length: tokens that are certain; None is all. Candidates of assisted decoding behind them
            are neither shown nor evicted.
        alike: of every layer a value that is the same where layers store the same tokens under
            this plan, whatever the batch; None tells nothing apart but windows.

    Raises:
        CacheMismatchError: a cache that no patched model has used.
    """

    def __init__(
        self, cache: Any, family: Family, ran: int | None = None, length: int | None = None,
        alike: Sequence[Any] | None = None,
    ) -> None:  # fmt: skip
        layers = getattr(cache, "layers", ())
        if not layers or not all(type(layer) is SlotLayer for layer in layers):
            raise CacheMismatchError(
                "only a cache that a patched model has used can be worked on",
                argument="past_key_values",
                given=type(cache).__name__,
                expected="past_key_values of a forward or generate() under the patch",
            )
        self.cache, self._family = cache, family
        self._ran, self._certain = len(layers) if ran is None else ran, length
        self._alike = [layer.window for layer in layers] if alike is None else alike

    @property
    def length(self) -> int:
        """Logical length: tokens seen."""
        seen = self.cache.get_seq_length()
        return seen if self._certain is None else min(seen, self._certain)

    @property
    def _hidden(self) -> int:
        """Newest slots of every layer that are candidates."""
        return self.cache.get_seq_length() - self.length

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.cache.layers)

    @property
    def state(self) -> dict[str, Any]:
        """For what a method remembers about this conversation; follows snapshots, not batches."""
        return self.cache.mllm.state

    @property
    def nbytes(self) -> tuple[int, int]:
        """Bytes held: (keys and values, everything else)."""
        return cache_bytes(self.cache)

    def _chosen(self, layers: Layers) -> list[SlotLayer]:
        if layers is None:
            layers = range(self._ran)
        numbers = [layers] if isinstance(layers, int) else list(layers)
        if wrong := [i for i in numbers if not 0 <= i < self._ran]:
            raise CacheMismatchError(
                f"layer {wrong[0]} has not run in this forward"
                if wrong[0] in range(self.depth)
                else f"there is no layer {wrong[0]}",
                argument="layers",
                given=wrong[0],
                expected=f"0 <= layer < {self._ran}",
            )
        return [layer for layer in map(self.cache.layers.__getitem__, numbers) if layer.segments]

    def view(self, layer: int, contents: bool = True) -> SlotView:
        """What a layer stores, as a padded rectangle.

        Keys and values are zero-copy while all heads and samples hold equally many slots: they are
        good until the cache changes. Slots need not be in the order of tokens; see
        :meth:`KVCache.settle`.

        Args:
            layer: where.
            contents: False leaves keys and values out (None, as where nothing is stored).
        """
        stored = self.cache.layers[layer]
        shown = stored.slots - self._hidden
        columns = {
            name: _headwise(t, stored.heads)[..., :shown]
            for name, t in stored.table.columns.items()
        }
        positions = [t for name, t in columns.items() if name.startswith("position")]
        named = {name: columns.pop(name) for name in ("valid", "visual", "logical")}
        rest = {name: t for name, t in columns.items() if not name.startswith("position")}
        return SlotView(
            keys=stored.keys[:, :, :shown] if contents and stored.segments else None,
            values=stored.values[:, :, :shown] if contents and stored.segments else None,
            position=torch.stack(positions),
            columns=rest,
            **named,
        )

    def annotate(self, layer: int, **columns: Tensor) -> None:
        """Add or replace columns of a layer: `[batch, kv_heads, slots]` or `[batch, slots]` each.

        They follow every operation; tokens that come get zero.
        """
        (stored,) = self._chosen(layer)
        batch, slots = stored.table.valid.shape[0], stored.slots - self._hidden
        for name, column in columns.items():
            given = tuple(column.shape)
            if name in _OWN or given not in ((batch, slots), (batch, stored.heads, slots)):
                raise CacheMismatchError(
                    f"{name} is no column for this layer",
                    argument=name,
                    given=given,
                    expected=f"another name than {', '.join(_OWN)}, one value per slot",
                )
        table = stored.table
        columns = {n: F.pad(t, (0, self._hidden)) for n, t in columns.items()}
        if any(t.dim() == 3 for t in columns.values()) or table.headwise:
            columns = {n: _headwise(t, stored.heads) for n, t in (table.columns | columns).items()}
        stored.table = table.with_columns(**columns)

    def holds(self, layer: int) -> bool:
        """Whether a layer stores anything; a plan may leave an attention out."""
        return bool(self.cache.layers[layer].segments)

    def window(self, layer: int) -> int | None:
        """Tokens that a new one sees of a layer, itself included; None is all.

        What lies further back may still be stored, and is of no use.
        """
        return self.cache.layers[layer].window

    def apart(self, layer: int) -> bool:
        """Whether heads of a layer hold different tokens."""
        return self.cache.layers[layer].table.headwise

    def same(self, layer: int) -> Any:
        """A key that layers have in common which hold the same tokens; not all such layers do."""
        return self.cache.layers[layer].table, self.cache.layers[layer].window

    def samples(self, layer: int) -> dict[str, Tensor]:
        """What methods keep of every sample at a layer, `[batch, ...]` each.

        It follows snapshots, files, and batches that are reordered. Change it in place.
        """
        return self.cache.layers[layer].samples

    def rotary(self, layer: int) -> Rotary:
        """The rotary embedding of a layer, for segments that turn keys themselves."""
        return Rotary(self._family, layer)

    def rotate(self, layer: int, k: Tensor, position: Tensor) -> Tensor:
        """Rotate keys by the model's own rotary module.

        Args:
            layer: 0-based layer; layers may rotate differently.
            k: `[batch, kv_heads, slots, head_dim]`.
            position: int64 `[1 or 3, batch, slots]` or `[1 or 3, batch, kv_heads, slots]`.
        """
        return self.rotary(layer).rotate(k, position)

    def unrotate(self, layer: int, k: Tensor, position: Tensor) -> Tensor:
        """Undo :meth:`rotate`: keys as they were before rotary embedding."""
        return self.rotary(layer).unrotate(k, position)
