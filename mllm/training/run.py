"""One run of a recipe: its folder, its record, training, evaluation, model card."""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from mllm.errors import DataError, RecipeError
from mllm.eval import sources
from mllm.eval.files import write_json, write_text
from mllm.eval.provenance import commit, versions
from mllm.eval.stats import wilson
from mllm.plan import Plan
from mllm.training.card import write_card, write_loss_plot
from mllm.training.launch import World, barrier, joined, on_first, refuse_stages
from mllm.training.recipe import Recipe, load
from mllm.training.schema import EvalPart
from mllm.training.stages import RECORD, plan_of, save_whole, tune

BATCH = 16  # questions answered at once
# What a run writes, and so what `output.overwrite` may delete.
OWN = (RECORD, "recipe.yaml", "metrics.jsonl", "eval.json", "README.md", "loss.png", "routers.png")
OWN_FOLDERS = ("model", "adapter", "routers", "checkpoint-*", "stage-*", ".saving", "runs")


def run(recipe: Recipe, resume: bool | str = False) -> dict[str, Any]:
    """Train, evaluate and describe; the content of `run.json` at the end.

    In many processes, all of them train, and the first one writes the folder and evaluates.

    Args:
        recipe: validated.
        resume: False starts anew; True continues the run in `output.dir`; a path is a run folder,
            or one checkpoint in it.

    Returns:
        The record, with `folder` and `eval` (the scores); `status` is "complete", or "stopped"
        after SIGTERM (a checkpoint was saved).

    Raises:
        RecipeError: the output folder cannot be used, the run there is of another recipe or of
            another number of processes, or the loss is no number any more.
        DataError: data, model or checkpoint cannot be read, or the disk is full.
    """
    with joined(recipe) as here:
        return _run(recipe, resume, here)


def _run(recipe: Recipe, resume: bool | str, here: World) -> dict[str, Any]:
    folder, checkpoint = _place(recipe, resume)
    record = on_first(lambda: _open(recipe, folder, bool(resume), here.size))
    if record["status"] == "complete":
        return _report(folder, record)
    started = time.monotonic()
    record["status"] = "failed"  # unless one of the lines below says otherwise
    try:
        record["status"] = _work(recipe, folder, record, checkpoint or bool(resume), here)
    except (KeyboardInterrupt, SystemExit):
        record["status"] = "stopped"
        raise
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise DataError(
            f"no room is left on the disk of {folder}; whole checkpoints are kept",
            argument="output.dir",
            given=folder,
            expected="more room on the disk, then --resume",
        ) from error
    finally:
        record["seconds"] += round(time.monotonic() - started, 1)
        # Without room for the record, the error that is on its way says so.
        failed = record["status"] == "failed"
        with contextlib.suppress(OSError) if failed else contextlib.nullcontext():
            if here.first:
                write_json(folder / RECORD, record)
    if record["status"] == "complete" and here.first:
        write_card(folder, recipe, record)
    return _report(folder, record)


