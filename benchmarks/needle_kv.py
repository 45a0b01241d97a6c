"""Needle test of methods on the KV cache: several pictures, a question about one of them.

`python benchmarks/needle_kv.py` writes `benchmarks/results/needle-kv.json` and `.md`, in about five
minutes of one core. Each prompt has two or three pictures: charts, and at any place among them one
scene with a small object whose color is asked for. Only questions that the unpatched model answers
count, since only of those there is an answer to lose. The cache is compressed with the question in
sight, which is then asked again (`protocol="again"`): the answer can only be read from what was
kept of the pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mllm.eval import files, stats
from mllm.eval.asking import Questions, SharedTower, answer_all, marks
from mllm.eval.plans import make_plan, patched_with
from mllm.eval.provenance import describe_run
from mllm.loading import load_model
from mllm.yardstick import sample

NEEDLE, AROUND, SPLIT = "needle_color", "chart_max", "test"
PROTOCOL = "again"
PLANS = ("snapkv:budget=0.25", "randomkv:budget=0.25", "streamingllm:budget=0.25")
BATCH = 4


def question(index: int) -> dict[str, Any]:
    """The question `index`: a sample of the yardstick with more pictures around its own."""
    count = 2 + index % 2
    asked = sample(NEEDLE, SPLIT, index)
    pictures = [sample(AROUND, SPLIT, 4 * index + i)["image"] for i in range(count)]
    pictures[index // 2 % count] = asked["image"]
    marked = " ".join(f"{i + 1}:<image>" for i in range(count))
    return asked | {"image": pictures, "question": f"{marked} {asked['question']}"}


def asked_of(model: Any, processor: Any, drawn: list[dict]) -> Questions:
    return Questions(processor, drawn, BATCH, model.dtype, model.device, PROTOCOL)


def solvable(model: Any, processor: Any, wanted: int) -> tuple[list[dict], int]:
    """The first questions that the unpatched model answers, and how many it was asked."""
    found: list[dict] = []
    asked = 0
    while len(found) < wanted:
        drawn = [question(asked + i) for i in range(12)]
        asked += len(drawn)
        questions = asked_of(model, processor, drawn)
        right = marks(questions, answer_all(model, processor, questions, None))
        found += [one for one, fine in zip(drawn, right, strict=True) if fine]
        print(f"{len(found)} of {asked} are answered without a plan", flush=True)
    return found[:wanted], asked


def measure(n: int) -> dict[str, Any]:
    """The results: per plan, how many of `n` answers stay right, with a 95 % Wilson interval."""
    model, processor = load_model("tiny-llava")
    drawn, asked = solvable(model, processor, n)
    questions, tower = asked_of(model, processor, drawn), SharedTower(model)
    rows = []
    for spec in PLANS:
        plan = make_plan(spec)
        with tower.used_by(plan), patched_with(model, plan) as patched:
            answers = answer_all(model, processor, questions, patched)
        right = marks(questions, answers)
        counts = [len(one["image"]) for one in drawn]
        row = {
            "plan": spec,
            "n": n,
            "right": sum(right),
            "score": sum(right) / n,
            "ci": list(stats.wilson(sum(right), n)),
            "kv_bytes": sum(x.efficiency["kv_bytes"] for x in answers) / n,
            "outcomes": "".join("01"[fine] for fine in right),
            "pictures": counts,
        }
        rows.append(row)
        print(f"{spec}: {sum(right)} of {n}", flush=True)
    return {
        "schema": 1,
        "needle": NEEDLE,
        "around": AROUND,
        "split": SPLIT,
        "protocol": PROTOCOL,
        "asked": asked,
        "rows": rows,
        "about": describe_run(model),
    }


def by_pictures(row: dict[str, Any], count: int) -> str:
    """Right ones of the questions with so many pictures."""
    pairs = zip(row["outcomes"], row["pictures"], strict=True)
    right = [outcome == "1" for outcome, pictures in pairs if pictures == count]
    return f"{sum(right)} of {len(right)}"


def markdown(results: dict[str, Any]) -> str:
    """The results for people."""
    n = results["rows"][0]["n"]
    lines = [
        "# Needle test: several pictures, a question about one",
        "",
        "Two or three pictures, charts and one scene with a small object whose color is asked for; "
        f"{n} questions that the unpatched model answers, the first of {results['asked']} of the "
        f"{results['split']} split. Protocol `{results['protocol']}`: the cache is compressed with "
        "the question in sight, which is then taken back and asked again. Brackets are 95 % Wilson "
        "intervals. `python benchmarks/needle_kv.py`",
        "",
        "| plan | KV MiB | still right % (95 %) | 2 pictures | 3 pictures |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in results["rows"]:
        low, high = row["ci"]
        parts = " | ".join(by_pictures(row, count) for count in (2, 3))
        lines.append(
            f"| `{row['plan']}` | {row['kv_bytes'] / 2**20:.1f} | {100 * row['score']:.1f} "
            f"({100 * low:.1f}–{100 * high:.1f}) | {parts} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=60, help="questions")
    parser.add_argument("--output", default="benchmarks/results/needle-kv.json")
    options = parser.parse_args()
    results = json.loads(json.dumps(measure(options.n)))
    path = Path(options.output)
    files.ensure_writable(path.parent)
    files.write_json(path, results)
    files.write_text(path.with_suffix(".md"), markdown(results))
    print(markdown(results))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
