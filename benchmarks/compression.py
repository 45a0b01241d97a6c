"""Is learnt compression worth its training? Against methods that need none, at as many tokens.

Every method is trained as `lora-control` trains (its held-back scenes, steps, LoRA and tasks), and
so is its control: the same without compression, afterwards under methods that need no training,
at the layer-average visual tokens that the learnt one has. One set of weights serves all budgets
of a method. Runs and answers that are there already are reused:

    python benchmarks/compression.py --output runs/compression
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from routers import RESULTS, marks, publish, trained

from mllm.errors import PlanError
from mllm.eval import plots
from mllm.eval.files import write_json, write_text
from mllm.eval.report import Row
from mllm.eval.stats import paired_seeds, share
from mllm.eval.sweep import SANITY
from mllm.training.recipe import load
from mllm.training.run import evaluate
from mllm.training.schema import EvalPart


@dataclass(frozen=True)
class Kind:
    """A learnt method.

    Attributes:
        plan: that it is trained with.
        plans: that its weights are evaluated under, most tokens first.
        seeds: how many runs.
    """

    plan: str
    plans: tuple[str, ...]
    seeds: int = 1


KINDS = {
    "m3": Kind("m3", tuple(f"m3:keep={n}" for n in (576, 144, 36, 9, 1)), 3),
    "tokenflex": Kind("tokenflex", tuple(f"tokenflex:keep={n}" for n in (256, 144, 64))),
    "dpn": Kind("dpn", ("dpn",)),
    "llavamini": Kind("llavamini", ("llavamini",)),
}
VISUAL = 576  # of the embedded model
#: Without training, at the same number of tokens.
FREE = (*SANITY, "visionzip", "cdpruner")


def scores(place: Path, plans: Sequence[str | None], part: EvalPart) -> dict[str | None, Any]:
    """Marks by task, and tokens, of a trained model under each plan; `scores.json` keeps them.

    A plan that cannot be had on this model, such as a budget between its grids, is left out.
    """
    file = place / "scores.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    new = [plan for plan in plans if (plan or "unpatched") not in found]
    new = [plan for plan in new if plan is None or _can(place, plan, part)]
    if new:
        for row in evaluate(place / "model", part.model_copy(update={"plans": new}))["rows"]:
            kept = {key: row[key] for key in ("task", "outcomes", "visual_avg")}
            found.setdefault(row["plan"] or "unpatched", []).append(kept)
        write_json(file, found)
    return {plan: found[name] for plan in plans if (name := plan or "unpatched") in found}


def _can(place: Path, plan: str, part: EvalPart) -> bool:
    try:
        evaluate(place / "model", part.model_copy(update={"plans": [plan], "limit": 1}))
    except PlanError:
        return False
    return True


def compare(kind: Kind, given: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each budget of a method, with its differences, and the record of a run."""
    part = load("lora-control", given.overrides).eval
    seeds = range(1, kind.seeds + 1)
    # The run's own evaluation is of no use here: answers are scored below, and kept.
    options = [*given.overrides, "eval.limit=1"]
    for plan in (kind.plan, "null"):
        runs = [trained(plan, seed, given.output, options) for seed in seeds]
    ours = [scores(given.output / f"{kind.plan}-{seed}", kind.plans, part) for seed in seeds]
    tokens = {
        plan: float(np.mean([row["visual_avg"] for run in ours for row in run[plan]]))
        for plan in kind.plans
    }
    free = {
        plan: [f"{name}:keep={round(n)}" for name in FREE]
        for plan, n in tokens.items()
        if n < VISUAL
    }
    wanted = [None, *dict.fromkeys(name for names in free.values() for name in names)]
    theirs = [scores(given.output / f"null-{seed}", wanted, part) for seed in seeds]
    rows = []
    for plan in kind.plans:
        mine = [run[plan] for run in ours]
        rows.append({"plan": plan, "visual_avg": tokens[plan], **_row(mine), "against": []})
        for other in (None, *free.get(plan, ())):
            if other not in theirs[0]:
                continue
            others = [run[other] for run in theirs]
            difference = paired_seeds([marks(x) for x in mine], [marks(x) for x in others])
            rows[-1]["against"].append(
                {"plan": other, **_row(others), "versus": difference.as_dict()}
            )
    return rows, runs[0]["record"]


