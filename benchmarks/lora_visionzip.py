"""Compare lora-visionzip with its control, on the same held-back test samples.

Run after `mllm train lora-visionzip` and `mllm train lora-control`:

    python benchmarks/lora_visionzip.py runs/lora-visionzip runs/lora-control
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from mllm.eval.files import write_json, write_text
from mllm.eval.stats import paired, wilson
from mllm.training.recipe import load
from mllm.training.run import evaluate
from mllm.training.schema import EvalPart

RESULTS = Path(__file__).parent / "results"


def outcomes(scores: dict[str, Any], plan: str | None) -> dict[str, list[bool]]:
    """Task -> right or wrong per sample, under one plan."""
    rows = [row for row in scores["rows"] if row["plan"] == plan]
    return {row["task"]: [mark == "1" for mark in row["outcomes"]] for row in rows}


def share(marks: list[bool]) -> dict[str, Any]:
    return {
        "n": len(marks),
        "accuracy": sum(marks) / len(marks),
        "ci": list(wilson(sum(marks), len(marks))),
    }


def compare(ours: dict[str, list[bool]], theirs: dict[str, list[bool]]) -> dict[str, Any]:
    """Paired difference over all tasks and per task (95 % bootstrap)."""
    tasks = list(ours)
    parts = {"all tasks": paired(list(ours.values()), list(theirs.values()))}
    parts |= {task: paired(ours[task], theirs[task]) for task in tasks}
    return {name: part.as_dict() | {"n": part.n} for name, part in parts.items()}


def main(active: Path, control: Path) -> None:
    recipe = load(active / "recipe.yaml")
    plan = recipe.plan
    parts = {"plan active": active, "control": control}
    found = {name: json.loads((path / "eval.json").read_text()) for name, path in parts.items()}
    records = {name: json.loads((path / "run.json").read_text()) for name, path in parts.items()}
    marks = {name: outcomes(scores, plan) for name, scores in found.items()}
    same = {"plans": [plan], "limit": found["control"]["rows"][0]["n"]}
    before = evaluate(recipe.model.path, EvalPart(**recipe.eval.model_dump() | same))
    marks["before training"] = outcomes(before, plan)
    data = {
        "schema": 1,
        "plan": plan,
        "style": found["control"]["style"],
        "split": found["control"]["split"],
        "runs": {
            name: {
                key: record[key]
                for key in ("recipe_sha256", "seconds", "device", "threads", "versions", "commit")
            }
            for name, record in records.items()
        },
        "accuracy": {
            name: {task: share(rows) for task, rows in by_task.items()}
            | {"all tasks": share([mark for rows in by_task.values() for mark in rows])}
            for name, by_task in marks.items()
        },
        "plan active minus control": compare(marks["plan active"], marks["control"]),
        "control minus before training": compare(marks["control"], marks["before training"]),
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "lora-visionzip.json", data)
    write_text(RESULTS / "lora-visionzip.md", page(data))


def page(data: dict[str, Any]) -> str:
    difference = data["plan active minus control"]
    lines = [
        "# LoRA with the plan active, against its control",
        "",
        f"Both runs: LoRA on the embedded model, the same held-back scenes ({data['style']}), "
        f"steps and seed; both evaluated under `{data['plan']}` on the {data['split']} split. The "
        "first was trained with the plan active, the control on all 576 visual tokens.",
        "",
        "| task | n | before training | control | plan active | active - control (points) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    accuracy = data["accuracy"]
    for task, part in difference.items():
        cells = [
            f"{accuracy[name][task]['accuracy']:.1%}"
            for name in ("before training", "control", "plan active")
        ]
        low, high = part["ci"]
        lines.append(
            f"| {task} | {part['n']} | {' | '.join(cells)} | {100 * part['diff']:+.1f} "
            f"({100 * low:+.1f} to {100 * high:+.1f}) |"
        )
    low, high = difference["all tasks"]["ci"]
    if low > 0:
        words = "Training with the plan active is better than training without it."
    elif high < 0:
        words = "Training with the plan active is worse than training without it."
    else:
        words = "Training with the plan active is not better than training without it."
    runs = data["runs"]
    lines += [
        "",
        f"{words} Intervals are 95 %, paired bootstrap over the same samples; one training seed, "
        "so they say nothing about other seeds.",
        "",
        f"Training and evaluation took {runs['plan active']['seconds'] / 60:.1f} and "
        f"{runs['control']['seconds'] / 60:.1f} minutes on {runs['control']['device']} "
        f"({runs['control']['threads']} threads, a shared machine: no speed claim).",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
