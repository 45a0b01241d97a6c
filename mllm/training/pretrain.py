"""Recipes with `stages`: the embedded model from scratch, one Trainer run a stage."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from transformers import TrainingArguments

from mllm.training.grounding import GroundedLlava, GroundingData, collate
from mllm.training.optim import MuonAdamW
from mllm.training.recipe import Recipe
from mllm.training.tiny import new_model, new_processor
from mllm.training.trainer import (
    GroundingTrainer,
    MetricsFile,
    StopOnSigterm,
    last_complete,
    write_atomically,
)

DONE = "stage.json"


def run_stages(recipe: Recipe, folder: Path, resume: bool) -> bool:
    """Train every stage in order; finished ones are read back when resuming.

    Args:
        recipe: with `stages`.
        folder: the run folder; stage `i` works in `folder/stage-i-name`.
        resume: continue from the newest whole checkpoint of the unfinished stage.

    Returns:
        True when all stages are done and `folder/model` holds the result in bf16; False when
        SIGTERM stopped the run (a checkpoint was saved).
    """
    processor = new_processor()
    seed = recipe.stages[0].train.get("seed", 0)
    llava = new_model(processor.tokenizer, seed=seed)
    model = GroundedLlava(llava, processor.tokenizer, {})
    for number, stage in enumerate(recipe.stages, 1):
        home = folder / f"stage-{number}-{stage.name}"
        weights = home / "model.safetensors"
        if resume and (home / DONE).is_file():
            load_model(model, str(weights))
            continue
        model.weights = dict(stage.losses)
        arguments = TrainingArguments(
            output_dir=str(home),
            remove_unused_columns=False,
            report_to="none",
            **{"use_cpu": not torch.cuda.is_available()} | stage.train,
        )
        optimizer = MuonAdamW(model, arguments.learning_rate, **stage.optimizer.model_dump())
        items = arguments.max_steps * arguments.train_batch_size
        stop = StopOnSigterm()
        trainer = GroundingTrainer(
            model=model,
            args=arguments,
            data_collator=collate,
            train_dataset=GroundingData(
                stage.scenes, stage.questions, items, arguments.seed, processor.tokenizer
            ),
            optimizers=(optimizer, None),
            callbacks=[MetricsFile(folder / "metrics.jsonl", stage.name), stop],
        )
        checkpoint, remarks = last_complete(home) if resume else (None, [])
        for remark in remarks:
            print(remark)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if stop.stopped:
            return False
        save_model(model, str(weights))
        write_atomically(home / DONE, json.dumps({"steps": trainer.state.global_step}))
    llava.to(torch.bfloat16).save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return True
