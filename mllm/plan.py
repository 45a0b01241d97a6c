"""Plans: which methods run, in which order, with which hyper-parameters.

A plan is a list of stages, each an instance of a registered method (a dataclass). It can be
written as text (``visionzip:keep=64+fastv:layer=2:keep=0.5``), as stages, or as a folder with
``mllm_plan.json``.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib
import json
import os
import pkgutil
import tempfile
import types
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from mllm import hub
from mllm.errors import PlanError

PLAN_FILE = "mllm_plan.json"
#: What a plan has learnt, beside it: the header and the weights.
ADAPTER_FILES = ("mllm_adapter.json", "mllm_adapter.safetensors")
Budget = int | float
"""Visual tokens kept per image: an int counts tokens, a float in (0, 1] is a fraction."""

_REGISTRY: dict[str, type] = {}


@dataclasses.dataclass(frozen=True)
class MethodInfo:
    """What is known about a method without building it (class attribute ``info``)."""

    name: str
    stage: str
    paper: str | None = None
    licence_note: str | None = None
    trained: bool = False
    reference_layers: int | None = None
    version: int = 1


def register(name: str, *, stage: str, **info: Any):
    """Class decorator: add a method dataclass to the registry under its spec name.

    Args:
        name: the paper's name in lower case without punctuation.
        stage: ``"pre_llm"``, ``"llm"``, ``"cache"``, ``"experts"``, or ``"preset"`` for several
            stages.
        **info: the other fields of :class:`MethodInfo`.
    """

    def add(cls: type) -> type:
        if name in _REGISTRY and _REGISTRY[name].__qualname__ != cls.__qualname__:
            raise PlanError(f"two methods are called {name!r}", argument="name", given=name)
        cls.info = MethodInfo(name=name, stage=stage, **info)
        _REGISTRY[name] = cls
        return cls

    return add


@functools.cache
def _load_methods() -> dict[str, type]:
    for name in ("mllm.compressors", "mllm.routers"):
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__):
            importlib.import_module(f"{name}.{module.name}")
    return _REGISTRY


def near(word: str, options: Iterable[str]) -> str:
    """`'fastv'` for `'fasv'`: the nearest names, or all of them, for an error message."""
    options = sorted(options)
    return ", ".join(difflib.get_close_matches(word, options, 3, 0.5) or options)


def get_method(name: str) -> type:
    """The method class registered as `name`; PlanError with the nearest names otherwise."""
    known = _load_methods()
    if name not in known:
        close = ", ".join(difflib.get_close_matches(name, known, 3, 0.5))
        expected = close or f"a name that `mllm methods` lists, or a folder with {PLAN_FILE}"
        if name in ("none", "unpatched"):  # `mllm eval` alone has a row for it
            close, expected = "", "a method; the model as it is needs no plan"
        elif name and os.path.exists(name):  # a file, or a folder of something else
            close, expected = "", f"text, or a folder with {PLAN_FILE}, which {name} is not"
        raise PlanError(
            f"unknown method {name!r}; "
            + (f"did you mean: {close}?" if close else f"expected {expected}"),
            argument="method",
            given=name,
            expected=expected,
        )
    return known[name]


def methods() -> list[dict[str, Any]]:
    """Every method: name, stage, what it reads, paper, parameters and defaults (contracts)."""
    return [_describe(cls) for _, cls in sorted(_load_methods().items())]


def _describe(cls: type) -> dict[str, Any]:
    info: MethodInfo = cls.info
    hints = _hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    default = cls()
    return {
        "name": info.name,
        "stage": info.stage,
        "site": cls.site,
        "reads": [type(s).__name__ for s in default.reads().values()],
        "actions": list(default.actions),
        "trained": info.trained,
        "paper": info.paper,
        "licence_note": info.licence_note,
        "params": [
            {"name": n, "type": _type_name(hints[n]), "default": _listed(f.default)}
            for n, f in fields.items()
        ],
        "positions": default.paper_positions,
        "identity": cls.identity and {k: _listed(v) for k, v in cls.identity.items()},
        "oracle": cls.oracle,
        "backends": ["sdpa", "eager"],
        "summary": (cls.__doc__ or "").strip().splitlines()[0],
    }


def _listed(value: Any) -> Any:
    """A value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _type_name(hint: Any) -> str:
    return getattr(hint, "__name__", str(hint)) if not typing.get_args(hint) else str(hint)


