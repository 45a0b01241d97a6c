"""Rows back to where they came from, in one launch behind the one that writes zeros.

Not run on a GPU yet; block sizes are not tuned.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a program, at most


@triton.jit
def _scatter(
    x, rows, real, out, kept, length, width, xb, xn, xd, rb, rn, eb, en,
    SOME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`x` `[batch, kept, width]` to its rows of `out` `[batch, length, width]`, contiguous."""
    place = tl.program_id(0).to(tl.int64)
    sample, column = place // kept, place % kept
    row = tl.load(rows + sample * rb + column * rn)
    # 64 bits, as everything that a stride is multiplied by: tensors may have 2**31 elements.
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    there = at < width
    if SOME:
        there = there & (tl.load(real + sample * eb + column * en) != 0)
    value = tl.load(x + sample * xb + column * xn + at * xd, mask=there)
    tl.store(out + (sample * length + row) * width + at, value, mask=there)


def unsupported(x: Tensor, rows: Tensor, length: int, real: Tensor | None = None) -> str | None:
    """Why the kernel cannot do it."""
    return f"a tensor of {x.dtype}" if x.is_complex() or x.dtype == torch.bool else None


def scatter_back(x: Tensor, rows: Tensor, length: int, real: Tensor | None = None) -> Tensor:
    """As :func:`mllm.tokens.scatter_back`."""
    batch, kept, width = x.shape
    out = x.new_zeros(batch, length, width)
    if x.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        flags = rows if real is None else real.view(torch.uint8)
        _scatter[(batch * kept, triton.cdiv(width, block))](
            x, rows, flags, out, kept, length, width, *x.stride(), *rows.stride(),
            *flags.stride(), SOME=real is not None, BLOCK=block,
        )  # fmt: skip
    return out
