"""Attention with taps: the model's own kernel runs, and declared scores are read beside it.

The functions registered here wrap sdpa, eager and flash attention. Nothing that is only read has
the shape queries x keys: rows cost O(rows x keys), a column sum O(block x keys) at a time. An
additive bias, where a plan asks for one, is a mask of that shape.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import compat, kernels
from mllm.errors import NoEffectError
from mllm.signals import Heads

BLOCK = 64  # query rows per step of a column sum


class Change(Protocol):
    """What a plan changes inside one call of an attention module."""

    module: nn.Module

    def finish(self, query: Tensor, output: Tensor, scaling: float | None) -> Tensor:
        """What the heads give, with what the plan does to it."""

    def turn(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys, rotated as far as the plan says."""

    def mask(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask with the plan's bias."""


# Taps of the forward pass that runs in this thread, by attention module.
_TAPS: ContextVar[dict[nn.Module, list[Callable]] | None] = ContextVar("mllm_taps", default=None)
# What the layer that runs in this thread changes in its attention.
_CHANGE: ContextVar[Change | None] = ContextVar("mllm_change", default=None)
# Taps of a call that is made for them alone, and attends to nothing.
_ONLY: ContextVar[list[Callable] | None] = ContextVar("mllm_only", default=None)


@contextlib.contextmanager
def taps(by_module: dict[nn.Module, list[Callable]]) -> Iterator[None]:
    """While open, attention modules hand (query, key, mask, scaling, value) to their taps."""
    token = _TAPS.set(by_module)
    try:
        yield
    finally:
        _TAPS.reset(token)


def open_taps(by_module: dict[nn.Module, list[Callable]]) -> None:
    """:func:`taps` for hooks, which cannot hold a `with` block open."""
    _TAPS.set(by_module)


def close_taps() -> None:
    """Undo :func:`open_taps`."""
    _TAPS.set(None)


def opened() -> dict[nn.Module, list[Callable]]:
    """Taps that are open in this thread."""
    return _TAPS.get() or {}


def set_change(change: Change | None) -> None:
    """Say what the attention module that is about to run changes."""
    _CHANGE.set(change)


def change() -> Change | None:
    """What :func:`set_change` said last."""
    return _CHANGE.get()


def exact(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """While open, products of fp32 tensors are fp32: autocast would score in half precision."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


class _WasRead(Exception):
    """Ends a call that was made for its taps."""


def read_only(
    module: nn.Module,
    readers: list[Callable],
    rows: Tensor | None = None,
    values: bool = True,
    **arguments: Any,
) -> None:
    """Call an attention module for its queries, keys and values: it ends when they are read.

    Args:
        module: an attention module that is served by this file.
        readers: taps.
        rows: int64 `[batch, n]`, the only rows whose queries have to be right; None is all.
        values: whether values have to be.
        **arguments: what the module is called with.
    """
    token = _ONLY.set(readers)
    try:
        with torch.no_grad(), compat.projecting(
            module, arguments["hidden_states"].shape[1], rows, values
        ):
            # Not through __call__: this is no forward that other hooks should see.
            module.forward(**arguments, past_key_values=None)
    except _WasRead:
        pass
    finally:
        _ONLY.reset(token)


def _served(base: str) -> Callable:
    def attention(module, query, key, value, attention_mask, **kwargs):
        only, change = _ONLY.get(), _CHANGE.get()
        own = change is not None and change.module is module
        readers = opened().get(module, ()) if only is None else only
        layer = getattr(key, "mllm_layer", None)
        if layer is not None:  # what is stored is not attended to as it is: see SlotLayer.update
            scaling = kwargs.get("scaling")
            if layer.selects:
                key, value, attention_mask = layer.attended(query, attention_mask, scaling)
            elif own or readers or base == "eager" or _unusual(kwargs):
                key, value = layer.keys, layer.values
            else:
                return layer.attend(query, attention_mask, scaling).transpose(1, 2), None
        for tap in readers:
            with torch.no_grad(), exact(query.device):
                tap(query, key, attention_mask, kwargs.get("scaling"), value)
        if only is not None:
            raise _WasRead
        if own:
            query, key = change.turn(query, key)
            attention_mask = change.mask(query, key, attention_mask)
        output, weights = compat.base_attention(module, base)(
            module, query, key, value, attention_mask, **kwargs
        )
        if own:
            output = change.finish(query, output, kwargs.get("scaling"))
        return output, weights

    return attention


def _unusual(kwargs: dict[str, Any]) -> bool:
    """Whether a model asks for more than attention is."""
    more = ("softcap", "s_aux", "position_bias", "cache")
    return bool(kwargs.get("dropout")) or any(kwargs.get(name) is not None for name in more)


for _base in compat.SERVED:
    # "flash" stays in the name: transformers chooses the varlen code path by it.
    compat.register_attention(f"mllm_{_base}", _served(_base), _base)


def row_logits(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    *,
    causal: bool = True,
) -> Tensor:
    """Scaled logits of a few query rows, in fp32: `[batch, heads, rows, keys]`; -inf is masked.

    Args:
        query: `[batch, heads, queries, head_dim]`.
        key: `[batch, kv_heads, keys, head_dim]`.
        rows: int64 `[batch, rows]`, query rows.
        mask: None, bool or additive `[batch, 1 or heads, queries, keys]`, or bool
            `[batch, keys]`.
        scaling: factor of the logits; None is `head_dim ** -0.5`.
        causal: whether a missing or 2-D mask means causal attention.
    """
    batch, heads, queries, width = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    at = rows[:, None, :, None]
    q = query.gather(2, at.expand(-1, heads, -1, width)).float()
    q = q * (width**-0.5 if scaling is None else scaling)
    q = q.reshape(batch, kv_heads, -1, width)  # heads of one group share their keys
    logits = (q @ key.float().transpose(-1, -2)).view(batch, heads, rows.shape[1], keys)
    if mask is not None and mask.dim() == 4:
        mask = mask[..., :keys].expand(batch, -1, -1, -1)
        seen = mask.gather(2, at.expand(-1, mask.shape[1], -1, keys))
        if seen.dtype == torch.bool:
            return logits.masked_fill_(~seen, float("-inf"))
        hidden = seen <= torch.finfo(seen.dtype).min / 2
        return logits.add_(seen).masked_fill_(hidden, float("-inf"))
    if causal:
        last = (rows + keys - queries)[:, None, :, None]
        first = 1 + int(last.min()) if rows.numel() and free_to_read(key.device) else 0
        behind = torch.arange(first, keys, device=key.device) > last
        logits[..., first:].masked_fill_(behind, float("-inf"))
    if mask is not None:
        logits.masked_fill_(~mask[:, None, None, :keys].bool(), float("-inf"))
    return logits


def row_attention(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    *,
    causal: bool = True,
) -> Tensor:
    """Post-softmax attention of a few query rows, in fp32: `[batch, heads, rows, keys]`.

    The arguments are those of :func:`row_logits`.
    """
    return row_logits(query, key, rows, mask, scaling, causal=causal).softmax(-1)


def row_scores(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    *,
    causal: bool = True,
    heads: Heads = "mean",
) -> Tensor:
    """Attention of a few query rows reduced over heads, in fp32: `[batch, rows, keys]`.

    The arguments are those of :func:`row_logits`, and

    Args:
        heads: the reduction; `[batch, heads, rows, keys]` for `"none"`.
    """
    return kernels.run(
        "row_scores", _row_scores, query, key, rows, mask, scaling, causal=causal, heads=heads
    )


def _row_scores(
    query: Tensor, key: Tensor, rows: Tensor, mask: Tensor | None, scaling: float | None, *,
    causal: bool, heads: Heads,
) -> Tensor:  # fmt: skip
    return reduce_heads(row_attention(query, key, rows, mask, scaling, causal=causal), heads)


def received_attention(
    query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """Attention that each key receives from all queries (no causality): `[batch, heads, keys]`.

    Runs over blocks of queries: extra memory is O(block x keys).
    """
    batch, queries = query.shape[0], query.shape[2]
    total = 0
    for start in range(0, queries, BLOCK):
        rows = torch.arange(start, min(start + BLOCK, queries), device=query.device)
        rows = rows.expand(batch, -1)
        total = total + row_attention(query, key, rows, mask, scaling, causal=False).sum(2)
    return total


def reduce_heads(x: Tensor, how: Heads) -> Tensor:
    """`[batch, heads, ...]` without its heads, or unchanged for `"none"`."""
    if how == "none":
        return x
    return {"mean": x.mean, "sum": x.sum, "max": x.amax}[how](1)


def column_mass(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    *,
    heads: Heads = "mean",
) -> tuple[Tensor, Tensor]:
    """Attention that each key receives from chosen queries, causally.

    A block of queries sees all keys that are not behind it, so that its softmax is complete: one
    pass over the scores, O(block x keys) memory. Keys behind it are left out where finding them
    makes nobody wait, on a CPU.

    Args:
        query, key, mask, scaling: as in :func:`row_logits`.
        rows: int64 `[batch, rows]`, query rows; -1 fills up.
        heads: reduction over heads, before the sum.

    Returns:
        fp32 `[batch, keys]` (`[batch, heads, keys]` for `"none"`), and int64 `[batch, keys]`,
        the chosen queries that see each key.
    """
    batch, count, queries, width = query.shape
    keys, behind = key.shape[2], key.shape[2] - queries
    wide = key.float().transpose(-1, -2)
    scaling = width**-0.5 if scaling is None else scaling
    total = torch.zeros(batch, 1 if heads == "max" else count, keys, device=key.device)
    seen = torch.zeros(batch, keys, dtype=torch.long, device=key.device)
    place = torch.arange(keys, device=key.device)
    trims = free_to_read(key.device)
    for number, (low, high, real) in enumerate(_spans(rows, queries, trims)):
        if not real:
            continue
        block = rows[:, number * BLOCK : (number + 1) * BLOCK]
        there, at = block >= 0, block.clamp(min=0)
        at = at[:, None, :, None]
        if mask is not None and mask.dim() == 4:
            given = mask[..., :keys].expand(batch, -1, -1, -1)
            given = given.gather(2, at.expand(-1, mask.shape[1], -1, keys))
            added = given.dtype != torch.bool
            sees = given > torch.finfo(given.dtype).min / 2 if added else given
            end = 1 + int((sees.flatten(0, 2).any(0) * place).max()) if trims else keys
            sees, first = sees[..., :end], 0
        else:
            added, first, end = False, low + behind + 1, high + behind + 1
            sees = place[:end] <= at + behind
            if mask is not None:
                sees, first = sees & mask[:, None, None, :end].bool(), 0
        q = query.gather(2, at.expand(-1, count, -1, width)).float() * scaling
        logits = q.reshape(batch, key.shape[1], -1, width) @ wide[..., :end]
        logits = logits.view(batch, count, -1, end)
        if added:
            logits += given[..., :end]
        if first < end:
            logits[..., first:].masked_fill_(~sees[..., first:], float("-inf"))
        weights = logits.softmax(-1)
        if heads == "max":
            weights = weights.amax(1, keepdim=True)
        if real < there.numel():
            weights.masked_fill_(~there[:, None, :, None], 0)
            sees = sees & there[:, None, :, None]
        total[..., :end] += weights.sum(2)
        seen[:, :end] += sees.any(1).sum(1)
    if heads == "max":
        return total[:, 0], seen
    return reduce_heads(total, heads), seen


def free_to_read(device: torch.device) -> bool:
    """Whether a value can be read without anybody waiting for it."""
    return device.type == "cpu"


def _spans(rows: Tensor, queries: int, read: bool) -> list[list[int]]:
    """Of every block of query rows the lowest one, the highest one, and how many there are.

    Without `read` these are bounds that hold for any block.
    """
    batch, count = rows.shape
    number = -(-count // BLOCK)
    if not read:
        return [[0, queries - 1, 1]] * number
    blocks = F.pad(rows, (0, -count % BLOCK), value=-1).reshape(batch, number, BLOCK)
    there = blocks >= 0
    low = blocks.masked_fill(~there, queries).amin((0, 2))
    return torch.stack([low, blocks.amax((0, 2)), there.sum((0, 2))], 1).tolist()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> Tensor:
    """Queries or keys with rotary positions, as the model turns the first channels of a head.

    Args:
        x: `[..., head_dim]`.
        cos, sin: `[..., rotary_dim]`, tables that have every angle twice.
        neighbours: whether neighbouring channels turn together, not those of two halves.
    """
    width, axis = cos.shape[-1], -1 if neighbours else -2
    turning, rest = x[..., :width].float(), x[..., width:]
    a, b = turning.unflatten(-1, (-1, 2) if neighbours else (2, -1)).unbind(axis)
    quarter = torch.stack([-b, a], axis).flatten(-2)
    turned = turning * cos.float() + quarter * sin.float()
    return torch.cat([turned.to(x.dtype), rest], -1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, neighbours: bool = False) -> Tensor:
    """The inverse of :func:`rotate`, and of the scaling of its tables."""
    scale = cos.float().square() + sin.float().square()
    return rotate(x, cos / scale, -sin / scale, neighbours)


def captured(signals: dict[Any, Tensor], key: Any, method: str) -> Tensor:
    """What a tap has left under `key`; NoEffectError if the tapped module never ran."""
    if key not in signals:
        raise NoEffectError(
            f"visual rows were present but {method} did not run: the attention that it reads was "
            "exchanged after mllm.patch",
            argument="model",
            given=method,
            expected="patch again after changing modules",
        )
    return signals[key]
