"""The recipe: one commented YAML, validated strictly before anything is loaded."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import re
import typing
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    Tag,
    TypeAdapter,
    ValidationError,
)

from mllm.errors import MllmError, RecipeError

SUFFIX = ".yaml"
NOT_TRAINED = ("summary", "published", "eval", "output", "tiny")
# Keys of `train` that TrainingArguments takes at any value, and fails with later.
COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps")
ABOVE_ZERO = ("learning_rate", "logging_steps", "save_steps")


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


class Recipe(Strict):
    """A whole recipe. `summary` is one line for `mllm recipes list`, `published` a source.

    `tiny` is laid over the rest by `mllm train --tiny`: the same recipe in a minute on a CPU.
    """

    version: Literal[1]
    summary: str = ""
    published: str | None = None
    model: ModelPart
    plan: str | None = None
    data: list[DataPart] = []
    method: MethodPart = MethodPart()
    train: dict[str, Any] = {}
    learning_rates: LearningRates = LearningRates()
    sampling: SamplingPart = SamplingPart()
    parallel: ParallelPart = ParallelPart()
    eval: EvalPart | None = None
    output: OutputPart
    stages: list[Stage] = []
    tiny: dict[str, Any] | None = None
    _written: dict[str, Any] = PrivateAttr(default_factory=dict)

    @property
    def sha256(self) -> str:
        """Hash of what is trained: what was written, less what does not change the weights.

        The number of processes is in the run's record: a launcher sets it from outside.
        """
        content = {k: v for k, v in self._written.items() if k not in NOT_TRAINED}
        if "nproc" in (parallel := content.get("parallel") or {}):
            content["parallel"] = {k: v for k, v in parallel.items() if k != "nproc"}
        if not content.get("parallel"):
            content.pop("parallel", None)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def with_lora(self) -> bool:
        """Whether PEFT puts adapters into the model."""
        return self.method.type == "lora" or bool(self.method.model_extra)

    @property
    def from_scratch(self) -> bool:
        """Whether the stages train the embedded architecture on drawn scenes."""
        return any(isinstance(stage, StagePart) for stage in self.stages)

    def tunes(self) -> list[tuple[str, Recipe]]:
        """Name and whole recipe of every fine-tuning stage; `("", self)` where there are none.

        All have the `model.path` of this recipe: where a later one starts is known at its time.

        Raises:
            RecipeError, PlanError: a stage is no recipe; the message has its name.
        """
        if not self.stages or self.from_scratch:
            return [("", self)]
        outside = (*NOT_TRAINED, "stages")
        shared = {k: v for k, v in self._written.items() if k not in outside}
        shared["output"] = self._written["output"]
        found = []
        for stage, written in zip(self.stages, self._written["stages"], strict=True):
            own = {key: value for key, value in written.items() if key != "name"}
            try:
                found.append((stage.name, validate(_laid_over(shared, own))))
            except MllmError as error:
                message, parts = f"stage {stage.name!r}: {error}", error.as_dict()
                told = {key: parts[key] for key in ("argument", "given", "expected")}
                raise type(error)(message, **told) from error
        return found

    def to_yaml(self) -> str:
        """The recipe as run: overrides applied, defaults left out."""
        return yaml.safe_dump(self._written, sort_keys=False)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 2e-3 as a number (YAML 1.2) and refuses a key given twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.value != "<<":
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def shipped() -> dict[str, Path]:
    """Name -> path of every recipe in the package."""
    folder = Path(str(files("mllm") / "training" / "recipes"))
    return {path.stem: path for path in sorted(folder.glob(f"*{SUFFIX}"))}


def resolve(source: str | Path) -> Path:
    """Path of a recipe: an existing file, or a shipped one by its name.

    `tiny-llava`, `tiny-llava.yaml` and `recipes/tiny-llava.yaml` all mean the shipped recipe where
    no such file exists.

    Raises:
        RecipeError: there is neither.
    """
    path = Path(source)
    if path.is_file():
        return path
    names = shipped()
    if path.parent in (Path("."), Path("recipes")) and path.suffix in ("", SUFFIX):
        if path.stem in names:
            return names[path.stem]
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"shipped recipes: {', '.join(names)}"
    raise RecipeError(
        f"no recipe {str(source)!r}; {hint}",
        argument="recipe",
        given=source,
        expected=f"a YAML file, or one of {', '.join(names)}",
    )


def parse(text: str, name: str = "recipe") -> Any:
    """YAML to plain objects.

    Raises:
        RecipeError: broken YAML; the message gives the line.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark else "unknown line"
        raise RecipeError(
            f"{name} is not valid YAML: {where}: {error.problem}",
            argument="recipe",
            given=name,
            expected="YAML as in the shipped recipes (mllm recipes show tiny-llava)",
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(
            f"{name} is not valid YAML: {str(error).splitlines()[0]}",
            argument="recipe",
            given=name,
            expected="a text file in UTF-8",
        ) from error


def load(source: str | Path, overrides: Sequence[str] = (), tiny: bool = False) -> Recipe:
    """Read, override and validate a recipe.

    Args:
        source: a path, or the name of a shipped recipe.
        tiny: lay the recipe's `tiny` part over it, before the overrides.
        overrides: `key=value` with dotted keys (`train.max_steps=10`, `stages.0.train.seed=1`,
            `plan=null`); values are YAML.

    Raises:
        RecipeError: no such recipe, broken YAML, an unknown key (the nearest known one is named),
            a value of the wrong kind, or parts that cannot go together.
        PlanError: a plan that does not parse.
    """
    path = resolve(source)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"cannot read {path}: {error}",
            argument="recipe",
            given=path,
            expected="a readable text file",
        ) from error
    written = parse(text, str(path))
    if not isinstance(written, dict):
        raise RecipeError(
            f"{path} holds no recipe: its top level is not a mapping",
            argument="recipe",
            given=path,
            expected="keys such as version, model, train, output",
        )
    if tiny:
        small = written.pop("tiny", None)
        if not isinstance(small, dict):
            raise RecipeError(
                f"{path} has no tiny part",
                argument="tiny",
                given=small,
                expected="tiny: with the keys that make the recipe small",
            )
        written = _laid_over(written, small)
    for override in overrides:
        _apply(written, override)
    return validate(written)


