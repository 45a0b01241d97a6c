"""Fine-tuning an existing model: full or LoRA, with or without an active plan."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import set_seed

import mllm
from mllm.errors import DataError, RecipeError
from mllm.loading import load_model
from mllm.training.data import Collator, Conversations
from mllm.training.recipe import Recipe
from mllm.training.trainer import (
    CheckpointTrainer,
    MetricsFile,
    Progress,
    StopOnSigterm,
    check_sealed,
    newest_checkpoint,
    training_arguments,
)

# LoRA goes into every projection of the language model unless the recipe names its own targets.
LORA_TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
PARTS = ("vision_tower", "multi_modal_projector", "language_model")


def freeze(model: Any, recipe: Recipe) -> None:
    """Apply the `freeze_*` flags.

    Raises:
        RecipeError: the model has no part of that name.
    """
    for part in PARTS:
        if not getattr(recipe.model, f"freeze_{part}"):
            continue
        module = getattr(model.model, part, None)
        if module is None:
            raise RecipeError(
                f"{type(model).__name__} has no {part} to freeze",
                argument=f"model.freeze_{part}",
                given=True,
                expected="false",
            )
        module.requires_grad_(False)
        if part == "language_model":
            model.lm_head.requires_grad_(False)


def wrap_lora(model: Any, recipe: Recipe) -> Any:
    """The model with LoRA adapters; everything else is frozen.

    Raises:
        RecipeError: PEFT refuses the configuration.
    """
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": LORA_TARGETS, **(recipe.method.model_extra or {})}
    try:
        return get_peft_model(model, LoraConfig(**options))
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"method: {error}",
            argument="method",
            given=options,
            expected="keys and values that peft.LoraConfig takes",
        ) from error


def finetune(
    recipe: Recipe, data: Conversations, folder: Path, resume: Path | bool
) -> tuple[Any, Any] | None:
    """Train, and return the model (adapters merged in) and its processor.

    With `plan`, the model is patched during training, so it learns from the tokens that the plan
    leaves; the patch is gone from the model that is returned.

    Args:
        recipe: without `stages`.
        data: what `load_data` returned.
        folder: the run folder; checkpoints are `folder/checkpoint-N`. With LoRA the adapter alone
            is saved in `folder/adapter`.
        resume: False, True (newest whole checkpoint) or a checkpoint folder.

    Returns:
        None when SIGTERM stopped the run (a checkpoint was saved).

    Raises:
        RecipeError, PlanError, DataError: see `mllm.training.recipe` and `mllm.patch`.
    """
    arguments = training_arguments(recipe.train, folder)
    set_seed(arguments.seed)
    base, processor = load_model(
        recipe.model.path, dtype=recipe.model.dtype, device=str(arguments.device)
    )
    freeze(base, recipe)
    lora = recipe.method.type == "lora"
    model = wrap_lora(base, recipe) if lora else base
    stop = StopOnSigterm()
    trainer = CheckpointTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(processor),
        train_dataset=data,
        callbacks=[MetricsFile(folder / "metrics.jsonl"), Progress("train"), stop],
    )
    checkpoint = _checkpoint(folder, resume)
    with mllm.patch(base, recipe.plan) if recipe.plan else nullcontext():
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if stop.stopped:
        return None
    if lora:
        model.save_pretrained(folder / "adapter")
        base = model.merge_and_unload()
    return base.eval(), processor


def _checkpoint(folder: Path, resume: Path | bool) -> Path | None:
    if not isinstance(resume, Path):
        return newest_checkpoint(folder) if resume else None
    fault = check_sealed(resume)
    if fault:
        whole = newest_checkpoint(folder)
        raise DataError(
            f"{resume} {fault}",
            argument="resume",
            given=resume,
            expected=f"a whole checkpoint, such as {whole}" if whole else "--resume alone",
        )
    return resume
