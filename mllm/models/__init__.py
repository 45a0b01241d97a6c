"""Family adapters: where a model's towers, projector, decoder and grids are.

One short file per family. An adapter says where things are; it never computes.
"""

from __future__ import annotations

import difflib
import os
from typing import Any

from mllm.errors import PlanError
from mllm.models.base import Family


def families() -> dict[str, type[Family]]:
    """Supported families by `config.model_type`."""
    from mllm.models.deepseek_vl import DeepseekVL
    from mllm.models.gemma3 import Gemma3
    from mllm.models.glm4v import Glm4V
    from mllm.models.idefics3 import Idefics3, SmolVLM
    from mllm.models.internvl import InternVL
    from mllm.models.llava import Llava, VipLlava
    from mllm.models.llava_next import LlavaNext, LlavaOnevision
    from mllm.models.mistral3 import LightOnOcr, Mistral3
    from mllm.models.paligemma import PaliGemma
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
        "paligemma": PaliGemma,
        "mistral3": Mistral3,
        "glm4v": Glm4V,
        "glm46v": Glm4V,
        "vipllava": VipLlava,
        "deepseek_vl": DeepseekVL,
        "lighton_ocr": LightOnOcr,
        "mllm_llava": TowerFamily,
    }


def family_of(config: Any, given: str, whole: bool = True) -> type[Family]:
    """The adapter class of a model's configuration.

    Args:
        config: has a `model_type`, or is none of transformers.
        given: name of the model or its class, for the message.
        whole: whether it is that of a whole model, not of a part.

    Raises:
        PlanError: the family is not supported; says why it cannot be, or names the nearest one
            that is.
    """
    known, kind = families(), getattr(config, "model_type", None) if whole else None
    if kind not in known:
        nearest = difflib.get_close_matches(kind or "", known, 1, 0.5)
        why = _never(config) or (f"; the nearest family is {nearest[0]}" if nearest else "")
        raise PlanError(
            f"{given} is not a supported vision-language model{why}",
            argument="model",
            given=given,
            expected="a conditional-generation model of type " + ", ".join(known),
        )
    return known[kind]


def _never(config: Any) -> str:
    """Why no plan can work on models of an architecture, if so."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    names = "cross_attention_layers", "cross_layer_interval"
    if any(getattr(text, name, None) for name in names):
        return (
            ": its text reads pictures through cross-attention, so there are no visual tokens in "
            "the sequence to choose from"
        )
    if getattr(config, "is_encoder_decoder", False):
        return ": its decoder reads pictures through an encoder, not as tokens of its prompt"
    return ""


def resolve(model: Any) -> Family:
    """The adapter of a model (PEFT wrappers are looked through).

    Raises:
        PlanError: the model's family is not supported.
    """
    if isinstance(model, str | os.PathLike):
        raise PlanError(
            f"{str(model)!r} is a {type(model).__name__}, and a loaded model is wanted: "
            f"model, processor = mllm.load_model({str(model)!r})",
            argument="model",
            given=model,
            expected="a loaded model of type " + ", ".join(families()),
        )
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, whole = getattr(inner, "config", None), hasattr(inner, "get_decoder")
    return family_of(config, type(inner).__name__, whole)(inner)
