"""`mllm eval`: lmms-eval's `simple_evaluate` with our model and tasks, one run per plan."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import re
import tempfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm.errors import DataError, MllmError
from mllm.eval import files, sources, stats
from mllm.eval.plans import UNPATCHED, check_plans, make_plan, with_adapter

_LONGEST = 200
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
    data_dir: str | os.PathLike | None = None,
    cache: str | os.PathLike | None = None,
    workers: int = 1,
    task_changes: Mapping[str, Mapping[str, Any]] | None = None,
    load: Callable[[str | None], tuple[Any, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Evaluate one model under several plans.

    With `output`, answers are kept in it as they come: the same call goes on where a killed one
    stopped, and asks nothing again when it is repeated.

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
            per plan, and for the answers (`responses.jsonl`); of one model and version of mllm.
        adapter: folder with what the plans have learnt, perhaps under another budget.
        data_dir: folder with local copies of public data sets (see `mllm.eval.public`).
        cache: folder for the answers instead of `output`, which several runs share.
        workers: processes that answer, on the CPU or with a GPU each; results do not depend on it.
        task_changes: keys of public tasks' configurations to set, by task.
        load: loads model and processor on a device, instead of `pretrained` with `dtype` and
            `attn_implementation`; picklable, if there are several workers.

    Returns:
        One record per plan: `{plan, rows, mllm, files, answers, results}`; `answers` counts
        `{kept, computed, damaged}`, and `results` is what lmms-eval returned, without the samples.

    Raises:
        MllmError: lmms-eval is not installed, a task does not exist, or workers without a GPU.
        DataError: `output` or `cache` cannot be written, or belongs to another model or version;
            or data cannot be had.
        PlanError: a plan that cannot run on the model, or that has not learnt what it must; found
            before weights are read.
    """
    made = with_adapter([make_plan(plan, seed) for plan in plans], adapter)
    task_names = list(dict.fromkeys(task_names))
    with contextlib.ExitStack() as stack:
        folder = None
        if output is not None:
            from mllm.eval.run_folder import RunFolder

            folder = stack.enter_context(RunFolder(output))
        if cache is not None:
            files.ensure_writable(cache, "cache")
        need_lmms_eval()
        _need_one_process()

        from mllm.eval import public, responses
        from mllm.eval.engines import Here, Pool, devices_for, load_on

        data_dir = existing(data_dir)
        manager = public.find_tasks(task_names, task_changes, data_dir)
        devices = devices_for(workers, device) if workers != 1 else []
        if load is None:
            check_plans(pretrained, made, learnt=True)
            load = functools.partial(
                load_on, pretrained, dtype=dtype, attn_implementation=attn_implementation
            )
        wanted = [_configured(name, split, limit) for name in task_names]
        if not all(map(_is_ours, task_names)):
            public.check_data(manager, wanted, data_dir)
        if devices:
            engine = stack.enter_context(Pool(load, devices, pretrained))
        else:
            engine = Here(*load(device), pretrained)
        kept = None
        if folder is not None:
            folder.claim(engine.facts)
        if cache is not None:
            path = responses.in_cache(cache, engine.facts)
            kept = stack.enter_context(responses.Responses(path, engine.facts, "cache"))
        elif folder is not None:
            path = folder.path / responses.NAME
            kept = stack.enter_context(responses.Responses(path, engine.facts))
        command = {
            "tasks": list(task_names), "limit": limit, "split": split, "changes": task_changes,
            "batch_size": batch_size, "backend": engine.facts["backend"],
            "device": engine.facts["device"], "data_dir": data_dir and str(data_dir.resolve()),
        }  # fmt: skip
        return [
            _evaluated(
                plan, pretrained, [_configured(name, split, limit) for name in task_names],
                manager, batch_size, limit, engine, kept, folder, command,
            )
            for plan in made
        ]  # fmt: skip


