"""Tokens in chunks, of which a step attends to those whose landmark its query likes most.

Keys lie in low-rank factors on the device, values in host memory; a landmark is the mean key of a
chunk. Chunks that their landmark speaks for badly, and the newest ones, are kept as they are and
always attended to (ShadowKV, arXiv:2410.21465).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.cache.lowrank import Fit, LowRank, Rank, Shared, factored
from mllm.cache.rotary import Rotary
from mllm.cache.segments import Segment, _gather, _stored, _to_host
from mllm.tokens import on_device


@dataclass(frozen=True)
class Chunks:
    """What is known of a sample's chunks. Tokens are counted without padding.

    Attributes:
        landmarks: `[batch, kv_heads, chunks, head_dim]`.
        open: bool `[batch, kv_heads, chunks]`, those that a step may choose.
        many: int64 `[batch]`, how many it chooses at most.
        members: int32 `[batch, chunks, size]`, their slots.
        exact: int32 `[batch, kv_heads, n]`, slots that are kept as they are; -1 fills up.
        keys, values: of these, `[batch, kv_heads, n, dim]`.
    """

    landmarks: Tensor
    open: Tensor
    many: Tensor
    members: Tensor
    exact: Tensor
    keys: Tensor
    values: Tensor

    def named(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


class Landmarked:
    """A segment that implements :class:`mllm.cache.segments.Selecting`; see :func:`landmarked`.

    It is one whole: a part of it, after an eviction by hand or a crop, is stored plainly.

    Args:
        store: all slots; keys in factors or not, values in host memory.
        chunks: their chunks.
        most: chunks that a step chooses of any sample.
        selects: whether any sample has more.
    """

    grows = False
    form = "landmarks"

    def __init__(self, store: LowRank, chunks: Chunks, most: int, selects: bool) -> None:
        self._store, self._chunks = store, chunks
        self.most, self.selects = most, selects

    @property
    def slots(self) -> int:
        return self._store.slots

    def keys(self) -> Tensor:
        keys, own = self._store.keys(), self._chunks
        if self._store.exact:
            return keys
        at = own.exact.masked_fill(own.exact < 0, self.slots).long()
        at = at[..., None].expand(-1, -1, -1, keys.shape[3])
        return F.pad(keys, (0, 0, 0, 1)).scatter(2, at, own.keys)[:, :, : self.slots]

    def values(self) -> Tensor:
        return self._store.values().to(self._chunks.landmarks.device, non_blocking=True)

    def attended(self, query: Tensor, scaling: float | None) -> tuple[Tensor, Tensor, Tensor]:
        own, width = self._chunks, query.shape[3]
        heads = own.landmarks.shape[1]
        groups = query[:, :, 0].unflatten(1, (heads, -1)).float()
        logits = groups @ own.landmarks.float().mT * (width**-0.5 if scaling is None else scaling)
        weights = logits.masked_fill(~own.open[:, :, None], -torch.inf).softmax(-1)
        score = weights.amax(2).masked_fill(~own.open, -1)
        best = score.argsort(dim=-1, descending=True, stable=True)[..., : self.most]
        rank = torch.arange(best.shape[-1], device=best.device)
        there = own.open.gather(2, best) & (rank < own.many[:, None, None])
        size = own.members.shape[2]
        members = own.members.long()[:, None].expand(-1, heads, -1, -1)
        slots = members.gather(2, best[..., None].expand(-1, -1, -1, size)).flatten(2)
        keys = self._store.picked_keys(slots)
        values = self._store.picked_values(slots.to(self._store.values().device))
        return (
            torch.cat([keys, own.keys], 2),
            torch.cat([values.to(own.values.device, non_blocking=True), own.values], 2),
            torch.cat([slots.where(there.repeat_interleave(size, 2), -1), own.exact.long()], 2),
        )

    def _plain(self, index: Tensor, kept: Tensor) -> Segment:
        return _stored(_gather(self.keys(), index), _gather(self.values(), index), kept)

    def take(self, index: Tensor, kept: Tensor) -> Segment:
        return self._plain(index, kept)

    def first(self, slots: int) -> Segment:
        return self._part(0, slots)

    def last(self, slots: int) -> Segment:
        return self._part(self.slots - slots, self.slots)

    def _part(self, start: int, stop: int) -> Segment:
        index = torch.arange(start, stop, device=self._chunks.landmarks.device)
        index = index.expand(len(self._chunks.landmarks), -1)
        return self._plain(index, torch.ones_like(index, dtype=torch.bool))

    def rows(self, change: Callable[[Tensor], Tensor]) -> Landmarked:
        chunks = replace(self._chunks, **{k: change(t) for k, t in self._chunks.named().items()})
        return Landmarked(self._store.rows(change), chunks, self.most, self.selects)

    def held(self) -> Landmarked:
        return self

    def tensors(self) -> list[Tensor]:
        return [*self._store.tensors(), self._chunks.keys, self._chunks.values]

    def meta(self) -> list[Tensor]:
        own = self._chunks
        return [*self._store.meta(), own.landmarks, own.open, own.many, own.members, own.exact]

    def saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What :meth:`loaded` makes the same segment of: plain values, and tensors by name."""
        row, tensors = self._store.saved()
        tensors |= {f"chunks.{name}": t for name, t in self._chunks.named().items()}
        return {**row, "most": self.most, "selects": self.selects}, tensors

    @classmethod
    def loaded(
        cls, row: dict[str, Any], tensors: dict[str, Tensor], rotary: Rotary,
        shared: dict[int, Shared],
    ) -> Landmarked:  # fmt: skip
        """As :meth:`mllm.cache.lowrank.LowRank.loaded`."""
        store = LowRank.loaded(row, tensors, rotary, shared)
        store = store.with_values(_to_host(store.values()))
        own = {f.name: tensors[f"chunks.{f.name}"] for f in fields(Chunks)}
        return cls(store, Chunks(**own), row["most"], row["selects"])