def _laid_over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Mappings key by key; anything else is replaced."""
    both = dict(below)
    for key, value in above.items():
        under = both.get(key)
        deep = isinstance(value, dict) and isinstance(under, dict)
        both[key] = _laid_over(under, value) if deep else value
    return both


def validate(written: dict[str, Any]) -> Recipe:
    """Check a parsed recipe; see `load` for the errors."""
    try:
        recipe = Recipe.model_validate(written)
    except ValidationError as error:
        raise _readable(error.errors()[0]) from error
    recipe._written = written
    _check_train_keys(recipe)
    _check_together(recipe)
    if recipe.tiny is not None:
        validate(_laid_over({k: v for k, v in written.items() if k != "tiny"}, recipe.tiny))
    return recipe


def _apply(written: dict[str, Any], override: str) -> None:
    """Set one dotted key in place."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(
            f"{override!r} is no override",
            argument="override",
            given=override,
            expected="key=value, such as train.max_steps=10",
        )
    node: Any = written
    *parents, last = key.split(".")
    for depth, name in enumerate(parents):
        if isinstance(node, dict):
            # A part that the recipe leaves out starts empty; a wrong name fails validation.
            node[name] = {} if node.get(name) is None else node[name]
        node = node[_index(node, name, key) if isinstance(node, list) else name]
        if not isinstance(node, (dict, list)):
            raise RecipeError(
                f"{'.'.join(parents[: depth + 1])} has no parts, so {key!r} cannot be set",
                argument=key,
                given=override,
                expected=f"{'.'.join(parents[: depth + 1])}=value",
            )
    node[_index(node, last, key) if isinstance(node, list) else last] = parse(text, override)


def _index(node: list, name: str, key: str) -> int:
    if not name.isdecimal() or int(name) >= len(node):
        raise RecipeError(
            f"{key!r}: {name!r} is no place in a list of {len(node)}",
            argument=key,
            given=name,
            expected=f"a number from 0 to {len(node) - 1}",
        )
    return int(name)


