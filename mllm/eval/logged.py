"""The folders that `mllm eval` writes, read as cells: what reports and comparisons work on."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mllm.errors import DataError
from mllm.eval import sources
from mllm.eval.cells import SCHEMA
from mllm.eval.plans import UNPATCHED, budgets_slots
from mllm.eval.scoring import normalise
from mllm.plan import Plan

PREFIX = "yardstick_"
_ABOUT = ("weights_sha256", "dtype", "backend", "device", "threads", "versions", "commit")
_BUDGET = re.compile(r":(keep|budget)=[^:+]*")


@dataclass
class Logged:
    """What a folder holds.

    Attributes:
        cells: one for each plan and task; runs of the same plan later in time replace earlier ones.
        damaged: lines of samples that are not whole.
        graded: tasks that were left out because their answers are not simply right or wrong.
        costless: plans that were left out because no sample says how many tokens they kept.
    """

    cells: list[dict[str, Any]] = field(default_factory=list)
    damaged: int = 0
    graded: list[str] = field(default_factory=list)
    costless: list[str] = field(default_factory=list)

    def doc(self, cell: dict[str, Any], index: int) -> tuple[str, str]:
        """Question and answer of a sample, read where it lies."""
        with Path(cell["file"]).open("rb") as file:
            file.seek(int(cell["offsets"][index]))
            sample = json.loads(file.readline())
        doc = sample.get("doc") or {}
        question = doc.get("question") or doc.get("text") or sample.get("input") or ""
        return str(question), str(sample.get("target", ""))


def read(folder: Path) -> Logged:
    """Every run in a folder and the folders in it.

    Samples are read line by line. A method is a plan's spec text without its budget; the budget
    is the layer average that it reached, or the share of a KV cache's slots.

    Raises:
        DataError: there is no run, or one that this version cannot read.
    """
    found = Logged()
    if (about := folder / "evaluation.json").exists():
        _check_version(about)
    runs: dict[tuple, dict[str, Any]] = {}
    for path in sorted(folder.rglob("*_results.json")):
        results, about = _results(path)
        plan = Plan.from_dict(about["plan"])
        made = []
        stamp = path.name.removesuffix("results.json")
        for samples in sorted(path.parent.glob(f"{stamp}samples_*.jsonl")):
            task = samples.name.removesuffix(".jsonl").split("_samples_", 1)[1]
            if (cell := _cell(samples, task, results, about, found)) is not None:
                made.append(cell)
        costs = [(cell["visual_avg"], cell["n"]) for cell in made]
        costs = [(average, n) for average, n in costs if math.isfinite(average)]
        if made and plan.stages and not costs:  # tasks that only score given answers
            found.costless.append(plan.spec)
            continue
        average = sum(average * n for average, n in costs) / max(1, sum(n for _, n in costs))
        for cell in made:
            cell |= named(plan, average)
            runs[about["plan_sha256"], about.get("adapter_sha256"), plan.seed, cell["task"]] = cell
    if not runs:
        raise DataError(
            f"{folder} holds no results of mllm eval",
            argument="results",
            given=str(folder),
            expected="a folder given to mllm eval --output, or a JSON Lines file of mllm sweep",
        )
    found.cells = list(runs.values())
    _align(found.cells)
    return found


def _align(cells: list[dict[str, Any]]) -> None:
    """Leave out, in all runs of a task, the samples that one of them has lost; name the data."""
    alike: dict[tuple, list[dict[str, Any]]] = {}
    for cell in cells:
        alike.setdefault((cell["task"], cell["n"] + cell.pop("lost")), []).append(cell)
    for members in alike.values():
        common = functools.reduce(np.intersect1d, [cell["ids"] for cell in members])
        for cell in members:
            keep = np.flatnonzero(np.isin(cell["ids"], common))
            cell |= {"n": len(keep), "offsets": cell["offsets"][keep], "ids": cell["ids"][keep]}
            cell["outcomes"] = "".join(cell["outcomes"][i] for i in keep)
            cell["answers"] = [cell["answers"][i] for i in keep]
            asked = cell.pop("asked")
            if cell["task"] in sources.TASKS:
                cell["data"] = sources.source_of(cell["task"]).digest(cell["split"])
            else:
                text = "\n".join(asked[i] for i in keep)
                cell["data"] = hashlib.sha256(text.encode()).hexdigest()


def _check_version(path: Path) -> None:
    try:
        schema = json.loads(path.read_bytes()).get("schema")
    except (ValueError, AttributeError) as error:
        raise _foreign(path, "not what mllm eval writes") from error
    if schema != SCHEMA:
        raise _foreign(path, f"schema {schema!r}, and this mllm reads schema {SCHEMA}")


def named(plan: Plan, average: float) -> dict[str, Any]:
    """Method, budget and plan of a cell.

    Args:
        plan: that was run.
        average: visual tokens per decoder layer that it reached.
    """
    if not plan.stages:
        return {"method": UNPATCHED, "budget": None, "plan": UNPATCHED}
    shares = [stage.budget for stage in plan.stages if budgets_slots(stage)]
    on_cache = all(stage.site == "cache" for stage in plan.stages)
    budget: int | float = round(average)
    if on_cache:
        budget = shares[0] if shares and isinstance(shares[0], float) else 1.0
    return {"method": _BUDGET.sub("", plan.spec), "budget": budget, "plan": plan.spec}


def _results(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    try:
        results = json.loads(path.read_bytes())
        about = results["mllm"]
        missing = [name for name in ("plan", "plan_sha256", "n", *_ABOUT) if name not in about]
    except (ValueError, KeyError, TypeError) as error:
        raise _foreign(path, "not a whole results file of mllm eval") from error
    if missing:
        raise _foreign(path, f"written by another version of mllm: no {', '.join(missing)}")
    return results, about


def _foreign(path: Path, what: str) -> DataError:
    return DataError(
        f"{path}: {what}",
        argument="results",
        given=str(path),
        expected="a folder written by mllm eval of this version",
    )


def _cell(
    path: Path, task: str, results: dict[str, Any], about: dict[str, Any], found: Logged
) -> dict[str, Any] | None:
    """The samples of a task as a cell, without method and budget; None if they are graded."""
    metric = _metric(results["results"].get(task, {}))
    rows, damaged = [], found.damaged
    for offset, sample in _lines(path, found):
        value = sample.get(metric)
        value = value.get("score") if isinstance(value, dict) else value
        if value not in (0, 1):
            found.graded += [task] * (task not in found.graded)
            return None
        said = sample.get("filtered_resps") or [""]
        said = said[0] if isinstance(said, list) else said
        costs = sample.get("mllm") or {}
        asked = f"{sample['doc_id']} {sample.get('target')}"
        answer = normalise(str(said))
        rows.append((sample["doc_id"], offset, "01"[int(value)], answer, asked, costs))
    if not rows:
        return None
    rows.sort(key=lambda row: row[0])
    own = task.removeprefix(PREFIX)
    config = results.get("configs", {}).get(task, {})
    costs = [row[5] for row in rows]
    times = [cost.get("ttft_s") for cost in costs]
    return {
        "schema": SCHEMA,
        "task": own if own in sources.TASKS else task,
        "split": config.get("test_split") or "test",
        "seed": about.get("seed", 0),
        "n": len(rows),
        "outcomes": "".join(row[2] for row in rows),
        "answers": [row[3] for row in rows],
        **{
            name: _mean([cost.get(given) for cost in costs])
            for name, given in (
                ("visual_avg", "visual_avg"),
                ("kept_llm", "kept_llm"),
                ("flops", "prefill_flops"),
                ("kv_bytes", "kv_bytes"),
            )
        },
        "prefill_s": None if None in times else {"median": float(np.median(times)), "ci": None},
        "about": {name: about[name] for name in _ABOUT},
        "file": str(path),
        "offsets": np.array([row[1] for row in rows]),
        "ids": np.array([row[0] for row in rows]),
        "asked": [row[4] for row in rows],
        "lost": found.damaged - damaged,
    }


def _lines(path: Path, found: Logged) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whole samples of a file and where they begin; others are counted."""
    offset = 0
    with path.open("rb") as file:
        for line in file:
            try:
                sample = json.loads(line)
                if not isinstance(sample, dict) or "doc_id" not in sample:
                    raise _foreign(path, "a line is no sample of lmms-eval")
                yield offset, sample
            except ValueError as error:
                if isinstance(error, DataError):
                    raise
                found.damaged += bool(line.strip())
            offset += len(line)


def _metric(scores: dict[str, Any]) -> str:
    """The first metric of a task that has a number."""
    return next(
        (
            key.split(",")[0]
            for key, value in scores.items()
            if "," in key and "_stderr" not in key and isinstance(value, int | float)
        ),
        "",
    )


def _mean(values: list[float | None]) -> float:
    return float("nan") if not values or None in values else sum(values) / len(values)
