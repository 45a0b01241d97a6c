"""What keys and values are stored in: segments of consecutive slots of one layer.

A layer is a list of segments, oldest slots first. New tokens go into the last segment if it can
grow, else into a new :class:`Dense` one. Seen from outside every segment is a rectangle of columns;
which cells of it stand for a token is the layer's knowledge (:class:`mllm.cache.SlotTable`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, Protocol

import torch
from torch import Tensor

from mllm import kernels

Part = Literal["both", "keys", "values"]

#: Room is left for 1/SLACK more tokens, and up to 1/SLACK of a buffer may lie idle.
SLACK = 8
LEAST_ROOM = 16


class Segment(Protocol):
    """Storage of some slots of one layer: implement this to keep keys and values in another form.

    A quantised or low-rank segment holds what it likes and materialises keys and values when the
    layer is attended to. A segment does not change, except that a growing one gets longer.

    One may also have `join(other)`: a segment with the columns of the other behind its own, or
    None where they are not alike (see :meth:`mllm.cache.KVCache.convert`). And one that a kernel
    attends to where it lies has `kernel`, its name, and `attend(query, seen, scaling)`, which is
    :func:`attend` without the rectangle.

    Attributes:
        slots: columns of the rectangle.
        grows: whether `append` works. Tokens that follow another segment start a new one.
    """

    slots: int
    grows: bool

    def keys(self) -> Tensor:
        """`[batch, kv_heads, slots, head_dim]` on the model's device, after rotary embedding."""

    def values(self) -> Tensor:
        """`[batch, kv_heads, slots, value_dim]` on the model's device."""

    def take(self, index: Tensor, kept: Tensor) -> Segment:
        """A segment of chosen columns that does not hold on to the others.

        Args:
            index: int64 `[batch, new slots]`, or `[batch, kv_heads, new slots]`.
            kept: bool, shaped like `index`; other cells are never read.
        """

    def first(self, slots: int) -> Segment:
        """The first columns; must not copy."""

    def last(self, slots: int) -> Segment:
        """The last columns; must not hold much more memory than them."""

    def rows(self, change: Callable[[Tensor], Tensor]) -> Segment:
        """A segment whose batch axis (the first) went through `change`."""

    def held(self) -> Segment:
        """The same slots for a snapshot: must stay as they are, whatever is appended here."""

    def tensors(self) -> list[Tensor]:
        """Tensors that hold keys and values."""

    def meta(self) -> list[Tensor]:
        """Tensors that hold indices, scales and the like."""


