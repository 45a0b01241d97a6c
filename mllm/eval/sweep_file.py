"""The YAML of a sweep: every key checked before anything is loaded."""

from __future__ import annotations

import difflib
import functools
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from mllm import strict_yaml
from mllm.errors import DataError, MllmError, PlanError
from mllm.eval.plans import budgets_slots, check_protocol, on_cache
from mllm.plan import Plan

VERSION = 1
#: Ends of the names of the tables that stand beside the cells.
TABLES = (".md", ".csv", ".json")


@dataclass(frozen=True)
class SweepFile:
    """A grid and how it is evaluated. The fields are the keys of the YAML, beside `version`.

    Attributes:
        model: folder, hub name, or `tiny-llava`.
        methods: spec templates without `keep`; the sanity rows are added.
        budgets: visual tokens per image, averaged over decoder layers.
        kv_budgets: of methods on the KV cache, shares of the slots per layer and KV head.
        fixed: whole plans that have no `keep`, each with the budget whose rows it stands beside.
        tasks: tasks of `mllm.eval.sources`; `admitted` stands for those that the embedded model
            learnt, the name of a source (`yardstick`, `easyvqa`, `mnist`) for all of its own.
        seeds: seeds of methods that draw at random; the others run once.
        seeds_of: other seeds for some of them, by method or template.
        sanity_positions: position policies of the sanity rows; `compact` is always there.
        n: questions per task.
        split: of the tasks.
        style: of the pictures.
        batch_size: questions per batch.
        protocol: when answers are read, against when the KV cache is compressed: `prompt`,
            `again` or `context`; see :func:`mllm.eval.answer.answer`.
        timings: single prefills timed per cell; None is 8 with one worker, else 0.
        workers: processes that share the tasks.
        dtype, device: how to load the model.
        adapter: folder with what trained methods have learnt, for all of their budgets.
        output: JSON Lines file, relative to the working directory.
    """

    model: str = "tiny-llava"
    methods: tuple[str, ...] = ("visionzip", "divprune", "fastv", "visionzip+fastv:layer=2")
    budgets: tuple[int, ...] = (192, 64, 16)
    kv_budgets: tuple[float, ...] = (0.5, 0.25, 0.1)
    fixed: dict[str, int] = field(default_factory=dict)
    tasks: tuple[str, ...] = ("admitted",)
    seeds: tuple[int, ...] = (0,)
    seeds_of: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sanity_positions: tuple[Literal["compact", "original"], ...] = ("compact",)
    n: int = 500
    split: Literal["test", "dev", "train"] = "test"
    style: str = "plain"
    batch_size: int = 16
    protocol: Literal["prompt", "again", "context"] = "prompt"
    timings: int | None = None
    workers: int = 1
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    device: str | None = None
    adapter: str | None = None
    output: str = "sweep.jsonl"

    def __post_init__(self) -> None:
        for template in self.methods:
            _check_template(template)
        for text, budget in self.fixed.items():
            Plan.from_spec(text)
            if budget not in self.budgets:
                raise MllmError(
                    f"fixed.{text}: {budget} is no budget of this sweep, so nothing is there to "
                    "compare with",
                    argument="fixed",
                    given=budget,
                    expected=f"one of {', '.join(map(str, self.budgets))}",
                )
        for name in self.seeds_of:
            _check_seeded(name, (*self.methods, *self.fixed))
        for text in (*self.methods, *self.fixed):
            check_protocol(Plan.from_spec(text), self.protocol)
        if Path(self.output).suffix.lower() in TABLES:
            raise MllmError(
                f"a table of the sweep would be written over its cells in {self.output}: tables "
                f"have the name of the output, and {', '.join(TABLES)}",
                argument="output",
                given=self.output,
                expected="a name that ends in .jsonl",
            )
        if self.workers > 1 and self.timings:
            raise MllmError(
                f"{self.workers} workers disturb each other's timings",
                argument="timings",
                given=self.timings,
                expected="timings 0, or one worker",
            )

    @property
    def timed(self) -> int:
        """Prefills to time per cell."""
        if self.timings is None:
            return 8 if self.workers == 1 else 0
        return self.timings


_LEAST = {"budgets": 1, "fixed": 1, "seeds": 0, "seeds_of": 0, "n": 1, "batch_size": 1,
          "timings": 0, "workers": 1}  # fmt: skip
_TYPES = typing.get_type_hints(SweepFile)


