"""What the slots of a layer stand for: which token, where it stood, whether there is one."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from mllm.cache.segments import SLACK, _headwise
from mllm.cache.sharing import once
from mllm.tokens import TokenTable

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class SlotTable:
    """What the slots of a layer stand for; layers that hold the same tokens share one table.

    Attributes:
        columns: tensors by name, all `[batch, slots]`, or `[batch, kv_heads, slots]` where heads
            hold different tokens. `valid` (bool, false for padding and empty cells), `visual`
            (bool), `logical` (int64, index in the uncompressed sequence), `position0` and under
            M-RoPE `position1`, `position2` (int64). Methods may add columns of their own: they
            follow every operation, and new tokens get zero.
        padded: whether any cell is invalid; known without asking the device.
        ordered: whether tokens lie in their order, within each segment. A step that lets one go
            puts the new one in its place.
    """

    columns: dict[str, Tensor]
    padded: bool
    ordered: bool = True
    _memo: list = field(default_factory=list, repr=False)
    _known: dict[str, list[int]] = field(default_factory=dict, repr=False)
    _last: list = field(default_factory=list, repr=False)

    @classmethod
    def of(cls, table: TokenTable, position: Tensor, padded: bool) -> SlotTable:
        """The rows of a forward as new slots.

        Args:
            table: rows that the layers see.
            position: int64 `[1 or 3, batch, rows]`, what the rotary embedding is given.
            padded: whether any row is invalid.
        """
        columns = {name: getattr(table, name) for name in ("valid", "visual", "logical")}
        shape = table.valid.shape
        columns |= {f"position{i}": p.expand(shape) for i, p in enumerate(position)}
        return cls(columns, padded)

    @classmethod
    def plain(cls, batch: int, start: int, stop: int, device: torch.device) -> SlotTable:
        """Text tokens `start` to `stop` of a model without a plan."""
        index = torch.arange(start, stop, device=device).expand(batch, -1)
        valid = torch.ones_like(index, dtype=torch.bool)
        columns = {"valid": valid, "visual": ~valid, "logical": index, "position0": index}
        return cls(columns, False)

    @property
    def valid(self) -> Tensor:
        return self.columns["valid"]

    @property
    def logical(self) -> Tensor:
        return self.columns["logical"]

    @property
    def position(self) -> Tensor:
        """int64 `[1 or 3, *valid.shape]`."""
        return torch.stack([t for name, t in self.columns.items() if name[:8] == "position"])

    @property
    def slots(self) -> int:
        return self.valid.shape[-1]

    @property
    def headwise(self) -> bool:
        """Whether heads hold different tokens."""
        return self.valid.dim() == 3

    def map(self, change: Callable[[Tensor], Tensor], key: Any) -> SlotTable:
        """Every column through `change`; `key` tells changes apart."""
        return once(
            self._memo,
            key,
            lambda: self._with({n: change(t) for n, t in self.columns.items()}),
        )

    def with_columns(self, **columns: Tensor) -> SlotTable:
        """The table with some columns exchanged or added."""
        return self._with(self.columns | columns)

    def _with(self, columns: dict[str, Tensor]) -> SlotTable:
        return SlotTable(columns, self.padded, self.ordered)

    def first(self, slots: int) -> SlotTable:
        return self.map(lambda t: t[..., :slots], ("first", slots))

    def last(self, slots: int) -> SlotTable:
        table = self.map(lambda t: t[..., t.shape[-1] - slots :], ("last", slots))
        return table.know(self.newest[self.slots - slots :]) if self._known else table

    @property
    def newest(self) -> list[int]:
        """The newest logical index in every slot, over samples and heads; -1 without any.

        Asks the device once; later tokens of a conversation are known without.
        """
        if not self._known:
            there = self.logical.masked_fill(~self.valid, -1)
            self._known["newest"] = there.flatten(0, -2).amax(0).tolist()
        return self._known["newest"]

    def know(self, newest: list[int]) -> SlotTable:
        """This table, which need not ask the device for :attr:`newest`."""
        self._known["newest"] = newest
        return self

    def real(self, chosen: Tensor) -> Tensor:
        """Those of chosen slots that hold a token: with heads where these or the table have them.

        Args:
            chosen: bool `[batch, slots]` or `[batch, kv_heads, slots]`.
        """
        valid = self.valid
        if chosen.dim() < valid.dim():
            chosen = chosen[:, None]
        return chosen & (valid if valid.dim() == chosen.dim() else valid[:, None])

    def cat(self, new: SlotTable) -> SlotTable:
        """This table with new slots behind; `new` is one for all heads."""

        def joined() -> SlotTable:
            heads = self.valid.shape[1] if self.headwise else None
            columns = {}
            for name in self.columns | new.columns:
                # An unpatched model appends text with one position.
                old = self.columns.get(name, self.columns["position0"])
                more = new.columns.get(name)
                if more is None:
                    more = old.new_zeros(new.valid.shape)
                if heads:
                    more = more[:, None].expand(-1, heads, -1)
                columns[name] = torch.cat([old, more], -1)
            table = SlotTable(columns, self.padded or new.padded, self.ordered)
            known = self._known and new._known
            return table.know(self.newest + new.newest) if known else table

        return once(self._memo, new, joined)

    def behind(self, others: list[SlotTable]) -> SlotTable:
        """The slots of other tables of this layer, and these behind them."""
        parts = [*others, self]
        wide = next((t.valid.shape[1] for t in parts if t.headwise), 0)
        columns = {}
        for name in self.columns:
            own = [t.columns[name] for t in parts]
            if wide:
                own = [_headwise(t, wide) for t in own]
            columns[name] = torch.cat(own, -1)
        padded, ordered = any(t.padded for t in parts), all(t.ordered for t in parts)
        return SlotTable(columns, padded, ordered)

    def compact(self, keep: Tensor) -> tuple[Tensor, SlotTable]:
        """Columns that stay, in order. Shorter lengths are filled up, first with padding.

        So padding stays on its side, and keeping everything changes nothing.

        Args:
            keep: bool, of the shape of `valid` or with one for all heads.

        Returns:
            int64 index of the column behind every new one, shaped like the new `valid`; and the
            new table.
        """
        return self._once("compact", keep, self._compact)

    def _once(self, way: str, keep: Tensor, make: Callable[[Tensor], T]) -> T:
        """What `make` gives, or gave for an equal `keep`: layers that choose alike share it."""
        if self._last:
            before, kept, rest, table = self._last
            alike = before == way and kept.shape == keep.shape and torch.equal(kept, keep)
            if alike and (found := table()) is not None:
                return rest, found
        made = make(keep)
        if made is not None:
            self._last[:] = [way, keep, made[0], weakref.ref(made[1])]
        return made

    def _compact(self, keep: Tensor) -> tuple[Tensor, SlotTable]:
        valid = self.valid if self.valid.dim() == keep.dim() else self.valid[:, None]
        most = int(keep.sum(-1).max()) if keep.numel() else 0
        rank = torch.where(keep, 2, torch.where(valid, 0, 1))
        index = rank.argsort(dim=-1, descending=True, stable=True)[..., :most].sort(-1).values
        if not self.ordered:
            name = _spread(self.logical, keep).gather(-1, index)
            index = index.gather(-1, name.argsort(dim=-1, stable=True))
        valid = keep.gather(-1, index)
        columns = {n: _spread(t, keep).gather(-1, index) for n, t in self.columns.items()}
        return index, SlotTable(columns | {"valid": valid}, not bool(valid.all()))

    def closed(self, keep: Tensor) -> tuple[Tensor | None, SlotTable] | None:
        """As :meth:`compact` where at most one column has to go: the last one fills the gaps.

        Args:
            keep: bool, of the shape of `valid` or with an axis of heads.

        Returns:
            int64, shaped like `keep` with one column: where the last column goes, its own place if
            it goes nowhere; None if all columns are still needed. And the new table. None where
            more columns have to go, or where more than 1/SLACK of the cells would be empty.
        """
        return self._once("closed", keep, self._close)

    def _close(self, keep: Tensor) -> tuple[Tensor | None, SlotTable] | None:
        many = keep.sum(-1).flatten().tolist()
        most, last = max(many), self.slots - 1
        padded = min(many) < most
        if not last or most < last or sum(many) * SLACK < len(many) * most * (SLACK - 1):
            return None
        if most > last:
            columns = {n: _spread(t, keep) for n, t in self.columns.items()}
            return None, SlotTable(columns | {"valid": keep}, padded, self.ordered)
        gap = (~keep[..., :last]).to(torch.uint8).argmax(-1, keepdim=True)
        gap = torch.where(keep[..., last:], gap, last)

        def filled(t: Tensor) -> Tensor:
            t = _spread(t, keep)
            return t.scatter(-1, gap, t[..., last:])[..., :last]

        columns = {n: filled(t) for n, t in (self.columns | {"valid": keep}).items()}
        return gap, SlotTable(columns, padded, ordered=False)


def _spread(t: Tensor, keep: Tensor) -> Tensor:
    """A column with the axes of `keep`, of its shape."""
    return t if t.dim() == keep.dim() else t[:, None].expand(keep.shape)
