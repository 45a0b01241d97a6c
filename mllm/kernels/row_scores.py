"""Attention of a few query rows over all keys, reduced over heads, in two passes over the keys.

The first pass leaves the maximum and the sum of every softmax, by parts of the keys (as in
flash-decoding, arXiv:2311.01282). The second computes the logits again and reduces the weights over
heads, so that nothing of the size heads x rows x keys is ever stored. Query heads that share their
keys, and several rows, are the rows of one matrix product.

Not run on a GPU yet; tile sizes are not tuned.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.kernels.ragged_decode import CELLS

PART = 512  # keys of a part of the first pass, unless there are very many
PARTS = 32  # at most
ROWS = 64  # heads x rows of a tile, at most
LEAST = 16  # rows, and channels, that a matrix product has at least

_MASKS = {"none": 0, "keys": 1, "bool": 2, "added": 3}
_WAYS = {"none": 0, "mean": 1, "sum": 1, "max": 2}


@triton.jit
def _queries(
    query, batch, head, at, real, d, width, qb, qh, qn, qd, UPCAST: tl.constexpr
):  # fmt: skip
    """Queries of rows `at` of a head each: `[rows, channels]`."""
    q = tl.load(
        query + batch * qb + head[:, None] * qh + at[:, None] * qn + d[None] * qd,
        mask=real[:, None] & (d[None] < width), other=0.0,
    )  # fmt: skip
    if UPCAST:
        q = q.to(tl.float32)
    return q


@triton.jit
def _logits(
    q, key, mask, batch, kv, head, at, real, n, d, keys, width, behind, scaling, hidden,
    kb, kh, kn, kd, mb, mh, mq, mk,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Scaled logits `[rows, keys]` of keys `n`; -inf where a query does not see.

    `kv`, `head` and `n` have 64 bits: tensors may have 2**31 elements.
    """
    there = n < keys
    k = tl.load(
        key + batch * kb + kv * kh + n[None] * kn + d[:, None] * kd,
        mask=there[None] & (d[:, None] < width), other=0.0,
    )  # fmt: skip
    if UPCAST:
        k = k.to(tl.float32)
    x = tl.dot(q, k, input_precision="ieee") * scaling
    sees = real[:, None] & there[None]
    if CAUSAL:
        sees = sees & (n[None] <= at[:, None] + behind)
    if MASK == 1:
        sees = sees & (tl.load(mask + batch * mb + n * mk, mask=there, other=0) != 0)[None]
    if MASK > 1:
        given = tl.load(
            mask + batch * mb + head[:, None] * mh + at[:, None] * mq + n[None] * mk,
            mask=sees, other=0,
        )  # fmt: skip
        if MASK == 2:
            sees = sees & (given != 0)
        else:
            given = given.to(tl.float32)
            sees = sees & (given > hidden)
            x += given
    return tl.where(sees, x, float("-inf"))