def read(path: str | Path) -> dict[str, Any]:
    """Checked keys and values of a sweep file, as arguments of :class:`SweepFile`.

    Raises:
        DataError: the file cannot be read.
        MllmError: it is not such a YAML: the key at fault is named, and near ones.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not text in UTF-8"
        raise DataError(
            f"cannot read the sweep file {path}: {why}",
            argument="grid",
            given=path,
            expected="a YAML file as in examples/sweep.yaml",
        ) from error

    def wrong(why: str) -> MllmError:
        return MllmError(
            why, argument="grid", given=path, expected="a YAML file as in examples/sweep.yaml"
        )

    written = strict_yaml.parse(text, str(path), wrong)
    return _checked(written, str(path))


def combine(written: Mapping[str, Any], flags: Mapping[str, Any]) -> SweepFile:
    """The sweep of a file's keys and of flags, which win; None is a flag that was not given.

    Raises:
        MllmError: a flag's value is not of its kind, or two values do not go together.
        PlanError: a method that does not exist.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    given = {
        name: _value(name, value, "--" + name.replace("_", "-")) for name, value in given.items()
    }
    return replace(SweepFile(), **{**written, **given})


def _checked(written: Any, path: str) -> dict[str, Any]:
    if not isinstance(written, dict):
        raise MllmError(
            f"{path} is not a list of keys and values",
            argument="grid",
            given=path,
            expected="keys such as methods, budgets, tasks",
        )
    known = ["version", *(f.name for f in fields(SweepFile))]
    for name in written:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1, 0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known keys: {', '.join(known)}"
            raise MllmError(
                f"{path}: unknown key {name!r}; {hint}",
                argument=str(name),
                given=name,
                expected=close[0] if close else ", ".join(known),
            )
    version = written.pop("version", None)
    if version != VERSION or isinstance(version, bool):
        raise MllmError(
            f"{path}: version is {version!r}, and this mllm reads version {VERSION}",
            argument="version",
            given=version,
            expected=f"version: {VERSION}",
        )
    return {name: _value(name, value, f"{path}: {name}") for name, value in written.items()}


def _value(name: str, value: Any, where: str) -> Any:
    """`value` as the field `name` holds it; MllmError if it is of another kind."""
    hint = _TYPES[name]
    if typing.get_origin(hint) is tuple:
        return _list(name, value, where, typing.get_args(hint)[0])
    if typing.get_origin(hint) is dict:
        item = typing.get_args(hint)[1]
        several = typing.get_origin(item) is tuple
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            like = "lists of seeds: {random: [0, 1, 2]}" if several else "budgets: {zipvl: 288}"
            raise _wrong(name, value, where, f"methods with {like}")
        read = functools.partial(_list if several else _scalar, name)
        return {
            key: read(each, f"{where}.{key}", int if several else item)
            for key, each in value.items()
        }
    return _scalar(name, value, where, hint)


def _list(name: str, value: Any, where: str, item: Any) -> tuple:
    if not isinstance(value, list | tuple) or not value:
        raise _wrong(name, value, where, f"a list with at least one item, each {_kind(name, item)}")
    return tuple(dict.fromkeys(_scalar(name, each, where, item) for each in value))


def _scalar(name: str, value: Any, where: str, hint: Any) -> Any:
    options = typing.get_args(hint) or (hint,)
    if typing.get_origin(hint) is Literal:
        fits = isinstance(value, str) and value in options
    else:
        fits = not isinstance(value, bool) and isinstance(value, options)
        fits = fits and not (isinstance(value, int) and value < _LEAST[name])
        fits = fits and not (isinstance(value, float) and not 0 < value <= 1)
        fits = fits and value != ""
    if not fits:
        raise _wrong(name, value, where, _kind(name, hint))
    return value


def _kind(name: str, hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    if hint is float:
        return "a fraction in (0, 1]"
    if int in (hint, *typing.get_args(hint)):
        return f"a whole number from {_LEAST[name]}"
    return "a text"


def _wrong(name: str, value: Any, where: str, expected: str) -> MllmError:
    return MllmError(
        f"{where} is {expected}, not {value!r}", argument=name, given=value, expected=expected
    )


def _check_template(template: str) -> None:
    plan = Plan.from_spec(template)
    name, budgets = ("budget", "kv_budgets") if on_cache(template) else ("keep", "budgets")
    own = name == "budget" and not any(map(budgets_slots, plan.stages))
    if f":{name}=" in template and not own:
        raise PlanError(
            f"a sweep sets {name} from the {budgets}: leave it out of {template!r}",
            argument="methods",
            given=template,
            expected="+".join(stage.info.name for stage in plan.stages),
        )


def _check_seeded(name: str, methods: tuple[str, ...]) -> None:
    """`name` must be a method or template that draws at random."""
    from mllm.eval.sweep import KV_SANITY, SANITY, draws

    plans = {text: Plan.from_spec(text) for text in (*SANITY, *KV_SANITY, *methods)}
    drawn = {text: plan for text, plan in plans.items() if draws(plan)}
    known = {stage.info.name for plan in drawn.values() for stage in plan.stages if stage.draws}
    known |= set(drawn)
    if name not in known:
        expected = ", ".join(sorted(known))
        raise MllmError(
            f"seeds_of names {name!r}, which is no row of this sweep that draws at random; "
            f"those are: {expected}",
            argument="seeds_of",
            given=name,
            expected=expected,
        )
