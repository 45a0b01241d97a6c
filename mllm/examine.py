"""What :func:`mllm.doctor` does: try everything, and report what the engine itself says."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import transformers
from torch import nn

from mllm import compat
from mllm.chunks import check_chunks
from mllm.compressors import base
from mllm.compressors.base import (
    Budget,
    CacheCompressor,
    LayerPruner,
    Positions,
    TokenReducer,
    TowerReducer,
)
from mllm.doctor import Check, Report
from mllm.errors import MllmError, PlanError
from mllm.models import resolve
from mllm.models.base import Family
from mllm.patcher import Patched
from mllm.placeholders import brought
from mllm.plan import MethodInfo, get_method
from mllm.plan import methods as known_methods
from mllm.validate import check_generation


def examine(model: nn.Module) -> Report:
    """See :func:`mllm.doctor`."""
    family = resolve(model)
    backends = {
        "decoder": compat.attention_name(family.attention(0)),
        "tower": compat.attention_name(family.block_attention(0)) if len(family.blocks) else "none",
    }
    Patched(model, []).remove()  # what is wrong with the model as a whole is no verdict
    return Report(
        model=type(family.model).__name__,
        family=family.model.config.model_type,
        backends=backends,
        transformers=transformers.__version__,
        tested=compat.tested(),
        facts=_facts(family),
        methods=_methods(model, family),
        signals=_signals(model, family),
        actions=_actions(model, family),
        ways=_ways(model, family),
    )


def _refusal(model: nn.Module, stage: Any) -> tuple[PlanError | None, list[str]]:
    """What `mllm.patch` says to one stage: its error, or its notes."""
    try:
        patched = Patched(model, [stage])
    except PlanError as error:
        return error, []
    patched.remove()
    return None, patched.plan_notes


def _why(error: MllmError) -> str:
    expected = str(error.expected or "")
    return f"{error}" + (f" (expected: {expected})" if expected not in str(error) else "")


@contextlib.contextmanager
def _as_if(family: Family, backend: str) -> Iterator[None]:
    """While open, the model's attention modules say that they run under `backend`."""
    modules = [family.attention(i) for i in range(len(family.layers))]
    modules += [family.block_attention(i) for i in range(len(family.blocks))]
    served = [(module, compat.serve(module, backend)) for module in modules]
    try:
        yield
    finally:
        for module, config in served:
            module.config = config


def _checks(model: nn.Module, family: Family, stages: Sequence[tuple[str, Any]]) -> list[Check]:
    """Each stage alone, under the model's own attention backend and under others."""
    said = [_refusal(model, stage) for _, stage in stages]
    under: list[dict[str, str]] = [{} for _ in stages]
    for backend in compat.SERVED:
        with _as_if(family, backend):
            for (_, stage), (error, _), answers in zip(stages, said, under, strict=True):
                if error is None:
                    refused, _ = _refusal(model, stage)
                    answers[backend] = "" if refused is None else _why(refused)
    return [
        Check(name, "yes", "", notes, answers) if error is None else Check(name, "no", _why(error))
        for (name, _), (error, notes), answers in zip(stages, said, under, strict=True)
    ]


def _methods(model: nn.Module, family: Family) -> list[Check]:
    """Every method with its default parameters, or where only others work with these."""
    stages, faults = [], {}
    for row in known_methods():
        cls = get_method(row["name"])
        stage = cls()
        error, _ = _refusal(model, stage)
        if error is not None and cls.identity is not None:
            # `identity` is a set of parameters that fits any model on which the method can work.
            other = cls(**cls.identity)
            if _refusal(model, other)[0] is None:
                stage, faults[row["name"]] = other, _why(error)
        stages.append((row["name"], stage))
    return [
        dataclasses.replace(check, verdict="adjust", reason=faults[check.name])
        if check.name in faults
        else check
        for check in _checks(model, family, stages)
    ]


# Signals and actions: stages that do nothing but declare them.


@dataclass
class _Probe:
    positions: Positions | None = "original"

    probed: ClassVar[Any] = None

    def reads(self):
        return {} if self.probed is None else {"probed": self.probed}


@dataclass
class _Tower(_Probe, TowerReducer):
    info = MethodInfo(name="a method", stage="pre_llm")

    def blocks(self, depth: int) -> list[int]:
        return [0]


@dataclass
class _Reducer(_Probe, TokenReducer):
    info = MethodInfo(name="a method", stage="pre_llm")


@dataclass
class _Pruner(_Probe, LayerPruner):
    layer: int | None = None
    keep: Budget = 1.0

    info = MethodInfo(name="a method", stage="llm", reference_layers=1)
    first_layer = 1


@dataclass
class _Compressor(_Probe, CacheCompressor):
    info = MethodInfo(name="a method", stage="cache")


