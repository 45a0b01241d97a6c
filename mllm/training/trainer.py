"""HF Trainer with checkpoints that are whole or not there, metrics on file, and a clean SIGTERM."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import time
from pathlib import Path

import torch
from safetensors.torch import load_model, save_model
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from mllm.errors import DataError

COMPLETE = "COMPLETE"


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_atomically(path: Path, text: str) -> None:
    """Write beside `path`, then rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def seal(folder: Path) -> None:
    """Write the COMPLETE marker: the checksum of every file of the checkpoint."""
    sums = {
        str(path.relative_to(folder)): sha256_file(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != COMPLETE
    }
    write_atomically(folder / COMPLETE, json.dumps(sums, indent=1))


def check_sealed(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    marker = folder / COMPLETE
    if not marker.is_file():
        return "has no COMPLETE marker"
    for name, digest in json.loads(marker.read_text()).items():
        if not (folder / name).is_file():
            return f"lacks {name}"
        if sha256_file(folder / name) != digest:
            return f"has a damaged {name}"
    return None


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders by step, complete or not."""
    found = [p for p in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if p.is_dir()]
    return sorted(found, key=lambda path: int(path.name.rsplit("-", 1)[1]))


def last_complete(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint, and a remark on each newer one that is not whole."""
    remarks = []
    for path in reversed(checkpoints(folder)):
        fault = check_sealed(path)
        if fault is None:
            return path, remarks
        remarks.append(f"checkpoint {path} {fault}: skipped")
    return None, remarks


class StopOnSigterm(TrainerCallback):
    """SIGTERM: save after the step in progress, then stop. `stopped` tells the caller."""

    def __init__(self) -> None:
        self.stopped = False

    def on_train_begin(self, args, state, control, **kwargs):
        self._previous = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, number, frame) -> None:
        self.stopped = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.stopped:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args, state, control, **kwargs):
        signal.signal(signal.SIGTERM, self._previous)


class MetricsFile(TrainerCallback):
    """Append every log of the Trainer to `metrics.jsonl` with its stage, step and time."""

    def __init__(self, path: Path, stage: str = "") -> None:
        self.path, self.stage = path, stage

    def on_log(self, args, state, control, logs=None, **kwargs):
        row = {"stage": self.stage, "step": state.global_step, "time": round(time.time(), 2)}
        with self.path.open("a") as handle:
            handle.write(json.dumps(row | (logs or {})) + "\n")


class CheckpointTrainer(Trainer):
    """`Trainer` whose checkpoints appear by rename, sealed with checksums."""

    _staging: str | None = None

    def _get_output_dir(self, trial) -> str:
        return self._staging or super()._get_output_dir(trial)

    def _save_checkpoint(self, model, trial) -> None:
        home = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = home / ".saving"
        shutil.rmtree(staging, ignore_errors=True)
        self._staging = str(staging)
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = None
        seal(staging / name)
        shutil.rmtree(home / name, ignore_errors=True)
        os.replace(staging / name, home / name)
        staging.rmdir()
        limit = self.args.save_total_limit
        if limit:
            for old in checkpoints(home)[:-limit]:
                shutil.rmtree(old)


class GroundingTrainer(CheckpointTrainer):
    """Trains a `GroundedLlava`; logs the mean of each part of the loss."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        parts = model(**inputs)
        loss = parts.pop("loss")
        if not hasattr(self, "_parts"):
            self._parts, self._count = {}, 0
        self._count += 1
        for name, part in parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + float(part)
        return (loss, parts) if return_outputs else loss

    def log(self, logs, start_time=None) -> None:
        if getattr(self, "_count", 0):
            logs |= {f"loss_{k}": round(v / self._count, 4) for k, v in self._parts.items()}
            self._parts, self._count = {}, 0
        super().log(logs, start_time)

    # The module ties two weights and is no PreTrainedModel, which Trainer's own pair cannot handle.
    def _save(self, output_dir=None, state_dict=None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(folder / "model.safetensors"))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        load_model(model or self.model, str(Path(resume_from_checkpoint) / "model.safetensors"))
