"""Trained stages: routers over depth, and experts; imported on first use."""

from __future__ import annotations

import importlib

_HOMES = {
    "BigMac": "experts_bigmac",
    "DPN": "dpn",
    "DeepSeekMoE": "experts_deepseekmoe",
    "GammaMoD": "gammamod",
    "MoD": "mod",
    "LayerSkip": "layerskip",
    "MoE": "experts_moe",
    "MoELLaVA": "experts_moellava",
    "MoH": "moh",
    "MoR": "mor",
    "PMoD": "pmod",
    "PRMoE": "experts_prmoe",
    "SkipFFN": "skipffn",
    "SlowFast": "slowfast",
    "VMoE": "experts_vmoe",
}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"mllm.routers.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'mllm.routers' has no attribute {name!r}")