def _readable(fault: dict[str, Any]) -> RecipeError:
    """One pydantic fault as a RecipeError."""
    location, start = list(fault["loc"]), Recipe
    if len(location) > 2 and location[0] == "stages":
        start = STAGES[location.pop(2)]  # the tag, which is no key
    where = ".".join(str(part) for part in location)
    if fault["type"] == "extra_forbidden":
        inner = location[:-1] if start is Recipe else location[2:-1]
        return _unknown_key(where, list(_part_at(inner, start).model_fields))
    if fault["type"] == "missing":
        return RecipeError(f"{where} is missing", argument=where, expected=f"a value for {where}")
    given = fault.get("input")
    return RecipeError(
        f"{where}={given!r}: {fault['msg'][:1].lower()}{fault['msg'][1:]}",
        argument=where,
        given=given,
        expected=fault["msg"],
    )


def _unknown_key(where: str, known: Sequence[str]) -> RecipeError:
    key = where.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return RecipeError(
        f"unknown key {where!r}; {hint}",
        argument=where,
        given=key,
        expected=near[0] if near else ", ".join(known),
    )


def _part_at(location: Sequence[str | int], start: type[BaseModel]) -> type[BaseModel]:
    """The model class that a validation location points into."""
    part = start
    for name in location:
        if isinstance(name, str):
            kind = part.model_fields[name].annotation
            options = [a for a in typing.get_args(kind) or (kind,) if isinstance(a, type)]
            part = next(option for option in options if issubclass(option, BaseModel))
    return part


def _check_train_keys(recipe: Recipe) -> None:
    """`train` keys are those of TrainingArguments; the folder is `output.dir`."""
    from transformers import TrainingArguments

    known = [name for name in TrainingArguments.__dataclass_fields__ if not name.startswith("_")]
    parts = [("train", recipe.train)]
    if recipe.from_scratch:
        parts += [(f"stages.{i}.train", stage.train) for i, stage in enumerate(recipe.stages)]
    for where, part in parts:
        for key in part:
            if key == "output_dir":
                raise RecipeError(
                    f"{where}.output_dir is not used: the folder is output.dir",
                    argument=f"{where}.output_dir",
                    given=part[key],
                    expected="output.dir",
                )
            if key not in known:
                raise _unknown_key(f"{where}.{key}", known)
            _check_train_value(f"{where}.{key}", key, part[key])
        steps = part.get("max_steps", -1)
        if steps <= 0 and not (epochs := part.get("num_train_epochs", 3)) > 0:
            _refuse(
                f"{where} has neither steps nor epochs: nothing would be trained",
                f"{where}.num_train_epochs",
                epochs,
                "num_train_epochs above 0, or max_steps of at least 1",
            )


@functools.cache
def _train_kinds() -> dict[str, TypeAdapter]:
    """What the plain values of TrainingArguments may be."""
    from transformers import TrainingArguments

    kinds: dict[str, TypeAdapter] = {}
    for name, kind in typing.get_type_hints(TrainingArguments).items():
        options = set(typing.get_args(kind) or (kind,))
        if options <= {int, float, bool, type(None)}:
            bounds = {"ge": 1} if name in COUNTS else {"gt": 0} if name in ABOVE_ZERO else {}
            # pydantic takes numbers for bools and the other way round unless it is strict.
            kinds[name] = TypeAdapter(typing.Annotated[kind, Field(strict=True, **bounds)])
    return kinds


def _check_train_value(where: str, key: str, value: Any) -> None:
    if key not in _train_kinds():
        return
    try:
        _train_kinds()[key].validate_python(value)
    except ValidationError as error:
        fault = error.errors()[0]["msg"]
        _refuse(f"{where}={value!r}: {fault[:1].lower()}{fault[1:]}", where, value, fault)


def _refuse(message: str, argument: str, given: Any, expected: str) -> typing.NoReturn:
    raise RecipeError(message, argument=argument, given=given, expected=expected)


