"""Rows to experts and back: a deterministic choice, capacities, and products over groups.

No model, no plan. Assignments are sorted by expert, every expert multiplies one contiguous slice,
and the results return to their rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm import kernels

#: Rows of a product from which on matrix libraries add up a row alike, whatever the others are.
ALIKE = 4


def choose(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` best experts of every row, best first; ties go to the expert with the lower index.

    Args:
        scores: fp32 `[rows, experts]`.
        k: experts per row.

    Returns:
        Their scores, fp32 `[rows, k]`, and their indices, int64 `[rows, k]`.
    """
    found = scores.sort(dim=-1, descending=True, stable=True)
    return found.values[:, :k], found.indices[:, :k]


def within_capacity(
    expert: Tensor, sample: Tensor, capacity: Tensor, experts: int, priority: Tensor | None = None
) -> Tensor:
    """Which assignments find room: bool `[rows, k]`.

    Every expert takes `capacity` rows of each sample, so that one sample never pushes out rows of
    another. First choices come before second ones; among these, rows come by priority, or in order.

    Args:
        expert: int64 `[rows, k]`, choices, best first.
        sample: int64 `[rows]`.
        capacity: int64 `[samples]`.
        experts: how many there are.
        priority: `[rows]`, larger is earlier; None is the order of the rows.
    """
    rows, k = expert.shape
    order = torch.arange(rows, device=expert.device)
    if priority is not None:
        order = priority.argsort(descending=True, stable=True)
    cell = (sample[order] * experts + expert[order].T).reshape(-1)  # choice by choice
    sorted_cell, by_cell = cell.sort(stable=True)
    first = torch.searchsorted(sorted_cell, sorted_cell)  # where the cell begins
    rank = torch.empty_like(cell)
    rank[by_cell] = torch.arange(len(cell), device=cell.device) - first
    fits = rank.view(k, rows) < capacity[sample[order]]
    found = torch.empty_like(fits)
    found[:, order] = fits
    return found.T


def group(expert: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Assignments sorted by expert.

    Args:
        expert: int64 `[assignments]`; `experts` itself stands for none and comes last.
        experts: how many there are.

    Returns:
        The order, int64 `[assignments]`, stable; and how many each expert has, int64 `[experts]`.
    """
    counts = torch.bincount(expert, minlength=experts + 1)[:experts]
    return expert.argsort(stable=True), counts


def gated_ffn(
    x: Tensor, gate: Tensor | None, up: Tensor, down: Tensor, act: Callable[[Tensor], Tensor]
) -> Tensor:
    """An FFN on `[..., width]`, gated unless `gate` is None."""
    if gate is None:
        return F.linear(act(F.linear(x, up)), down)
    return F.linear(act(F.linear(x, gate)) * F.linear(x, up), down)


def grouped_ffn(
    x: Tensor,
    counts: Sequence[int],
    gate: Tensor | None,
    up: Tensor,
    down: Tensor,
    act: Callable[[Tensor], Tensor],
    least: int = 1,
) -> Tensor:
    """Every group of rows through its own FFN.

    Args:
        x: `[rows, width]`, rows of the first expert first.
        counts: rows of each expert; they may end before `x` does.
        gate, up: `[experts, inner, width]`; no gate is None.
        down: `[experts, width, inner]`.
        act: the activation.
        least: rows that a product has at least, where `x` has so many: a smaller group is
            multiplied with rows beside it, whose results are left out.

    Returns:
        `[sum of counts, width]`.
    """
    return kernels.run("grouped_ffn", _grouped_ffn, x, counts, gate, up, down, act, least)


def _grouped_ffn(
    x: Tensor, counts: Sequence[int], gate: Tensor | None, up: Tensor, down: Tensor,
    act: Callable[[Tensor], Tensor], least: int = 1,
) -> Tensor:  # fmt: skip
    parts, start = [], 0
    gates = [None] * len(counts) if gate is None else gate.unbind()
    everyone = zip(counts, gates, up.unbind(), down.unbind(), strict=True)
    for number, (n, g, u, d) in enumerate(everyone):
        # One expert runs even on nothing, so that weights are always part of the graph.
        if n or (number == 0 and not any(counts)):
            first = max(0, min(start, len(x) - least)) if n < least else start
            y = gated_ffn(x[first : max(start + n, min(first + least, len(x)))], g, u, d, act)
            parts.append(y[start - first : start - first + n])
        start += n
    return torch.cat(parts)


def combine(y: Tensor, weight: Tensor, whole: bool) -> Tensor:
    """The weighted sum over choices, `[rows, width]`.

    Args:
        y: `[rows, k, width]`, zero where a choice was dropped.
        weight: fp32 `[rows, k]`, zero where a choice was dropped.
        whole: the weights of a row add up to one unless a choice was dropped. Then experts that
            agree give exactly what each of them gives.
    """
    weight = weight.to(y.dtype)
    if not whole or y.shape[1] == 1:
        return (y * weight[..., None]).sum(1)
    total = weight.sum(1, keepdim=True)
    total = torch.where((weight > 0).all(1, keepdim=True), torch.ones_like(total), total)
    out = total * y[:, 0]
    for k in range(1, y.shape[1]):
        out = out + weight[:, k : k + 1] * (y[:, k] - y[:, 0])
    return out
