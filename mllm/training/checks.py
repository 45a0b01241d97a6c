"""What a recipe may not say: values that cannot be, and parts that cannot go together."""

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, TypeAdapter, ValidationError

from mllm.errors import RecipeError
from mllm.training.schema import TowerPart, TunePart

if TYPE_CHECKING:
    from mllm.training.recipe import Recipe

# Keys of `train` that TrainingArguments takes at any value, and fails with later.
COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps")
ABOVE_ZERO = ("learning_rate", "logging_steps", "save_steps")
NEVER = "nothing is evaluated during training"
# Keys of `train` that would not do what they say: the value at which they do nothing, why, and what
# would work.
REFUSED = {
    "eval_strategy": ("no", NEVER, "eval, which scores tasks at the end"),
    "do_eval": (False, NEVER, "eval, which scores tasks at the end"),
    "load_best_model_at_end": (False, NEVER, "false"),
    "label_smoothing_factor": (
        0,
        "transformers then takes the labels from the model, without which a plan looks at answers, "
        "and compares each with its own row for most multimodal models",
        "0",
    ),
    "train_sampling_strategy": ("random", "the order is the recipe's", "sampling.group_by"),
}


def check(recipe: Recipe) -> None:
    """Refuse a recipe of which every part is as it should be, and the whole cannot be run.

    Raises:
        RecipeError: names the key at fault.
        PlanError: a plan that does not parse.
    """
    _check_train(recipe)
    _check_parallel(recipe)
    _check_learnt(recipe)
    _check_method_keys(recipe)
    _check_distill(recipe)
    _check_model(recipe)
    new = recipe.model.path.startswith("new:")
    names = [stage.name for stage in recipe.stages]
    if len(set(names)) < len(names):
        _refuse("two stages have the same name", "stages", names, "different names")
    if recipe.stages and not recipe.from_scratch:
        _check_tunes(recipe, new)
    else:
        if recipe.from_scratch:
            _check_scenes(recipe)
        elif new:
            path = recipe.model.path
            _refuse("a new model needs stages", "model.path", path, "stages, or a model")
        elif not recipe.data:
            _refuse("there is nothing to train on", "data", None, "data, or stages")
        _check_frozen(recipe)
        _check_data(recipe)
    _check_eval(recipe, new)


def _check_train(recipe: Recipe) -> None:
    """`train` keys are those of TrainingArguments; the folder is `output.dir`."""
    from transformers import TrainingArguments

    known = [name for name in TrainingArguments.__dataclass_fields__ if not name.startswith("_")]
    parts = [("train", recipe.train)]
    if recipe.from_scratch:
        parts += [(f"stages.{i}.train", stage.train) for i, stage in enumerate(recipe.stages)]
    for where, part in parts:
        for key in part:
            if key == "output_dir":
                _refuse(
                    f"{where}.output_dir is not used: the folder is output.dir",
                    f"{where}.output_dir",
                    part[key],
                    "output.dir",
                )
            if key not in known:
                raise unknown_key(f"{where}.{key}", known)
            if key in REFUSED and part[key] != REFUSED[key][0]:
                why, expected = REFUSED[key][1:]
                message = f"{where}.{key}={part[key]!r}: {why}"
                _refuse(message, f"{where}.{key}", part[key], expected)
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


def _check_method_keys(recipe: Recipe) -> None:
    """Keys that are not ours are those of LoRA."""
    method, extra = recipe.method.type, recipe.method.model_extra
    if not extra:
        return
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
            raise unknown_key(f"method.{key}", list(LoraConfig.__dataclass_fields__))


def _check_distill(recipe: Recipe) -> None:
    if recipe.method.distill is None:
        return
    from mllm.plan import Plan

    for stage in Plan.of(recipe.plan).stages if recipe.plan else ():
        if getattr(stage, "train", None) == "sum":
            _refuse(
                f"{stage.info.name} answers from every budget in a step, and a teacher would be "
                "heard by the last alone",
                "method.distill",
                "train=sum",
                f"plan: {stage.info.name}:train=draw",
            )
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


def _check_model(recipe: Recipe) -> None:
    """What is not whole cannot be made anew, nor trained."""
    if recipe.model.reset_projector and recipe.parallel.zero == 3:
        _refuse(
            "a projector cannot be drawn anew in parts",
            "model.reset_projector",
            True,
            "parallel.zero of 0, 1 or 2",
        )
    if recipe.model.tower is not None:
        _check_tower(recipe, recipe.model.tower)
    if recipe.method.load_in_4bit and recipe.method.type != "lora":
        _refuse("a base in 4 bits cannot be trained", "method.load_in_4bit", True, "type: lora")