def _check_together(recipe: Recipe) -> None:
    """Parts that cannot go together."""
    from mllm.eval import sources
    from mllm.yardstick import TASKS
    from mllm.yardstick.scenes import KINDS

    _check_parallel(recipe)
    method = recipe.method.type
    _check_learnt(recipe)
    extra = recipe.method.model_extra or {}
    if extra:
        _check_method_keys(method, extra)
    _check_distill(recipe)
    _check_tower(recipe)
    if recipe.method.load_in_4bit and method != "lora":
        _refuse("a base in 4 bits cannot be trained", "method.load_in_4bit", True, "type: lora")
    new = recipe.model.path.startswith("new:")
    names = [stage.name for stage in recipe.stages]
    if len(set(names)) < len(names):
        _refuse("two stages have the same name", "stages", names, "different names")
    if recipe.stages and not recipe.from_scratch:
        _check_tunes(recipe, new)
    elif recipe.stages:
        if recipe.model.feature_cache:
            _refuse(
                "stages from scratch train the tower",
                "model.feature_cache",
                recipe.model.feature_cache,
                "null",
            )
        for key in ("data", "train", "plan", "learning_rates", "sampling", "parallel"):
            if key in recipe._written and recipe._written[key]:
                _refuse(
                    f"a recipe with stages cannot have {key!r}: stages bring their own",
                    key,
                    getattr(recipe, key),
                    f"either stages or {key}",
                )
        if method != "full":
            _refuse("stages train the whole model", "method.type", method, "full")
        if recipe.model.path != "new:tiny-llava":
            _refuse(
                "stages train the embedded architecture from random weights",
                "model.path",
                recipe.model.path,
                "new:tiny-llava",
            )
        for number, stage in enumerate(recipe.stages):
            if isinstance(stage, TunePart):
                _refuse(
                    f"stages.{number} has no scenes, and others have",
                    f"stages.{number}",
                    stage.name,
                    "stages of one kind: all with scenes and losses, or none",
                )
            if stage.scenes == "soup" and stage.questions:
                _refuse(
                    f"stages.{number}: soup scenes have no questions",
                    f"stages.{number}.questions",
                    stage.questions,
                    "0, or scenes: mini or full",
                )
            if stage.freeze_vision_tower and not stage.questions:
                _refuse(
                    f"stages.{number}: nothing is left to train without tower and questions",
                    f"stages.{number}.freeze_vision_tower",
                    True,
                    "false, or questions of at least 1",
                )
            _check_names(f"stages.{number}.tasks", stage.tasks or (), (*TASKS, "list", "legend"))
            _check_names(f"stages.{number}.kinds", stage.kinds or (), tuple(KINDS))
            if not stage.train.get("max_steps", 0) > 0:
                _refuse(
                    f"stages.{number}.train.max_steps must be given: scenes are endless",
                    f"stages.{number}.train.max_steps",
                    stage.train.get("max_steps"),
                    "a number of steps",
                )
    elif new:
        _refuse("a new model needs stages", "model.path", recipe.model.path, "stages, or a model")
    elif not recipe.data:
        _refuse("there is nothing to train on", "data", None, "data, or stages")
    if recipe.stages and not recipe.from_scratch:
        _check_eval(recipe, new)
        return
    model = recipe.model
    if recipe.with_lora and model.freeze_language_model and "target_modules" not in extra:
        _refuse(
            "LoRA goes into the language model by default, which is frozen",
            "model.freeze_language_model",
            True,
            "false, or method.target_modules",
        )
    frozen = model.freeze_vision_tower, model.freeze_multi_modal_projector
    if method == "full" and all(frozen) and model.freeze_language_model:
        _refuse("everything is frozen: nothing to train", "model", "all frozen", "one part free")
    for number, part in enumerate(recipe.data):
        source = sources.SOURCES.get(part.path)
        if part.streaming and (source or Path(part.path).suffix == ".json"):
            _refuse(
                f"data.{number}: {part.path} cannot be streamed",
                f"data.{number}.streaming",
                True,
                "JSON Lines (.jsonl), parquet or a datasets folder, or streaming: false",
            )
        if source:
            _check_names(f"data.{number}.tasks", part.tasks or [], source.tasks)
            _check_names(f"data.{number}.style", [part.style], source.styles)
            if part.limit is None and not source.size:
                _refuse(
                    f"data.{number}.limit must be given: the {source.name} is endless",
                    f"data.{number}.limit",
                    None,
                    "samples per task",
                )
        elif part.tasks is not None or part.style != "plain":
            names = ", ".join(sources.SOURCES)
            _refuse(
                f"data.{number}: tasks and style belong to path: {names}",
                f"data.{number}.tasks",
                part.tasks,
                f"path: {names}; or no tasks and style",
            )
    _check_eval(recipe, new)


