"""Published methods, written slowly and plainly: what the registered ones must equal.

Loops over tokens, one sample and one picture at a time; nothing is shared with `mllm`.
"""

from __future__ import annotations

from collections.abc import Sequence

from oracles import Choose, View, budget, tower
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
