"""The recipe: one commented YAML, validated strictly before anything is loaded."""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import typing
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, PrivateAttr, ValidationError

from mllm import strict_yaml
from mllm.errors import MllmError, RecipeError
from mllm.training.checks import check, unknown_key
from mllm.training.schema import (
    STAGES,
    DataPart,
    EvalPart,
    LearningRates,
    MethodPart,
    ModelPart,
    OutputPart,
    ParallelPart,
    SamplingPart,
    Stage,
    StagePart,
    Strict,
)

SUFFIX = ".yaml"
NOT_TRAINED = ("summary", "published", "eval", "output", "tiny")


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
    """YAML to plain objects: :func:`mllm.strict_yaml.parse`.

    Raises:
        RecipeError: broken YAML; the message gives the line.
    """

    def wrong(why: str) -> RecipeError:
        return RecipeError(
            why,
            argument="recipe",
            given=name,
            expected="YAML as in the shipped recipes (mllm recipes show tiny-llava)",
        )

    return strict_yaml.parse(text, name, wrong)


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
    check(recipe)
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
        place = _place(node, name, key)
        # A part that the recipe leaves out starts empty; a wrong name fails validation.
        part = {} if isinstance(node, dict) and node.get(place) is None else node[place]
        if not isinstance(part, (dict, list)):
            raise RecipeError(
                f"{'.'.join(parents[: depth + 1])} has no parts, so {key!r} cannot be set",
                argument=key,
                given=override,
                expected=f"{'.'.join(parents[: depth + 1])}=value",
            )
        node[place] = copy.copy(part)  # other keys may be aliases of it
        node = node[place]
    node[_place(node, last, key)] = parse(text, override)


def _place(node: dict | list, name: str, key: str) -> str | int:
    """Where `name`, a part of `key`, is in a mapping or a list."""
    if isinstance(node, dict):
        return name
    if not name.isdecimal() or int(name) >= len(node):
        raise RecipeError(
            f"{key!r}: {name!r} is no place in a list of {len(node)}",
            argument=key,
            given=name,
            expected=f"a number from 0 to {len(node) - 1}" if node else "a list with entries",
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
        return unknown_key(where, list(_part_at(inner, start).model_fields))
    if fault["type"] == "missing":
        return RecipeError(f"{where} is missing", argument=where, expected=f"a value for {where}")
    given = fault.get("input")
    return RecipeError(
        f"{where}={given!r}: {fault['msg'][:1].lower()}{fault['msg'][1:]}",
        argument=where,
        given=given,
        expected=fault["msg"],
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
