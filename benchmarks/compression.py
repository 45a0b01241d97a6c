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
from routers import marks, publish, trained

from mllm.errors import PlanError
from mllm.eval.files import write_json
from mllm.eval.stats import paired_seeds
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
#: Without training, at the same number of tokens.
FREE = ("random", "avgpool", "visionzip", "divprune", "cdpruner")


def scores(place: Path, plans: Sequence[str | None], part: EvalPart) -> dict[str | None, Any]:
    """Marks by task, and tokens, of a trained model under each plan; `scores.json` keeps them."""
    file = place / "scores.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    for plan in plans:
        name = plan or "unpatched"
        if name not in found:
            rows = evaluate(place / "model", part.model_copy(update={"plans": [plan]}))["rows"]
            found[name] = [{key: row[key] for key in ("outcomes", "visual_avg")} for row in rows]
            write_json(file, found)
    return {plan: found[plan or "unpatched"] for plan in plans}


def compare(kind: Kind, given: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for each budget of a method, with its differences, and the record of a run."""
    part = load("lora-control", given.overrides).eval
    seeds = range(1, kind.seeds + 1)
    once = ["eval.limit=1", *given.overrides]  # answers are scored below, and kept
    for plan in (kind.plan, "null"):
        runs = [trained(plan, seed, given.output, once) for seed in seeds]
    places = {
        plan: [given.output / f"{plan}-{seed}" for seed in seeds] for plan in (kind.plan, "null")
    }
    ours = [scores(place, kind.plans, part) for place in places[kind.plan]]
    rows = []
    for plan in kind.plans:
        tokens = float(np.mean([row["visual_avg"] for run in ours for row in run[plan]]))
        rows.append({"plan": plan, "visual_avg": tokens, **_row([run[plan] for run in ours])})
        rows[-1]["against"] = []
        for other in (None, *(f"{name}:keep={round(tokens)}" for name in FREE)):
            try:
                theirs = [scores(place, [other], part)[other] for place in places["null"]]
            except PlanError:  # that few tokens are no budget of every method
                continue
            difference = paired_seeds(
                [marks(run[plan]) for run in ours], [marks(rows) for rows in theirs]
            )
            rows[-1]["against"].append({"plan": other, **_row(theirs), **difference.as_dict()})
    return rows, runs[0]["record"]


def _row(runs: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    return {"accuracy": [float(np.mean(np.concatenate(marks(rows)))) for rows in runs]}


def page(data: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "# Learnt compression against methods without training",
        "",
        f"LoRA on held-back scenes, {data['steps']} steps of {data['batch']}, with the method and "
        f"without any; {data['n']} test questions a seed. Tokens are layer averages. The control "
        "is compressed after its training by the methods that are named, to as many tokens, and "
        "not at all in the column `all tokens`; in brackets is how much better the learnt method "
        "is, in points with its 95 % interval. A row of one seed is preliminary.",
        "",
        f"| plan | tokens | seeds | accuracy | all tokens | {' | '.join(FREE)} |",
        "| --- | --- | --- | --- | --- |" + " --- |" * len(FREE),
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
    low, high = other["ci"]
    difference = f"{100 * other['diff']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"{np.mean(other['accuracy']):.1%} ({difference})"


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


if __name__ == "__main__":
    main()
