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
from mllm.eval.run_folder import MORE
from mllm.eval.scoring import normalise
from mllm.plan import Plan

PREFIX = "yardstick_"
_ABOUT = ("weights_sha256", "dtype", "backend", "device", "threads", "versions", "commit")
_BUDGET = re.compile(r":(keep|budget)=[^:+]*")


@dataclass
class Logged:
    """What a folder holds.

    Attributes:
        cells: one for each plan and task: of the run that asked most, and of such the newest.
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
    is the layer average that it reached, or the share of a KV cache's slots. A plan that would
    have the name of another one is called by its whole text, and by its adapter.

    Raises:
        DataError: there is no run, or one that this version cannot read.
    """
    found = Logged()
    if (about := folder / "evaluation.json").exists():
        _check_version(about)
    runs: dict[tuple, dict[str, Any]] = {}
    plans: dict[tuple, tuple[Plan, dict[tuple, dict[str, Any]]]] = {}
    for path in sorted(folder.rglob("*_results.json")):
        # What tasks write themselves may be called so, too.
        if any(part.endswith(MORE) for part in path.relative_to(folder).parts[:-1]):
            continue
        results, about = _results(path)
        plan = Plan.from_dict(about["plan"])
        made = []
        stamp = path.name.removesuffix("results.json")
        for samples in sorted(path.parent.glob(f"{stamp}samples_*.jsonl")):
            task = samples.name.removesuffix(".jsonl").split("_samples_", 1)[1]
            if (cell := _cell(samples, task, results, about, found)) is not None:
                made.append(cell)
        costs = [cell["visual_avg"] for cell in made]
        if made and plan.stages and not any(map(math.isfinite, costs)):
            found.costless.append(plan.spec)  # tasks that only score given answers
            continue
        adapter = about.get("adapter_sha256")
        for cell in made:
            key = about["plan_sha256"], adapter, plan.seed, cell["task"]
            if key not in runs or _asked(cell) >= _asked(runs[key]):
                runs[key] = cell
                plans.setdefault((plan.spec, adapter), (plan, {}))[1][key] = cell
    if not runs:
        raise DataError(
            f"{folder} holds no results of mllm eval",
            argument="results",
            given=str(folder),
            expected="a folder given to mllm eval --output, or a JSON Lines file of mllm sweep",
        )
    _name(plans)
    found.cells = list(runs.values())
    _align(found.cells)
    return found


def ids(cell: dict[str, Any]) -> np.ndarray:
    """Numbers of a cell's questions in their split, rising: int64 `[n]`."""
    return cell["ids"] if "ids" in cell else np.arange(cell["n"])


def only(cell: dict[str, Any], wanted: np.ndarray) -> dict[str, Any]:
    """A cell with those of its questions whose numbers are among `wanted`."""
    keep = np.flatnonzero(np.isin(ids(cell), wanted))
    if len(keep) == cell["n"]:
        return cell
    cut = {name: [cell[name][i] for i in keep] for name in ("answers", "asked") if cell.get(name)}
    cut |= {name: cell[name][keep] for name in ("offsets",) if name in cell}
    outcomes = "".join(cell["outcomes"][i] for i in keep)
    return cell | cut | {"n": len(keep), "outcomes": outcomes, "ids": ids(cell)[keep]}


def _asked(cell: dict[str, Any]) -> int:
    return cell["n"] + cell["lost"]


def _name(plans: dict[tuple, tuple[Plan, dict[tuple, dict[str, Any]]]]) -> None:
    """Method, budget and plan of the cells of each plan; no two plans get the same.

    Args:
        plans: (spec text, hash of the adapter) -> the plan and its cells. All tasks of a plan have
            one budget, whichever command they were asked by.
    """
    taken, specs = set(), set()
    for (spec, adapter), (plan, members) in plans.items():
        costs = [(cell["visual_avg"], cell["n"]) for cell in members.values()]
        costs = [(average, n) for average, n in costs if math.isfinite(average)]
        average = sum(average * n for average, n in costs) / max(1, sum(n for _, n in costs))
        names = named(plan, average)
        if (names["method"], names["budget"]) in taken:
            names["method"] = spec
            if spec in specs:
                names["method"] += f" ({adapter[:8] if adapter else 'no adapter'})"
        taken.add((names["method"], names["budget"]))
        specs.add(spec)
        for cell in members.values():
            cell |= names


def _align(cells: list[dict[str, Any]]) -> None:
    """Leave out, in all runs of a task, the samples that one of them has lost; name the data."""
    alike: dict[tuple, list[dict[str, Any]]] = {}
    for cell in cells:
        alike.setdefault((cell["task"], _asked(cell)), []).append(cell)
        del cell["lost"]
    for members in alike.values():
        common = functools.reduce(np.intersect1d, [cell["ids"] for cell in members])
        for cell in members:
            cell |= only(cell, common)
            if cell["task"] in sources.TASKS:
                cell["data"] = sources.source_of(cell["task"]).digest(cell["split"])
                del cell["asked"]
            else:
                text = "\n".join(cell["asked"])
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
    rows, damaged, known = [], found.damaged, set()
    for offset, sample in _lines(path, found):
        if sample["doc_id"] in known:  # again, through another of the task's filters
            continue
        known.add(sample["doc_id"])
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
        "asked": [row[4] for row in rows],  # what tells public questions from others
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
