"""xKV: keys and values of a group of layers in low-rank factors that they share."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mllm.compressors.base import CacheCompressor, CacheEvent, register

__all__ = ["XKV"]


@register("xkv", paper="arXiv:2503.18893", stage="cache")
@dataclass
class XKV(CacheCompressor):
    """Store the prompt of several layers at once by one SVD (xKV).

    Tokens are rows, channels of all heads and layers of a group are columns; the best
    approximation of a rank is kept as one left factor of the group and a right factor of each
    layer. Keys are factored before rotary embedding and turned to their positions when they are
    attended to. The prompt itself runs on exact keys and values, and so do the tokens of an answer;
    a later turn is factored for itself.

    Args:
        group: decoder layers that share factors; the last group has what is left. Layers that
            store other tokens (sliding windows, other cuts) share factors among themselves.
        rank_keys: rank of the keys of a group, an int, or a fraction of the full rank, which is
            the lesser of the tokens and of the group's width. With the full rank keys stay as they
            are.
        rank_values: the same of the values.
    """

    group: int = 4
    rank_keys: int | float = 512
    rank_values: int | float = 768

    identity = {"rank_keys": 1.0, "rank_values": 1.0}
    oracle = "reference"
    actions = ()
    lowrank = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("group", self.group > 0, "a whole number from 1")
        for field in ("rank_keys", "rank_values"):
            rank = getattr(self, field)
            fine = rank > 0 and (isinstance(rank, int) or rank <= 1)
            self.demand(field, fine, "a whole number from 1, or a fraction in (0, 1]")

    def group_end(self, event: CacheEvent) -> None:
        first = event.layer - event.layer % self.group
        layers = range(first, event.layer + 1)
        if len(layers) < self.group:
            event.note(f"xkv: the last group has {len(layers)} of {self.group} layers")
        fits = event.cache.lowrank(layers, self.rank_keys, self.rank_values)
        if len(fits) > 1:
            apart = " and ".join(_listed(fit.layers) for fit in fits)
            event.note(f"xkv: layers {apart} store different tokens and share no factors")
        for fit in fits:
            event.book(fit.flops)
            for field, full in zip(("rank_keys", "rank_values"), fit.full, strict=True):
                rank = getattr(self, field)
                if isinstance(rank, int) and rank > min(full):
                    most = _listed(sorted({n for n in full if n < rank}))
                    where = f"in layers {_listed(fit.layers)}"
                    event.note(f"xkv: {field}={rank} is cut to the full rank, {most} {where}")


def _listed(numbers: Iterable[int]) -> str:
    return "/".join(map(str, numbers))
