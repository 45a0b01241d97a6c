"""What routers did in the newest forward with images, per layer, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

KEY = "statistics"


def note(state: dict[str, Any], layer: int, scores: Tensor, kept: Tensor, among: Tensor) -> None:
    """Keep the sums of a layer; nothing waits for the device until they are read.

    Args:
        state: of the stage, `ctx.state`.
        layer: decoder layer.
        scores: fp32 `[batch, rows]`.
        kept, among: bool `[batch, rows]`, rows that take part, of those that were scored.
    """
    with torch.no_grad():
        x = scores.float().masked_fill(~among, 0)
        state.setdefault(KEY, {})[layer] = torch.stack(
            [among.sum().float(), (kept & among).sum().float(), x.sum(), (x * x).sum()]
        )


def rows(states: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per stage and layer: `kept`, the share that took part, and mean and spread of scores.

    Args:
        states: by stage number, what :func:`note` was given.

    Returns:
        `{stage, layer, kept, score_mean, score_std}` each.
    """
    found = []
    for stage, state in sorted(states.items()):
        for layer, sums in sorted(state.get(KEY, {}).items()):
            n, kept, total, squares = sums.tolist()
            mean = total / max(1.0, n)
            spread = math.sqrt(max(0.0, squares / max(1.0, n) - mean * mean))
            found.append({
                "stage": stage, "layer": layer, "kept": kept / max(1.0, n), "score_mean": mean,
                "score_std": spread,
            })  # fmt: skip
    return found


def plot(found: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Share and spread of scores over layers, as a picture; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    share, spread = figure.subplots(2, sharex=True)
    found = list(found)
    for axes, key, label in (
        (share, "kept", "share that takes part"), (spread, "score_std", "spread of scores")
    ):
        axes.plot([row["layer"] for row in found], [row[key] for row in found], marker="o")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    spread.set_xlabel("decoder layer")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format=path.suffix[1:] or "png")
    temporary.replace(path)
    return path