class Selecting(Segment, Protocol):
    """A segment of which one new token need not attend to everything.

    Several new tokens at once attend to all of it, and so does a model whose plan does not expect
    such segments (:attr:`mllm.compressors.base.CacheCompressor.selects`).

    Attributes:
        selects: whether anything is left out at all.
    """

    selects: bool

    def attended(
        self, query: Tensor, scaling: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What one token of every sample attends to.

        Args:
            query: `[batch, heads, 1, head_dim]`, after rotary embedding.
            scaling: factor of the logits; None is `head_dim ** -0.5`.

        Returns:
            Keys and values `[batch, kv_heads, n, dim]`, and int64 `[batch, kv_heads, n]`, their
            columns of the rectangle; -1 fills up.
        """


class _Buffer:
    """Keys and values with room behind them.

    Attributes:
        fixed: rows before this are part of a snapshot and are not written again.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values, self.fixed = keys, values, 0

    @property
    def ours(self) -> bool:
        """Whether it may be written here: what inference mode has made, only in it."""
        return torch.is_inference_mode_enabled() or not self.keys.is_inference()

    def write(self, keys: Tensor, values: Tensor, start: int, at: int, axis: int) -> _Buffer | None:
        """Put new rows at `at`; returns a larger buffer of the rows from `start` where needed."""
        new = keys.shape[axis]
        capacity = self.keys.shape[axis]
        parts = keys, values, self.keys, self.values
        tracked = torch.is_grad_enabled() and any(t.requires_grad for t in parts)
        if at + new <= capacity and at >= self.fixed and not tracked and self.ours:
            self.keys.narrow(axis, at, new).copy_(keys)
            self.values.narrow(axis, at, new).copy_(values)
            return None
        old = [t.narrow(axis, start, at - start) for t in (self.keys, self.values)]
        if tracked:
            joined = zip(old, (keys, values), strict=True)
            return _Buffer(*(torch.cat(pair, axis) for pair in joined))
        length = at - start + new
        grown = []
        for was, more in zip(old, (keys, values), strict=True):
            shape = list(was.shape)
            shape[axis] = length + length // SLACK + LEAST_ROOM
            room = _room(was, shape)
            room.narrow(axis, 0, at - start).copy_(was)
            room.narrow(axis, at - start, new).copy_(more)
            grown.append(room)
        return _Buffer(*grown)


class Dense:
    """A rectangle in one buffer; its keys and values are views, so attention copies nothing."""

    grows = True

    def __init__(self, buffer: _Buffer, start: int, stop: int) -> None:
        self.buffer, self.start, self.stop = buffer, start, stop

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Dense:
        """A segment that owns `[batch, kv_heads, slots, dim]` tensors, without room behind."""
        return cls(_Buffer(keys, values), 0, keys.shape[2])

    @property
    def slots(self) -> int:
        return self.stop - self.start

    def keys(self) -> Tensor:
        return self.buffer.keys[:, :, self.start : self.stop]

    def values(self) -> Tensor:
        return self.buffer.values[:, :, self.start : self.stop]

    def append(self, keys: Tensor, values: Tensor) -> None:
        grown = self.buffer.write(keys, values, self.start, self.stop, axis=2)
        if grown is not None:
            self.buffer, self.start, self.stop = grown, 0, self.slots
        self.stop += keys.shape[2]

    @property
    def writable(self) -> bool:
        """Whether no snapshot and no graph of gradients holds what is stored."""
        held = self.buffer.keys.requires_grad or self.buffer.values.requires_grad
        return self.start >= self.buffer.fixed and self.buffer.ours and not held

    def close(self, gap: Tensor) -> None:
        """Put the last column into a gap, in place, and end before it; only if `writable`.

        Args:
            gap: int64 `[batch, 1]` or `[batch, kv_heads, 1]`, a column; the last one is none.
        """
        for own in (self.keys(), self.values()):
            batch, heads = own.shape[:2]
            place = torch.arange(max(batch, heads), device=own.device)
            at = place[:batch, None], place[:heads], _headwise(gap, heads)[..., 0]
            own[at] = own[:, :, -1].clone()  # many times cheaper than `scatter_`
        self.stop -= 1

    def take(self, index: Tensor, kept: Tensor) -> Segment:
        keys, values = (_gather(t, index) for t in (self.keys(), self.values()))
        return _stored(keys, values, kept)

    def first(self, slots: int) -> Dense:
        return Dense(self.buffer, self.start, self.start + slots)

    def last(self, slots: int) -> Dense:
        part = Dense(self.buffer, self.stop - slots, self.stop)
        if part.start * SLACK > slots:
            return Dense.of(*(_owned(t) for t in (part.keys(), part.values())))
        return part

    def rows(self, change: Callable[[Tensor], Tensor]) -> Dense:
        # With the room behind, or the next token would copy everything again.
        with torch.inference_mode(False):  # room is written in and out of it
            buffer = _Buffer(change(self.buffer.keys), change(self.buffer.values))
        return Dense(buffer, self.start, self.stop)

    def held(self) -> Dense:
        self.buffer.fixed = max(self.buffer.fixed, self.stop)
        return copy.copy(self)

    def tensors(self) -> list[Tensor]:
        return [self.buffer.keys, self.buffer.values]

    def meta(self) -> list[Tensor]:
        return []


class Packed:
    """Heads and samples of unequal lengths, one after another in a flat buffer.

    The rectangle is gathered when it is attended to; cells that stand for nothing take no memory.

    Attributes:
        buffer: keys and values `[rows, dim]`.
        used: rows written.
        place: int32 `[batch, kv_heads, slots]`, the row of every cell (any row for empty cells).
    """

    grows = True
    kernel = "ragged_decode"

    def __init__(self, buffer: _Buffer, used: int, place: Tensor) -> None:
        self.buffer, self.used, self.place = buffer, used, place

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, kept: Tensor) -> Packed:
        """The kept cells of a rectangle.

        Args:
            keys, values: `[batch, kv_heads, slots, dim]`.
            kept: bool `[batch, kv_heads, slots]`, somewhere true.
        """
        return cls.of_rows(keys[kept], values[kept], kept)

    @classmethod
    def of_rows(cls, keys: Tensor, values: Tensor, kept: Tensor) -> Packed:
        """The same from the kept cells alone, `[cells, dim]` in the order of `kept`."""
        place = (kept.flatten().cumsum(0) - 1).clamp(min=0).to(torch.int32)
        return cls(_Buffer(keys, values), keys.shape[0], place.view(kept.shape))

    @property
    def slots(self) -> int:
        return self.place.shape[2]

    def keys(self) -> Tensor:
        return self._gathered(self.buffer.keys)

    def values(self) -> Tensor:
        return self._gathered(self.buffer.values)

    def _gathered(self, rows: Tensor) -> Tensor:
        found = rows.index_select(0, self.place.flatten())
        return found.view(*self.place.shape, rows.shape[1])

    def attend(
        self, query: Tensor, seen: Tensor | None, scaling: float | None
    ) -> tuple[Tensor, Tensor]:
        return kernels.run(
            self.kernel, lambda *_: attend(query, self.keys(), self.values(), seen, scaling),
            query, self.buffer.keys, self.buffer.values, self.place, seen, scaling,
        )  # fmt: skip

    def append(self, keys: Tensor, values: Tensor) -> None:
        cells = keys.shape[:3]
        flat = [t.reshape(-1, t.shape[-1]) for t in (keys, values)]
        grown = self.buffer.write(*flat, 0, self.used, axis=0)
        self.buffer = self.buffer if grown is None else grown
        stop = self.used + cells.numel()
        new = torch.arange(self.used, stop, dtype=torch.int32, device=keys.device).view(cells)
        self.place, self.used = torch.cat([self.place, new], 2), stop

    def take(self, index: Tensor, kept: Tensor) -> Segment:
        index, kept = (_headwise(t, self.place.shape[1]) for t in (index, kept))
        part = Packed(self.buffer, self.used, self.place.gather(2, index))
        # Idle rows stay until they are worth a copy: dropping one token per step is cheap.
        idle = self.used - int(kept.sum())
        if idle * SLACK <= self.used and not _rectangular(kept):
            return part
        return _stored(part.keys(), part.values(), kept)

    def first(self, slots: int) -> Packed:
        return Packed(self.buffer, self.used, self.place[:, :, :slots])

    def last(self, slots: int) -> Packed:
        return Packed(self.buffer, self.used, self.place[:, :, self.slots - slots :])

    def rows(self, change: Callable[[Tensor], Tensor]) -> Packed:
        # Copies of a sample share its rows until they go different ways.
        return Packed(self.buffer, self.used, change(self.place))

    def held(self) -> Packed:
        self.buffer.fixed = max(self.buffer.fixed, self.used)
        return copy.copy(self)

    def tensors(self) -> list[Tensor]:
        return [self.buffer.keys, self.buffer.values]

    def meta(self) -> list[Tensor]:
        return [self.place]