def landmarked(
    keys: Tensor, values: Tensor, valid: Tensor, position: Tensor, rotary: Rotary, *,
    rank: Rank, size: int, local: int, outliers: int, many: Callable[[int], int],
) -> tuple[Segment, Fit]:  # fmt: skip
    """Store the tokens of a layer in chunks.

    Every sample is cut into chunks of its own tokens, from its first one on. The last `local`
    chunks and what is left behind them are kept as they are, and of the others, for every KV head,
    the `outliers` with the least cosine between landmark and a key.

    Args:
        keys, values: `[batch, kv_heads, slots, dim]`, keys after rotary embedding.
        valid: bool `[batch, slots]`.
        position: int64 `[1 or 3, batch, slots]`.
        rotary: of the layer.
        rank: of the keys; see :func:`mllm.cache.lowrank.factored`.
        size: tokens of a chunk.
        local, outliers: chunks that are kept as they are.
        many: from the tokens of a sample the number of chunks that a step chooses.

    Returns:
        A segment, and what became of the keys. Where nothing is left to choose from in any sample,
        all is stored as it is.
    """
    tokens = valid.sum(1).tolist()
    full = [n // size for n in tokens]
    body = [n - min(n, local) for n in full]
    apart = [min(n, outliers) for n in body]
    most = [min(many(n), b - a) for n, b, a in zip(tokens, body, apart, strict=True)]
    left = [b - a - m for b, a, m in zip(body, apart, most, strict=True)]
    if not any(b > a for b, a in zip(body, apart, strict=True)):
        (segment,), fit = factored([keys], [values], valid, position, [rotary], 1.0, 1.0)
        return segment, fit
    (store,), fit = factored([keys], [values], valid, position, [rotary], rank, 1.0)
    store = store.with_values(_to_host(values))

    def counts(x: Sequence[int]) -> Tensor:
        return on_device(torch.tensor(x), keys)[:, None, None]

    heads, slots = keys.shape[1:3]
    chunks = max(body)
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)  # of tokens, then padding
    members = order[:, : chunks * size].unflatten(1, (chunks, size))
    inside = _gather(keys, members.flatten(1)).unflatten(2, (chunks, size)).float()
    landmarks = inside.mean(3)
    like = F.cosine_similarity(inside, landmarks[:, :, :, None], dim=-1).amin(3)
    number = torch.arange(chunks, device=keys.device)
    real = number < counts(body)
    rank_of = like.masked_fill(~real, torch.inf).argsort(dim=-1, stable=True).argsort(-1)
    odd = rank_of < counts(apart)
    # In the order of tokens: those of odd chunks, and those behind the last chunk of the body.
    place = torch.arange(slots, device=keys.device)
    behind = (place >= counts([n * size for n in body])) & (place < counts(tokens))
    exact = F.pad(odd.repeat_interleave(size, 2), (0, slots - chunks * size)) | behind
    widest = max(a * size + n - b * size for a, n, b in zip(apart, tokens, body, strict=True))
    first = (~exact).to(torch.uint8).argsort(dim=2, stable=True)[..., :widest]
    index = order[:, None].expand(-1, heads, -1).gather(2, first)
    own = Chunks(
        landmarks=landmarks.to(keys.dtype),
        open=real & ~odd,
        many=counts(most)[:, 0, 0],
        members=members.to(torch.int32),
        exact=index.where(exact.gather(2, first), -1).to(torch.int32),
        keys=_gather(keys, index),
        values=_gather(values, index),
    )
    return Landmarked(store, own, max(most), any(left)), fit