def check_fields(stage: Any) -> None:
    """Validate what every method shares: budgets, `layer`, `positions`. Called by the bases."""
    name = stage.info.name
    hints = _hints(type(stage))
    for field in ("keep", "budget", "clusters"):
        keep = getattr(stage, field, None)
        for budget in keep if isinstance(keep, tuple) else (keep,):
            if budget is not None:
                _check_keep(name, field, budget)
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        if not any(_is_a(value, option) for option in _options(hints[field.name])):
            expected = " or ".join(map(_option_name, _options(hints[field.name])))
            raise PlanError(
                f"{name}: {field.name}={value!r} is not {expected}",
                argument=field.name,
                given=value,
                expected=expected,
            )
    for field in ("layer", "layers"):
        value = getattr(stage, field, None)
        layers = value if isinstance(value, tuple) else () if value is None else (value,)
        if any(layer < 0 for layer in layers) or list(layers) != sorted(set(layers)):
            raise PlanError(
                f"{name}: {field} must be whole numbers from 0, rising, not {value!r}",
                argument=field,
                given=value,
                expected="0 <= layer < number of decoder layers",
            )


def _is_a(value: Any, option: Any) -> bool:
    """Whether a value fits one alternative of a field's type; a bool is no number."""
    origin = typing.get_origin(option)
    if origin is typing.Literal:
        return value in typing.get_args(option)
    if origin is tuple:
        item = typing.get_args(option)[0]
        return isinstance(value, tuple) and all(_is_a(v, item) for v in value)
    if isinstance(value, bool):
        return option is bool
    return isinstance(value, (int, float) if option is float else option)


def _option_name(option: Any) -> str:
    if typing.get_origin(option) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(option)))
    return "None" if option is type(None) else getattr(option, "__name__", str(option))


def _check_keep(name: str, field: str, keep: Any) -> None:
    expected = "a whole number of tokens from 1, or a fraction in (0, 1]"
    number = isinstance(keep, int | float) and not isinstance(keep, bool)
    if not number or (isinstance(keep, int) and keep < 1) or not (keep > 0):
        raise PlanError(
            f"{name}: {field}={keep!r} is not {expected}", argument=field, given=keep,
            expected=expected,
        )
    if isinstance(keep, float) and keep > 1:
        raise PlanError(
            f"{name}: {field}={keep!r} is a fraction above 1; write a whole number "
            "for tokens",
            argument=field,
            given=keep,
            expected=expected,
        )


def resolve(keep: Budget, tokens: int, images: int = 1) -> int:
    """Tokens that a budget leaves of `tokens`, which belong to `images` images (>= 1 if any)."""
    wanted = keep * images if isinstance(keep, int) else round(keep * tokens)
    return min(tokens, max(1, wanted)) if tokens else 0


def keep_for_average(average: float, tokens: int, layer: int, num_layers: int) -> int:
    """Tokens to keep from decoder layer `layer` on, so that layers see `average` on average.

    The convention is "input to layer": layers before `layer` see all `tokens`.

    Args:
        average: visual tokens per layer and image, averaged over all decoder layers.
        tokens: visual tokens of an image before the cut.
        layer: 0-based layer before which rows leave.
        num_layers: decoder layers of the model.

    Raises:
        PlanError: the average cannot be reached at this layer.
    """
    kept = round((average * num_layers - layer * tokens) / (num_layers - layer))
    if not 1 <= kept <= tokens:
        floor = (layer * tokens + num_layers - layer) / num_layers
        raise PlanError(
            f"a layer average of {average:g} visual tokens cannot be reached by a cut before "
            f"layer {layer} of {num_layers}: the least is {floor:.1f}",
            argument="tokens_avg",
            given=average,
            expected=f"{floor:.1f} <= average <= {tokens}",
        )
    return kept