def _check_tower(recipe: Recipe, part: TowerPart) -> None:
    from mllm.models.towers import TOWERS

    _check_names("model.tower.type", [part.type], tuple(TOWERS))
    known = TOWERS[part.type].fields()
    for key in part.model_extra or ():
        if key not in known:
            raise unknown_key(f"model.tower.{key}", known)
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


def _check_scenes(recipe: Recipe) -> None:
    """Stages on drawn scenes: they train a new model, and bring everything of their own."""
    from mllm.yardstick import TASKS
    from mllm.yardstick.scenes import KINDS

    model = recipe.model
    if model.feature_cache:
        _refuse(
            "stages from scratch train the tower",
            "model.feature_cache",
            model.feature_cache,
            "null",
        )
    for key in ("data", "train", "plan", "learning_rates", "sampling", "parallel"):
        if recipe._written.get(key):
            _refuse(
                f"a recipe with stages cannot have {key!r}: stages bring their own",
                key,
                getattr(recipe, key),
                f"either stages or {key}",
            )
    if recipe.method.type != "full":
        _refuse("stages train the whole model", "method.type", recipe.method.type, "full")
    if model.path != "new:tiny-llava":
        _refuse(
            "stages train the embedded architecture from random weights",
            "model.path",
            model.path,
            "new:tiny-llava",
        )
    for number, stage in enumerate(recipe.stages):
        where = f"stages.{number}"
        if isinstance(stage, TunePart):
            _refuse(
                f"{where} has no scenes, and others have",
                where,
                stage.name,
                "stages of one kind: all with scenes and losses, or none",
            )
        if stage.scenes == "soup" and stage.questions:
            _refuse(
                f"{where}: soup scenes have no questions",
                f"{where}.questions",
                stage.questions,
                "0, or scenes: mini or full",
            )
        if stage.freeze_vision_tower and not stage.questions:
            _refuse(
                f"{where}: nothing is left to train without tower and questions",
                f"{where}.freeze_vision_tower",
                True,
                "false, or questions of at least 1",
            )
        _check_names(f"{where}.tasks", stage.tasks or (), (*TASKS, "list", "legend"))
        _check_names(f"{where}.kinds", stage.kinds or (), tuple(KINDS))
        if not stage.train.get("max_steps", 0) > 0:
            _refuse(
                f"{where}.train.max_steps must be given: scenes are endless",
                f"{where}.train.max_steps",
                stage.train.get("max_steps"),
                "a number of steps",
            )


def _check_frozen(recipe: Recipe) -> None:
    """Something is left to train."""
    model, method = recipe.model, recipe.method
    placed = "target_modules" in (method.model_extra or {})
    if recipe.with_lora and model.freeze_language_model and not placed:
        _refuse(
            "LoRA goes into the language model by default, which is frozen",
            "model.freeze_language_model",
            True,
            "false, or method.target_modules",
        )
    frozen = model.freeze_vision_tower, model.freeze_multi_modal_projector
    if method.type == "full" and all(frozen) and model.freeze_language_model:
        _refuse("everything is frozen: nothing to train", "model", "all frozen", "one part free")


def _check_data(recipe: Recipe) -> None:
    """Sources of samples and files have keys of their own."""
    from mllm.eval.sources import SOURCES

    for number, part in enumerate(recipe.data):
        where, source = f"data.{number}", SOURCES.get(part.path)
        if part.streaming and (source or Path(part.path).suffix == ".json"):
            _refuse(
                f"{where}: {part.path} cannot be streamed",
                f"{where}.streaming",
                True,
                "JSON Lines (.jsonl), parquet or a datasets folder, or streaming: false",
            )
        if source:
            _check_names(f"{where}.tasks", part.tasks or [], source.tasks)
            _check_names(f"{where}.style", [part.style], source.styles)
            if part.limit is None and not source.size:
                _refuse(
                    f"{where}.limit must be given: the {source.name} is endless",
                    f"{where}.limit",
                    None,
                    "samples per task",
                )
        elif part.tasks is not None or part.style != "plain":
            names = ", ".join(SOURCES)
            _refuse(
                f"{where}: tasks and style belong to path: {names}",
                f"{where}.tasks",
                part.tasks,
                f"path: {names}; or no tasks and style",
            )


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


def _check_names(where: str, given: Iterable[str], known: Sequence[str]) -> None:
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            _refuse(f"{where}: {name!r} does not exist; {hint}", where, name, ", ".join(known))


def unknown_key(where: str, known: Sequence[str]) -> RecipeError:
    """The error for a key that is none of those that are `known` at its place."""
    key = where.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
    return RecipeError(
        f"unknown key {where!r}; {hint}",
        argument=where,
        given=key,
        expected=near[0] if near else ", ".join(known),
    )


def _refuse(message: str, argument: str, given: Any, expected: str) -> typing.NoReturn:
    raise RecipeError(message, argument=argument, given=given, expected=expected)
