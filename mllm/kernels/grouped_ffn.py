"""Every group of rows through its own FFN, all groups in one launch per matrix product.

A program multiplies rows of one expert alone; which rows are its own it finds in a list of tiles,
made on the host from counts that are known there.

Not run on a GPU yet; tile sizes are not tuned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mllm.kernels.ragged_decode import FLOATS, LEAST

ROWS, COLUMNS, DEPTH = 64, 64, 32  # of a tile, at most


@triton.jit
def _grouped_linear(
    x, weight, out, tiles, inner, columns, xn, xd, we, wn, wd,
    UPCAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`out` `[rows, columns]`, contiguous; `tiles` `[tiles, 3]`: expert, first and last row + 1."""
    tile = tiles + tl.program_id(0) * 3
    expert, first, stop = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    r = (first + tl.arange(0, BM)).to(tl.int64)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    there, within = r < stop, n < columns
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, inner, BK):
        k = start + tl.arange(0, BK)
        a = tl.load(
            x + r[:, None] * xn + k[None] * xd, mask=there[:, None] & (k[None] < inner), other=0.0
        )
        b = tl.load(
            weight + expert * we + n[None] * wn + k[:, None] * wd,
            mask=within[None] & (k[:, None] < inner), other=0.0,
        )  # fmt: skip
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc += tl.dot(a, b, input_precision="ieee")
    tl.store(
        out + r[:, None] * columns + n[None], acc.to(out.dtype.element_ty),
        mask=there[:, None] & within[None],
    )  # fmt: skip


def unsupported(
    x: Tensor, counts: Sequence[int], gate: Tensor | None, up: Tensor, down: Tensor,
    act: Callable[[Tensor], Tensor], least: int = 1,
) -> str | None:  # fmt: skip
    """Why the kernel cannot do it."""
    dtypes = {t.dtype for t in (x, gate, up, down) if t is not None}
    if len(dtypes) > 1 or x.dtype not in FLOATS:
        return f"rows and weights are {', '.join(sorted(map(str, dtypes)))}"
    return "autocast is on" if torch.is_autocast_enabled(x.device.type) else None


def grouped_ffn(
    x: Tensor, counts: Sequence[int], gate: Tensor | None, up: Tensor, down: Tensor,
    act: Callable[[Tensor], Tensor], least: int = 1,
) -> Tensor:  # fmt: skip
    """As :func:`mllm.routers.dispatch.grouped_ffn`; a row never depends on others, so `least` is 1.

    Every product has its own launch, for the activation is any function.
    """
    x = x[: sum(counts)]
    many = max(1, max(counts))
    size = min(ROWS, max(LEAST, triton.next_power_of_2(many)))
    tiles, start = [], 0
    for expert, n in enumerate(counts):
        tiles += [(expert, start + i, start + n) for i in range(0, n, size)]
        start += n
    where = torch.tensor(tiles, dtype=torch.int32).view(-1, 3).to(x.device, non_blocking=True)
    inner = _linear(x, up, where, size)
    inner = act(inner) if gate is None else act(_linear(x, gate, where, size)) * inner
    return _linear(inner, down, where, size)


def _linear(x: Tensor, weight: Tensor, tiles: Tensor, size: int) -> Tensor:
    """`x` `[rows, inner]` times the weights `[experts, columns, inner]` of its tiles' experts."""
    columns, inner = weight.shape[1:]
    out = x.new_empty(len(x), columns)
    if len(tiles):
        block = min(COLUMNS, max(LEAST, triton.next_power_of_2(columns)))
        interpreted = not isinstance(_grouped_linear, triton.runtime.jit.JITFunction)
        _grouped_linear[(len(tiles), triton.cdiv(columns, block))](
            x, weight, out, tiles, inner, columns, *x.stride(), *weight.stride(),
            # The interpreter multiplies bfloat16 wrongly.
            UPCAST=interpreted and x.dtype == torch.bfloat16, BM=size, BN=block,
            BK=min(DEPTH, max(LEAST, triton.next_power_of_2(inner))),
        )  # fmt: skip
    return out
