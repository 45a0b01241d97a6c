"""Family adapters: where a model's towers, projector, decoder and grids are.

One short file per family. An adapter says where things are; it never computes.
"""

from __future__ import annotations

import difflib
from typing import Any

from mllm.errors import PlanError
from mllm.models.base import Family


def families() -> dict[str, type[Family]]:
    """Supported families by `config.model_type`."""
    from mllm.models.gemma3 import Gemma3
    from mllm.models.idefics3 import Idefics3, SmolVLM
    from mllm.models.internvl import InternVL
    from mllm.models.llava import Llava
    from mllm.models.llava_next import LlavaNext, LlavaOnevision
    from mllm.models.qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL
    from mllm.models.towers.family import TowerFamily

    return {
        "llava": Llava,
        "llava_next": LlavaNext,
        "llava_onevision": LlavaOnevision,
        "qwen2_vl": Qwen2VL,
        "qwen2_5_vl": Qwen25VL,
        "qwen3_vl": Qwen3VL,
        "internvl": InternVL,
        "gemma3": Gemma3,
        "idefics3": Idefics3,
        "smolvlm": SmolVLM,
        "mllm_llava": TowerFamily,
    }


def family_of(kind: str | None, given: str) -> type[Family]:
    """The adapter class of a `config.model_type`.

    Args:
        kind: the model type.
        given: name of the model or its class, for the message.

    Raises:
        PlanError: the family is not supported; names the nearest one that is.
    """
    known = families()
    if kind not in known:
        nearest = difflib.get_close_matches(kind or "", known, 1, 0.5)
        raise PlanError(
            f"{given} is not a supported vision-language model"
            + (f"; the nearest family is {nearest[0]}" if nearest else ""),
            argument="model",
            given=given,
            expected="a conditional-generation model of type " + ", ".join(known),
        )
    return known[kind]


def resolve(model: Any) -> Family:
    """The adapter of a model (PEFT wrappers are looked through).

    Raises:
        PlanError: the model's family is not supported.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = getattr(getattr(inner, "config", None), "model_type", None)
    whole = hasattr(inner, "get_decoder")
    return family_of(kind if whole else None, type(inner).__name__)(inner)