def _check_eval(recipe: Recipe, new: bool) -> None:
    """Plans and tasks; those of stages are checked with each."""
    from mllm.eval import sources
    from mllm.plan import Plan

    plans = [recipe.plan]
    if recipe.eval:
        _check_names("eval.tasks", recipe.eval.tasks, (*sources.GROUPS, *sources.TASKS))
        for task in (task for name in recipe.eval.tasks for task in sources.expand(name)):
            _check_names("eval.style", [recipe.eval.style], sources.source_of(task).styles)
        if recipe.eval.base and new:
            _refuse(
                "a new model has no base to evaluate",
                "eval.base",
                True,
                "false, or the path of a model",
            )
        plans += recipe.eval.plans
    for plan in plans:
        # A folder with a saved plan is read when it is used.
        if plan is not None and not Path(plan).is_dir():
            Plan.from_spec(plan)


def _check_tunes(recipe: Recipe, new: bool) -> None:
    """Fine-tuning stages: each is a recipe of its own; what is of the whole run stands outside."""
    if new:
        _refuse(
            "stages without scenes fine-tune a model that exists",
            "model.path",
            recipe.model.path,
            "the path of a model, or stages with scenes and losses",
        )
    if recipe.model.reset_projector:
        _refuse(
            "every stage would start from a random projector",
            "model.reset_projector",
            True,
            "reset_projector under model of one stage",
        )
    for number, stage in enumerate(recipe.stages):
        for part, key in (("model", "path"), ("parallel", "nproc")):
            if key in getattr(stage, part):
                _refuse(
                    f"stages.{number}.{part}.{key} is that of the whole run",
                    f"stages.{number}.{part}.{key}",
                    getattr(stage, part)[key],
                    f"{part}.{key} outside of stages",
                )
    recipe.tunes()


def _check_parallel(recipe: Recipe) -> None:
    part = recipe.parallel
    if part.sp_size != 1:
        _refuse(
            f"parallel.sp_size={part.sp_size} is not available in recipes: processes of a run "
            "share the batch, not sequences",
            "parallel.sp_size",
            part.sp_size,
            "1",
        )
    if part.offload and part.zero not in (1, 2, 3):
        _refuse(
            f"parallel.offload={part.offload!r} needs ZeRO: zero={part.zero} partitions nothing",
            "parallel.offload",
            part.offload,
            "zero of 1, 2 or 3, or no offload",
        )
    if part.offload == "parameters" and part.zero != 3:
        _refuse(
            f"parallel.offload='parameters' needs zero=3, not {part.zero}",
            "parallel.offload",
            part.offload,
            "zero: 3, or offload: optimizer",
        )
    if part.deepspeed and part.zero is None:
        _refuse(
            "parallel.deepspeed has settings, but the run is not DeepSpeed's",
            "parallel.deepspeed",
            part.deepspeed,
            "zero of 0 to 3",
        )
    if "deepspeed" in recipe.train:
        _refuse(
            "train.deepspeed is not used: the stage is parallel.zero",
            "train.deepspeed",
            recipe.train["deepspeed"],
            "parallel.zero, and parallel.deepspeed for more",
        )


def _check_learnt(recipe: Recipe) -> None:
    """What a method trains, the plan has; and what the plan learns can be trained so."""
    from mllm.plan import Plan

    method = recipe.method
    stages = [] if recipe.plan is None else Plan.of(recipe.plan).stages
    learns = [stage for stage in stages if stage.info.trained]
    experts = [stage for stage in stages if stage.info.stage == "experts"]
    if recipe.parallel.ep_size > 1:
        _check_spread(recipe, bool(experts))
    for kind, there, such in (("router", learns, "pmod"), ("moe", experts, "moellava")):
        if method.type == kind and not there and not recipe.stages:
            what = "what its plan learns" if kind == "router" else "the experts of its plan"
            _refuse(
                f"method.type={kind!r} trains {what}, and there are none in plan={recipe.plan!r}",
                "plan",
                recipe.plan,
                f"a plan such as {such}, or another method.type",
            )
    if experts and recipe.parallel.zero == 3:
        _refuse(
            "ZeRO-3 keeps parameters in parts, and experts start from whole ones; DeepSpeed itself "
            "refuses native experts there",
            "parallel.zero",
            3,
            "zero of 0, 1 or 2",
        )
    if experts and method.load_in_4bit:
        _refuse(
            f"{experts[0].info.name} copies FFNs, which are not whole numbers in 4 bits",
            "method.load_in_4bit",
            True,
            "false",
        )
    if method.dense_ffn and (method.type != "moe" or recipe.with_lora):
        _refuse(
            "method.dense_ffn trains the FFNs beside experts as they are",
            "method.dense_ffn",
            True,
            "type: moe without LoRA",
        )


