"""Keys and values of several layers as products of thin matrices, the left one shared.

The tokens of a group of layers are the rows of one matrix, `[tokens, layers x kv_heads x dim]`;
its best approximation of a rank is kept as a left factor for all layers, `[tokens, rank]`, and a
right factor for each, `[rank, kv_heads x dim]` (xKV, arXiv:2503.18893). Keys are factored as they
are before rotary embedding, where they lie closer to a plane, and turned to the positions of their
slots when they are attended to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.cache.rotary import Rotary
from mllm.cache.segments import SLACK, Segment, _gather, _owned, _stored
from mllm.cache.sharing import once

Rank = int | float
"""An int, or a fraction in (0, 1] of the full rank."""


class Shared:
    """A tensor `[batch, slots, width]` that layers hold together.

    What they do to it alike is done once, so that they go on holding one.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self._memo: list = []

    def _map(self, key: Any, change: Callable[[Tensor], Tensor]) -> Shared:
        return once(self._memo, key, lambda: Shared(change(self.tensor)))

    def take(self, index: Tensor) -> Shared:
        """Chosen slots: int64 `[batch, n]`."""
        width = self.tensor.shape[2]
        return self._map(
            index, lambda t: t.gather(1, index.to(t.device)[..., None].expand(-1, -1, width))
        )

    def first(self, slots: int) -> Shared:
        return self._map(("first", slots), lambda t: t[:, :slots])

    def last(self, slots: int) -> Shared:
        return self._map(("last", slots), lambda t: _lean(t[:, t.shape[1] - slots :]))

    def rows(self, change: Callable[[Tensor], Tensor]) -> Shared:
        return self._map(getattr(change, "key", change), change)


@dataclass(frozen=True)
class Factors:
    """One layer's keys or values as a product.

    Attributes:
        left: `[batch, slots, rank]`, of the layer's group.
        right: `[batch, rank, kv_heads x dim]`.
        heads: KV heads.
    """

    left: Shared
    right: Tensor
    heads: int

    @property
    def slots(self) -> int:
        return self.left.tensor.shape[1]

    def whole(self) -> Tensor:
        """`[batch, kv_heads, slots, dim]`."""
        return (self.left.tensor @ self.right).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def picked(self, index: Tensor) -> Tensor:
        """Of every head the slots int64 `[batch, kv_heads, n]`: `[batch, kv_heads, n, dim]`."""
        left = self.left.tensor
        rows = left.gather(1, index.flatten(1)[..., None].expand(-1, -1, left.shape[2]))
        right = self.right.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return rows.unflatten(1, index.shape[1:]) @ right

    def take(self, index: Tensor) -> Factors:
        return Factors(self.left.take(index), self.right, self.heads)

    def first(self, slots: int) -> Factors:
        return Factors(self.left.first(slots), self.right, self.heads)

    def last(self, slots: int) -> Factors:
        return Factors(self.left.last(slots), self.right, self.heads)

    def rows(self, change: Callable[[Tensor], Tensor]) -> Factors:
        return Factors(self.left.rows(change), change(self.right), self.heads)

    def tensors(self) -> dict[str, Tensor]:
        return {"left": self.left.tensor, "right": self.right}


@dataclass(frozen=True)
class Whole:
    """One layer's keys or values `[batch, kv_heads, slots, dim]` as they are."""

    tensor: Tensor

    @property
    def slots(self) -> int:
        return self.tensor.shape[2]

    @property
    def heads(self) -> int:
        return self.tensor.shape[1]

    def whole(self) -> Tensor:
        return self.tensor

    def picked(self, index: Tensor) -> Tensor:
        return _gather(self.tensor, index)

    def take(self, index: Tensor) -> Whole:
        return Whole(_gather(self.tensor, index))

    def first(self, slots: int) -> Whole:
        return Whole(self.tensor[:, :, :slots])

    def last(self, slots: int) -> Whole:
        return Whole(_lean(self.tensor[:, :, self.slots - slots :]))

    def rows(self, change: Callable[[Tensor], Tensor]) -> Whole:
        return Whole(change(self.tensor))

    def tensors(self) -> dict[str, Tensor]:
        return {"whole": self.tensor}


