"""Turn a finished run of `tiny-llava` into the embedded model: weights, admission, card, tasks.

`python -m mllm.training.release runs/tiny-llava`; for tasks that the yardstick got afterwards,
`python -m mllm.training.release --tasks needle_attr --note "why"`.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mllm
from mllm.errors import DataError
from mllm.eval.files import write_json, write_text
from mllm.eval.provenance import weights_sha256
from mllm.loading import load_model
from mllm.training.recipe import load
from mllm.training.run import evaluate
from mllm.training.schema import EvalPart
from mllm.training.trainer import sha256_file
from mllm.yardstick import TASKS, samples
from mllm.yardstick.saliency import cls_attention_auc

PACKAGE = Path(mllm.__file__).parent
GROUP = Path("eval", "tasks", "yardstick", "_yardstick.yaml")  # in PACKAGE
LIMIT_BYTES = 16 * 2**20
RANDOM = "random:keep=58"  # 10 % of 576
RANDOM_LLM = "randomllm:layer=2:keep=58"  # the same inside the language model
# The admission rule: accuracy without a plan, points that RANDOM must lose, questions.
LEAST_ACCURACY, LEAST_LOSS, LEAST_N = 0.85, 0.10, 500


def admission(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Per evaluated task: accuracy without a plan, under RANDOM and under RANDOM_LLM, and whether
    the task counts."""
    by_plan = {(row["task"], row["plan"]): row for row in rows}
    table = {}
    for task in (task for task in TASKS if (task, None) in by_plan):
        full, few, late = (by_plan[task, plan] for plan in (None, RANDOM, RANDOM_LLM))
        table[task] = {
            "n": full["n"],
            "accuracy": full["score"],
            "ci": full["ci"],
            "random_10_percent": {"accuracy": few["score"], "ci": few["ci"], "plan": RANDOM},
            "randomllm_10_percent": {
                "accuracy": late["score"],
                "ci": late["ci"],
                "plan": RANDOM_LLM,
            },
            "admitted": full["n"] >= LEAST_N
            and full["score"] >= LEAST_ACCURACY
            and full["score"] - few["score"] >= LEAST_LOSS,
        }
    return table