def _check_spread(recipe: Recipe, experts: bool) -> None:
    """Where processes share experts, they are DeepSpeed's, and there are some."""
    part, norm = recipe.parallel, recipe.train.get("max_grad_norm", 1.0)
    half = next((name for name in ("bf16", "fp16") if recipe.train.get(name)), None)
    wanted = None
    if not experts:
        wanted = "plan", recipe.plan, "a plan with experts, in the same stage as ep_size"
    elif part.zero is None:
        wanted = "parallel.zero", None, "zero of 0, 1 or 2: the groups are DeepSpeed's"
    elif part.offload:
        wanted = "parallel.offload", part.offload, "null: it has not been tried with shared experts"
    elif part.zero == 0 and norm:
        # Its norm of all gradients is then the mean over processes, each with experts of its own.
        wanted = "train.max_grad_norm", norm, "max_grad_norm: 0 under ZeRO 0, or zero: 1 or 2"
    elif part.zero == 0 and half:
        wanted = f"train.{half}", True, "zero: 1 or 2; half precision has not been tried under 0"
    if wanted:
        argument, given, expected = wanted
        _refuse(
            f"parallel.ep_size={part.ep_size} cannot go with {argument}={given!r}; give {expected}",
            argument,
            given,
            expected,
        )


def _check_distill(recipe: Recipe) -> None:
    if recipe.model.reset_projector and recipe.parallel.zero == 3:
        _refuse(
            "a projector cannot be drawn anew in parts",
            "model.reset_projector",
            True,
            "parallel.zero of 0, 1 or 2",
        )
    if recipe.method.distill is None:
        return
    if recipe.plan is None:
        _refuse(
            "without a plan, the model and its teacher are the same: nothing to distil",
            "method.distill",
            None,
            "a plan",
        )
    if recipe.parallel.zero == 3:
        _refuse(
            "the teacher shares its weights with the model, which ZeRO-3 takes apart",
            "parallel.zero",
            3,
            "0, 1 or 2",
        )


def _check_tower(recipe: Recipe) -> None:
    part = recipe.model.tower
    if part is None:
        return
    from mllm.models.towers import TOWERS

    _check_names("model.tower.type", [part.type], tuple(TOWERS))
    known = TOWERS[part.type].fields()
    for key in part.model_extra or ():
        if key not in known:
            raise _unknown_key(f"model.tower.{key}", known)
    outside = {
        "parallel.zero": (recipe.parallel.zero == 3, 3, "0, 1 or 2"),
        "method.load_in_4bit": (recipe.method.load_in_4bit, True, "false"),
        "stages": (recipe.from_scratch, "scenes", "stages without scenes"),
    }
    for argument, (given, value, expected) in outside.items():
        if given:
            _refuse(
                f"model.tower cannot be put into a model that is in parts, in 4 bits or yet to be "
                f"drawn: {argument}={value!r}",
                argument,
                value,
                expected,
            )


def _check_names(where: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            _refuse(f"{where}: {name!r} does not exist; {hint}", where, name, ", ".join(known))


def _check_method_keys(method: str, extra: dict[str, Any]) -> None:
    if method not in ("lora", "moe"):
        _refuse(
            f"method.{next(iter(extra))} belongs to lora",
            f"method.{next(iter(extra))}",
            method,
            "method.type=lora, or moe with LoRA beside the experts",
        )
    from peft import LoraConfig

    for key in extra:
        if key not in LoraConfig.__dataclass_fields__:
            raise _unknown_key(f"method.{key}", list(LoraConfig.__dataclass_fields__))
