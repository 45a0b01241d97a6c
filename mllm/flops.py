"""Analytic FLOPs: 2 x multiply-adds of matrix products, attention over the full rectangle.

One set of formulas for the ledger, the bench's ideal and estimates. They equal torch's
`FlopCounterMode` under eager attention.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def decoder_layer(config: Any, queries: float, keys: float) -> float:
    """One LLaMA-type decoder layer on `queries` new tokens that attend to `keys` slots.

    Args:
        config: the text config.
        queries: rows that enter the layer.
        keys: KV slots they attend to, themselves included.
    """
    return attention_branch(config, queries, keys) + mlp_branch(config, queries)


def _heads(config: Any) -> tuple[int, int, int]:
    """Query heads, key heads, and their width."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, getattr(config, "num_key_value_heads", None) or heads, head_dim


def head_dim(config: Any) -> int:
    """Channels of a head."""
    return _heads(config)[2]


def attention_products(config: Any, queries: float) -> float:
    """The four projections of a decoder layer's attention on `queries` rows."""
    heads, kv_heads, head_dim = _heads(config)
    return 2 * queries * config.hidden_size * head_dim * (2 * heads + 2 * kv_heads)


def attention_reading(config: Any, rows: float, queries: float, values: float) -> float:
    """Projections that read a layer's attention: keys of `rows`, so many queries and values."""
    heads, kv_heads, head_dim = _heads(config)
    return 2 * config.hidden_size * head_dim * (queries * heads + (rows + values) * kv_heads)


def attention_branch(config: Any, queries: float, keys: float) -> float:
    """A decoder layer's attention on `queries` rows over `keys` slots."""
    heads, _, head_dim = _heads(config)
    return attention_products(config, queries) + 4 * queries * keys * heads * head_dim


def mlp_branch(config: Any, rows: float) -> float:
    """A decoder layer's gated MLP on `rows` rows."""
    return 6 * rows * config.hidden_size * config.intermediate_size


def lm_head(config: Any, rows: float) -> float:
    """The output projection on the rows whose logits are computed."""
    return 2 * rows * config.hidden_size * config.vocab_size


def vision_block(
    tokens: float,
    width: int,
    intermediate: int,
    *,
    gated: bool = False,
    spans: Iterable[int] | None = None,
) -> float:
    """One transformer block of a tower.

    Args:
        tokens: tokens of one image.
        width: width of the tower.
        intermediate: width of the MLP.
        gated: whether the MLP has a gate, a third product.
        spans: tokens of each window or picture that attends to itself; None is one of all tokens.
    """
    products = 4 * width**2 + (3 if gated else 2) * width * intermediate
    spans = [tokens] if spans is None else spans
    return 2 * tokens * products + 4 * width * sum(span**2 for span in spans)


def vision_tower(config: Any, patches: int, prefix: int = 1) -> float:
    """A CLIP- or SigLIP-type tower on one picture.

    Args:
        config: the vision config.
        patches: patch tokens.
        prefix: extra tokens ([CLS]).
    """
    width, patch = config.hidden_size, config.patch_size
    area = patch[0] * patch[1] if isinstance(patch, tuple | list) else patch**2
    embed = 2 * patches * config.num_channels * area * width
    block = vision_block(patches + prefix, width, config.intermediate_size)
    return embed + config.num_hidden_layers * block


def projector(in_width: int, out_width: int, tokens: int) -> float:
    """LLaVA's two-layer projector on `tokens` tokens."""
    return 2 * tokens * (in_width * out_width + out_width**2)


def kv_bytes(config: Any, slots: float, itemsize: int) -> float:
    """Bytes of keys and values that one layer stores for `slots` tokens."""
    _, kv_heads, head_dim = _heads(config)
    return 2 * slots * kv_heads * head_dim * itemsize
