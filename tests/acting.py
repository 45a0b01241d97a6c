"""Methods made of functions, for tests of single signals and actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mllm.compressors.base import LayerContext, LayerMethod
from mllm.plan import MethodInfo


def acting(
    at: Sequence[int],
    act: Callable[[LayerContext], list[Any]],
    *actions: str,
    name: str = "acting",
    differentiable: bool = False,
    **reads: Any,
) -> LayerMethod:
    """A stage that calls `act` before layers `at`; `reads` are its signals."""
    body = {
        "__annotations__": {"positions": Literal["original", "compact"] | None},
        "positions": None,
        "at": lambda self: tuple(at),
        "act": lambda self, ctx: act(ctx),
        "reads": lambda self: reads,
        "actions": actions,
        "differentiable": differentiable,
        "info": MethodInfo(name=name, stage="llm"),
    }
    return dataclass(type("Acting", (LayerMethod,), body))()