def schedule_for_average(
    average: float, tokens: int, layers: Sequence[int], num_layers: int, keep: Sequence[Budget]
) -> tuple[int, ...]:
    """Tokens to keep from each of `layers` on, so that layers see `average` on average.

    The shares of `keep` are raised to one common power, so that a geometric schedule stays
    geometric. The convention is that of :func:`keep_for_average`.

    Args:
        average: visual tokens per layer and image, averaged over all decoder layers.
        tokens: visual tokens of an image before the first cut.
        layers: 0-based layers before which rows leave, rising.
        num_layers: decoder layers of the model.
        keep: budgets of the schedule that gives the shape.

    Raises:
        PlanError: the average cannot be reached at these layers.
    """
    spans = [b - a for a, b in zip(layers, [*layers[1:], num_layers], strict=True)]
    shares = [resolve(k, tokens) / tokens for k in keep]

    def counts(power: float) -> tuple[int, ...]:
        return tuple(max(1, round(tokens * share**power)) for share in shares)

    def mean(kept: Sequence[int]) -> float:
        seen = layers[0] * tokens + sum(n * s for n, s in zip(kept, spans, strict=True))
        return seen / num_layers

    low, high = 0.0, 64.0  # mean() falls with the power
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if mean(counts(middle)) > average else (low, middle)
    best = min(counts(low), counts(high), key=lambda kept: abs(mean(kept) - average))
    if abs(mean(best) - average) > 1:
        floor = mean(counts(64.0))
        raise PlanError(
            f"a layer average of {average:g} visual tokens cannot be reached by cuts before "
            f"layers {'/'.join(map(str, layers))} of {num_layers}: the least is {floor:.1f}",
            argument="tokens_avg",
            given=average,
            expected=f"{floor:.1f} <= average <= {tokens}",
        )
    return best


