"""What routers did in the newest prefill or training step, per layer, in plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def depth_sums(scores: Tensor, kept: Tensor, among: Tensor) -> dict[str, Tensor]:
    """What :func:`rows` needs of a router over depth.

    Args:
        scores: fp32 `[batch, rows]`.
        kept, among: bool `[batch, rows]`, rows that take part, of those that were scored.
    """
    with torch.no_grad():
        x = scores.float().masked_fill(~among, 0)
        return {
            "scored": among.sum(),
            "kept": (kept & among).sum(),
            "total": x.sum(),
            "squares": (x * x).sum(),
        }


def rows(found: Mapping[tuple[int, int], Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """Per stage and layer, what its router did.

    Args:
        found: by stage and layer, sums; see :class:`mllm.routers.account.Routing`.

    Returns:
        `{stage, layer}` with, of routers over depth, `kept` (the share that took part),
        `score_mean` and `score_std`; of experts, `load` (share of the choices, by expert),
        `entropy` (of the scores, in nats, mean over rows), `dropped` (share of the choices that
        found no room), `balance` and `z` (losses before their coefficients).
    """
    described = []
    for (stage, layer), sums in sorted(found.items()):
        own = _experts(sums) if "load" in sums else _depth(sums)
        described.append({"stage": stage, "layer": layer, **own})
    return described


def _depth(sums: Mapping[str, Tensor]) -> dict[str, Any]:
    n = max(1.0, float(sums["scored"]))
    mean = float(sums["total"]) / n
    return {
        "kept": float(sums["kept"]) / n,
        "score_mean": mean,
        "score_std": math.sqrt(max(0.0, float(sums["squares"]) / n - mean * mean)),
    }


def _experts(sums: Mapping[str, Tensor]) -> dict[str, Any]:
    load, choices = sums["load"].tolist(), max(1, int(sums["choices"]))
    return {
        "load": [x / max(1, sum(load)) for x in load],
        "entropy": float(sums["entropy"]),
        "dropped": int(sums["dropped"].sum()) / choices,
        "balance": float(sums["balance"]),
        "z": float(sums["z"]),
    }


def numbers(found: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """One number or two per layer, by a name for a log.

    `router_<stage>_<layer>_std` is the spread of scores over depth, `..._kept` the share;
    `..._load` the share of the expert with the most choices, `..._entropy` that of the scores.

    Args:
        found: what :func:`rows` has returned.
    """
    logged = {}
    for row in found:
        start = f"router_{row['stage']}_{row['layer']}"
        if "load" in row:
            logged[f"{start}_load"] = max(row["load"])
            logged[f"{start}_entropy"] = row["entropy"]
            if row["dropped"]:
                logged[f"{start}_dropped"] = row["dropped"]
        else:
            logged[f"{start}_kept"] = row["kept"]
            logged[f"{start}_std"] = row["score_std"]
    return {name: round(x, 5) for name, x in logged.items()}


def plot(found: Iterable[Mapping[str, Any]], path: str | Path) -> Path:
    """Shares, loads and scores over layers, as a picture; needs matplotlib.

    Args:
        found: what :func:`rows` has returned.
        path: of the picture.
    """
    from matplotlib.figure import Figure

    found = list(found)
    depth = [row for row in found if "kept" in row]
    experts = [row for row in found if "load" in row]
    kinds = (
        (depth, "share that takes part", lambda row: row["kept"]),
        (depth, "spread of scores", lambda row: row["score_std"]),
        (experts, "share of the busiest expert", lambda row: max(row["load"])),
        (experts, "entropy of scores (nats)", lambda row: row["entropy"]),
        (experts, "dropped choices", lambda row: row["dropped"]),
    )
    shown = [kind for kind in kinds if kind[0]]
    figure = Figure(figsize=(7, 2 * max(1, len(shown))), layout="constrained")
    panels = figure.subplots(max(1, len(shown)), sharex=True, squeeze=False)[:, 0]
    for axes, (own, label, value) in zip(panels, shown, strict=False):
        axes.plot([row["layer"] for row in own], [value(row) for row in own], marker="o")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("decoder layer")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format=path.suffix[1:] or "png")
    temporary.replace(path)
    return path
