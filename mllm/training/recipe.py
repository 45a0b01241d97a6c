"""The recipe: one commented YAML, validated strictly before anything is loaded."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mllm.errors import RecipeError

RECIPES = files("mllm") / "training" / "recipes"


class Strict(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class ModelPart(Strict):
    """Which model, in which type, and what stays frozen."""

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    freeze_vision_tower: bool = False
    freeze_multi_modal_projector: bool = False
    freeze_language_model: bool = False


class DataPart(Strict):
    """One data source: a LLaVA JSON file, or the generated yardstick (`path: yardstick`)."""

    path: str
    format: Literal["llava", "messages"] = "llava"
    image_root: str | None = None
    split: Literal["train", "dev"] = "train"
    weight: float = Field(default=1.0, gt=0)
    limit: int | None = Field(default=None, ge=1)
    tasks: list[str] | None = None
    style: str = "plain"

    @property
    def generated(self) -> bool:
        return self.path == "yardstick"


class MethodPart(BaseModel):
    """What is trained. Further keys of `lora` are PEFT's own names (r, lora_alpha, ...)."""

    model_config = ConfigDict(extra="allow")
    type: Literal["full", "lora", "router", "moe"] = "full"


class OptimizerPart(Strict):
    """Muon + AdamW of the pretraining stages: factors on `train.learning_rate`."""

    matrix_scale: float = Field(default=1.0, gt=0)
    vision_scale: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)


class StagePart(Strict):
    """One pretraining stage on drawn scenes, with the grounding objective."""

    name: str
    scenes: Literal["soup", "mini", "full"]
    questions: int = Field(default=0, ge=0)
    losses: dict[Literal["answers", "patches", "cls", "places", "words"], float]
    optimizer: OptimizerPart = OptimizerPart()
    train: dict[str, Any]

    @model_validator(mode="after")
    def _questions_need_a_scene(self) -> StagePart:
        if (self.scenes == "soup") != (self.questions == 0):
            raise ValueError("`questions` must be 0 for soup scenes and at least 1 for others")
        return self


class ParallelPart(Strict):
    """How the run is spread over devices."""

    zero: Literal[0, 1, 2, 3] = 0
    ep_size: int = Field(default=1, ge=1)
    sp_size: int = Field(default=1, ge=1)


class EvalPart(Strict):
    """What is evaluated at the end, under which plans (null: unpatched)."""

    tasks: list[str] = ["yardstick"]
    plans: list[str | None] = [None]
    limit: int = Field(default=500, ge=1)
    style: str = "plain"


class OutputPart(Strict):
    """The run folder."""

    dir: str
    overwrite: bool = False


class Recipe(Strict):
    """A whole recipe; see `mllm recipes list` for shipped ones."""

    version: Literal[1]
    summary: str = ""
    model: ModelPart
    plan: str | None = None
    data: list[DataPart] = []
    method: MethodPart = MethodPart()
    train: dict[str, Any] = {}
    parallel: ParallelPart = ParallelPart()
    eval: EvalPart | None = None
    output: OutputPart
    stages: list[StagePart] = []

    @field_validator("train")
    @classmethod
    def _plain_train(cls, value: dict[str, Any]) -> dict[str, Any]:
        return _check_train(value)

    @property
    def sha256(self) -> str:
        """Hash of what is trained: everything but where it is written."""
        content = self.model_dump(mode="json", exclude={"output", "eval"})
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _check_train(value: dict[str, Any]) -> dict[str, Any]:
    return value


def load(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    path = Path(str(source))
    if not path.is_file():
        path = Path(str(RECIPES / path.name))
        if path.suffix != ".yaml":
            path = path.with_suffix(".yaml")
    data = yaml.safe_load(path.read_text())
    for override in overrides:
        key, _, text = override.partition("=")
        *parents, last = key.split(".")
        node = data
        for parent in parents:
            node = node[int(parent)] if isinstance(node, list) else node.setdefault(parent, {})
        node[last] = yaml.safe_load(text)
    return Recipe.model_validate(data)