class Plan:
    """An ordered list of stages and one seed.

    Args:
        stages: method instances, in the order in which they run. A preset is written as itself
            and runs as the stages that it stands for.
        seed: seed of all random choices.

    Attributes:
        written: what was given; spec text and plan files have it.
        stages: what runs, presets expanded.
        folder: where it was read; what is learnt may lie beside it, and belongs to it.
    """

    folder: Path | None = None

    def __init__(self, stages: Iterable[Any], seed: int = 0) -> None:
        self.written = list(stages)
        self.seed = seed
        for stage in self.written:
            if isinstance(stage, type) or not hasattr(stage, "info"):
                what = f"the class {stage.__name__}" if isinstance(stage, type) else repr(stage)
                raise PlanError(
                    f"a plan is made of method instances, not {what}",
                    argument="plan",
                    given=stage,
                    expected="for example VisionZip(keep=64) or 'visionzip:keep=64'",
                )
        self.stages = [
            own
            for stage in self.written
            for own in (stage.expand() if hasattr(stage, "expand") else [stage])
        ]

    @classmethod
    def of(cls, plan: Any) -> Plan:
        """A Plan from a Plan, a stage, several stages, a spec, or an existing plan folder."""
        if isinstance(plan, Plan):
            return plan
        if isinstance(plan, str | os.PathLike):
            path = Path(plan)
            folder = path.parent if path.name == PLAN_FILE else path
            if os.path.isfile(folder / PLAN_FILE):  # False for a text that no path can be
                return cls.from_pretrained(folder)
            return cls.from_spec(str(plan))
        return cls(plan if isinstance(plan, list | tuple) else [plan])

    @classmethod
    def from_spec(cls, text: str, seed: int = 0) -> Plan:
        """Parse ``name:key=value:key=value`` stages joined by ``+`` (see the contracts)."""
        if not text.strip():
            raise PlanError(
                "the plan is empty", argument="plan", given=text, expected="visionzip:keep=64"
            )
        if set(" ,\t\n") & set(text.strip()):
            raise PlanError(
                f"a plan has no spaces and no commas: {text!r}",
                argument="plan",
                given=text,
                expected="name:key=value:key=value, stages joined by '+'",
            )
        return cls([_parse_stage(part, text) for part in text.strip().split("+")], seed)

    def seed_for(self, number: int, *bits: int) -> int:
        """Seed of stage `number` for a picture, or a sample, known by the sums of its bits."""
        own = getattr(self.stages[number], "seed", 0)
        return hash((*bits, self.seed, own, number)) & (2**63 - 1)

    @property
    def spec(self) -> str:
        """The plan as spec text; values that are the defaults are not written."""
        return "+".join(_format_stage(stage) for stage in self.written)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``mllm_plan.json``."""
        import mllm

        return {
            "type": "mllm.plan",
            "version": 1,
            "mllm_version": mllm.__version__,
            "seed": self.seed,
            "stages": _rows(self.written),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Plan:
        """Inverse of :meth:`to_dict`; unknown keys and newer versions are PlanErrors."""
        if not isinstance(data, dict):
            raise PlanError("a plan file holds one JSON object", argument="plan", given=data)
        _no_unknown(data, {"type", "version", "mllm_version", "seed", "stages"}, "plan file")
        if data.get("type") != "mllm.plan" or data.get("version") != 1:
            raise PlanError(
                f"not a plan of version 1: type={data.get('type')!r}, "
                f"version={data.get('version')!r}",
                argument="version",
                given=data.get("version"),
                expected="type 'mllm.plan', version 1",
            )
        rows, seed = data.get("stages", []), data.get("seed", 0)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise PlanError(
                "stages is a list of objects", argument="stages", given=rows,
                expected="[{name, version, params}]",
            )
        if not _is_a(seed, int):
            raise PlanError(
                f"seed={seed!r} is not a whole number", argument="seed", given=seed, expected="int"
            )
        stages = []
        for row in rows:
            _no_unknown(row, {"name", "version", "params"}, "stage")
            method = get_method(row.get("name", ""))
            if row.get("version", 1) > method.info.version:
                raise PlanError(
                    f"{row['name']} version {row['version']} is newer than this mllm knows",
                    argument="version",
                    given=row["version"],
                    expected=f"<= {method.info.version}",
                )
            params = row.get("params", {})
            _check_keys(method, params)
            stages.append(method(**{k: _from_json(v) for k, v in params.items()}))
        return cls(stages, seed)

    @property
    def sha256(self) -> str:
        """Hash of what the plan does (the version of mllm is left out)."""
        return self._hash(whole=True)

    @property
    def learnt_sha256(self) -> str:
        """Hash of what the plan's learnt parts depend on: :attr:`sha256` without `free` fields."""
        return self._hash(whole=False)

    def _hash(self, whole: bool) -> str:
        data = {k: v for k, v in self.to_dict().items() if k != "mllm_version"}
        data["stages"] = _rows(self.stages)
        for stage, row in zip(self.stages, data["stages"], strict=True):
            for name in () if whole else stage.free:
                del row["params"][name]
            if "positions" in row["params"]:
                row["params"]["positions"] = stage.positions or stage.paper_positions
            if row["params"].get("calibration"):
                path = Path(stage.calibration)  # what it says counts, not where it lies
                if path.is_file():
                    row["params"]["calibration"] = hashlib.sha256(path.read_bytes()).hexdigest()
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()

    def save_pretrained(self, folder: str | os.PathLike) -> Path:
        """Write ``mllm_plan.json`` into `folder` (made if missing); returns its path."""
        path = Path(folder) / PLAN_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        temporary.replace(path)
        return path

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
        """Upload the plan; returns the address of the commit.

        What a plan has learnt goes with :meth:`mllm.patcher.Patched.push_to_hub`.

        Args:
            repo_id: `user/name`; made if it is missing.
            private: whether a new repository is; None is the account's setting.
            **options: `commit_message`, `revision`, `create_pr`, `token`, as `huggingface_hub` has
                them.

        Raises:
            PlanError: nobody is logged in, there is no way to the hub, or it refuses.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            text = (
                f"# Plan\n\n`{self.spec}`\n\n```python\nimport mllm\n\n"
                'plan = mllm.Plan.from_pretrained("user/name")  # of this repository\n'
                "patched = mllm.patch(model, plan)\n```\n"
            )
            (Path(folder) / "README.md").write_text(text)
            return hub.push(Path(folder), repo_id, private, **options)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike, **options: Any) -> Plan:
        """Read a folder written by :meth:`save_pretrained` or `save_adapter`, or such a repository.

        Args:
            folder: a folder, or `user/name` on the hub; what was learnt is found beside the plan.
            **options: `revision`, `token`, `cache_dir` and others of
                `huggingface_hub.snapshot_download`, for a repository.

        Raises:
            PlanError: there is no plan, or no way to the hub.
        """
        if hub.is_repo(folder):
            folder = hub.fetch(folder, [PLAN_FILE, *ADAPTER_FILES], **options)
        path = Path(folder) / PLAN_FILE
        try:
            plan = cls.from_dict(json.loads(path.read_text()))
        except (OSError, json.JSONDecodeError) as error:
            raise PlanError(
                f"cannot read {path}: {error}", argument="plan", given=path,
                expected=f"a folder with {PLAN_FILE}",
            ) from error
        plan.folder = Path(folder)
        return plan

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.to_dict() == other.to_dict()

    def __repr__(self) -> str:
        return f"Plan({self.spec!r}, seed={self.seed})"


def _rows(stages: Iterable[Any]) -> list[dict[str, Any]]:
    """Stages as a plan file has them."""
    return [
        {
            "name": stage.info.name,
            "version": stage.info.version,
            "params": {
                f.name: _to_json(getattr(stage, f.name), _hints(type(stage))[f.name])
                for f in dataclasses.fields(stage)
            },
        }
        for stage in stages
    ]


def _no_unknown(data: dict, known: set[str], what: str) -> None:
    for key in data.keys() - known:
        raise PlanError(
            f"unknown key {key!r} in {what}", argument=key, given=key, expected=near(key, known)
        )


def _check_keys(method: type, params: Iterable[str]) -> None:
    names = [f.name for f in dataclasses.fields(method)]
    for key in params:
        if key not in names:
            expected = near(key, names)
            raise PlanError(
                f"{method.info.name} has no parameter {key!r}; did you mean: {expected}?",
                argument=key,
                given=key,
                expected=expected,
            )


def _parse_stage(part: str, text: str) -> Any:
    name, *pairs = part.split(":")
    broken = [p for p in pairs if "=" not in p or p.startswith("=")]
    if not name or broken:
        raise PlanError(
            f"cannot read {(broken or [part])[0]!r} in the plan {text!r}",
            argument="plan",
            given=text,
            expected="name:key=value:key=value, stages joined by '+'",
        )
    method = get_method(name)
    values: dict[str, str] = {}
    for pair in pairs:
        key, value = pair.split("=", 1)
        if key in values:
            raise PlanError(
                f"{name}: {key} is given twice", argument=key, given=part, expected="once"
            )
        values[key] = unquote(value)
    _check_keys(method, values)
    hints = _hints(method)
    return method(**{k: _parse_value(name, k, v, hints[k]) for k, v in values.items()})


def _options(hint: Any) -> tuple:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _parse_value(name: str, key: str, text: str, hint: Any) -> Any:
    words = {"none": None, "true": True, "false": False}
    options = _options(hint)
    if text.lower() in words and type(words[text.lower()]) in options:
        return words[text.lower()]
    for option in options:
        if typing.get_origin(option) is tuple:
            item = typing.get_args(option)[0]
            return tuple(_parse_value(name, key, v, item) for v in text.split("/"))
        if typing.get_origin(option) is typing.Literal:
            return text
    for kind in (int, float, str):
        if kind in options:
            try:
                return kind(text)
            except ValueError:
                continue
    expected = " or ".join(map(_option_name, options))
    raise PlanError(
        f"{name}: {key}={text!r} is not {expected}", argument=key, given=text, expected=expected
    )


def _format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return "/".join(_format_value(v) for v in value)
    return quote(repr(value) if isinstance(value, float) else str(value), safe="/-_.~")


def _format_stage(stage: Any) -> str:
    parts = [stage.info.name]
    for field in dataclasses.fields(stage):
        value = getattr(stage, field.name)
        default = field.default
        if value != default or type(value) is not type(default) or field.name in stage.named:
            parts.append(f"{field.name}={_format_value(value)}")
    return ":".join(parts)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _to_json(value: Any, hint: Any) -> Any:
    options = _options(hint)
    if isinstance(value, tuple):
        item = next(typing.get_args(o)[0] for o in options if typing.get_origin(o) is tuple)
        return [_to_json(v, item) for v in value]
    if {int, float} <= set(options) and value is not None:
        return {"tokens" if isinstance(value, int) else "fraction": value}
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {"tokens"} and _is_a(value["tokens"], int):
            return value["tokens"]
        if set(value) == {"fraction"} and _is_a(value["fraction"], float):
            return float(value["fraction"])
        expected = '{"tokens": n} or {"fraction": x}'
        raise PlanError(
            f"a budget is {expected}, not {value}", argument="keep", given=value,
            expected=expected,
        )
    return tuple(map(_from_json, value)) if isinstance(value, list) else value
