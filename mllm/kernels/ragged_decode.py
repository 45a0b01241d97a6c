"""Attention of one new token over the rows of a flat buffer, in two steps.

Every head of a sample attends to its own cells; what they stand for lies anywhere in the buffer.
The first step attends to parts of the cells, the second joins the parts (flash-decoding,
arXiv:2311.01282). Rows that are not attended to are not read.

Not run on a GPU yet; tile sizes are not tuned.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 256  # cells of a part, unless there are very many
PARTS = 64  # at most
BLOCK = 2**14  # bytes of a block of keys, at most: several have to fit into shared memory
LEAST = 16  # rows, and channels, that a matrix product has at least
GROUP = 64  # heads that share their keys, at most
WIDTH = 256  # channels of a head, at most
CELLS = 2**16 - 1  # samples x key heads, at most: what CUDA launches along one of its axes
FLOATS = torch.float32, torch.float16, torch.bfloat16


@triton.jit
def begun(
    query, batch, kv, g, group, width, qb, qh, qd,
    UPCAST: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Queries `[BG, BD]` of heads that share their keys; maximum, sum and values of nothing."""
    d = tl.arange(0, BD)
    q = tl.load(
        query + batch * qb + (kv * group + g[:, None]) * qh + d[None] * qd,
        mask=(g[:, None] < group) & (d[None] < width), other=0.0,
    )  # fmt: skip
    if UPCAST:
        q = q.to(tl.float32)
    m = tl.full((BG,), float("-inf"), tl.float32)
    return q, m, tl.zeros((BG,), tl.float32), tl.zeros((BG, BV), tl.float32)


