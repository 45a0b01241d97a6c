"""mllm: make multimodal LLMs cheap to run and to train."""

from __future__ import annotations

import importlib

from mllm.doctor import doctor
from mllm.estimate import estimate
from mllm.patch import patch

__version__ = "0.1.0.dev0"

# Imported on first use: `import mllm` stays light.
_EXPORTS = {
    "Patched": "mllm.patcher",
    "Plan": "mllm.plan",
    "SelfSpeculation": "mllm.speculation",
    "methods": "mllm.plan",
    "calibrate": "mllm.calibration",
    "upcycle": "mllm.routers.upcycle",
    "register": "mllm.plan",
    "with_tower": "mllm.models.towers",
    "Ledger": "mllm.ledger",
    "load_model": "mllm.loading",
    "load_image": "mllm.loading",
    "build_inputs": "mllm.loading",
    "MllmError": "mllm.errors",
    "PlanError": "mllm.errors",
    "NoEffectError": "mllm.errors",
    "RecipeError": "mllm.errors",
    "DataError": "mllm.errors",
    "CacheMismatchError": "mllm.errors",
}
__all__ = ["__version__", "doctor", "estimate", "patch", *_EXPORTS]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'mllm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