def _row(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Accuracies of the seeds, the interval of their mean, and the mean of each task."""
    right = [np.concatenate(marks(rows)) for rows in runs]
    whole = share(right)
    return {
        "accuracy": [float(np.mean(x)) for x in right],
        "ci": [whole.low, whole.high],
        "tasks": {
            same[0]["task"]: float(np.mean(marks(same))) for same in zip(*runs, strict=True)
        },
    }


def page(data: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "# Learnt compression against methods without training",
        "",
        f"LoRA on held-back scenes, {data['steps']} steps of {data['batch']}, with the method and "
        f"without any; {data['n']} test questions a seed. Tokens are layer averages. The control "
        "is compressed after its training by the methods that are named, to as many tokens, and "
        "not at all in the column `all tokens`. In brackets is how much better the learnt method "
        "is, in points with its 95 % interval. A row of one seed is preliminary.",
        "",
        f"| plan | tokens | seeds | accuracy | all tokens | {' | '.join(FREE)} |",
        "| --- |" + " --- |" * (4 + len(FREE)),
    ]
    for rows in data["methods"].values():
        for row in rows:
            against = {str(o["plan"]).split(":")[0]: o for o in row["against"]}
            cells = [_cell(against.get(name)) for name in ("None", *FREE)]
            lines.append(
                f"| `{row['plan']}` | {row['visual_avg']:.1f} | {len(row['accuracy'])} | "
                f"{np.mean(row['accuracy']):.1%} | {' | '.join(cells)} |"
            )
    return "\n".join(lines) + "\n"


def _cell(other: dict[str, Any] | None) -> str:
    if other is None:
        return "–"
    low, high = other["versus"]["ci"]
    difference = f"{100 * other['versus']['diff']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{np.mean(other['accuracy']):.1%} ({difference})"


def picture(data: dict[str, Any]) -> str:
    """Accuracy over tokens as SVG; what was not trained is of the first method's control."""
    found: dict[str | None, Row] = {}
    for rows in data["methods"].values():
        for row in rows:
            found[row["plan"]] = _point(row, row["visual_avg"], data["n"])
            for other in row["against"]:
                tokens = row["visual_avg"] if other["plan"] else VISUAL
                found.setdefault(other["plan"], _point(other, tokens, data["n"]))
    return plots.picture(list(found.values()), f"Held-back scenes, LoRA of {data['steps']} steps")


def _point(row: dict[str, Any], tokens: float, n: int) -> Row:
    plan, seeds = row["plan"], len(row["accuracy"])
    name = plan.split(":")[0] if plan else "unpatched"
    right = round(sum(row["accuracy"]) * n)
    return Row(
        name, plan or "", round(tokens) if plan else None, tokens,
        tasks={"all": (right, seeds * n)}, sanity=name in SANITY, ci=tuple(row["ci"]),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--output", type=Path, default=Path("runs/compression"))
    parser.add_argument("overrides", nargs="*", help="key=value of the recipe, for all runs")
    given = parser.parse_args()
    part, methods = load("lora-control", given.overrides).eval, {}
    for name in given.methods:
        methods[name], record = compare(KINDS[name], given)
    found = {"n": part.limit * len(part.tasks), "methods": methods}
    publish("compression", page, found, record, given.overrides)
    made = json.loads((RESULTS / "compression.json").read_text())
    write_text(RESULTS.parents[1] / "docs" / "learned.svg", picture(made))


if __name__ == "__main__":
    main()
