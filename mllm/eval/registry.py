"""Entry point of the group `lmms_eval.models`: makes `--model mllm` known to lmms-eval."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifests() -> list[ModelManifest]:
    """The models that this package offers to lmms-eval."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(model_id="mllm", chat_class_path="mllm.eval.lmms.MllmModel")]