def release(folder: Path, package: Path = PACKAGE) -> dict[str, Any]:
    """Copy `folder/model` into the package with `yardstick.json` and a model card.

    The group of lmms-eval tasks that are to be quoted becomes that of the admitted tasks.

    Args:
        folder: of the run, with `eval.json` on its final model.
        package: the folder of `mllm`.

    Raises:
        DataError: the run is not complete, or the weights are larger than 16 MiB.
    """
    target = package / "assets" / "tiny_llava"
    record = json.loads((folder / "run.json").read_text())
    weights = folder / "model" / "model.safetensors"
    if record["status"] != "complete":
        raise DataError(f"the run in {folder} is {record['status']}", argument="run", given=folder)
    if weights.stat().st_size > LIMIT_BYTES:
        raise DataError(f"{weights} is larger than 16 MiB", argument="run", given=folder)
    recipe = load(folder / "recipe.yaml")
    scores = json.loads((folder / "eval.json").read_text())
    model, processor = load_model(folder / "model", attn_implementation="eager")
    scenes = samples("exist", "dev", 50) + samples("needle", "dev", 50)
    data = {
        "schema": 1,
        "recipe_sha256": recipe.sha256,
        "seeds": [stage.train["seed"] for stage in recipe.stages],
        "steps": [stage.train["max_steps"] for stage in recipe.stages],
        "device": record["device"],
        "threads": record["threads"],
        "seconds": record["seconds"],
        "versions": record["versions"],
        "notes": record.get("notes", []),
        "file_sha256": sha256_file(weights),
        "weights_sha256": weights_sha256(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "split": scores["split"],
        "style": scores["style"],
        "cls_attention_auc": round(cls_attention_auc(model, processor, scenes), 4),
        "tasks": admission(scores["rows"]),
    }
    shutil.copytree(folder / "model", target, dirs_exist_ok=True)
    _publish(data, package)
    return data


def add_tasks(tasks: Sequence[str], note: str, package: Path = PACKAGE) -> dict[str, Any]:
    """Score tasks, that the yardstick got after the release, on the embedded model as it is.

    Args:
        tasks: of `mllm.yardstick.TASKS`; what was known of them is replaced.
        note: a line of the card.
        package: as for :func:`release`.

    Raises:
        DataError: unknown task.
    """
    target = package / "assets" / "tiny_llava"
    data = json.loads((target / "yardstick.json").read_text())
    part = EvalPart(
        tasks=list(tasks),
        plans=[None, RANDOM, RANDOM_LLM],
        limit=LEAST_N,
        split=data["split"],
        style=data["style"],
    )
    known = data["tasks"] | admission(evaluate(target, part)["rows"])
    data["tasks"] = {task: known[task] for task in TASKS if task in known}
    data["notes"].append(note)
    _publish(data, package)
    return data


def _publish(data: dict[str, Any], package: Path) -> None:
    target = package / "assets" / "tiny_llava"
    write_json(target / "yardstick.json", data)
    write_text(target / "README.md", card(data))
    write_text(package / GROUP, group(data))


def group(data: dict[str, Any]) -> str:
    """The lmms-eval group of the admitted tasks, from `yardstick.json`."""
    lines = [
        "# The tasks that the shipped model learnt (`mllm.yardstick.ADMITTED`): the ones to quote.",
        "# Written by `mllm.training.release`.",
        "group: yardstick",
        "task:",
        *(f"  - yardstick_{task}" for task, row in data["tasks"].items() if row["admitted"]),
        "aggregate_metric_list:",
        "  - metric: exact_match",
        "    aggregation: mean",
        "    weight_by_size: true",
        "metadata:",
        "  version: 1",
    ]
    return "\n".join(lines) + "\n"


def card(data: dict[str, Any]) -> str:
    """The model card, from `yardstick.json`."""
    lines = [
        "# tiny-llava",
        "",
        "A LLaVA of 8.2 million parameters: CLIP-style tower (336 px, patch 14, 6 layers of 192, "
        "[CLS] and 576 patches), MLP projector, LLaMA of 8 layers of 256, own tokenizer. Trained "
        "from nothing on procedurally drawn scenes, as a yardstick for methods that drop visual "
        "tokens: it answers short questions about such drawings and nothing else. It says nothing "
        "about photographs, and its size says nothing about speed.",
        "",
        f"- recipe: `mllm train recipes/tiny-llava.yaml`, sha256 `{data['recipe_sha256']}`",
        f"- seeds {_words(data['seeds'])}; steps {_words(data['steps'])}, one number a stage",
        f"- {data['device']}, {data['threads']} threads, {data['seconds'] / 60:.0f} minutes with "
        "the final evaluation, on a machine shared with other work",
        f"- torch {data['versions']['torch']}, transformers {data['versions']['transformers']}; "
        f"{data['dtype']} weights, file sha256 `{data['file_sha256']}`",
        "- attention of the [CLS] row finds drawn objects: AUC "
        f"{data['cls_attention_auc']:.3f} on 100 dev scenes",
        "- one training run; the style and the question templates of the test split are those of "
        "training (other seeds). Patches were trained with labels and [CLS] with a presence loss, "
        "which favours methods guided by attention or features.",
        *(f"- {note}" for note in data["notes"]),
        "",
        "## What it has learnt",
        "",
        f"Test split, greedy answers, exact match. A task counts if accuracy is at least "
        f"{LEAST_ACCURACY:.0%}, `{RANDOM}` (10 % of the tokens) loses at least "
        f"{100 * LEAST_LOSS:.0f} points, and n is at least {LEAST_N}.",
        "",
        "| task | n | accuracy | 95 % interval | random, 10 % of tokens | 95 % interval "
        "| random at layer 2 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = data["tasks"]
    for task, row in rows.items():
        if row["admitted"]:
            few, late = row["random_10_percent"], row["randomllm_10_percent"]
            lines.append(
                f"| {task} | {row['n']} | {row['accuracy']:.1%} | {_interval(row['ci'])} "
                f"| {few['accuracy']:.1%} | {_interval(few['ci'])} | {late['accuracy']:.1%} |"
            )
    lines += ["", "Not learnt, or not sensitive, and not to be quoted:", ""]
    for task in TASKS:
        if task not in rows:
            lines.append(f"- {task}: not scored")
        elif not rows[task]["admitted"]:
            few = rows[task]["random_10_percent"]["accuracy"]
            lines.append(f"- {task}: {rows[task]['accuracy']:.1%}, random {few:.1%}")
    return "\n".join(lines) + "\n"


def _interval(ci: list[float]) -> str:
    return f"{ci[0]:.1%} to {ci[1]:.1%}"


def _words(values: list[int]) -> str:
    return ", ".join(str(value) for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="the folder of a finished run")
    parser.add_argument("--tasks", nargs="+", help="score these on the embedded model instead")
    parser.add_argument("--note", help="with --tasks: why, a line of the card")
    given = parser.parse_args()
    if (given.run is None) == (given.tasks is None) or bool(given.tasks) != bool(given.note):
        parser.error("give a run, or --tasks and --note")
    if given.tasks:
        add_tasks(given.tasks, given.note)
    else:
        release(given.run)


if __name__ == "__main__":
    main()
