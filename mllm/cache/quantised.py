"""Keys and values in few bits: keys by channel, values by token (KIVI, arXiv:2402.02750).

A code is a whole number between the least and the largest value of a group: for keys one channel
of consecutive tokens, for values neighbouring channels of one token. Groups are made once, within a
head of a sample and in the order of its tokens, so a sample's do not depend on its batch. Whatever
leaves later, codes and bounds of what stays are moved as they are and never rounded again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from mllm import kernels
from mllm.cache.segments import SLACK, _headwise, attend
from mllm.errors import PlanError

#: Bits of a value; 16 is the identity.
BITS = (2, 4, 8, 16)
BLOCK = 2**19  # values that a CPU goes through at a time: steps in between stay in its caches


@dataclass(frozen=True)
class Plain:
    """Rows `[rows, dim]` as they are: what 16 bits stand for."""

    codes: Tensor

    def rows(self) -> Tensor:
        return self.codes

    def pick(self, index: Tensor) -> Plain:
        return Plain(self.codes[index])

    def like(self, other: Any) -> bool:
        return isinstance(other, Plain)

    def join(self, other: Plain) -> Plain:
        return Plain(torch.cat([self.codes, other.codes]))

    def meta(self) -> list[Tensor]:
        return []


@dataclass(frozen=True)
class ByToken:
    """Rows whose neighbouring channels are groups.

    Attributes:
        codes: uint8 `[rows, bytes]`, 8 / bits values a byte, the first one lowest.
        low, step: `[rows, groups]`, least value of a group, and what a code of 1 adds to it.
        bits: of a value.
        dim: channels.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    bits: int
    dim: int

    @classmethod
    def of(cls, x: Tensor, bits: int, group: int) -> ByToken:
        """Quantise rows `[rows, dim]` in groups of `group` channels, or all if there are fewer."""
        parts = x.unflatten(1, (-1, min(group, x.shape[1])))
        low, step = _bounds(parts.amin(2), parts.amax(2), bits)

        def packed(part: slice) -> Tensor:
            codes = _codes(parts[part], low[part, :, None], step[part, :, None], bits)
            return _pack(codes.flatten(1), bits)

        return cls(_blockwise(packed, x), low, step, bits, x.shape[1])

    def rows(self) -> Tensor:
        def values(part: slice) -> Tensor:
            codes = _unpack(self.codes[part], self.bits, self.dim)
            codes = codes.unflatten(1, (self.low.shape[1], -1))
            return _values(codes, self.low[part, :, None], self.step[part, :, None]).flatten(1)

        return _blockwise(values, self.codes, self.dim)

    def pick(self, index: Tensor) -> ByToken:
        return replace(self, **{n: getattr(self, n)[index] for n in ("codes", "low", "step")})

    def like(self, other: Any) -> bool:
        return (
            isinstance(other, ByToken)
            and (self.bits, self.dim, self.low.shape[1])
            == (other.bits, other.dim, other.low.shape[1])
        )  # fmt: skip

    def join(self, other: ByToken) -> ByToken:
        return _joined(self, other, "codes", "low", "step")

    def meta(self) -> list[Tensor]:
        return [self.low, self.step]


