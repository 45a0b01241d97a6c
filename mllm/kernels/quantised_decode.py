"""Attention of one new token over keys and values in 2, 4 or 8 bits, which stay so in memory.

As :mod:`mllm.kernels.ragged_decode`; a block's codes become numbers in registers, rounded to the
dtype of their bounds as :mod:`mllm.cache.quantised` rounds them.

Not run on a GPU yet; tile sizes are not tuned.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mllm.kernels.ragged_decode import added, begun, cannot, cells_of, launch, left


@triton.jit
def _numbers(codes, low, step, row, channel, width, bound, there, BITS: tl.constexpr):
    """What channels of rows stand for; `width` is of a row of codes, `bound` where bounds are."""
    if BITS == 16:
        return tl.load(codes + row * width + channel, mask=there, other=0.0)
    else:
        code = tl.load(codes + row * width + channel * BITS // 8, mask=there, other=0).to(tl.int32)
        code = (code >> (channel % (8 // BITS) * BITS)) & (2**BITS - 1)
        least = tl.load(low + bound, mask=there, other=0.0)
        steps = tl.load(step + bound, mask=there, other=0.0)
        return (code.to(tl.float32) * steps.to(tl.float32) + least.to(tl.float32)).to(least.dtype)


@triton.jit
def _quantised(
    query, keys, key_low, key_step, number, values, value_low, value_step, place, seen,
    most, total, sums,
    kv_heads, group, cells, width, value_width, part, scaling, key_bytes, value_bytes, size,
    qb, qh, qd, pb, ph, pn, sb, sh, sn,
    KEY_BITS: tl.constexpr, VALUE_BITS: tl.constexpr, PLACE: tl.constexpr, SEEN: tl.constexpr,
    UPCAST: tl.constexpr,
    BG: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """As `_ragged`. `size` channels of a value share their bounds; 16 bits are plain numbers."""
    this, cell = tl.program_id(0), tl.program_id(1).to(tl.int64)
    batch, kv = cell // kv_heads, cell % kv_heads
    g, d, v = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BV)
    q, m, s, acc = begun(query, batch, kv, g, group, width, qb, qh, qd, UPCAST, BG, BD, BV)
    groups = tl.cdiv(value_width, size)
    for start in range(this * part, tl.minimum((this + 1) * part, cells), BN):
        n = start + tl.arange(0, BN)
        sees, there, row = cells_of(
            seen, place, batch, kv, g, n, kv_heads, group, cells, sb, sh, sn, pb, ph, pn,
            SEEN, PLACE,
        )  # fmt: skip
        together = row
        if KEY_BITS < 16:
            together = tl.load(number + row, mask=there, other=0).to(tl.int64)
        k = _numbers(
            keys, key_low, key_step, row[None], d[:, None], key_bytes,
            together[None] * width + d[:, None], there[None] & (d[:, None] < width), KEY_BITS,
        )  # fmt: skip
        x = _numbers(
            values, value_low, value_step, row[:, None], v[None], value_bytes,
            row[:, None] * groups + v[None] // size, there[:, None] & (v[None] < value_width),
            VALUE_BITS,
        )  # fmt: skip
        if UPCAST:
            k, x = k.to(tl.float32), x.to(tl.float32)
        m, s, acc = added(m, s, acc, q, k, x, sees & there[None], scaling)
    left(most, total, sums, m, s, acc, this, cell, g, BG, BV)


def unsupported(
    query: Tensor, keys: Any, values: Any, shape: tuple[int, int, int], place: Tensor | None,
    seen: Tensor | None, scaling: float | None,
) -> str | None:  # fmt: skip
    """Why the kernel cannot do it."""
    held = [getattr(side, "low", side.codes) for side in (keys, values)]
    steps = [getattr(side, "step", side.codes) for side in (keys, values)]
    for t in (*held, *steps, keys.codes, values.codes):
        if not t.is_contiguous():
            return f"a stride of {t.stride()}"
    return cannot(query, {t.dtype for t in held}, shape[1], _width(values))


def quantised_decode(
    query: Tensor, keys: Any, values: Any, shape: tuple[int, int, int], place: Tensor | None,
    seen: Tensor | None, scaling: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As :meth:`mllm.cache.quantised.Quantised.attend`."""
    codes, bounds = [], []
    for side in (keys, values):
        codes.append(side.codes)
        bounds.append([getattr(side, n, side.codes) for n in ("low", "step")])
    key_bits, value_bits = (getattr(side, "bits", 16) for side in (keys, values))
    number = keys.codes if key_bits == 16 else keys.number()
    width = _width(values)
    return launch(
        _quantised, query, *shape[1:], width, scaling, place, seen,
        codes[0], *bounds[0], number, codes[1], *bounds[1],
        key_bytes=codes[0].shape[1], value_bytes=codes[1].shape[1],
        size=width if value_bits == 16 else width // values.low.shape[1],
        KEY_BITS=key_bits, VALUE_BITS=value_bits, PLACE=place is not None,
    )  # fmt: skip


def _width(side: Any) -> int:
    return getattr(side, "dim", side.codes.shape[1])
