"""What a recipe may say: its parts, key by key."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag


class Strict(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class TowerPart(BaseModel):
    """Another vision tower for a LLaVA: `docs/towers.md` has the types and their keys.

    An encoder is the name or folder of one, or a mapping with `path` or `config` (a configuration
    with `model_type`: random weights).
    """

    model_config = ConfigDict(extra="allow")
    type: str
    encoders: list[str | dict[str, Any]] = Field(min_length=1)


class ModelPart(Strict):
    """Which model, in which type, and what stays frozen.

    `path` is a folder, a hub name, `tiny-llava` (the embedded model), or, with `stages`,
    `new:tiny-llava`: the same architecture with random weights. `reset_projector` starts from a
    random projector. `feature_cache` is a folder for what a frozen tower says of every picture.
    `tower` takes the place of the model's own; what is new in it is trained and frozen with the
    projector.
    """

    path: str
    tower: TowerPart | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    reset_projector: bool = False
    feature_cache: str | None = None
    freeze_vision_tower: bool = False
    freeze_multi_modal_projector: bool = False
    freeze_language_model: bool = False


class DataPart(Strict):
    """One data source: a file or folder, or a source of samples (`path: yardstick`, `mnist`, ...).

    `path: tiny-clips` is four drawn videos that ship with mllm.

    Files are JSON, JSON Lines or parquet; a folder is one that `datasets` has saved. `limit`
    samples are taken (sources of samples: per task); `weight` 0.5 shows every second one, 2.0 each
    one twice. `skip_bad` is the share of unreadable entries and pictures that is skipped before
    the run fails. `streaming` reads an entry when it is needed, instead of all at the start. Of a
    video, `num_frames` frames are taken, evenly over its length. `tasks`, `style` and `split`
    belong to the sources of samples.
    """

    path: str
    format: Literal["llava", "messages"] = "llava"
    image_root: str | None = None
    split: Literal["train", "dev"] = "train"
    weight: float = Field(default=1.0, gt=0)
    limit: int | None = Field(default=None, ge=1)
    skip_bad: float = Field(default=0.0, ge=0, lt=1)
    streaming: bool = False
    num_frames: int = Field(default=8, ge=1)
    tasks: list[str] | None = None
    style: str = "plain"


class SamplingPart(Strict):
    """The order of the samples: shuffled by `train.seed`, and what is alike in one batch.

    `length` puts long ones together, `modality` also keeps text-only samples apart from those with
    pictures (LLaVA's `group_by_modality_length`).
    """

    group_by: Literal["length", "modality"] | None = None


class DistillPart(Strict):
    """The uncompressed model as teacher: no plan, and the weights that training started from.

    `weight` is the share of the teacher in the loss (the answers have the rest), `temperature`
    softens both sides, `layers` (0-based, negative from the end) are decoder layers whose output on
    the answers should be the teacher's; `hidden_weight` scales that part.
    """

    weight: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)
    layers: list[int] = []
    hidden_weight: float = Field(default=1.0, gt=0)


class MethodPart(BaseModel):
    """What is trained: `full` and `lora` beside what the plan learns, `router` that alone.

    `moe` trains the experts of the plan and their routers; with `dense_ffn` also the FFNs of the
    other decoder layers, as MoE-LLaVA does. The other keys are those of PEFT's LoraConfig; with
    `moe` they put LoRA beside the experts, by default into the attention.

    `load_in_4bit` is QLoRA: a frozen base in nf4 (bitsandbytes, on a GPU).
    """

    model_config = ConfigDict(extra="allow")
    type: Literal["full", "lora", "router", "moe"] = "full"
    load_in_4bit: bool = False
    dense_ffn: bool = False
    distill: DistillPart | None = None


class LearningRates(Strict):
    """Learning rates of parts, where they differ from `train.learning_rate`.

    `new_modules` are parameters that the model did not have before: adapters, routers, experts;
    without it they have the rate of the part they sit in.
    """

    vision_tower: float | None = Field(default=None, gt=0)
    multi_modal_projector: float | None = Field(default=None, gt=0)
    language_model: float | None = Field(default=None, gt=0)
    new_modules: float | None = Field(default=None, gt=0)


class OptimizerPart(Strict):
    """Muon + AdamW of the pretraining stages: factors on `train.learning_rate`."""

    matrices: Literal["muon", "adamw"] = "muon"
    matrix_scale: float = Field(default=1.0, gt=0)
    vision_scale: float = Field(default=1.0, gt=0)
    weight_decay: float = Field(default=0.02, ge=0)


class LossPart(Strict):
    """Weights of the grounding losses."""

    answers: float = 0.0
    patches: float = 0.0
    cls: float = 0.0
    places: float = 0.0
    tokens: float = 0.0
    token_places: float = 0.0
    words: float = 0.0


class StagePart(Strict):
    """One pretraining stage on drawn scenes, with the grounding objective.

    `tasks` (weights) limits the questions to these tasks, "yes" and "no" in equal parts; `kinds`
    (shares) sets the kinds of scene, `pictures` (shares) how many pictures an item has.
    """

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    scenes: Literal["soup", "mini", "full"]
    questions: int = Field(default=0, ge=0)
    tasks: dict[str, float] | None = None
    kinds: dict[str, float] | None = None
    pictures: dict[int, float] | None = None
    freeze_vision_tower: bool = False
    losses: LossPart
    optimizer: OptimizerPart = OptimizerPart()
    train: dict[str, Any]


class TunePart(Strict):
    """One stage of fine-tuning: what it has is laid over the rest of the recipe, as `tiny` is.

    The first starts from `model.path`, each other from what the one before it has left.
    """

    name: str = Field(pattern=r"^[a-z0-9-]+$")
    model: dict[str, Any] = {}
    plan: str | None = None
    data: list[dict[str, Any]] = []
    method: dict[str, Any] = {}
    train: dict[str, Any] = {}
    learning_rates: dict[str, Any] = {}
    sampling: dict[str, Any] = {}
    parallel: dict[str, Any] = {}


STAGES = {"scenes": StagePart, "tune": TunePart}


def _kind_of_stage(stage: Any) -> str:
    """Which of the two a stage is: drawn scenes have losses of their own."""
    if isinstance(stage, dict):
        return "scenes" if {"scenes", "losses"} & stage.keys() else "tune"
    return "scenes" if isinstance(stage, StagePart) else "tune"


Stage = Annotated[
    Annotated[StagePart, Tag("scenes")] | Annotated[TunePart, Tag("tune")],
    Discriminator(_kind_of_stage),
]


class ParallelPart(Strict):
    """How the run is spread over devices.

    `nproc` processes are started on this machine unless a launcher has started them. `zero` is
    DeepSpeed's ZeRO stage; null is plain data parallelism. `offload` keeps optimizer states, or
    parameters as well (stage 3), in the memory of the machine. `deepspeed` is merged into the
    configuration that DeepSpeed is given.
    `ep_size` processes share one set of experts of the plan; ZeRO 0, 1 or 2.
    """

    nproc: int = Field(default=1, ge=1)
    zero: int | None = Field(default=None, ge=0, le=3)
    offload: Literal["optimizer", "parameters"] | None = None
    deepspeed: dict[str, Any] = {}
    ep_size: int = Field(default=1, ge=1)
    sp_size: int = Field(default=1, ge=1)


class EvalPart(Strict):
    """What is evaluated at the end, under which plans (null: unpatched).

    `tasks` are names of `mllm.eval.sources`: tasks, a source for all of its tasks, or `admitted`
    for those the embedded model learnt. At most `limit` samples a task. `base` evaluates the model
    that training started from as well.
    """

    tasks: list[str] = ["admitted"]
    plans: list[str | None] = [None]
    limit: int = Field(default=500, ge=1)
    split: Literal["dev", "test"] = "test"
    style: str = "plain"
    base: bool = False


class OutputPart(Strict):
    """The run folder."""

    dir: str
    overwrite: bool = False
