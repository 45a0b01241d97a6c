"""Attention with taps: the model's own kernel runs, and declared scores are read beside it.

The functions registered here wrap sdpa, eager and flash attention. Nothing is ever computed of
shape queries x keys: a tap costs O(rows x keys), a column sum O(block x keys) at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from mllm import compat
from mllm.errors import NoEffectError

BLOCK = 128  # query rows per step of a column sum

# Taps of the forward pass that runs in this thread, by attention module.
_TAPS: ContextVar[dict[nn.Module, list[Callable]] | None] = ContextVar("mllm_taps", default=None)


@contextlib.contextmanager
def taps(by_module: dict[nn.Module, list[Callable]]) -> Iterator[None]:
    """While open, attention modules hand (query, key, mask, scaling) to their taps."""
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


def _served(base: str) -> Callable:
    def attention(module, query, key, value, attention_mask, **kwargs):
        for tap in (_TAPS.get() or {}).get(module, ()):
            with torch.no_grad():
                tap(query, key, attention_mask, kwargs.get("scaling"))
        return compat.base_attention(module, base)(
            module, query, key, value, attention_mask, **kwargs
        )

    return attention


for _base in compat.SERVED:
    # "flash" stays in the name: transformers chooses the varlen code path by it.
    compat.register_attention(f"mllm_{_base}", _served(_base), _base)


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

    Args:
        query: `[batch, heads, queries, head_dim]`, after rotary embedding.
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
    q = q.reshape(batch, kv_heads, -1, width)  # heads of one group share their keys
    logits = q @ key.float().transpose(-1, -2) * (width**-0.5 if scaling is None else scaling)
    logits = logits.view(batch, heads, rows.shape[1], keys)
    if mask is not None and mask.dim() == 4:
        mask = mask[..., :keys].expand(batch, -1, -1, -1)
        seen = mask.gather(2, at.expand(-1, mask.shape[1], -1, keys))
        if seen.dtype == torch.bool:
            logits = logits.masked_fill(~seen, float("-inf"))
        else:
            logits = logits + seen.float()
    else:
        if causal:
            last = (rows + keys - queries)[:, None, :, None]
            logits = logits.masked_fill(
                torch.arange(keys, device=key.device) > last, float("-inf")
            )
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None, :keys].bool(), float("-inf"))
    return logits.softmax(-1)


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
