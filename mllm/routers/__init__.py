"""Trained depth: routers that send rows past decoder layers; imported on first use."""

from __future__ import annotations

import importlib

_HOMES = {"PMoD": "pmod"}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"mllm.routers.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mllm.routers' has no attribute {name!r}")
