"""What :func:`mllm.doctor` does: try everything, and report what the engine itself says."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import transformers
from torch import nn

from mllm import compat
from mllm.compressors import base as methods
from mllm.compressors.base import Budget, LayerPruner, Positions, TokenReducer, TowerReducer
from mllm.doctor import Check, Report
from mllm.errors import MllmError, PlanError
from mllm.models import resolve
from mllm.models.base import Family
from mllm.patcher import Patched
from mllm.plan import MethodInfo, get_method
from mllm.plan import methods as known_methods


def examine(model: nn.Module) -> Report:
    """See :func:`mllm.doctor`."""
    family = resolve(model)
    backends = {
        "decoder": compat.attention_name(family.attention(0)),
        "tower": compat.attention_name(family.block_attention(0)),
    }
    Patched(model, []).remove()  # what is wrong with the model as a whole is no verdict
    return Report(
        model=type(family.model).__name__,
        family=family.model.config.model_type,
        backends=backends,
        transformers=transformers.__version__,
        tested=compat.tested(),
        facts=_facts(family),
        methods=[_method(model, family, get_method(m["name"])) for m in known_methods()],
        signals=[
            _probe(model, name, kind, probed=signal) for name, (kind, signal) in SIGNALS.items()
        ],
        actions=[
            _probe(model, name, kind, actions=(name.split("(")[0],))
            for name, kind in ACTIONS.items()
        ],
        ways=[],
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


def _method(model: nn.Module, family: Family, cls: type) -> Check:
    name = cls.info.name
    error, notes = _refusal(model, cls())
    stage, verdict, reason = cls(), "yes", ""
    if error is not None:
        verdict, reason = "no", _why(error)
        # A parameter of its own may be at fault: `identity` is a set of them that fits any model.
        own = {f.name for f in dataclasses.fields(cls)}
        if error.argument in own and cls.identity is not None:
            stage = cls(**cls.identity)
            still, notes = _refusal(model, stage)
            verdict = "adjust" if still is None else "no"
    backends = {}
    for backend in compat.SERVED:
        with _as_if(family, backend):
            refused, _ = _refusal(model, stage)
        if verdict != "no":
            backends[backend] = "" if refused is None else _why(refused)
    return Check(name, verdict, reason, notes, backends)


# Signals and actions: stages that do nothing but declare them.


@dataclass
class _Reducer(TokenReducer):
    positions: Positions | None = None

    info = MethodInfo(name="probe", stage="pre_llm")
    probed: ClassVar[Any] = None

    def reads(self):
        return {"probed": self.probed} if self.probed is not None else {}


@dataclass
class _Pruner(LayerPruner):
    layer: int | None = None
    keep: Budget = 1.0
    positions: Positions | None = None

    info = MethodInfo(name="probe", stage="llm", reference_layers=32)
    paper_layer = 1
    first_layer = 1
    probed: ClassVar[Any] = None

    def reads(self):
        return {"probed": self.probed} if self.probed is not None else {}


@dataclass
class _Merger(TowerReducer):
    positions: Positions | None = None

    info = MethodInfo(name="probe", stage="pre_llm")

    def blocks(self, depth: int) -> Sequence[int]:
        return (0,)


#: What to declare for every signal.
SIGNALS: dict[str, tuple[type, Any]] = {
    "VisionAttention(query='cls')": (_Reducer, methods.VisionAttention(query="cls")),
    "VisionAttention(query='received')": (_Reducer, methods.VisionAttention(query="received")),
    "VisionKeys": (_Reducer, methods.VisionKeys()),
    "Features": (_Reducer, methods.Features()),
    "Grid": (_Reducer, methods.Grid()),
    "TextEmbeds": (_Pruner, methods.TextEmbeds()),
    "AttentionRows": (_Pruner, methods.AttentionRows()),
    "AttentionRows(when='before')": (_Pruner, methods.AttentionRows(when="before")),
    "AttentionRows(rope=False)": (_Pruner, methods.AttentionRows(rope=False)),
    "ColumnMass": (_Pruner, methods.ColumnMass()),
    "Keys": (_Pruner, methods.Keys()),
    "Values": (_Pruner, methods.Values()),
    "Hidden": (_Pruner, methods.Hidden()),
}
#: The kind of stage that returns every action.
ACTIONS: dict[str, type] = {
    "Keep": _Pruner,
    "Merge": _Reducer,
    "Write": _Reducer,
    "Pool": _Reducer,
    "Resize": _Reducer,
    "Merge(tower)": _Merger,
    "Protect": _Pruner,
    "Insert": _Pruner,
    "BranchGate": _Pruner,
    "BranchRows": _Pruner,
    "HeadGate": _Pruner,
    "LogitBias": _Pruner,
    "Inject": _Pruner,
    "Evict": _Pruner,
}


def _probe(model: nn.Module, name: str, kind: type, **declared: Any) -> Check:
    stage = type("Probe", (kind,), declared)()
    error, _ = _refusal(model, stage)
    return Check(name, "yes" if error is None else "no", "" if error is None else _why(error))


def _facts(family: Family) -> dict[str, Any]:
    """Where the parts are, and what sets the family apart."""
    path = {id(module): name for name, module in family.model.named_modules()}
    grid, windows = family.native_grid(), [family.window(i) for i in range(len(family.layers))]
    return {
        "tower": f"{path[id(family.tower)]} ({type(family.tower).__name__})",
        "tower_blocks": f"{path[id(family.blocks)]} ({len(family.blocks)})",
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
