"""The recipe: one commented YAML, validated strictly before anything is loaded."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import typing
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from mllm.errors import RecipeError

SUFFIX = ".yaml"
NOT_TRAINED = ("summary", "published", "eval", "output", "tiny")


class Strict(BaseModel):
    """A part of a recipe: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid")


class ModelPart(Strict):
    """Which model, in which type, and what stays frozen.

    `path` is a folder, a hub name, `tiny-llava` (the embedded model), or, with `stages`,
    `new:tiny-llava`: the same architecture with random weights. `reset_projector` starts from a
    random projector.
    """

    path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    reset_projector: bool = False
    freeze_vision_tower: bool = False
    freeze_multi_modal_projector: bool = False
    freeze_language_model: bool = False


class DataPart(Strict):
    """One data source: a file or folder, or a source of samples (`path: yardstick`, `mnist`, ...).

    Files are JSON, JSON Lines or parquet; a folder is one that `datasets` has saved. `limit`
    samples are taken (sources of samples: per task); `weight` 0.5 shows every second one, 2.0 each
    one twice. `skip_bad` is the share of unreadable entries and pictures that is skipped before
    the run fails. `tasks`, `style` and `split` belong to the sources of samples.
    """

    path: str
    format: Literal["llava", "messages"] = "llava"
    image_root: str | None = None
    split: Literal["train", "dev"] = "train"
    weight: float = Field(default=1.0, gt=0)
    limit: int | None = Field(default=None, ge=1)
    skip_bad: float = Field(default=0.0, ge=0, lt=1)
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
    """What is trained. The other keys of `lora` are those of PEFT's LoraConfig.

    `load_in_4bit` is QLoRA: a frozen base in nf4 (bitsandbytes, on a GPU).
    """

    model_config = ConfigDict(extra="allow")
    type: Literal["full", "lora", "router", "moe"] = "full"
    load_in_4bit: bool = False
    distill: DistillPart | None = None


class LearningRates(Strict):
    """Learning rates of parts, where they differ from `train.learning_rate`.

    `new_modules` are parameters that the model did not have before: adapters and the like; without
    it they have the rate of the part they sit in.
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


class ParallelPart(Strict):
    """How the run is spread over devices.

    `nproc` processes are started on this machine unless a launcher has started them. `zero` is
    DeepSpeed's ZeRO stage; null is plain data parallelism. `offload` keeps optimizer states, or
    parameters as well (stage 3), in the memory of the machine. `deepspeed` is merged into the
    configuration that DeepSpeed is given.
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
    stages: list[StagePart] = []
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
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

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
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return _unknown_key(where, list(_part_at(fault["loc"][:-1]).model_fields))
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


def _part_at(location: Sequence[str | int]) -> type[BaseModel]:
    """The model class that a validation location points into."""
    part: type[BaseModel] = Recipe
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


def _refuse(message: str, argument: str, given: Any, expected: str) -> typing.NoReturn:
    raise RecipeError(message, argument=argument, given=given, expected=expected)


def _check_together(recipe: Recipe) -> None:
    """Parts that cannot go together."""
    from mllm.eval import sources
    from mllm.plan import Plan
    from mllm.yardstick import TASKS
    from mllm.yardstick.scenes import KINDS

    _check_parallel(recipe)
    method = recipe.method.type
    if method in ("router", "moe"):
        _refuse(
            f"method.type={method!r} is not available yet",
            "method.type",
            method,
            "full or lora",
        )
    extra = recipe.method.model_extra or {}
    if extra:
        _check_method_keys(method, extra)
    _check_distill(recipe)
    if recipe.method.load_in_4bit and method != "lora":
        _refuse("a base in 4 bits cannot be trained", "method.load_in_4bit", True, "type: lora")
    new = recipe.model.path.startswith("new:")
    if recipe.stages:
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
        names = [stage.name for stage in recipe.stages]
        if len(set(names)) < len(names):
            _refuse("two stages have the same name", "stages", names, "different names")
    elif new:
        _refuse("a new model needs stages", "model.path", recipe.model.path, "stages, or a model")
    elif not recipe.data:
        _refuse("there is nothing to train on", "data", None, "data, or stages")
    model = recipe.model
    if method == "lora" and model.freeze_language_model and "target_modules" not in extra:
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
    _check_experts(recipe)
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


def _check_parallel(recipe: Recipe) -> None:
    part = recipe.parallel
    for key in ("ep_size", "sp_size"):
        if getattr(part, key) != 1:
            _refuse(
                f"parallel.{key}={getattr(part, key)} is not available yet: the processes of a run "
                "share the batch, not experts or sequences",
                f"parallel.{key}",
                getattr(part, key),
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


def _check_experts(recipe: Recipe) -> None:
    from mllm.plan import Plan

    if recipe.plan is None or Path(recipe.plan).is_dir():
        return
    found = [stage for stage in Plan.from_spec(recipe.plan).stages if stage.info.stage == "experts"]
    if found and recipe.parallel.zero == 3:
        _refuse(
            "ZeRO-3 keeps parameters in parts, and experts start from whole ones; DeepSpeed itself "
            "refuses native experts there",
            "parallel.zero",
            3,
            "zero of 0, 1 or 2",
        )
    if found:
        _refuse(
            f"recipes do not train experts yet, and would lose them: {found[0].info.name}",
            "plan",
            recipe.plan,
            "mllm.upcycle in a script (docs/experts.md), or a plan without experts",
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


def _check_names(where: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            _refuse(f"{where}: {name!r} does not exist; {hint}", where, name, ", ".join(known))


def _check_method_keys(method: str, extra: dict[str, Any]) -> None:
    if method != "lora":
        _refuse(
            f"method.{next(iter(extra))} belongs to lora",
            f"method.{next(iter(extra))}",
            method,
            "method.type=lora",
        )
    from peft import LoraConfig

    for key in extra:
        if key not in LoraConfig.__dataclass_fields__:
            raise _unknown_key(f"method.{key}", list(LoraConfig.__dataclass_fields__))