@triton.jit
def _softmax(
    query, key, rows, mask, most, total,
    heads, kv_heads, count, keys, width, behind, part, scaling, hidden,
    qb, qh, qn, qd, kb, kh, kn, kd, rb, rn, mb, mh, mq, mk,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr,
    BG: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """`most` and `total` `[parts, batch, kv_heads, tiles, BR * BG]` of the softmax of every row."""
    this, tile, cell = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batch, kv = cell // kv_heads, cell % kv_heads
    own = tl.arange(0, BR * BG)
    r, g = tile * BR + own // BG, own % BG
    group = heads // kv_heads
    real = (r < count) & (g < group)
    head = kv * group + g
    at = tl.load(rows + batch * rb + r * rn, mask=real, other=0)
    d = tl.arange(0, BD)
    q = _queries(query, batch, head, at, real, d, width, qb, qh, qn, qd, UPCAST)
    m = tl.full((BR * BG,), float("-inf"), tl.float32)
    s = tl.zeros((BR * BG,), tl.float32)
    for start in range(this * part, tl.minimum((this + 1) * part, keys), BN):
        n = (start + tl.arange(0, BN)).to(tl.int64)
        x = _logits(
            q, key, mask, batch, kv, head, at, real, n, d,
            keys, width, behind, scaling, hidden, kb, kh, kn, kd, mb, mh, mq, mk,
            MASK, CAUSAL, UPCAST,
        )  # fmt: skip
        new = tl.maximum(m, tl.max(x, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        s = s * tl.exp(m - base) + tl.sum(tl.exp(x - base[:, None]), 1)
        m = new
    place = (this * tl.num_programs(2) + cell) * tl.num_programs(1) + tile
    tl.store(most + place * (BR * BG) + own, m)
    tl.store(total + place * (BR * BG) + own, s)


@triton.jit
def _weights(
    query, key, rows, mask, most, total, out,
    heads, kv_heads, count, keys, width, behind, parts, scaling, hidden, factor,
    qb, qh, qn, qd, kb, kh, kn, kd, rb, rn, mb, mh, mq, mk,
    MASK: tl.constexpr, CAUSAL: tl.constexpr, UPCAST: tl.constexpr, WAY: tl.constexpr,
    BG: tl.constexpr, BR: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """`out`, `[batch, rows, keys]`, or `[batch, heads, rows, keys]` where `WAY` is 0."""
    block, tile, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    own = tl.arange(0, BR * BG)
    r, g = tile * BR + own // BG, own % BG
    group = heads // kv_heads
    real = (r < count) & (g < group)
    at = tl.load(rows + batch * rb + r * rn, mask=real, other=0)
    d, p = tl.arange(0, BD), tl.arange(0, BP)
    n = (block * BN + tl.arange(0, BN)).to(tl.int64)
    there = n < keys
    tiles, cells = tl.num_programs(1), tl.num_programs(2) * kv_heads
    line = tile * BR + tl.arange(0, BR)
    found = tl.zeros((BR, BN), tl.float32)
    blind = tl.zeros((BR,), tl.int32)
    for number in range(0, kv_heads):
        kv = tl.cast(number, tl.int64)
        head = kv * group + g
        q = _queries(query, batch, head, at, real, d, width, qb, qh, qn, qd, UPCAST)
        x = _logits(
            q, key, mask, batch, kv, head, at, real, n, d,
            keys, width, behind, scaling, hidden, kb, kh, kn, kd, mb, mh, mq, mk,
            MASK, CAUSAL, UPCAST,
        )  # fmt: skip
        place = ((p[:, None] * cells + batch * kv_heads + kv) * tiles + tile) * (BR * BG)
        m = tl.load(most + place + own[None], mask=p[:, None] < parts, other=float("-inf"))
        s = tl.load(total + place + own[None], mask=p[:, None] < parts, other=0.0)
        base = tl.max(m, 0)
        base = tl.where(base == float("-inf"), 0.0, base)
        s = tl.sum(s * tl.exp(m - base[None]), 0)
        dead = real & (s == 0)
        x = tl.exp(x - base[:, None]) / tl.where(s == 0, 1.0, s)[:, None]
        if WAY == 0:  # a softmax over nothing is not a number
            x = tl.where(dead[:, None], float("nan"), x)
            tl.store(
                out + ((batch * heads + head[:, None]) * count + r[:, None]) * keys + n[None],
                x, mask=real[:, None] & there[None],
            )  # fmt: skip
        else:
            x = tl.reshape(x, (BR, BG, BN))
            found = found + tl.sum(x, 1) if WAY == 1 else tl.maximum(found, tl.max(x, 1))
            blind = tl.maximum(blind, tl.max(tl.reshape(dead.to(tl.int32), (BR, BG)), 1))
    if WAY > 0:
        found = tl.where(blind[:, None] > 0, float("nan"), found * factor)
        tl.store(
            out + (batch * count + line[:, None]) * keys + n[None],
            found, mask=(line[:, None] < count) & there[None],
        )  # fmt: skip


def unsupported(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    *,
    causal: bool = True,
    heads: str = "mean",
) -> str | None:
    """Why the kernel cannot do it."""
    if query.dtype != key.dtype or query.dtype not in (
        torch.float32, torch.float16, torch.bfloat16,
    ):  # fmt: skip
        return f"queries are {query.dtype}, keys {key.dtype}"
    if query.shape[3] > 256:
        return f"heads of {query.shape[3]} channels; at most 256"
    if query.shape[1] // key.shape[1] > ROWS:
        return f"{query.shape[1] // key.shape[1]} heads share their keys; at most {ROWS}"
    if key.shape[0] * key.shape[1] > CELLS:
        return f"{key.shape[0]} samples of {key.shape[1]} key heads; at most {CELLS} in all"
    if mask is not None and mask.dim() == 4 and not (
        mask.dtype == torch.bool or mask.dtype.is_floating_point
    ):  # fmt: skip
        return f"a mask of {mask.dtype}"
    return None


def row_scores(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    *,
    causal: bool = True,
    heads: Literal["mean", "sum", "max", "none"] = "mean",
) -> Tensor:
    """As :func:`mllm.attention.row_scores`."""
    batch, count_heads, queries, width = query.shape
    kv_heads, keys, count = key.shape[1], key.shape[2], rows.shape[1]
    shape = [batch, count, keys] if heads != "none" else [batch, count_heads, count, keys]
    out = query.new_empty(shape, dtype=torch.float32)
    if not out.numel():
        return out
    kind, hidden = "none", 0.0
    strides = [0, 0, 0, 0]
    if mask is None:
        mask = rows  # not read
    elif mask.dim() == 2:
        kind, mask = "keys", mask.bool().expand(batch, -1)
        strides = [mask.stride(0), 0, 0, mask.stride(1)]
    else:
        kind = "bool" if mask.dtype == torch.bool else "added"
        hidden = torch.finfo(mask.dtype).min / 2 if kind == "added" else 0.0
        mask = mask.expand(batch, count_heads, -1, -1)
        strides = mask.stride()
    if mask.dtype == torch.bool:
        mask = mask.view(torch.uint8)
    bg = triton.next_power_of_2(count_heads // kv_heads)
    br = max(min(triton.next_power_of_2(count), ROWS // bg), -(-LEAST // bg))
    tiles, bd = triton.cdiv(count, br), max(LEAST, triton.next_power_of_2(width))
    bn = 32 if bd > 128 else 64
    part = bn * triton.cdiv(max(PART, triton.cdiv(keys, PARTS)), bn)
    parts = triton.cdiv(keys, part)
    most, total = query.new_empty(2, parts, batch * kv_heads * tiles, br * bg, dtype=torch.float32)
    interpreted = not isinstance(_softmax, triton.runtime.jit.JITFunction)
    common = {
        "heads": count_heads, "kv_heads": kv_heads, "count": count,
        "keys": keys, "width": width, "behind": keys - queries,
        "scaling": width**-0.5 if scaling is None else scaling, "hidden": hidden,
        **dict(zip(("qb", "qh", "qn", "qd"), query.stride(), strict=True)),
        **dict(zip(("kb", "kh", "kn", "kd"), key.stride(), strict=True)),
        **dict(zip(("rb", "rn"), rows.stride(), strict=True)),
        **dict(zip(("mb", "mh", "mq", "mk"), strides, strict=True)),
        "MASK": _MASKS[kind], "CAUSAL": causal and kind in ("none", "keys"),
        # The interpreter multiplies bfloat16 wrongly.
        "UPCAST": interpreted and query.dtype == torch.bfloat16,
        "BG": bg, "BR": br, "BN": bn, "BD": bd,
    }  # fmt: skip
    _softmax[(parts, tiles, batch * kv_heads)](
        query, key, rows, mask, most, total, part=part, **common
    )
    _weights[(triton.cdiv(keys, bn), tiles, batch)](
        query, key, rows, mask, most, total, out, parts=parts,
        factor=1 / count_heads if heads == "mean" else 1.0, WAY=_WAYS[heads],
        BP=triton.next_power_of_2(parts), **common,
    )  # fmt: skip
    return out