@dataclass(frozen=True)
class ByChannel:
    """Rows in groups of consecutive ones, every channel between its own bounds.

    Bounds stay as long as one row of their group does: they are at most as many as the rows.

    Attributes:
        codes: uint8 `[rows, bytes]`, as in :class:`ByToken`.
        low, step: `[groups, dim]`.
        members: int32 `[groups]`, rows of each.
        bits, dim: as in :class:`ByToken`.
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    members: Tensor
    bits: int
    dim: int

    @classmethod
    def of(cls, x: Tensor, number: Tensor, bits: int) -> ByChannel:
        """Quantise rows.

        Args:
            x: `[rows, dim]`.
            number: int64 `[rows]`, group of each, rising from 0.
            bits: of a value.
        """
        members = number.unique_consecutive(return_counts=True)[1]
        # Every group as long as the longest: its last row again and again changes no bound.
        size = int(members.max()) if len(members) else 1
        last = members.cumsum(0)[:, None] - 1
        within = torch.arange(1 - size, 1, device=x.device)
        at = (last + within).clamp(min=last + 1 - members[:, None])
        groups = x.index_select(0, at.flatten()).unflatten(0, at.shape)
        low, step = _bounds(groups.amin(1), groups.amax(1), bits)

        def packed(part: slice) -> Tensor:
            own = (t.index_select(0, number[part]) for t in (low, step))
            return _pack(_codes(x[part], *own, bits), bits)

        codes = _blockwise(packed, x)
        return cls(codes, low, step, members.to(torch.int32), bits, x.shape[1])

    def number(self) -> Tensor:
        """Group of every row."""
        every = torch.arange(len(self.members), device=self.members.device)
        return every.repeat_interleave(self.members, output_size=len(self.codes))

    def rows(self) -> Tensor:
        number = self.number()

        def values(part: slice) -> Tensor:
            own = (t.index_select(0, number[part]) for t in (self.low, self.step))
            return _values(_unpack(self.codes[part], self.bits, self.dim), *own)

        return _blockwise(values, self.codes, self.dim)

    def pick(self, index: Tensor) -> ByChannel:
        groups, members = self.number()[index].unique_consecutive(return_counts=True)
        return replace(
            self, codes=self.codes[index], low=self.low[groups], step=self.step[groups],
            members=members.to(torch.int32),
        )  # fmt: skip

    def like(self, other: Any) -> bool:
        return isinstance(other, ByChannel) and (self.bits, self.dim) == (other.bits, other.dim)

    def join(self, other: ByChannel) -> ByChannel:
        return _joined(self, other, "codes", "low", "step", "members")

    def meta(self) -> list[Tensor]:
        return [self.low, self.step, self.members]


Side = Plain | ByToken | ByChannel
_FORMS = {form.__name__: form for form in (Plain, ByToken, ByChannel)}


class Quantised:
    """A :class:`~mllm.cache.Segment` in few bits: rows of heads and samples, one after another.

    Attributes:
        shape: (batch, kv_heads, slots) of the rectangle.
        place: int32 `[batch, kv_heads, slots]`, the row of every cell, -1 for empty cells. None
            where the rows are the cells in order, as they are while nothing is ragged.
    """

    grows = False
    form = "quantised"
    kernel = "quantised_decode"

    def __init__(
        self, keys: Side, values: Side, shape: tuple[int, int, int], place: Tensor | None = None
    ) -> None:
        self._keys, self._values, self.shape, self.place = keys, values, shape, place

    @classmethod
    def of(
        cls, keys: Tensor, values: Tensor, kept: Tensor, key_bits: int, value_bits: int, group: int
    ) -> Quantised:
        """Quantise the kept cells of a rectangle.

        Args:
            keys, values: `[batch, kv_heads, slots, dim]`.
            kept: bool `[batch, kv_heads, slots]`.
            key_bits, value_bits: 2, 4, 8, or 16, which leaves them as they are.
            group: tokens of a group of keys, the last of a head may have fewer; channels of a
                group of values.

        Raises:
            PlanError: other bits, or a group that does not divide the channels.
        """
        check_size(values.shape[-1], group, "value channels")
        if not {key_bits, value_bits} <= set(BITS):
            raise PlanError(
                f"keys in {key_bits} and values in {value_bits} bits",
                argument="bits", given=(key_bits, value_bits), expected=f"of {BITS}",
            )  # fmt: skip
        rank = kept.long().cumsum(2) - 1
        groups = (rank[..., -1:] + group) // group
        before = groups.flatten().cumsum(0).view(groups.shape) - groups
        number = (before + rank.clamp(min=0) // group)[kept]
        sides = (
            Plain(keys[kept]) if key_bits == 16 else ByChannel.of(keys[kept], number, key_bits),
            Plain(values[kept]) if value_bits == 16
            else ByToken.of(values[kept], value_bits, group),
        )  # fmt: skip
        shape = tuple(kept.shape)
        if len(number) == kept.numel():
            return cls(*sides, shape)
        place = (kept.flatten().cumsum(0) - 1).view(shape).masked_fill(~kept, -1)
        return cls(*sides, shape, place.to(torch.int32))

    @property
    def slots(self) -> int:
        return self.shape[2]

    @property
    def used(self) -> int:
        """Rows stored."""
        return len(self._keys.codes)

    def keys(self) -> Tensor:
        return self._rectangle(self._keys.rows())

    def values(self) -> Tensor:
        return self._rectangle(self._values.rows())

    def _rectangle(self, rows: Tensor) -> Tensor:
        if self.place is not None:
            rows = rows.index_select(0, self.place.flatten().clamp(min=0))
        return rows.view(*self.shape, rows.shape[1])

    def attend(
        self, query: Tensor, seen: Tensor | None, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        return kernels.run(
            self.kernel, lambda *_: attend(query, self.keys(), self.values(), seen, scaling),
            query, self._keys, self._values, self.shape, self.place, seen, scaling,
        )  # fmt: skip

    def _places(self) -> Tensor:
        if self.place is not None:
            return self.place
        device = self._keys.codes.device
        return torch.arange(self.used, dtype=torch.int32, device=device).view(self.shape)

    def _at(self, place: Tensor) -> Quantised:
        return Quantised(self._keys, self._values, tuple(place.shape), place)

    def _settled(self, place: Tensor) -> Quantised:
        """The cells at `place`; idle rows stay until they are worth a copy."""
        there = place >= 0
        count = int(there.sum())
        idle, full = self.used - count, count == place.numel()
        if idle * SLACK <= self.used and not (full and not idle):
            return self._at(place)
        if full:
            if self.place is None and torch.equal(place, self._places()):
                return self
            rows, new = place.flatten(), None
        else:
            rows = place[there].unique()
            new = torch.searchsorted(rows, place.clamp(min=0), out_int32=True)
            new = new.masked_fill(~there, -1)
        sides = (side.pick(rows) for side in (self._keys, self._values))
        return Quantised(*sides, tuple(place.shape), new)

    def take(self, index: Tensor, kept: Tensor) -> Quantised:
        index, kept = (_headwise(t, self.shape[1]) for t in (index, kept))
        return self._settled(self._places().gather(2, index).masked_fill(~kept, -1))

    def first(self, slots: int) -> Quantised:
        return self._at(self._places()[:, :, :slots])

    def last(self, slots: int) -> Quantised:
        return self._settled(self._places()[:, :, self.slots - slots :])

    def rows(self, change: Callable[[Tensor], Tensor]) -> Quantised:
        # Copies of a sample share its rows until they go different ways.
        return self._at(change(self._places()))

    def held(self) -> Quantised:
        return self

    def tensors(self) -> list[Tensor]:
        return [self._keys.codes, self._values.codes]

    def meta(self) -> list[Tensor]:
        own = [] if self.place is None else [self.place]
        return [*self._keys.meta(), *self._values.meta(), *own]

    def join(self, other: Any) -> Quantised | None:
        """This segment with the columns of another behind it; None where they are not alike."""
        if not isinstance(other, Quantised) or not (
            self._keys.like(other._keys) and self._values.like(other._values)
        ):
            return None
        more = other._places()
        place = torch.cat([self._places(), more.add(self.used).masked_fill(more < 0, -1)], 2)
        keys, values = self._keys.join(other._keys), self._values.join(other._values)
        return Quantised(keys, values, tuple(place.shape), place)

    # Files

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What :meth:`loaded` makes the same segment of: plain values, and tensors by name."""
        row: dict[str, Any] = {"shape": list(self.shape)}
        tensors = {} if self.place is None else {"place": self.place}
        for name, side in (("keys", self._keys), ("values", self._values)):
            given = {f.name: getattr(side, f.name) for f in fields(side)}
            tensors |= {f"{name}.{k}": v for k, v in given.items() if isinstance(v, Tensor)}
            row[name] = {"form": type(side).__name__}
            row[name] |= {k: v for k, v in given.items() if not isinstance(v, Tensor)}
        return row, tensors

    @classmethod
    def loaded(cls, row: dict[str, Any], tensors: dict[str, Tensor], *_: Any) -> Quantised:
        """The segment that was :meth:`saved`; needs nothing else of its layer."""
        sides = []
        for name in ("keys", "values"):
            given = {k: v for k, v in row[name].items() if k != "form"}
            start = f"{name}."
            given |= {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}
            sides.append(_FORMS[row[name]["form"]](**given))
        return cls(*sides, tuple(row["shape"]), tensors.get("place"))