@triton.jit
def left(
    most, total, sums, m, s, acc, this, cell, g, BG: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """Store what a part of the cells has come to."""
    at = (this * tl.num_programs(1) + cell) * BG + g
    tl.store(most + at, m)
    tl.store(total + at, s)
    tl.store(sums + at[:, None] * BV + tl.arange(0, BV)[None], acc)


@triton.jit
def cells_of(
    seen, place, batch, kv, g, n, kv_heads, group, cells, sb, sh, sn, pb, ph, pn,
    SEEN: tl.constexpr, PLACE: tl.constexpr,
):  # fmt: skip
    """Which heads see cells `n` `[BG, BN]`, and the rows of the cells that any sees `[BN]`."""
    sees = (g[:, None] < group) & (n[None] < cells)
    if SEEN:
        head = kv * group + g
        flags = tl.load(seen + batch * sb + head[:, None] * sh + n[None] * sn, mask=sees, other=0)
        sees = sees & (flags != 0)
    there = tl.max(sees.to(tl.int32), 0) > 0
    if PLACE:
        row = tl.load(place + batch * pb + kv * ph + n * pn, mask=there, other=-1).to(tl.int64)
    else:
        row = (batch * kv_heads + kv) * cells + n
    return sees, there & (row >= 0), row


@triton.jit
def added(m, s, acc, q, k, x, sees, scaling):
    """Maximum, sum and weighted values of an online softmax, with the cells of one block."""
    logits = tl.dot(q, k, input_precision="ieee") * scaling
    logits = tl.where(sees, logits, float("-inf"))
    new = tl.maximum(m, tl.max(logits, 1))
    base = tl.where(new == float("-inf"), 0.0, new)
    old, p = tl.exp(m - base), tl.exp(logits - base[:, None])
    acc = acc * old[:, None] + tl.dot(p.to(x.dtype), x, input_precision="ieee")
    return new, s * old + tl.sum(p, 1), acc


@triton.jit
def _ragged(
    query, keys, values, place, seen, most, total, sums,
    kv_heads, group, cells, width, value_width, part, scaling,
    qb, qh, qd, kn, kd, vn, vd, pb, ph, pn, sb, sh, sn,
    SEEN: tl.constexpr, UPCAST: tl.constexpr,
    BG: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """`most`, `total` `[parts, batch * kv_heads, BG]` and `sums` `[..., BV]`, not divided."""
    this, cell = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv = cell // kv_heads, cell % kv_heads
    g, d, v = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BV)
    q, m, s, acc = begun(query, batch, kv, g, group, width, qb, qh, qd, UPCAST, BG, BD, BV)
    for start in range(this * part, tl.minimum((this + 1) * part, cells), BN):
        n = start + tl.arange(0, BN)
        sees, there, row = cells_of(
            seen, place, batch, kv, g, n, kv_heads, group, cells, sb, sh, sn, pb, ph, pn, SEEN, True
        )
        k = tl.load(
            keys + row[None] * kn + d[:, None] * kd,
            mask=there[None] & (d[:, None] < width), other=0.0,
        )  # fmt: skip
        x = tl.load(
            values + row[:, None] * vn + v[None] * vd,
            mask=there[:, None] & (v[None] < value_width), other=0.0,
        )  # fmt: skip
        if UPCAST:
            k, x = k.to(tl.float32), x.to(tl.float32)
        m, s, acc = added(m, s, acc, q, k, x, sees & there[None], scaling)
    left(most, total, sums, m, s, acc, this, cell, g, BG, BV)


@triton.jit
def _join(
    most, total, sums, out, lse, kv_heads, group, value_width, parts,
    BG: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """`out` `[batch, heads, value_width]` and `lse` `[batch, heads]`; zeros and -inf of nothing."""
    cell, cells = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    g, v = tl.arange(0, BG), tl.arange(0, BV)
    m = tl.full((BG,), float("-inf"), tl.float32)
    s = tl.zeros((BG,), tl.float32)
    acc = tl.zeros((BG, BV), tl.float32)
    for part in range(0, parts):
        at = (part * cells + cell) * BG + g
        own = tl.load(most + at)
        new = tl.maximum(m, own)
        base = tl.where(new == float("-inf"), 0.0, new)
        old, more = tl.exp(m - base), tl.exp(own - base)
        s = s * old + tl.load(total + at) * more
        acc = acc * old[:, None] + tl.load(sums + at[:, None] * BV + v[None]) * more[:, None]
        m = new
    some = tl.where(s == 0, 1.0, s)
    head = cell * group + g
    tl.store(
        out + head[:, None] * value_width + v[None], acc / some[:, None],
        mask=(g[:, None] < group) & (v[None] < value_width),
    )  # fmt: skip
    tl.store(lse + head, m + tl.log(some), mask=g < group)


def cannot(query: Tensor, dtypes: set[torch.dtype], kv_heads: int, value_width: int) -> str | None:
    """Why no kernel attends with such a query to keys and values of these dtypes."""
    if query.dtype not in FLOATS or dtypes != {query.dtype}:
        others = ", ".join(sorted(map(str, dtypes)))
        return f"queries are {query.dtype}, keys and values {others}"
    if max(query.shape[3], value_width) > WIDTH:
        return f"heads of {query.shape[3]} and {value_width} channels; at most {WIDTH}"
    if query.shape[1] // kv_heads > GROUP:
        return f"{query.shape[1] // kv_heads} heads share their keys; at most {GROUP}"
    if query.shape[0] * kv_heads > CELLS:
        return f"{query.shape[0]} samples of {kv_heads} key heads; at most {CELLS} in all"
    return None


def launch(
    parts_of: Callable[..., Any], query: Tensor, kv_heads: int, cells: int, value_width: int,
    scaling: float | None, place: Tensor | None, seen: Tensor | None, *given: Any, **more: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Both steps.

    Args:
        parts_of: kernel of the first one.
        query, scaling, seen: as in :func:`mllm.cache.segments.attend`.
        kv_heads, cells, value_width: what is attended to.
        place: int32 `[batch, kv_heads, cells]`, rows; None is one after another.
        *given: tensors and numbers of the keys and values alone.
        **more: constants of the kernel alone.
    """
    batch, heads, _, width = query.shape
    group = heads // kv_heads
    out = query.new_empty(batch, heads, 1, value_width, dtype=torch.float32)
    lse = query.new_empty(batch, heads, 1, 1, dtype=torch.float32)
    bg = max(LEAST, triton.next_power_of_2(group))
    bd, bv = (max(LEAST, triton.next_power_of_2(n)) for n in (width, value_width))
    bn = max(16, min(64, BLOCK // (max(bd, bv) * query.element_size())))
    part = bn * triton.cdiv(max(PART, triton.cdiv(cells, PARTS)), bn)
    parts = max(1, triton.cdiv(cells, part))
    shape = parts, batch * kv_heads, bg
    most, total = query.new_empty(2, *shape, dtype=torch.float32)
    sums = query.new_empty(*shape, bv, dtype=torch.float32)
    flags = query.new_empty(1, 1, 1, dtype=torch.uint8) if seen is None else seen.view(torch.uint8)
    places = query.new_empty(1, 1, 1, dtype=torch.int32) if place is None else place
    interpreted = not isinstance(parts_of, triton.runtime.jit.JITFunction)
    parts_of[(parts, batch * kv_heads)](
        query, *given, places, flags, most, total, sums,
        kv_heads=kv_heads, group=group, cells=cells, width=width, value_width=value_width,
        part=part, scaling=width**-0.5 if scaling is None else scaling,
        qb=query.stride(0), qh=query.stride(1), qd=query.stride(3),
        **dict(zip(("pb", "ph", "pn"), places.stride(), strict=True)),
        **dict(zip(("sb", "sh", "sn"), flags.stride(), strict=True)),
        # The interpreter multiplies bfloat16 wrongly.
        UPCAST=interpreted and query.dtype == torch.bfloat16,
        SEEN=seen is not None, BG=bg, BN=bn, BD=bd, BV=bv, **more,
    )  # fmt: skip
    _join[(batch * kv_heads,)](
        most, total, sums, out, lse, kv_heads, group, value_width, parts, BG=bg, BV=bv
    )
    return out, lse


def unsupported(
    query: Tensor, keys: Tensor, values: Tensor, place: Tensor, seen: Tensor | None,
    scaling: float | None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot do it."""
    return cannot(query, {keys.dtype, values.dtype}, place.shape[1], values.shape[1])


def ragged_decode(
    query: Tensor, keys: Tensor, values: Tensor, place: Tensor, seen: Tensor | None,
    scaling: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :meth:`mllm.cache.Packed.attend`."""
    strides = dict(zip(("kn", "kd", "vn", "vd"), (*keys.stride(), *values.stride()), strict=True))
    return launch(
        _ragged, query, *place.shape[1:], values.shape[1], scaling, place, seen, keys, values,
        **strides,
    )  # fmt: skip