#: What every signal is tried with: the kind of stage that reads it.
SIGNALS: list[tuple[type, Any]] = [
    (_Reducer, base.VisionAttention(query="cls")),
    (_Reducer, base.VisionAttention(query="received")),
    (_Reducer, base.VisionKeys()),
    (_Reducer, base.Features()),
    (_Reducer, base.Unprojected()),
    (_Reducer, base.BlockFeatures((0,))),
    (_Reducer, base.Joint()),
    (_Pruner, base.Grid()),
    (_Pruner, base.TextEmbeds()),
    (_Pruner, base.AttentionRows()),
    (_Pruner, base.AttentionRows(when="before")),
    (_Pruner, base.AttentionRows(rope=False)),
    (_Pruner, base.ColumnMass()),
    (_Pruner, base.Keys()),
    (_Pruner, base.Queries()),
    (_Pruner, base.Rotary()),
    (_Pruner, base.Values()),
    (_Pruner, base.Hidden()),
    (_Pruner, base.Unreduced()),
    (_Pruner, base.Views()),
]
#: Where every action is returned: the kind of stage, and the place in words.
ACTIONS: dict[str, list[type]] = {
    "Keep": [_Reducer, _Pruner],
    "Merge": [_Tower, _Reducer, _Pruner],
    "Write": [_Reducer, _Pruner],
    "Pool": [_Reducer],
    "Resize": [_Reducer],
    "Protect": [_Reducer, _Pruner],
    "Insert": [_Pruner],
    "BranchGate": [_Pruner],
    "BranchRows": [_Pruner],
    "LayerGate": [_Pruner],
    "HeadGate": [_Pruner],
    "LogitBias": [_Pruner],
    "Turn": [_Pruner],
    "Inject": [_Pruner],
    "Attend": [_Pruner],
    "Evict": [_Pruner, _Compressor],
}
PLACES = {
    _Tower: "in the tower",
    _Reducer: "before the LLM",
    _Pruner: "in the LLM",
    _Compressor: "from the cache",
}


def _name(signal: Any) -> str:
    """A signal as it is written, without what is default."""
    given = [
        f"{f.name}={getattr(signal, f.name)!r}"
        for f in dataclasses.fields(signal)
        if getattr(signal, f.name) != f.default
    ]
    return type(signal).__name__ + (f"({', '.join(given)})" if given else "")


def _probe(family: Family, kind: type, **declared: Any) -> Any:
    """A stage that declares something, where rows can leave."""
    layer = {"layer": max(1, family.first_cut)} if kind is _Pruner else {}
    return type("Probe", (kind,), declared)(**layer)


def _signals(model: nn.Module, family: Family) -> list[Check]:
    stages = [(_name(signal), _probe(family, kind, probed=signal)) for kind, signal in SIGNALS]
    return _checks(model, family, stages)


def _actions(model: nn.Module, family: Family) -> list[Check]:
    stages = [
        (f"{action} {PLACES[kind]}", _probe(family, kind, actions=(action,)))
        for action, kinds in ACTIONS.items()
        for kind in kinds
    ]
    return _checks(model, family, stages)


def _ways(model: nn.Module, family: Family) -> list[Check]:
    """Ways of running that some model or plan cannot take; all else always works."""

    def generate(**given: Any) -> Callable[[], None]:
        return lambda: check_generation(family.model.generation_config, given)

    def ask_all(asked: dict[str, Callable[[], Any]]) -> list[Check]:
        found = []
        for name, ask in asked.items():
            try:
                ask()
            except MllmError as error:
                found.append(Check(name, "no", _why(error)))
            else:
                found.append(Check(name, "yes"))
        return found

    with Patched(model, [_probe(family, _Pruner)]) as patched:
        asked: dict[str, Callable[[], Any]] = {
            "generate": generate(),
            "images": lambda: brought(patched, {family.pixels: True}),
            "videos": lambda: brought(patched, {"pixel_values_videos": True}),
            "static cache": generate(cache_implementation="static"),
            "quantised cache of transformers": generate(cache_implementation="quantized"),
            "offloaded cache": generate(cache_implementation="offloaded"),
        }
        for name in compat.CONTINUOUS:
            if hasattr(family.model, name):  # the patch stands in for it
                asked["continuous batching"] = getattr(family.model, name)
        found = ask_all(asked)
    with Patched(model, [_probe(family, _Compressor, chunks=True)]) as patched:
        (chunks,) = ask_all({"prefill in chunks": lambda: check_chunks(patched, 1024)})
    if chunks.verdict == "yes":
        notes = ["under plans of pre-LLM stages and of methods that score and evict stored tokens"]
        chunks = dataclasses.replace(chunks, notes=notes)
    compact = _probe(family, _Reducer)
    compact.positions = "compact"
    return [*found, chunks, *_checks(model, family, [("compact positions", compact)])]


def _facts(family: Family) -> dict[str, Any]:
    """Where the parts are, and what sets the family apart."""
    path = {id(module): name for name, module in family.model.named_modules()}
    grid, windows = family.native_grid(), [family.window(i) for i in range(len(family.layers))]
    return {
        "tower": f"{path[id(family.tower)]} ({type(family.tower).__name__})",
        "tower_blocks": f"{path[id(family.blocks)]} ({len(family.blocks)})"
        if len(family.blocks)
        else "none",
        "projector": f"{path[id(family.projector)]} ({type(family.projector).__name__})",
        "decoder": f"{path[id(family.decoder)]} ({type(family.decoder).__name__})",
        "layers": f"{path[id(family.layers)]} ({len(family.layers)})",
        "class_token": bool(family.prefix),
        "token_per_patch": family.per_token,
        "visual_tokens": "x".join(map(str, grid)) + " per image" if grid else "by image size",
        "videos": family.of_videos() is not None,
        "positions": "original (rows and columns)" if family.mrope else "original or compact",
        "first_cut": max(1, family.first_cut),
        "sliding_layers": sum(window is not None for window in windows),
    }
