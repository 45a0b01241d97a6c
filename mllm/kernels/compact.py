"""Chosen rows of several tensors in one launch.

Not run on a GPU yet; block sizes are not tuned.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a program, at most


@triton.jit
def _gather(
    sources, targets, rows, outers, widths, outer_strides, batch_strides, row_strides, strides,
    batch, kept, rb, rn, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every source `[outer, batch, rows, width]` to a contiguous `[outer, batch, kept, width]`."""
    place = tl.program_id(0).to(tl.int64)
    sample, column = place // kept, place % kept
    row = tl.load(rows + sample * rb + column * rn)
    # 64 bits, as everything that a stride is multiplied by: tensors may have 2**31 elements.
    at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    for i in tl.static_range(len(sources)):
        there = at < widths[i]
        source = sources[i] + sample * batch_strides[i] + row * row_strides[i] + at * strides[i]
        target = targets[i] + place * widths[i] + at
        for plane in range(outers[i]):
            outer = tl.cast(plane, tl.int64)
            x = tl.load(source + outer * outer_strides[i], mask=there)
            tl.store(target + outer * batch * kept * widths[i], x, mask=there)


def unsupported(rows: Tensor, parts: Sequence[tuple[Tensor, int]]) -> str | None:
    """Why the kernel cannot do it."""
    for x, dim in parts:
        if dim not in (1, 2) or x.dim() > dim + 2:
            return f"rows are axis {dim} of {x.dim()}"
        if x.is_complex():
            return f"a tensor of {x.dtype}"
    return None


def compact(rows: Tensor, parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """As :func:`mllm.tokens.gather_parts`."""
    batch, kept = rows.shape
    shapes = [(*x.shape[: d - 1], batch, kept, *x.shape[d + 1 :]) for x, d in parts]
    found = [x.new_empty(shape) for (x, _), shape in zip(parts, shapes, strict=True)]
    sources, targets = [], []
    for (x, dim), out in zip(parts, found, strict=True):
        if out.numel():
            sources.append(_planes(x.expand(*out.shape[:dim], *x.shape[dim:]), dim))
            targets.append(_planes(out, dim))
    if sources:
        widths = tuple(x.shape[3] for x in sources)
        block = min(BLOCK, triton.next_power_of_2(max(widths)))
        _gather[(batch * kept, triton.cdiv(max(widths), block))](
            tuple(sources), tuple(targets), rows, tuple(x.shape[0] for x in sources), widths,
            *(tuple(x.stride(i) for x in sources) for i in range(4)),
            batch, kept, *rows.stride(), BLOCK=block,
        )  # fmt: skip
    return found


def _planes(x: Tensor, dim: int) -> Tensor:
    """A view `[outer, batch, rows, width]`; bools as bytes."""
    x = x.view(torch.uint8) if x.dtype == torch.bool else x
    x = x if dim == 2 else x[None]
    return x if x.dim() == 4 else x[..., None]
