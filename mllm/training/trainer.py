"""HF Trainer with checkpoints that are whole or not there, metrics on file, and a clean SIGTERM."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from mllm.compat import PREFIX_CHECKPOINT_DIR
from mllm.errors import DataError, RecipeError
from mllm.eval.files import write_json
from mllm.training.launch import any_of, barrier

COMPLETE = "COMPLETE"
WEIGHTS = "model.safetensors"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def seal(folder: Path) -> None:
    """Write the COMPLETE marker: the checksum of every file of the checkpoint."""
    sums = {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != COMPLETE
    }
    write_json(folder / COMPLETE, sums)


def check_sealed(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    marker = folder / COMPLETE
    if not marker.is_file():
        return "has no COMPLETE marker: it was half-written"
    for name, digest in json.loads(marker.read_text()).items():
        if not (folder / name).is_file():
            return f"lacks {name}"
        if sha256_file(folder / name) != digest:
            return f"has a damaged {name}"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, complete or not."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.is_dir()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint; a warning names each newer one that is not whole."""
    for path in reversed(checkpoints(folder)):
        fault = check_sealed(path)
        if fault is None:
            return path
        warnings.warn(f"{path} {fault}; an older checkpoint is used", stacklevel=2)
    return None


class StopOnSigterm(TrainerCallback):
    """SIGTERM: save after the step in progress, then stop. `stopped` tells the caller.

    The processes of a run stop after the same step, whichever of them was told.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._previous: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        self._previous = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number, frame) -> None:
        self.stopped = True

    def on_step_end(self, args, state, control, **kwargs):
        self.stopped = any_of(self.stopped)
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Let SIGTERM do what it did before."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None


class MetricsFile(TrainerCallback):
    """Append every log of the Trainer to `metrics.jsonl` with its stage, step and time."""

    def __init__(self, path: Path, stage: str = "") -> None:
        self.path, self.stage = path, stage

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        row = {"stage": self.stage, "step": state.global_step, "time": round(time.time(), 2)}
        with self.path.open("a") as handle:
            handle.write(json.dumps(row | (logs or {})) + "\n")


class Progress(TrainerCallback):
    """One bar on stderr with the newest loss and share of waiting: stdout belongs to results."""

    def __init__(self, label: str) -> None:
        self.label = label

    def on_train_begin(self, args, state, control, **kwargs):
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            desc=self.label,
            file=sys.stderr,
            disable=not state.is_world_process_zero,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "loss" in logs:
            shown = {"loss": f"{float(logs['loss']):.3f}"}
            if "data_wait" in logs:
                shown["data_wait"] = f"{logs['data_wait']:.0%}"
            self._bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()


def training_arguments(
    train: dict[str, Any], folder: Path, deepspeed: dict[str, Any] | None = None
) -> TrainingArguments:
    """TrainingArguments of a recipe's `train` part.

    Args:
        train: the part.
        folder: where checkpoints and logs go.
        deepspeed: the configuration for DeepSpeed, if the run is its.

    Raises:
        RecipeError: a value that TrainingArguments refuses.
    """
    defaults = {
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "remove_unused_columns": False,
        "disable_tqdm": True,
        # A loss that is not a number stops the run; it is not to look like the last good one.
        "logging_nan_inf_filter": False,
    }
    if not (train.get("gradient_checkpointing_kwargs") or {}).get("use_reentrant"):
        # Text alone uses no tower, and a picture not all of its layers.
        defaults["ddp_find_unused_parameters"] = True
    if deepspeed is not None:
        # DeepSpeed's own optimizers are compiled when they are first used.
        defaults |= {"deepspeed": deepspeed, "optim": "adamw_torch"}
    try:
        arguments = TrainingArguments(output_dir=str(folder), **defaults | train)
    except (TypeError, ValueError) as error:
        raise RecipeError(
            f"train: {error}",
            argument="train",
            given=train,
            expected="values that transformers.TrainingArguments takes",
        ) from error
    # One process has one GPU: DataParallel would copy the model without what is hooked into it.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class CheckpointTrainer(Trainer):
    """`Trainer` whose checkpoints appear by rename, sealed with checksums."""

    _staging: str | None = None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.remove_callback(PrinterCallback)

    def train(self, resume_from_checkpoint=None, **kwargs) -> Any:
        if resume_from_checkpoint and self.args.save_only_model:
            raise RecipeError(
                f"{resume_from_checkpoint} has weights alone, and a run that went on from it would "
                "be another",
                argument="train.save_only_model",
                given=True,
                expected="a run without save_only_model",
            )
        try:
            return super().train(resume_from_checkpoint, **kwargs)
        finally:  # callbacks do not hear of errors
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, StopOnSigterm):
                    callback.restore()

    def _run_epoch(self, *args, **kwargs) -> None:
        # A run that was stopped behind its last step would take one more.
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        home = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = home / ".saving"
        if self.args.should_save:
            shutil.rmtree(staging, ignore_errors=True)
        barrier()
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            if not _unwritten(error):
                raise
            shutil.rmtree(staging, ignore_errors=True)
            raise unwritten(home, error) from error
        finally:
            self._staging = None
        barrier()
        if self.args.should_save:
            seal(staging / name)
            shutil.rmtree(home / name, ignore_errors=True)
            os.replace(staging / name, home / name)
            staging.rmdir()
            limit = self.args.save_total_limit
            if limit:  # later ones are of the run before, perhaps not whole
                mine = [p for p in checkpoints(home) if _step(p) <= self.state.global_step]
                for old in mine[:-limit]:
                    shutil.rmtree(old)
        barrier()

    # Trainer's own pair saves a model under its hub names and loads them without converting back
    # (LLaVA, transformers 5.23: every weight "missing", training goes on from the wrong weights).
    def save_model(self, output_dir=None, _internal_call=False) -> None:
        # DeepSpeed's checkpoint has the weights; gathering them as well would double it.
        if is_peft(self.model) or not self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir=None, state_dict=None) -> None:
        if is_peft(self.model):
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        if is_peft(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_model(model or self.model, str(Path(resume_from_checkpoint) / WEIGHTS))


def _unwritten(error: Exception) -> bool:
    """Whether a file could not be written; torch says so with a RuntimeError."""
    return not isinstance(error, RuntimeError) or "PytorchStreamWriter" in str(error)


def unwritten(folder: Path, error: Exception) -> DataError:
    """The error for a checkpoint that could not be written."""
    whole = checkpoints(folder)
    kept = f"{whole[-1].name} is whole" if whole else "there is no earlier one"
    return DataError(
        f"cannot write a checkpoint to {folder}: {str(error).splitlines()[0]}; {kept}",
        argument="output.dir",
        given=folder,
        expected="more room on the disk, then --resume",
    )


def is_peft(model: torch.nn.Module) -> bool:
    """Whether the model is wrapped by PEFT, which saves adapters under its own names."""
    return hasattr(model, "peft_config")


class GroundingTrainer(CheckpointTrainer):
    """Trains a `GroundedLlava`; logs the mean of each part of the loss."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._parts: dict[str, float] = {}
        self._count = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        parts = model(**inputs)
        loss = parts.pop("loss")
        self._count += 1
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + float(part)
        return (loss, parts) if return_outputs else loss

    def _get_train_sampler(self, train_dataset=None):
        # Items are random already, and those of one batch belong together.
        return SequentialSampler(train_dataset or self.train_dataset)

    def log(self, logs, start_time=None) -> None:
        if self._count:
            logs |= {f"loss_{k}": round(v / self._count, 4) for k, v in self._parts.items()}
            self._parts, self._count = {}, 0
        super().log(logs, start_time)
