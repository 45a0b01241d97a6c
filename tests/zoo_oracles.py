"""Published methods, written slowly and plainly: what the registered ones must equal.

Loops over tokens, one sample and one picture at a time; nothing is shared with `mllm`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from oracles import Block, Choose, View, budget, project, tower
from torch import Tensor


def best(score: dict[int, float], count: int) -> list[int]:
    """The `count` highest of a score by token; of equal ones the earlier."""
    return sorted(sorted(score, key=lambda i: (-score[i], i))[:count])


def share(keep: int | float, entered: int, images: int) -> int:
    """A budget of a schedule: tokens per image, or a fraction of what entered the decoder."""
    return min(entered, keep * images) if isinstance(keep, int) else budget(keep, entered)


def pyramiddrop(keep: int | float) -> Choose:
    """The attention that the layer about to run pays from the last prompt token."""

    def choose(view: View) -> tuple[Sequence[int], Tensor]:
        row = view.look()[:, view.prompt - 1].mean(0)
        entered = int((view.rows.visual & view.rows.alive).sum())
        score = {i: float(row[i]) for i in view.arriving}
        return best(score, share(keep, entered, view.images)), view.h

    return choose


def by_tile(score: dict[int, float], part: Sequence[int], count: int) -> list[int]:
    """The best of every tile, split as evenly as can be; what is left goes to the best others."""
    parts = max(part) + 1
    chosen = []
    for p in range(parts):
        own = {i: x for i, x in score.items() if part[i] == p}
        chosen += best(own, (p + 1) * count // parts - p * count // parts)
    rest = {i: x for i, x in score.items() if i not in chosen}
    return sorted(chosen + best(rest, min(count, len(score)) - len(chosen)))


def fastervlm(model, pixels: Tensor, keep: int | float) -> list[int]:
    """The patches that [CLS] attends to most, or that receive most."""
    score = tower(model, pixels).attention.mean(0).tolist()
    return best(dict(enumerate(score)), budget(keep, len(score)))


def quartile(values: list[float], at: float) -> float:
    values = sorted(values)
    place = at * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def prumerge(
    x: Tensor,
    a: list[float],
    keys: Tensor,
    part: Sequence[int],
    keep: int | float | None,
    *,
    neighbours: int,
    plus: bool = False,
    merge: str = "sum",
) -> tuple[list[Tensor], list[int]]:
    """PruMerge of one picture: vectors in the order of the sequence, and the token of each."""
    n = len(x)
    for p in set(part):
        total = sum(a[i] for i in range(n) if part[i] == p)
        if total > 1:
            a = [v / total if part[i] == p else v for i, v in enumerate(a)]
    spare, fixed = 1, None
    if keep is not None:
        wanted = budget(keep, n)
        spare = 1 if 1 < wanted < n else 0
        fixed = wanted - spare
    whisker = quartile(a, 0.75) + 1.5 * (quartile(a, 0.75) - quartile(a, 0.25))
    count = max(1, sum(v > whisker for v in a)) if fixed is None else fixed
    if plus and fixed is not None:
        count = max(1, round(0.25 * fixed))
    kept = sorted(range(n), key=lambda i: (-a[i], i))[:count]
    rest = [i for i in range(n) if i not in kept]
    if plus and fixed is None:
        step = max(1, int(int(n / count) / 3))
        kept += [i for i in range(0, n - 1, step) if i not in kept]
    elif plus:
        more = fixed - count
        kept += [rest[(k * len(rest) + len(rest) // 2) // more] for k in range(more)]
    gone = [i for i in range(n) if i not in kept]

    def weighted(of: list[int], base: Tensor | None, own: float) -> Tensor:
        total = sum((a[j] * x[j] for j in of), torch.zeros_like(x[0]))
        if merge == "mean":
            total = total if base is None else total + own * base
            return total / (sum(a[j] for j in of) + own)
        return total if base is None else base + total

    out = []
    for i in kept:
        others = [j for j in range(n) if j != i and part[j] == part[i]]
        near = sorted(others, key=lambda j: (-cosine(keys[i], keys[j]), j))[:neighbours]
        out.append(weighted(near, x[i], a[i]))
    if spare and gone:
        out.append(weighted(gone, None, 0.0))
        kept = kept + [gone[0]]
    return out, kept


def prumerge_block(model, pixels: Tensor, keep: int | float | None, **options) -> Block:
    """PruMerge on a CLIP or SigLIP tower: it reads the last block over its full width."""
    t = tower(model, pixels)
    a = t.looks(-1, joint=True)[0].tolist()
    keys = t.blocks[-1][1][:, -len(t.patches) :].transpose(0, 1).flatten(1)
    out, kept = prumerge(t.patches, a, keys, [0] * len(a), keep, **options)
    into = [i if i in kept else kept[-1] for i in range(len(a))]
    return Block(project(model, torch.stack(out)), kept, into)
