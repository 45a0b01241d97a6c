"""Does a trained router earn its name? p-MoD and MoE-LLaVA against the same with random routing.

Every pair is trained alike on held-back scenes (recipe `lora-control`: its data, steps, LoRA and
tasks) and costs the same FLOPs; only who chooses differs. Runs that are there already are reused:

    python benchmarks/routers.py --seeds 1 2 3 --output runs/routers
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mllm.eval.files import write_json, write_text
from mllm.eval.stats import paired_seeds
from mllm.plan import register
from mllm.routers.experts_moellava import MoELLaVA
from mllm.routers.pmod import PMoD
from mllm.training.finetune import ATTENTION_TARGETS
from mllm.training.recipe import load
from mllm.training.run import run

RESULTS = Path(__file__).parent / "results"
#: What the recipe is given beside the plan: experts start as copies of FFNs, and learn slower.
KINDS = {
    "pmod": [],
    "moellava": [
        "method.type=moe",
        f"method.target_modules={ATTENTION_TARGETS}",
        "learning_rates.new_modules=2.0e-4",
    ],
}


@register("pmodrandom", stage="llm", reference_layers=32, trained=True)
@dataclass
class RandomPMoD(PMoD):
    """p-MoD whose rows are drawn: weights are learnt, the choice is not."""

    draws = True

    def best(self, ctx, scores, share, among=None):
        layers, rows = ctx.num_layers, scores.shape[1]
        drawn = [torch.rand(layers, rows, generator=g)[ctx.layer] for g in ctx.generators()]
        return PMoD.best(ctx, torch.stack(drawn).to(scores), share, among)


@register("moellavarandom", stage="experts", trained=True)
@dataclass
class RandomMoELLaVA(MoELLaVA):
    """MoE-LLaVA whose router stays what it was drawn as."""

    def build(self, *args, **kwargs):
        made = super().build(*args, **kwargs)
        gate = made.gate.detach()
        del made.gate
        made.register_buffer("gate", gate)
        return made


def trained(plan: str, seed: int, folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """The record of a run with its scores; trains unless the folder has it."""
    place = folder / f"{plan}-{seed}"
    options = [f"plan={plan}", f"train.seed={seed}", f"output.dir={place}", *options]
    resume = (place / "run.json").is_file()
    record = run(load("lora-control", options), resume)
    if record["status"] != "complete":
        raise SystemExit(f"{place} is {record['status']}; the same command goes on")
    rows = json.loads((place / "eval.json").read_text())["rows"]
    return {"marks": marks(rows), "tasks": [row["task"] for row in rows], "record": record}


def marks(rows: Sequence[Mapping[str, Any]]) -> list[list[bool]]:
    """Right or wrong, by row of an evaluation."""
    return [[mark == "1" for mark in row["outcomes"]] for row in rows]


def compare(learnt: list[dict[str, Any]], random: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of each seed, and the difference with its interval over questions and seeds."""
    found = paired_seeds([run["marks"] for run in learnt], [run["marks"] for run in random])
    return {
        **{
            name: [float(np.mean(np.concatenate(run["marks"]))) for run in runs]
            for name, runs in (("learnt", learnt), ("random", random))
        },
        **found.as_dict(),
        "n": sum(map(len, learnt[0]["marks"])),
        "tasks": learnt[0]["tasks"],
    }


def publish(
    name: str, page: Callable[[dict[str, Any]], str], found: dict[str, Any],
    record: Mapping[str, Any], overrides: Sequence[str],
) -> None:  # fmt: skip
    """Write `benchmarks/results/<name>.json`, and its page.

    Args:
        name: of the results.
        page: makes Markdown of them.
        found: results: `n`, `methods` and what else there is.
        record: of one of the runs, which says where they ran.
        overrides: of the recipe.
    """
    recipe = load("lora-control", overrides)
    data = {
        "schema": 1,
        "steps": recipe.train["max_steps"],
        "batch": recipe.train["per_device_train_batch_size"],
        **{key: value for key, value in found.items() if key != "methods"},
        **{key: record[key] for key in ("versions", "commit", "device", "threads")},
        "methods": found["methods"],
    }
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / f"{name}.json", data)
    write_text(RESULTS / f"{name}.md", page(data))


def page(data: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "# Trained routers against random routing",
        "",
        f"LoRA and routers (of `moellava`: experts and routers) on held-back scenes, "
        f"{data['steps']} steps of {data['batch']}; {data['n']} test questions a seed. A pair has "
        "the same parameters, data, order and FLOPs.",
        "",
        "| method | seeds | learnt | random | difference (points) | verdict |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in data["methods"].items():
        low, high = row["ci"]
        verdict = "better" if low > 0 else "worse" if high < 0 else "not better"
        several = len(row["learnt"]) > 2
        sides = [", ".join(f"{x:.1%}" for x in row[side]) for side in ("learnt", "random")]
        lines.append(
            f"| `{name}` | {len(row['learnt'])} | {sides[0]} | {sides[1]} | "
            f"{100 * row['diff']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f}) | "
            f"{verdict} than random routing{'' if several else ', preliminary'} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--output", type=Path, default=Path("runs/routers"))
    parser.add_argument("overrides", nargs="*", help="key=value of the recipe, for all runs")
    given = parser.parse_args()
    methods = {}
    for kind in given.methods:
        options = [*KINDS[kind], *given.overrides]
        pair = [
            [
                trained(p, seed, given.output, [f"eval.plans=[{p}]", *options])
                for seed in given.seeds
            ]
            for p in (kind, f"{kind}random")
        ]
        methods[kind] = compare(*pair)
        record = pair[0][0]["record"]
    found = {"n": next(iter(methods.values()))["n"], "seeds": given.seeds, "methods": methods}
    publish("routers", page, found, record, given.overrides)


if __name__ == "__main__":
    main()
