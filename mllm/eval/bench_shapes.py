"""Models with random weights, and inputs of exact length, for the bench."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.errors import DataError, unusable

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A model to build from its config with random weights.

    Attributes:
        name: for `--model` and the results.
        vision: fields of the vision config.
        text: fields of the text config.
        family: `"llava"` (CLIP, LLaMA) or `"qwen2_5_vl"`.
        visual: visual tokens per sample that are measured by default.
    """

    name: str
    vision: dict[str, Any]
    text: dict[str, Any]
    family: str = "llava"
    visual: tuple[int, ...] = (576, 1152)

    def build(self, dtype: torch.dtype, device: str) -> Any:
        """The model in eval mode, sdpa, weights drawn with seed 0."""
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(
                self._config(), dtype=dtype, attn_implementation="sdpa"
            )
        return model.to(device).eval()

    def _config(self) -> Any:
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig

        last = self.text["vocab_size"] - 1
        if self.family == "llava":
            return LlavaConfig(
                vision_config=CLIPVisionConfig(**self.vision),
                text_config=LlamaConfig(**self.text),
                image_token_id=last,
            )
        return Qwen2_5_VLConfig(
            vision_config=self.vision,
            text_config=self.text,
            image_token_id=last,
            video_token_id=last - 1,
            vision_start_token_id=last - 2,
            vision_end_token_id=last - 3,
        )


# Every speed figure on CPU is about this shape: large enough that matrix products dominate.
BENCH_CPU = Shape(
    name="bench-cpu",
    vision=dict(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=8,
        image_size=336, patch_size=14,
    ),
    text=dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, vocab_size=8192, max_position_embeddings=8192,
    ),
)  # fmt: skip

LLAVA_7B = Shape(
    name="llava-1.5-7b",
    vision=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    ),
    text=dict(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32064, max_position_embeddings=65536,
    ),
    visual=(576, 2880),
)  # fmt: skip

QWEN25_7B = Shape(
    name="qwen2.5-vl-7b",
    family="qwen2_5_vl",
    vision=dict(
        depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584,
        patch_size=14, window_size=112, fullatt_block_indexes=[7, 15, 23, 31],
    ),
    text=dict(
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, max_position_embeddings=128000,
        rope_parameters=dict(rope_type="default", mrope_section=[16, 24, 24], rope_theta=1e6),
    ),
    visual=(576, 2880, 20000),
)  # fmt: skip

SHAPES = {shape.name: shape for shape in (BENCH_CPU, LLAVA_7B, QWEN25_7B)}


def random_inputs(
    model: Any, *, visual: int, text: int, batch: int, unequal: bool = False, seed: int = 0
) -> Inputs:
    """Inputs of exact length: noise pictures first, then random words.

    Without `unequal` nothing is padded; with it each sample after the first has fewer words and
    is padded on the left.

    Returns:
        What the model's processor gives, for `batch` samples of `visual` visual tokens and `text`
        words each, pixels in the model's dtype, on its device.

    Raises:
        DataError: `visual` is no whole number of images, or the model's family is not known here.
    """
    config, draw = model.config, torch.Generator().manual_seed(seed)
    ids = _words(config, batch, visual + text, draw)
    ids[:, 1 : 1 + visual] = config.image_token_id
    mask = torch.ones_like(ids)
    if unequal:
        for sample in range(batch):
            gone = sample * text * 3 // (4 * batch)
            ids[sample, gone:] = ids[sample, : ids.shape[1] - gone].clone()
            ids[sample, :gone], mask[sample, :gone] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask, **_pictures(config, visual, batch, draw)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    return {name: x.to(model.device) for name, x in inputs.items()}


def text_inputs(model: Any, inputs: Inputs, length: int) -> Inputs:
    """Unpadded inputs of `length` words without pictures, for the batch of `inputs`."""
    draw = torch.Generator().manual_seed(0)
    ids = _words(model.config, len(inputs["input_ids"]), length, draw).to(model.device)
    more = {"mm_token_type_ids": torch.zeros_like(ids).int()}
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **(more if "mm_token_type_ids" in inputs else {}),
    }


def _words(config: Any, batch: int, length: int, draw: torch.Generator) -> Tensor:
    # The special tokens of a shape are the last of the vocabulary.
    ids = torch.randint(3, config.text_config.vocab_size - 4, (batch, length), generator=draw)
    return ids.masked_fill(ids == config.image_token_id, 3)


def whole_images(model: Any, most: int) -> int:
    """The most visual tokens up to `most` that are whole images; `most` if images have any size."""
    if model.config.model_type != "llava":
        return most
    return most - most % _image_tokens(model.config)


def _image_tokens(config: Any) -> int:
    """Visual tokens of one image of a LLaVA-1.5."""
    vision = config.vision_config
    tokens = (vision.image_size // vision.patch_size) ** 2
    return tokens + (config.vision_feature_select_strategy == "full")


def _pictures(config: Any, visual: int, batch: int, draw: torch.Generator) -> dict[str, Tensor]:
    vision = config.vision_config
    if config.model_type == "llava":
        tokens = _image_tokens(config)
        if visual < tokens or visual % tokens:
            whole = f"a multiple of {tokens}, the tokens of one image"
            raise cannot_measure("visual", visual, whole)
        size = (batch * visual // tokens, 3, vision.image_size, vision.image_size)
        return {"pixel_values": torch.randn(size, generator=draw)}
    if config.model_type in ("qwen2_vl", "qwen2_5_vl"):
        if visual < 1:
            raise cannot_measure("visual", visual, "1 or more")
        side = next(n for n in range(math.isqrt(visual), 0, -1) if visual % n == 0)
        grid = [1, *(n * vision.spatial_merge_size for n in (side, visual // side))]
        values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = batch * math.prod(grid)
        return {
            "pixel_values": torch.randn(patches, values, generator=draw),
            "image_grid_thw": torch.tensor([grid] * batch),
        }
    raise cannot_measure("model", config.model_type, "llava, qwen2_vl or qwen2_5_vl")


def cannot_measure(argument: str, given: Any, expected: str) -> DataError:
    """The error for an argument of the bench that cannot be used."""
    return unusable(argument, given, "measured", expected)
