"""Recipes with `stages`: the embedded model from scratch, one Trainer run a stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model

from mllm.eval.files import write_json
from mllm.training.grounding import GroundedLlava, GroundingData, collate
from mllm.training.optim import MuonAdamW
from mllm.training.recipe import Recipe
from mllm.training.tiny import new_model, new_processor
from mllm.training.trainer import (
    GroundingTrainer,
    MetricsFile,
    Progress,
    StopOnSigterm,
    newest_checkpoint,
    training_arguments,
)

DONE = "stage.json"


def pretrain(recipe: Recipe, folder: Path, resume: bool) -> tuple[Any, Any] | None:
    """Train every stage in order; finished ones are read back when resuming.

    Args:
        recipe: with `stages`.
        folder: the run folder; stage `i` works in `folder/stage-i-name`.
        resume: continue from the newest whole checkpoint of the unfinished stage.

    Returns:
        The trained model in bf16 and its processor; None when SIGTERM stopped the run (a
        checkpoint was saved).
    """
    processor = new_processor()
    llava = new_model(processor.tokenizer, seed=recipe.stages[0].train.get("seed", 0))
    model = GroundedLlava(llava, processor.tokenizer, {})
    for number, stage in enumerate(recipe.stages, 1):
        home = folder / f"stage-{number}-{stage.name}"
        weights = home / "model.safetensors"
        if resume and (home / DONE).is_file():
            load_model(model, str(weights))
            continue
        model.weights = stage.losses.model_dump()
        model.freeze_vision_tower = stage.freeze_vision_tower
        llava.model.vision_tower.requires_grad_(not stage.freeze_vision_tower)
        arguments = training_arguments(stage.train, home)
        optimizer = MuonAdamW(model, arguments.learning_rate, **stage.optimizer.model_dump())
        items = (
            arguments.max_steps * arguments.train_batch_size * arguments.gradient_accumulation_steps
        )
        stop = StopOnSigterm()
        trainer = GroundingTrainer(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=GroundingData(
                stage.scenes,
                stage.questions,
                items,
                arguments.seed,
                processor.tokenizer,
                stage.tasks,
                stage.kinds,
                stage.pictures,
                arguments.train_batch_size,
            ),
            optimizers=(optimizer, None),
            callbacks=[
                MetricsFile(folder / "metrics.jsonl", stage.name),
                Progress(stage.name),
                stop,
            ],
        )
        checkpoint = newest_checkpoint(home) if resume else None
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        if stop.stopped:
            return None
        save_model(model, str(weights))
        write_json(home / DONE, {"steps": trainer.state.global_step})
    return llava.to(torch.bfloat16).eval(), processor
