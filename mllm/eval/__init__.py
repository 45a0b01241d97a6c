"""Evaluation: the lmms-eval model and tasks, sweeps, tuning, statistics, bench and report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mllm.eval.tuning import tune

__all__ = ["tune"]


def __getattr__(name: str):
    if name == "tune":
        from mllm.eval.tuning import tune

        return tune
    raise AttributeError(f"module 'mllm.eval' has no attribute {name!r}")
