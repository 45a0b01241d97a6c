"""Fine-tuning in one stage or several: data, checks, training, and the model handed on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mllm.errors import DataError
from mllm.eval.files import write_json
from mllm.plan import PLAN_FILE, Plan
from mllm.routers.adapter import FILES as ADAPTER_FILES
from mllm.training.launch import World, anywhere, barrier
from mllm.training.recipe import Recipe

RECORD = "run.json"
#: Folder of what a plan has learnt, in a run and in a checkpoint of LoRA.
ROUTERS = "routers"


def plan_of(text: str) -> Plan:
    """A plan by its spec, or by the folder it was saved in."""
    return Plan.from_pretrained(text) if Path(text).is_dir() else Plan.from_spec(text)


def save_whole(folder: Path, plan: str | None, model: Any, processor: Any) -> None:
    """Write `folder/model` by rename: weights, processor and the plan it was trained with."""
    fresh = folder / ".saving"
    shutil.rmtree(fresh, ignore_errors=True)
    model.save_pretrained(fresh)
    processor.save_pretrained(fresh)
    for path in fresh.iterdir():
        path.chmod(0o644)  # safetensors writes files that only their owner can read
    if plan:
        plan_of(plan).save_pretrained(fresh)
    if (learnt := folder / ROUTERS).is_dir():  # with the layers that the plan had
        for name in (PLAN_FILE, *ADAPTER_FILES):
            shutil.copyfile(learnt / name, fresh / name)
    fresh.rename(folder / "model")


def tune(
    recipe: Recipe, folder: Path, record: dict[str, Any], resume: Path | bool, here: World
) -> tuple[Any, Any] | None:
    """Fine-tune, stage after stage; the data and settings of all are checked before the first.

    A stage works in `folder/stage-N-name` and leaves its model there, which the next one reads;
    without stages, and in the end, the model is returned.

    Args:
        recipe: not from scratch.
        folder: the run folder.
        record: the content of `run.json`; gets `data_sha256`, `samples`, `resolved` and `skipped`,
            with stages under `stages` and the name of each.
        resume: False, True or, without stages, a checkpoint; finished stages are not run again.
        here: the processes of the run.

    Returns:
        As `finetune`.

    Raises:
        DataError: a source is not what the run was started on. See `finetune` for more.
    """
    from mllm.training.data import load_data
    from mllm.training.finetune import finetune
    from mllm.training.preview import check
    from mllm.training.trainer import MetricsFile

    ready = []
    for name, part in recipe.tunes():
        data, digests = load_data(part.data)
        into = record.setdefault("stages", {}).setdefault(name, {}) if name else record
        if resume and into.get("data_sha256", []) not in ([], digests):
            raise DataError(
                f"the data is not what the run in {folder} was started on",
                argument=f"data of stage {name}" if name else "data",
                given=digests,
                expected=f"files with the SHA-256 {into['data_sha256']}",
            )
        into |= {"data_sha256": digests, "samples": len(data), "resolved": check(part, data, here)}
        ready.append((name, part, data, into))
    if here.first:
        write_json(folder / RECORD, record)
    start = recipe.model.path
    for number, (name, part, data, into) in enumerate(ready, 1):
        home = folder / f"stage-{number}-{name}" if name else folder
        last = number == len(ready)
        if last or not (resume and (home / "model").is_dir()):
            part = _starting_from(part, start)
            metrics = MetricsFile(folder / "metrics.jsonl", name)
            trained = finetune(part, data, home, resume, metrics=metrics)
            pictures = int(anywhere(data.bad).sum())
            into["skipped"] = {"entries": len(data.skipped), "pictures": pictures}
            if trained is None:
                return None
            if not last and here.first:
                save_whole(home, part.plan, *trained)
            if not last:
                del trained  # before the next one is read
                barrier()
        start = str(home / "model")
    if home != folder and here.first:
        _bring_routers(home, folder)
    return trained


def _bring_routers(stage: Path, folder: Path) -> None:
    """What the last stage has learnt belongs to the run."""
    if (stage / ROUTERS).is_dir():
        shutil.copytree(stage / ROUTERS, folder / ROUTERS, dirs_exist_ok=True)
        if (picture := stage / f"{ROUTERS}.png").is_file():
            shutil.copyfile(picture, folder / picture.name)


def _starting_from(recipe: Recipe, path: str) -> Recipe:
    """The recipe of a stage; what an earlier one has left has the recipe's tower."""
    update: dict[str, Any] = {"path": path}
    if path != recipe.model.path:
        update["tower"] = None
    return recipe.model_copy(update={"model": recipe.model.model_copy(update=update)})