class LowRank:
    """A segment whose keys, values or both are products; see :func:`factored`.

    Heads that come to hold different tokens are stored as they are from then on: a left factor
    has one row for all heads.

    Args:
        keys: before rotary embedding if they are a product, after it if they are not.
        values: the same slots.
        position: int32 `[batch, slots, 1 or 3]`, what keys are rotated by; None if they are whole.
        rotary: of the layer.
    """

    grows = False
    form = "lowrank"

    def __init__(
        self, keys: Factors | Whole, values: Factors | Whole, position: Shared | None,
        rotary: Rotary,
    ) -> None:  # fmt: skip
        self._keys, self._values = keys, values
        self._position, self._rotary = position, rotary

    @property
    def slots(self) -> int:
        return self._keys.slots

    @property
    def exact(self) -> bool:
        """Whether keys are as they were given."""
        return self._position is None

    def keys(self) -> Tensor:
        keys = self._keys.whole()
        if self._position is None:
            return keys
        return self._rotary.rotate(keys, self._position.tensor.movedim(2, 0))

    def values(self) -> Tensor:
        return self._values.whole()

    def picked_keys(self, index: Tensor) -> Tensor:
        """Keys of chosen slots alone, `[batch, kv_heads, n, dim]`.

        Args:
            index: int64 `[batch, kv_heads, n]`, every head's own.
        """
        keys = self._keys.picked(index)
        if self._position is None:
            return keys
        place = self._position.tensor
        place = place.gather(1, index.flatten(1)[..., None].expand(-1, -1, place.shape[2]))
        return self._rotary.rotate(keys, place.unflatten(1, index.shape[1:]).movedim(3, 0))

    def picked_values(self, index: Tensor) -> Tensor:
        """The same of values."""
        return self._values.picked(index)

    def with_values(self, values: Tensor) -> LowRank:
        """The segment with other values, `[batch, kv_heads, slots, dim]`, as they are."""
        return LowRank(self._keys, Whole(values), self._position, self._rotary)

    def _each(self, change: Callable[[Any], Any]) -> LowRank:
        position = None if self._position is None else change(self._position)
        return LowRank(change(self._keys), change(self._values), position, self._rotary)

    def take(self, index: Tensor, kept: Tensor) -> Segment:
        if index.dim() == 3:
            return _stored(_gather(self.keys(), index), _gather(self.values(), index), kept)
        return self._each(lambda x: x.take(index))

    def first(self, slots: int) -> LowRank:
        return self._each(lambda x: x.first(slots))

    def last(self, slots: int) -> LowRank:
        return self._each(lambda x: x.last(slots))

    def rows(self, change: Callable[[Tensor], Tensor]) -> LowRank:
        return self._each(lambda x: x.rows(change))

    def held(self) -> LowRank:
        return self

    def tensors(self) -> list[Tensor]:
        return [*self._keys.tensors().values(), *self._values.tensors().values()]

    def meta(self) -> list[Tensor]:
        return [] if self._position is None else [self._position.tensor]

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What :meth:`loaded` makes the same segment of: plain values, and tensors by name.

        Tensors that layers share are the same objects.
        """
        sides = {"keys": self._keys.tensors(), "values": self._values.tensors()}
        named = {f"{side}.{k}": t for side, own in sides.items() for k, t in own.items()}
        if self._position is not None:
            named["position"] = self._position.tensor
        return {"heads": self._keys.heads}, named

    @classmethod
    def loaded(
        cls, row: dict[str, Any], tensors: dict[str, Tensor], rotary: Rotary,
        shared: dict[int, Shared],
    ) -> LowRank:  # fmt: skip
        """The segment that was :meth:`saved`.

        Args:
            row, tensors: what it gave.
            rotary: of the layer.
            shared: what other segments have been given, by tensor; is added to.
        """

        def of(tensor: Tensor) -> Shared:
            return shared.setdefault(id(tensor), Shared(tensor))

        def side(name: str) -> Factors | Whole:
            if f"{name}.whole" in tensors:
                return Whole(tensors[f"{name}.whole"])
            left, right = tensors[f"{name}.left"], tensors[f"{name}.right"]
            return Factors(of(left), right, row["heads"])

        position = of(tensors["position"]) if "position" in tensors else None
        return cls(side("keys"), side("values"), position, rotary)


@dataclass(frozen=True)
class Fit:
    """What became of the tokens of some layers.

    Attributes:
        layers: those that share factors.
        tokens: of each sample.
        full: full rank of each sample, of keys and of values.
        keys, values: rank of each sample; what has its full rank in all of them is stored as it is.
        flops: what it cost, per sample.
    """

    layers: tuple[int, ...]
    tokens: list[int]
    full: tuple[list[int], list[int]]
    keys: list[int]
    values: list[int]
    flops: float


def factored(
    keys: Sequence[Tensor], values: Sequence[Tensor], valid: Tensor, position: Tensor,
    rotaries: Sequence[Rotary], rank_keys: Rank, rank_values: Rank,
) -> tuple[list[LowRank], Fit]:  # fmt: skip
    """Factor the same tokens of several layers.

    Padding is zero and has no part in any sample's factors. What has full rank in all samples is
    left as it is, bit for bit, but is a segment of its own too: so a later turn is factored alike,
    whatever else was in the batch.

    Args:
        keys, values: of every layer, `[batch, kv_heads, slots, dim]`, keys after rotary embedding.
        valid: bool `[batch, slots]`.
        position: int64 `[1 or 3, batch, slots]`.
        rotaries: of every layer.
        rank_keys, rank_values: at most the full rank, the lesser of tokens and width; a fraction
            is of that, for each sample.

    Returns:
        A segment for every layer, and the fit.
    """
    tokens = valid.sum(1).tolist()
    ranks, full, sides, flops = [], [], [], 0.0
    for x, rank in ((keys, rank_keys), (values, rank_values)):
        heads, slots, dim = x[0].shape[1:]
        width = len(x) * heads * dim
        full.append([min(n, width) for n in tokens])
        ranks.append([_rank(rank, most) for most in full[-1]])
        if ranks[-1] == full[-1]:
            sides.append(None)
            continue
        most = max(ranks[-1])
        short = min(slots, width)
        flops += 2.0 * slots * width * (short + most) + 9.0 * short**3  # of the eigenvectors
        if x is keys:
            x = [r.unrotate(k.float(), position) for r, k in zip(rotaries, x, strict=True)]
        flat = torch.cat([t.transpose(1, 2).flatten(2) for t in x], 2)
        left, right = best_factors(flat.masked_fill(~valid[..., None], 0), ranks[-1])
        left = Shared(left.to(keys[0].dtype))
        parts = right.to(keys[0].dtype).chunk(len(x), 2)
        sides.append([Factors(left, _owned(part), heads) for part in parts])
    fit = Fit((), tokens, tuple(full), *ranks, flops)
    place = Shared(position.movedim(0, 2).to(torch.int32)) if sides[0] else None
    own_keys, own_values = (
        side or [Whole(_lean(t)) for t in x] for side, x in zip(sides, (keys, values), strict=True)
    )
    every = zip(own_keys, own_values, rotaries, strict=True)
    return [LowRank(k, v, place, rotary) for k, v, rotary in every], fit


def best_factors(x: Tensor, ranks: list[int]) -> tuple[Tensor, Tensor]:
    """The best approximation of every matrix by one of a rank, as a product.

    Singular vectors of the short side are eigenvectors of its Gram matrix, and a projection on
    them is the truncated SVD. That is several times less work than an SVD of a long matrix, and
    deterministic, as a randomised one is not. Squaring halves the digits: hence double precision.

    Args:
        x: `[batch, rows, columns]`.
        ranks: of every matrix, at most its full rank.

    Returns:
        fp64 `[batch, rows, most]` and `[batch, most, columns]`; what is beyond a matrix' own rank
        is zero.
    """
    x = x.double()
    tall = x.shape[1] >= x.shape[2]
    vectors = torch.linalg.eigh(x.mT @ x if tall else x @ x.mT).eigenvectors
    vectors = vectors.flip(2)[..., : max(ranks)]
    limit = torch.tensor(ranks, device=x.device)[:, None, None]
    there = torch.arange(vectors.shape[2], device=x.device) < limit
    vectors = torch.where(there, vectors, 0)
    return (x @ vectors, vectors.mT) if tall else (vectors, vectors.mT @ x)


def _rank(rank: Rank, full: int) -> int:
    return min(full, rank if isinstance(rank, int) else max(1, round(rank * full)))


def _lean(x: Tensor) -> Tensor:
    """A view, or a copy where much of what it would hold on to is not its own."""
    idle = x.untyped_storage().nbytes() - x.nbytes
    return _owned(x) if idle * SLACK > x.nbytes else x
