"""Merging what leaves a layer into what stays: which token is most like it, and the means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import CacheEvent
from mllm.compressors.kv_base import Layer

__all__ = ["merge_into", "most_alike"]

BLOCK = 256  # tokens that are compared with all others at a time


def most_alike(
    event: CacheEvent, layer: Layer, keep: Tensor, gone: Tensor
) -> tuple[Tensor, Tensor]:
    """Of tokens that go the cosine to, and the slot of, the one that stays with the nearest key.

    Keys are compared as they are stored, after rotary embedding. Where heads share a choice, their
    keys are compared together.

    Args:
        event: its cost is booked.
        layer: the layer.
        keep, gone: bool `[batch, heads, slots]`.

    Returns:
        fp32 and int64, `[batch, heads, slots]` each; zero for tokens that do not go.
    """
    keys = event.cache.view(layer.index).keys.float()
    if layer.logical.shape[1] == 1:
        keys = keys.transpose(1, 2).flatten(2)[:, None]
    keys = F.normalize(keys, dim=-1)
    most = int(gone.sum(-1).max())
    event.book(2.0 * keys.shape[1] * most * keys.shape[2] * keys.shape[3])
    at = gone.int().argsort(dim=-1, descending=True, stable=True)[..., :most]
    like, slot = torch.zeros(gone.shape, device=gone.device), torch.zeros_like(layer.logical)
    for part in at.split(BLOCK, -1):
        own = keys.gather(2, part[..., None].expand(-1, -1, -1, keys.shape[3]))
        best = (own @ keys.transpose(2, 3)).masked_fill(~keep[:, :, None], -2).max(-1)
        like, slot = like.scatter(-1, part, best.values), slot.scatter(-1, part, best.indices)
    return like * gone, slot * gone


def merge_into(
    event: CacheEvent, layer: Layer, keep: Tensor, merged: Tensor, slot: Tensor, share: Tensor
) -> None:
    """Let go of what is not in `keep`; what is in `merged` goes into a token that stays.

    Keys and values of a token that stays become the weighted mean of all that it stands for.

    Args:
        event: what has happened.
        layer: the layer.
        keep, merged: bool `[batch, heads, slots]`; a token that is in neither is dropped.
        slot: int64 `[batch, heads, slots]`, where merged tokens go.
        share: fp32 `[batch, heads, slots]`, the weight of each token.
    """
    at = layer.logical
    target = torch.where(merged, at.gather(-1, slot), -1)
    target = torch.where(keep, at, target)
    # Cells that fill up a segment may have the name of a token that another segment holds.
    named = torch.where(layer.stored, at, event.cache.length)
    into = at.new_full((*at.shape[:2], event.cache.length + 1), -1).scatter(-1, named, target)
    weight = torch.ones_like(into, dtype=torch.float32).scatter(-1, named, share)
    into, weight = into[..., :-1], weight[..., :-1]
    if at.shape[1] == 1:
        into, weight = into[:, 0], weight[:, 0]
    event.cache.merge(layer.index, into, weight)