def _evaluated(
    plan: Any,
    pretrained: str,
    wanted: list[Any],
    manager: Any,
    batch_size: int,
    limit: int | None,
    engine: Any,
    kept: Any,
    folder: Any,
    command: dict[str, Any],
) -> dict[str, Any]:
    """One plan: its record, and its files."""
    from lmms_eval.evaluator import simple_evaluate

    from mllm.eval.lmms import MllmModel
    from mllm.routers import adapter as adapters

    own = {"seed": plan.seed, **adapters.digest(plan.folder)}
    model = MllmModel(pretrained, plan, batch_size=batch_size, engine=engine, kept=kept)
    with tempfile.TemporaryDirectory() as beside:  # some tasks write files for a test server
        name, stamp = _slug(plan.spec or UNPATCHED), ""
        if folder is not None:
            stamp = folder.stamp(command | {"plan": plan.sha256, **own})
            beside = folder.fresh(f"{name}/{stamp}")
        try:
            results = simple_evaluate(
                model=model,
                model_args=f"pretrained={pretrained},plan={plan.spec or 'none'}",
                tasks=wanted,
                batch_size=batch_size,
                device=str(engine.device),
                limit=limit,
                bootstrap_iters=0,
                task_manager=manager,
                cli_args=Namespace(
                    output_path=str(beside), process_with_media=True, reasoning_tags=None
                ),
            )
        finally:
            engine.release()
    results["config"]["model"] = "mllm"
    del results["config"]["resolved_cli_args"]
    samples = results.pop("samples")
    for config in results["configs"].values():
        for key, value in config.items():
            if isinstance(value, str):  # lmms-eval writes functions as text
                config[key] = files.without_addresses(value)
    record = _record(plan, results, samples, engine.about | own, model.seconds)
    record["answers"] = model.counts | {"damaged": kept.damaged if kept is not None else 0}
    if folder is not None:
        into = files.ensure_writable(folder.path / name)
        # The results come last: where they are, everything is.
        written = [
            files.write_jsonl(into / f"{stamp}_samples_{task}.jsonl", rows)
            for task, rows in samples.items()
        ]
        whole = files.write_json(into / f"{stamp}_results.json", results)
        record["files"] = [str(path) for path in (whole, *written)]
    return record


def need_lmms_eval() -> None:
    """Raises MllmError where lmms-eval is not installed."""
    if importlib.util.find_spec("lmms_eval") is None:
        raise MllmError(
            "lmms-eval is not installed; run scripts/install.sh, or "
            "pip install 'mllm-efficiency[eval-full]'",
            argument="tasks",
            expected="lmms-eval 0.7",
        )


def _need_one_process() -> None:
    """Under torchrun or accelerate, plain lmms-eval spreads tasks over the ranks itself."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise MllmError(
            "mllm eval starts its own processes: give --workers N instead of starting it with "
            "torchrun or accelerate launch (python -m lmms_eval --model mllm runs under those)",
            argument="workers",
            given=os.environ["WORLD_SIZE"],
            expected="one process with --workers",
        )


def existing(data_dir: str | os.PathLike | None) -> Path | None:
    """`data_dir` as a path; DataError if it is not there."""
    if data_dir is None or Path(data_dir).is_dir():
        return data_dir and Path(data_dir)
    raise DataError(
        f"there is no folder {data_dir} with local copies of data sets",
        argument="data_dir",
        given=data_dir,
        expected="a folder that exists",
    )


def _is_ours(name: str) -> bool:
    return name.startswith("yardstick") or name in (*sources.GROUPS, *sources.TASKS)


def _configured(name: str, split: str | None, limit: int | None) -> str | dict[str, Any]:
    """A task for lmms-eval; one of ours makes no more samples than are asked for."""
    if not _is_ours(name):
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
    plan: Any,
    results: dict[str, Any],
    samples: dict[str, list[dict[str, Any]]],
    about: dict[str, Any],
    seconds: float,
) -> dict[str, Any]:
    for rows in samples.values():
        for sample in rows:
            counts = (sample["token_counts"] or [None])[0]
            sample["mllm"] = counts["mllm"] if counts else None
            del sample["arguments"]
    samples = {name: _once(rows) for name, rows in samples.items()}
    costs = [s["mllm"] for rows in samples.values() for s in rows if s["mllm"]]
    totals = {name: sum(cost[name] for cost in costs) for name in _SUMS}
    results["mllm"] = {
        "plan": plan.to_dict(),
        "plan_sha256": plan.sha256,
        **about,
        "n": len(costs),
        "totals": totals | {"seconds": seconds},
    }
    return {
        "plan": plan.spec or UNPATCHED,
        "rows": [_row(name, rows, results) for name, rows in samples.items()],
        "mllm": results["mllm"],
        "files": [],
        "results": results,
    }


def _once(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first sample of each document: a task with several filters logs it for each of them."""
    return list({sample["doc_id"]: sample for sample in reversed(samples)}.values())[::-1]


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
    """Wilson interval for 0/1 metrics; for others, lmms-eval's own standard error.

    A task that only writes answers for a test server has no score.
    """
    metrics = [key for key in scores if "," in key and "_stderr" not in key]
    numbers = [key for key in metrics if isinstance(scores[key], int | float)]
    if not numbers:
        return {"metric": next(iter(metrics), "").split(",")[0], "score": None, "ci": None}
    metric = numbers[0]
    name, score = metric.split(",")[0], scores[metric]
    values = [sample.get(name) for sample in samples]
    values = [value.get("score") if isinstance(value, dict) else value for value in values]
    if all(value in (0, 1) for value in values) and sum(values) == round(score * len(values), 9):
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
    """A spec as a folder name, which file systems bound to 255 characters."""
    name = re.sub(r"[^A-Za-z0-9.+=-]+", "_", spec)
    if len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST - 17]}-{hashlib.sha256(spec.encode()).hexdigest()[:16]}"