class Offloaded:
    """Keys, values or both in host memory; they visit the device when they are attended to."""

    grows = False

    def __init__(self, keys: Tensor, values: Tensor, device: torch.device) -> None:
        self._keys, self._values, self._device = keys, values, device

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, part: Part = "both") -> Offloaded:
        """Move a `[batch, kv_heads, slots, dim]` rectangle, or one `part` of it."""
        host = {"both": (True, True), "keys": (True, False), "values": (False, True)}[part]
        moved = [
            _to_host(t) if there else _owned(t)
            for t, there in zip((keys, values), host, strict=True)
        ]
        return cls(*moved, keys.device)

    @property
    def slots(self) -> int:
        return self._keys.shape[2]

    def keys(self) -> Tensor:
        return self._keys.to(self._device, non_blocking=True)

    def values(self) -> Tensor:
        return self._values.to(self._device, non_blocking=True)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Offloaded:
        return Offloaded(change(self._keys), change(self._values), self._device)

    def take(self, index: Tensor, kept: Tensor) -> Offloaded:
        return self._map(lambda t: _gather(t, index.to(t.device)))

    def first(self, slots: int) -> Offloaded:
        return self._map(lambda t: t[:, :, :slots])

    def last(self, slots: int) -> Offloaded:
        return self._map(lambda t: _owned(t[:, :, t.shape[2] - slots :]))

    def rows(self, change: Callable[[Tensor], Tensor]) -> Offloaded:
        return self._map(change)

    def held(self) -> Offloaded:
        return self

    def tensors(self) -> list[Tensor]:
        return [self._keys, self._values]

    def meta(self) -> list[Tensor]:
        return []


