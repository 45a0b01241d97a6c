"""What a finished run leaves for people: the loss plot and the model card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mllm.eval.files import write_text
from mllm.training.recipe import Recipe


def write_loss_plot(folder: Path) -> None:
    """Draw `loss.png` from `metrics.jsonl`: the loss over all steps, one colour per stage."""
    from matplotlib.figure import Figure

    curves: dict[str, list[tuple[int, float]]] = {}
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.is_file() else []
    for row in map(json.loads, lines):
        if "loss" in row:
            curves.setdefault(row["stage"], []).append((row["step"], float(row["loss"])))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    start = 0
    for stage, points in curves.items():
        # A resumed run logs some steps twice; the later line counts.
        steps = dict(points)
        axes.plot([start + step for step in steps], list(steps.values()), label=stage or "loss")
        start += max(steps)
    axes.set(xlabel="step", ylabel="loss")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
    temporary = folder / ".loss.tmp.png"
    figure.savefig(temporary, dpi=120)
    temporary.replace(folder / "loss.png")


def write_card(folder: Path, recipe: Recipe, record: dict[str, Any]) -> None:
    """Write the run folder's README.md: what was trained, how, and how well it does."""
    lines = [
        f"# {folder.name}",
        "",
        recipe.summary or f"Trained from {recipe.model.path}.",
        "",
        "| | |",
        "| --- | --- |",
        f"| base model | {recipe.model.path} |",
        f"| method | {_methods(recipe)} |",
        f"| plan while training | {', '.join(part.plan or 'none' for _, part in recipe.tunes())} |",
        f"| recipe sha256 | {record['recipe_sha256']} |",
        f"| seed | {_seeds(recipe)} |",
        f"| device | {record['device']}, {record['threads']} threads |",
        f"| time | {record['seconds'] / 60:.1f} minutes |",
        f"| mllm | {record['versions'].get('mllm')}, commit {record['commit']} |",
        "",
        "`recipe.yaml` holds the recipe with every override; `metrics.jsonl` and `loss.png` the "
        "course of the training.",
    ]
    scores = folder / "eval.json"
    if scores.is_file():
        found = json.loads(scores.read_text())
        lines += [
            "",
            f"## Accuracy ({found['style']} style, {found['split']} split)",
            "",
            "| task | plan | visual tokens (layer average) | n | base | accuracy | 95 % interval |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        base = {(row["task"], row["plan"]): f"{row['score']:.1%}" for row in found.get("base", [])}
        for row in found["rows"]:
            tokens = "all" if row["visual_avg"] is None else f"{row['visual_avg']:.0f}"
            before = base.get((row["task"], row["plan"]), "")
            low, high = row["ci"]
            lines.append(
                f"| {row['task']} | {row['plan'] or 'none'} | {tokens} | {row['n']} "
                f"| {before} | {row['score']:.1%} | {low:.1%} to {high:.1%} |"
            )
    write_text(folder / "README.md", "\n".join(lines) + "\n")


def _methods(recipe: Recipe) -> str:
    if recipe.from_scratch:
        return "from scratch, in stages"
    return ", ".join(f"{name} {part.method.type}".strip() for name, part in recipe.tunes())


def _seeds(recipe: Recipe) -> str:
    whole = [part.train for _, part in recipe.tunes()]
    parts = [stage.train for stage in recipe.stages] if recipe.from_scratch else whole
    return ", ".join(str(part.get("seed", 42)) for part in parts)