def check_size(channels: int, group: int, what: str) -> None:
    """PlanError where groups do not divide the channels; one group of all is fine."""
    if group < 1 or channels % min(group, channels):
        raise PlanError(
            f"groups of {group} do not divide {channels} {what}",
            argument="group_size",
            given=group,
            expected=f"a divisor of {channels}, or at least {channels}",
        )


def _blockwise(
    make: Callable[[slice], Tensor], rows: Tensor, width: int | None = None
) -> Tensor:
    """`make` of all rows, one block of them after another on a CPU.

    Args:
        make: gives `[rows of the slice, ...]`.
        rows: `[rows, ...]`.
        width: values of a row; None is as many as `rows` has.
    """
    count = len(rows)
    block = max(1, BLOCK // (width or rows.shape[1])) if rows.device.type == "cpu" else count
    if count <= block:
        return make(slice(None))
    found = None
    for start in range(0, count, block):
        part = slice(start, start + block)
        made = make(part)
        if found is None:
            found = made.new_empty(count, *made.shape[1:])
        found[part] = made
    return found


def _bounds(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Least values and steps as they are stored, in the dtype of the keys.

    The step is rounded up, so that the largest value lies within the last code.
    """
    step = (high.float() - low.float()) / (2**bits - 1)
    return low, (step * (1 + torch.finfo(low.dtype).eps)).to(low.dtype)


def _codes(x: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    """uint8, shaped like `x`."""
    code = (x.float() - low.float()) / step.float().masked_fill(step == 0, 1)
    return code.round().clamp(0, 2**bits - 1).to(torch.uint8)


def _values(codes: Tensor, low: Tensor, step: Tensor) -> Tensor:
    if codes.device.type == "cpu":  # where what is spread out is gone through one by one
        low, step = (t.expand(codes.shape).contiguous() for t in (low, step))
    # Codes are exact in any floating point dtype, and the sum is rounded once.
    return torch.addcmul(low, codes.to(low.dtype), step)


#: Steps that spread a byte's values of so many bits over the bytes of a wider whole number, the
#: first one lowest: how far a copy is shifted, and what stays.
_SPREAD = {8: (), 4: ((4, 0x0F0F),), 2: ((12, 0x000F000F), (6, 0x03030303))}
_WIDE = {8: torch.uint8, 4: torch.int16, 2: torch.int32}


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[rows, dim]` below 2**bits as `[rows, bytes]`, filled up with zeros."""
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % (8 // bits)))
    wide = codes.contiguous().view(_WIDE[bits])
    for shift, _ in reversed(_SPREAD[bits]):
        wide = wide | wide >> shift
    return wide.to(torch.uint8)  # what is above the lowest byte is no use


def _unpack(packed: Tensor, bits: int, dim: int) -> Tensor:
    wide = packed.to(_WIDE[bits])
    for shift, stays in _SPREAD[bits]:
        wide = (wide | wide << shift) & stays
    return wide.view(torch.uint8)[:, :dim]


def _joined(one: Any, other: Any, *names: str) -> Any:
    return replace(one, **{n: torch.cat([getattr(one, n), getattr(other, n)]) for n in names})