def attend(
    query: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None, scaling: float | None
) -> tuple[Tensor, Tensor]:
    """Attention of one new token to a part of what it sees, for :func:`joined`.

    Args:
        query: `[batch, heads, 1, head_dim]`, after rotary embedding.
        keys, values: `[batch, kv_heads, slots, dim]`.
        seen: bool `[batch, heads, slots]`; None is everything.
        scaling: factor of the logits; None is `head_dim ** -0.5`.

    Returns:
        fp32 `[batch, heads, 1, value_dim]`, and the logarithms of the sums of exponentiated logits,
        fp32 `[batch, heads, 1, 1]`. Who sees nothing reads zeros, and its sum is 0.
    """
    grouped = query[:, :, 0].unflatten(1, (keys.shape[1], -1)).float()
    logits = grouped @ keys.float().mT * (query.shape[3] ** -0.5 if scaling is None else scaling)
    logits = logits.flatten(1, 2)
    if seen is not None:
        logits = logits.masked_fill(~seen, -torch.inf)
    lse = logits.logsumexp(-1, keepdim=True)
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0)).exp()
    out = (weights.unflatten(1, (keys.shape[1], -1)) @ values.float()).flatten(1, 2)
    return out[:, :, None], lse[:, :, None]


def joined(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Attention to all parts, each from :func:`attend`: fp32 `[batch, heads, 1, value_dim]`."""
    if len(parts) == 1:
        return parts[0][0]
    outs, sums = (torch.stack(part) for part in zip(*parts, strict=True))
    whole = sums.logsumexp(0)
    return ((sums - whole.masked_fill(whole == -torch.inf, 0)).exp() * outs).sum(0)


def _room(like: Tensor, shape: list[int]) -> Tensor:
    """An empty buffer that may be written in and out of inference mode."""
    with torch.inference_mode(False):
        return torch.empty(shape, dtype=like.dtype, device=like.device)


def from_rows(keys: Tensor, values: Tensor, kept: Tensor) -> Segment:
    """Plain storage of cells `[cells, dim]`, in the order of `kept` `[batch, kv_heads, slots]`."""
    if bool(kept.all()):
        return Dense.of(*(t.view(*kept.shape, -1) for t in (keys, values)))
    return Packed.of_rows(keys, values, kept)


def _stored(keys: Tensor, values: Tensor, kept: Tensor) -> Segment:
    """A rectangle where little of it is empty, else packed."""
    if _rectangular(kept):
        return Dense.of(keys, values)
    return Packed.of(keys, values, _headwise(kept, keys.shape[1]))


def _rectangular(kept: Tensor) -> bool:
    return (kept.numel() - int(kept.sum())) * SLACK <= kept.numel()


def _headwise(x: Tensor, heads: int) -> Tensor:
    """`[batch, slots]` or `[batch, kv_heads, slots]` as the latter."""
    return x if x.dim() == 3 else x[:, None].expand(-1, heads, -1)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Columns of `[batch, kv_heads, slots, dim]`."""
    index = _headwise(index, x.shape[1])
    return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))


def _owned(x: Tensor) -> Tensor:
    """A copy that holds no more memory than it needs."""
    return x.clone(memory_format=torch.contiguous_format)


def _to_host(x: Tensor) -> Tensor:
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return host.copy_(x)