def _report(folder: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The record with its folder and scores."""
    scores = folder / "eval.json"
    rows = json.loads(scores.read_text())["rows"] if scores.is_file() else []
    shown = [{k: v for k, v in row.items() if k != "outcomes"} for row in rows]
    return {**record, "folder": str(folder), "eval": shown}


def _work(
    recipe: Recipe, folder: Path, record: dict[str, Any], resume: Path | bool, here: World
) -> str:
    """Train unless that is done, then evaluate; the new status."""
    if not (folder / "model").is_dir():
        if recipe.from_scratch:
            from mllm.training.pretrain import pretrain

            refuse_stages(recipe, here)
            trained = pretrain(recipe, folder, bool(resume))
        else:
            trained = tune(recipe, folder, record, resume, here)
        if here.first:
            write_loss_plot(folder)
        if trained is None:
            return "stopped"
        if here.first:
            save_whole(folder, recipe.tunes()[-1][1].plan, *trained)
        del trained
    barrier()  # before the evaluation, which may take longer than the others wait
    if recipe.eval and here.first:
        found = evaluate(folder / "model", recipe.eval)
        if recipe.eval.base:
            found["base"] = evaluate(recipe.model.path, recipe.eval)["rows"]
        write_json(folder / "eval.json", found)
    return "complete"


def evaluate(path: str | Path, part: EvalPart) -> dict[str, Any]:
    """Score a model on tasks of `mllm.eval.sources` under each plan, greedily.

    Returns:
        `{schema, split, style, rows: [{task, plan, n, correct, score, ci, visual_avg, outcomes}]}`;
        `plan` None is the unpatched model, `outcomes` one character a sample ("1" right).
    """
    from mllm.eval.asking import Questions, SharedTower, answer_all, marks
    from mllm.eval.plans import patched_with
    from mllm.loading import load_model
    from mllm.routers import adapter as adapters

    names = dict.fromkeys(task for name in part.tasks for task in sources.expand(name))
    sizes = {task: sources.at_most(task, part.split, part.limit) for task in names}
    rows = []
    model, processor = load_model(path)
    shared = SharedTower(model)
    with tqdm(total=sum(sizes.values()) * len(part.plans), desc="evaluate", file=sys.stderr) as bar:
        for task, n in sizes.items():
            drawn = sources.samples(task, part.split, n, part.style)
            questions = Questions(processor, drawn, BATCH, model.dtype, model.device)
            for text in part.plans:
                plan = plan_of(text) if text else Plan([])
                with patched_with(model, plan) as patched, shared.used_by(plan):
                    if patched is not None and adapters.belongs(path, patched):
                        patched.load_adapter(path)
                    answers = answer_all(model, processor, questions, patched, bar.update)
                right = marks(questions, answers)
                tokens = [given.efficiency["visual_avg"] for given in answers] if text else None
                rows.append(
                    {
                        "task": task,
                        "plan": text,
                        "n": len(right),
                        "correct": sum(right),
                        "score": sum(right) / len(right),
                        "ci": list(wilson(sum(right), len(right))),
                        "visual_avg": sum(tokens) / len(tokens) if tokens else None,
                        "outcomes": "".join("01"[r] for r in right),
                    }
                )
            shared.forget()
    return {"schema": 1, "split": part.split, "style": part.style, "rows": rows}


def _place(recipe: Recipe, resume: bool | str) -> tuple[Path, Path | None]:
    """The run folder, and the checkpoint to resume from if one was named."""
    folder = Path(recipe.output.dir)
    if not isinstance(resume, str):
        return folder, None
    path = Path(resume)
    if not path.is_dir():
        raise DataError(
            f"cannot resume from {path}: no such folder",
            argument="resume",
            given=path,
            expected="a run folder or a checkpoint in it",
        )
    if (path / RECORD).is_file():
        return path, None
    if recipe.stages:
        raise DataError(
            f"{path} is no run folder; a staged run resumes as a whole",
            argument="resume",
            given=path,
            expected=f"a folder with {RECORD}",
        )
    return path.parent, path


def _open(recipe: Recipe, folder: Path, resume: bool, processes: int) -> dict[str, Any]:
    """Make or reopen the run folder; its record."""
    found = folder / RECORD
    if found.is_file() and not _own(found):
        raise RecipeError(
            f"{found} is no record of a run, so nothing is written there or deleted",
            argument="output.dir",
            given=folder,
            expected="a new or empty folder, or one that mllm train has written",
        )
    if resume:
        if not found.is_file():
            raise RecipeError(
                f"nothing to resume: {folder} holds no run",
                argument="resume",
                given=folder,
                expected="the folder of a run that was stopped",
            )
        record = json.loads(found.read_text())
        if record["recipe_sha256"] != recipe.sha256:
            raise RecipeError(
                f"the run in {folder} was started from another recipe or other overrides",
                argument="resume",
                given=recipe.sha256[:12],
                expected=f"the recipe kept in {folder / 'recipe.yaml'}",
            )
        if record.get("processes", 1) != processes:
            raise RecipeError(
                f"the run in {folder} was started in {record.get('processes', 1)} processes, and "
                f"goes on in as many: {processes} would see other batches",
                argument="nproc",
                given=processes,
                expected=f"--nproc {record.get('processes', 1)}",
            )
        return record
    if found.is_file() and not recipe.output.overwrite:
        raise RecipeError(
            f"{folder} already holds a run; continue it with --resume, replace it with "
            "output.overwrite=true, or choose another output.dir",
            argument="output.dir",
            given=folder,
            expected="a new folder, --resume, or output.overwrite=true",
        )
    try:
        if folder.is_dir() and any(folder.iterdir()) and not found.is_file():
            raise RecipeError(
                f"{folder} is not empty and holds no run, so nothing is written there",
                argument="output.dir",
                given=folder,
                expected="a new or empty folder",
            )
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        record = {
            "status": "running",
            "mllm_run": 1,
            "recipe_sha256": recipe.sha256,
            "versions": versions(),
            "commit": commit(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "threads": torch.get_num_threads(),
            "processes": processes,
            "data_sha256": [],
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "seconds": 0.0,
        }
        write_text(folder / "recipe.yaml", recipe.to_yaml())
        write_json(folder / RECORD, record)
    except OSError as error:
        raise RecipeError(
            f"cannot write the run folder {folder}: {error.strerror}",
            argument="output.dir",
            given=folder,
            expected="a folder that can be written",
        ) from error
    return record


def _own(path: Path) -> bool:
    """Whether a run of a recipe has written this record."""
    try:
        return "mllm_run" in json.loads(path.read_text())
    except (ValueError, TypeError):
        return False


def _clear(folder: Path) -> None:
    """Delete what an earlier run wrote, and nothing else."""
    for name in OWN:
        (folder / name).unlink(missing_ok=True)
    for pattern in OWN_FOLDERS:
        for path in folder.glob(pattern):
            shutil.rmtree(path)


def train(
    source: str | Path, overrides: list[str], resume: bool | str = False, tiny: bool = False
) -> dict[str, Any]:
    """`load` and `run`: what `mllm train` does in one process."""
    return run(load(source, overrides, tiny), resume)
