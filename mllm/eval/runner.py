"""`mllm eval`: lmms-eval's `simple_evaluate` with our model and tasks, one run per plan."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm.errors import DataError, MllmError
from mllm.eval import files, sources, stats, tasks
from mllm.eval.plans import UNPATCHED, check_plans, make_plan, with_adapter

_SUMS = ("kept_llm", "visual_in", "visual_avg", "prefill_flops", "kv_bytes")


def evaluate(
    pretrained: str,
    plans: Sequence[str],
    task_names: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 1,
    split: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    attn_implementation: str = "sdpa",
    seed: int = 0,
    output: str | os.PathLike | None = None,
    adapter: str | None = None,
) -> list[dict[str, Any]]:
    """Evaluate one model under several plans.

    Args:
        pretrained: model folder, hub name, or `tiny-llava`.
        plans: spec texts or plan folders; `none` is the model as it is.
        task_names: lmms-eval names: `yardstick`, `yardstick_<task>`, `easyvqa`, `mnist` and their
            tasks, or public ones, whose data lmms-eval fetches.
        limit: most samples per task.
        batch_size: requests per batch.
        split: `test` (the default), `dev` or `train`, for our own tasks.
        dtype, device, attn_implementation: how to load the model.
        seed: seed of the plans.
        output: folder for `<time>_results.json` and `<time>_samples_<task>.jsonl`, in one folder
            per plan.
        adapter: folder with what the plans have learnt, perhaps under another budget.

    Returns:
        One record per plan: `{plan, rows, mllm, files, results}`; `results` is what lmms-eval
        returned, without the samples.

    Raises:
        MllmError: lmms-eval is not installed, or a task does not exist.
        DataError: `output` cannot be written, or data cannot be fetched.
        PlanError: a plan that cannot run on the model; found before weights are read.
    """
    made = with_adapter([make_plan(plan, seed) for plan in plans], adapter)
    if output is not None:
        output = files.ensure_writable(output)
    _need_lmms_eval()
    manager = find_tasks(task_names)

    from lmms_eval.evaluator import simple_evaluate
    from tenacity import RetryError

    from mllm.eval.lmms import MllmModel
    from mllm.eval.provenance import describe_run
    from mllm.loading import load_model
    from mllm.routers import adapter as adapters

    check_plans(pretrained, made)
    loaded = load_model(
        pretrained, dtype=dtype, device=device, attn_implementation=attn_implementation
    )
    about = describe_run(loaded[0])
    records = []
    for plan in made:
        wanted = [_configured(name, split, limit) for name in task_names]
        model = MllmModel(pretrained, plan, batch_size=batch_size, loaded=loaded)
        try:
            results = simple_evaluate(
                model=model,
                model_args=f"pretrained={pretrained},plan={plan.spec or 'none'}",
                tasks=wanted,
                batch_size=batch_size,
                device=str(loaded[0].device),
                limit=limit,
                bootstrap_iters=0,
                task_manager=manager,
            )
        except RetryError as error:  # lmms-eval tries a download several times
            model.clean()
            cause = error.last_attempt.exception()
            raise DataError(
                f"the data of {', '.join(task_names)} cannot be fetched: {cause}",
                argument="tasks",
                given=", ".join(task_names),
                expected="a network, cached data, or the yardstick tasks",
            ) from error
        results["config"]["model"] = "mllm"
        own = {"seed": plan.seed, **adapters.digest(plan.folder)}
        records.append(_record(plan, results, about | own, model.seconds, output))
    return records


def find_tasks(names: Sequence[str]) -> Any:
    """A TaskManager that knows `names`; the index of public tasks is read only if needed.

    Raises:
        MllmError: a name that neither we nor lmms-eval know; it lists near names.
    """
    from lmms_eval.tasks import TaskManager

    manager = TaskManager(include_path=tasks.PATH, include_defaults=False)
    ours = manager.all_tasks
    for name in names:
        near = difflib.get_close_matches(name, ours, 3, 0.8)
        if near and name not in ours:  # a slip of ours: no need to read two thousand files
            raise _no_task(name, near)
    if set(names) <= set(ours):
        return manager
    manager = TaskManager(include_path=tasks.PATH, model_name="mllm")
    for name in names:
        if name not in manager.all_tasks:
            raise _no_task(name, difflib.get_close_matches(name, manager.all_tasks, 3, 0.5) or ours)
    return manager


def _no_task(name: str, near: list[str]) -> MllmError:
    return MllmError(
        f"there is no task {name!r}; did you mean: {', '.join(near)}?",
        argument="tasks",
        given=name,
        expected=", ".join(near),
    )


def _need_lmms_eval() -> None:
    if importlib.util.find_spec("lmms_eval") is None:
        raise MllmError(
            "lmms-eval is not installed; run scripts/install.sh, or "
            "pip install 'mllm-efficiency[eval-full]'",
            argument="tasks",
            expected="lmms-eval 0.7",
        )


def _configured(name: str, split: str | None, limit: int | None) -> str | dict[str, Any]:
    """A task for lmms-eval; one of ours makes no more samples than are asked for."""
    if not name.startswith("yardstick") and name not in (*sources.GROUPS, *sources.TASKS):
        if split is None:
            return name
        raise MllmError(
            f"{name} has no choice of split",
            argument="split",
            given=split,
            expected="no --split, or our own tasks only",
        )
    changes: dict[str, Any] = {} if split is None else {"test_split": split}
    if limit is not None:
        changes["dataset_kwargs"] = {"n": limit, "style": "plain"}
    return {"task": name, **changes} if changes else name


def _record(
    plan: Any, results: dict[str, Any], about: dict[str, Any], seconds: float, output: Path | None
) -> dict[str, Any]:
    samples = results.pop("samples")
    for rows in samples.values():
        for sample in rows:
            counts = (sample["token_counts"] or [None])[0]
            sample["mllm"] = counts["mllm"] if counts else None
            del sample["arguments"]
    costs = [s["mllm"] for rows in samples.values() for s in rows if s["mllm"]]
    totals = {name: sum(cost[name] for cost in costs) for name in _SUMS}
    results["mllm"] = {
        "plan": plan.to_dict(),
        "plan_sha256": plan.sha256,
        **about,
        "n": len(costs),
        "totals": totals | {"seconds": seconds},
    }
    record = {
        "plan": plan.spec or UNPATCHED,
        "rows": [_row(name, rows, results) for name, rows in samples.items()],
        "mllm": results["mllm"],
        "files": [],
        "results": results,
    }
    if output is not None:
        folder = files.ensure_writable(output / _slug(record["plan"]))
        stamp = time.strftime("%Y%m%d_%H%M%S")
        written = [files.write_json(folder / f"{stamp}_results.json", results)]
        for name, rows in samples.items():
            written.append(files.write_jsonl(folder / f"{stamp}_samples_{name}.jsonl", rows))
        record["files"] = [str(path) for path in written]
    return record


def _row(name: str, samples: list[dict], results: dict[str, Any]) -> dict[str, Any]:
    """One task: its score with a 95 % interval, and mean costs per sample."""
    costs = [sample["mllm"] for sample in samples if sample["mllm"]]
    n = len(samples)
    row = {"task": name, "n": n, **_score(samples, results["results"][name])}
    for field in _SUMS:
        row[field] = sum(cost[field] for cost in costs) / len(costs) if costs else None
    row["seconds"] = (
        sum((cost["ttft_s"] or 0) + cost["decode_s"] for cost in costs) / len(costs)
        if costs and all(cost["batch"] == 1 for cost in costs)
        else None
    )
    return row


def _score(samples: list[dict], scores: dict[str, Any]) -> dict[str, Any]:
    """Wilson interval for 0/1 metrics; for others, lmms-eval's own standard error."""
    metric = next(
        key
        for key, value in scores.items()
        if "," in key and "_stderr" not in key and isinstance(value, int | float)
    )
    name, score = metric.split(",")[0], scores[metric]
    values = [sample.get(name) for sample in samples]
    if all(value in (0, 1) for value in values):
        correct = int(sum(values))
        return {
            "metric": name,
            "score": correct / len(values),
            "ci": list(stats.wilson(correct, len(values))),
        }
    error = scores.get(metric.replace(name, f"{name}_stderr", 1))
    interval = None
    if isinstance(error, int | float):
        interval = [score - 1.96 * error, score + 1.96 * error]
    return {"metric": name, "score": score, "ci": interval}


def _slug(spec: str) -> str:
    """A spec as a folder name."""
    return re.sub(r"[^A-Za-z0-9.+=-]+", "_", spec)
