"""LLaVA with another tower: the model, its configuration, and how one becomes the other."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import torch
from torch import nn
from transformers import ConvNextConfig, LlavaConfig, LlavaForConditionalGeneration

from mllm import compat
from mllm.models.towers.base import WORDS, Question, Tower, TowerConfig, asking, refuse
from mllm.models.towers.convllava import ConvLLaVAConfig


def _default_tower() -> TowerConfig:
    large = ConvNextConfig(depths=[3, 3, 27, 3], hidden_sizes=[192, 384, 768, 1536])
    return ConvLLaVAConfig(encoders=[{"name": "convnext", "config": large.to_dict()}])


class TowerLlavaConfig(LlavaConfig):
    """`LlavaConfig` whose `vision_config` is that of a tower."""

    model_type = "mllm_llava"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = _default_tower()
        super().__post_init__(**kwargs)


class TowerLlava(LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration` with a :class:`mllm.models.towers.Tower`."""

    config_class = TowerLlavaConfig

    def __init__(self, config: TowerLlavaConfig) -> None:
        super().__init__(config)
        own = self.model.vision_tower.projector(config.text_config)
        if own is not None:
            self.model.multi_modal_projector = own
            self.post_init()

    @functools.wraps(LlavaForConditionalGeneration.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = compat.arguments(_SIGNATURE, (self, *args), kwargs)
        with asking(self._question(given)):
            return super().forward(*args, **kwargs)

    @functools.wraps(LlavaForConditionalGeneration.generate)
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        with asking(self._question({**kwargs, "input_ids": ids})):
            return super().generate(*args, **kwargs)

    def _question(self, given: dict[str, Any]) -> Question | None:
        """The words of a call, where its pictures are read and the tower reads words.

        Words are what is neither a picture nor padding nor supervised.
        """
        tower, ids = self.model.vision_tower, given.get("input_ids")
        if not tower.reads_text or ids is None or given.get("pixel_values") is None:
            return None
        visual = ids == self.config.image_token_id
        text, mask, labels = ~visual, given.get("attention_mask"), given.get("labels")
        if mask is not None and mask.dim() == 2:
            text = text & mask[:, -ids.shape[1] :].bool()
        if labels is not None:
            text = text & (labels == -100)
        pictures = [n // tower.config.tokens for n in visual.sum(1).tolist()]
        most = max(1, min(WORDS, int(text.sum(1).max())))
        last = text.int().argsort(dim=1, stable=True)[:, -most:]
        words = self.get_input_embeddings()(ids.gather(1, last)).detach()
        return Question(words, text.gather(1, last), pictures)


_SIGNATURE = inspect.signature(LlavaForConditionalGeneration.forward)


def with_tower(model: nn.Module, tower: Tower, processor: Any) -> tuple[TowerLlava, Any]:
    """A LLaVA with another vision tower, and a processor for it.

    ```python
    tower = ConvLLaVA.of("path/to/convnext", image_size=1024)
    model, processor = mllm.with_tower(model, tower, processor)
    model.save_pretrained(folder), processor.save_pretrained(folder)
    model, processor = mllm.load_model(folder)
    ```

    What comes back is a new model that shares the language model with the one that was given, which
    stays as it is. Its projector is new: LLaVA's own for the tower's width, or the tower's. The
    processor is a copy that makes pictures of the tower's size and as many placeholders as it has
    visual tokens.

    Args:
        model: a `LlavaForConditionalGeneration`, not patched.
        tower: the tower; is brought to the model's device and dtype.
        processor: the model's `LlavaProcessor`; None where only the model is wanted.

    Raises:
        PlanError: another kind of model, a patched one, or a tower for words of another width.
    """
    if not isinstance(model, LlavaForConditionalGeneration) or "mllm_patched" in vars(model.model):
        known = isinstance(model, LlavaForConditionalGeneration)
        refuse(
            "the model is patched" if known
            else f"{type(model).__name__} takes no other tower: its pictures are not one grid each",
            "model", type(model).__name__, "LlavaForConditionalGeneration without a plan",
        )  # fmt: skip
    text, words = model.config.text_config, model.get_input_embeddings().weight
    tower.meet(text.hidden_size)
    if processor is not None:
        processor = _processor_for(tower, processor)
    left = ("model_type", "text_config", "vision_config", "architectures", "transformers_version")
    kept = {k: v for k, v in model.config.to_dict().items() if k not in left}
    kept |= {
        "attn_implementation": compat.attention_name(model),  # else it is reset in all parts
        "image_seq_length": tower.config.tokens,
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    }
    config = TowerLlavaConfig(text_config=text, vision_config=tower.config, **kept)
    with torch.device("meta"):  # of the language model there is one
        new = TowerLlava(config)
    projector = tower.projector(text)
    if projector is None:
        projector = compat.part("LlavaMultiModalProjector")(config)
    new.model.vision_tower = tower.to(words)
    new.model.multi_modal_projector = projector.to(words)
    new.model.language_model, new.lm_head = model.model.language_model, model.lm_head
    new.generation_config = model.generation_config
    return new.train(model.training), processor


def _processor_for(tower: Tower, processor: Any) -> Any:
    """A copy of a processor that makes what the tower takes."""
    if not hasattr(processor, "num_additional_image_tokens"):
        refuse(
            f"{type(processor).__name__} does not count a picture's tokens by its patches",
            "processor", type(processor).__name__, "the model's LlavaProcessor",
        )  # fmt: skip
    processor = copy.deepcopy(processor)
    config, images = tower.config, processor.image_processor
    side = config.image_size
    square = {"height": side, "width": side}
    images.size = {"shortest_edge": side} if "shortest_edge" in images.size else square
    images.crop_size = square
    config.image_mean, config.image_std = list(images.image_mean), list(images.image_std)
    processor.patch_size = config.patch_size
    processor.vision_feature_select_strategy = "full"
    # The processor counts whole patches of the picture, and this many more.
    processor.num_additional_image_tokens = config.tokens - (side // config.patch_size) ** 2
    return processor
