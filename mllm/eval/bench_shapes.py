"""Models with random weights, and inputs of exact length, for the bench."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from mllm.errors import DataError, first_line, unusable
from mllm.estimating import prompt
from mllm.loading import load_model
from mllm.models import resolve
from mllm.models.base import Family
from mllm.shapes import SHAPES as PUBLIC

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
        return build(self.config(), dtype, device)

    def config(self) -> Any:
        """What transformers builds it from."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig

        last = self.text["vocab_size"] - 1
        if self.family == "llava":
            return LlavaConfig(
                vision_config=CLIPVisionConfig(**self.vision),
                text_config=LlamaConfig(**self.text),
                image_token_id=last,
            )
        # The family's own are behind the end of a small vocabulary; a bench needs neither.
        ends = {"bos_token_id": None, "eos_token_id": None}
        return Qwen2_5_VLConfig(
            vision_config=self.vision,
            text_config=ends | self.text,
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

# As large, of a family that takes pictures of any size.
BENCH_QWEN = Shape(
    name="bench-qwen-cpu",
    family="qwen2_5_vl",
    vision=dict(
        depth=6, hidden_size=512, intermediate_size=1408, num_heads=8, out_hidden_size=1024,
        patch_size=14, window_size=112, fullatt_block_indexes=[5],
    ),
    text=dict(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=4, vocab_size=8192, max_position_embeddings=32768,
        rope_parameters=dict(rope_type="default", mrope_section=[8, 12, 12], rope_theta=1e6),
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

SHAPES = {shape.name: shape for shape in (BENCH_CPU, BENCH_QWEN, LLAVA_7B, QWEN25_7B)}


def build(config: Any, dtype: torch.dtype, device: str) -> Any:
    """A model of a config in eval mode, sdpa, weights drawn with seed 0."""
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    return model.to(device).eval()


def model_of(name: str | Shape, dtype: str, device: str) -> tuple[Any, dict[str, Any]]:
    """A model, and what the results say of it.

    Args:
        name: a shape or its name, the name of a public model (:mod:`mllm.shapes`) or a
            `config.json`, all of which get random weights; else what
            :func:`mllm.load_model` takes.
        dtype: of the weights.
        device: torch device.

    Raises:
        DataError: nothing can be read there.
    """
    if isinstance(name, Shape):
        return name.build(getattr(torch, dtype), device), asdict(name)
    config = config_of(name)
    if config is None:
        return load_model(name, dtype=dtype, device=device)[0], {"name": name}
    return build(config, getattr(torch, dtype), device), {"name": name, "weights": "random"}


def config_of(name: str | Shape) -> Any | None:
    """The config of a model that has no weights of its own (:func:`model_of`), else None.

    Raises:
        DataError: a `config.json` that cannot be read.
    """
    from transformers import AutoConfig

    if isinstance(name, Shape):
        return name.config()
    if name in PUBLIC:
        given = copy.deepcopy(PUBLIC[name])
        return AutoConfig.for_model(given.pop("model_type"), **given)
    if not str(name).endswith(".json"):
        return None
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise DataError(
            f"cannot read the configuration {name}: {first_line(error)}",
            argument="model",
            given=name,
            expected="a config.json that transformers can read",
        ) from error


def random_inputs(
    model: Any,
    *,
    visual: int | None = None,
    size: tuple[int, int] | None = None,
    text: int,
    batch: int,
    unequal: bool = False,
    seed: int = 0,
) -> Inputs:
    """Inputs of exact length: a word, noise pictures with a word behind each, random words.

    Where there are fewer words than that, pictures follow each other without.

    Without `unequal` nothing is padded; with it each sample after the first has fewer words and
    is padded on the left.

    Args:
        visual: visual tokens of each sample, see :func:`pictures`.
        size: (height, width) of one picture of each sample instead.
        text: words of each sample.

    Returns:
        What the model's processor gives, pixels in the model's dtype, on its device.

    Raises:
        DataError: as :func:`pictures`.
    """
    family, draw = resolve(model), torch.Generator().manual_seed(seed)
    images, size = pictures(family, visual, size)
    inputs = prompt(family, images=images, size=size, text=max(text, images + 1), batch=batch)
    image, behind = inputs["input_ids"] == family.image_token_id, text - images
    if behind < 1:
        count, behind = int(image[0].sum()), text - 1
        image = (torch.arange(count + text) - 1 < count).expand(batch, -1).clone()
        image[:, 0] = False
    ids = _words(model.config, *image.shape, draw).masked_fill(image, family.image_token_id)
    mask = torch.ones_like(ids)
    if unequal:
        for sample in range(batch):
            gone = max(0, min(sample * text * 3 // (4 * batch), behind - 1))
            ids[sample, gone:] = ids[sample, : ids.shape[1] - gone].clone()
            ids[sample, :gone], mask[sample, :gone] = 0, 0
    inputs |= {name: torch.zeros_like(ids) for name in family.asks}
    inputs |= {"input_ids": ids, "attention_mask": mask}
    if family.mrope:
        inputs["mm_token_type_ids"] = (ids == family.image_token_id).int()
    hollow = inputs[family.pixels]
    inputs[family.pixels] = torch.randn(hollow.shape, generator=draw).to(hollow.dtype)
    return {name: x.to(model.device) for name, x in inputs.items()}


def pictures(
    family: Family, visual: int | None, size: tuple[int, int] | None
) -> tuple[int, tuple[int, int] | None]:
    """Pictures of each sample, and their (height, width) where the model takes several.

    Args:
        family: the model's.
        visual: visual tokens of a sample: whole pictures where the model has one size of them,
            else one picture, nearly square.
        size: (height, width) of one picture instead, rounded as the family rounds it.

    Raises:
        DataError: `visual` is no whole number of pictures, or `size` is not for this model.
    """
    grid, images = family.native_grid(), 1
    if grid is not None:
        each = grid[0] * grid[1]
        if size is not None:
            raise cannot_measure("size", _sized(size), "visual: this model has one size of image")
        if visual < each or visual % each:
            whole = f"a multiple of {each}, the tokens of one image"
            raise cannot_measure("visual", visual, whole)
        images = visual // each
    elif size is not None:
        if min(size) < 1:
            raise cannot_measure("size", _sized(size), "width and height of 1 or more")
    else:
        if visual < 1:
            raise cannot_measure("visual", visual, "1 or more")
        size = family.size_of(visual)
        if size is None:
            raise cannot_measure("visual", visual, "size: a picture's tokens follow from it")
    return images, size


def visual_tokens(family: Family, size: tuple[int, int]) -> int:
    """Visual tokens of one picture of (height, width)."""
    images, size = pictures(family, None, size)
    ids = prompt(family, images=images, size=size, text=2, batch=1)["input_ids"]
    return int((ids == family.image_token_id).sum())


def _sized(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def text_inputs(model: Any, inputs: Inputs, length: int) -> Inputs:
    """Unpadded inputs of `length` words without pictures, for the batch of `inputs`."""
    draw = torch.Generator().manual_seed(0)
    like = inputs["input_ids"].shape
    ids = _words(model.config, like[0], length, draw).to(model.device)
    beside = [name for name, x in inputs.items() if name not in _OWN and x.shape == like]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **{name: torch.zeros_like(ids).to(inputs[name].dtype) for name in beside},
    }


_OWN = ("input_ids", "attention_mask", "labels")


def _words(config: Any, batch: int, length: int, draw: torch.Generator) -> Tensor:
    # Special tokens are the last of a vocabulary.
    most = min(1000, config.get_text_config().vocab_size - 4)
    ids = torch.randint(3, most, (batch, length), generator=draw)
    return ids.masked_fill(ids == config.image_token_id, 3)


def whole_images(model: Any, most: int) -> int:
    """The most visual tokens up to `most` that are whole images; `most` if images have any size."""
    return most - most % one_image(resolve(model), 1)


def one_image(family: Family, other: int) -> int:
    """Visual tokens of one image; `other` where images have any size."""
    grid = family.native_grid()
    return other if grid is None else grid[0] * grid[1]


def cannot_measure(argument: str, given: Any, expected: str) -> DataError:
    """The error for an argument of the bench that cannot be used."""
    return unusable(argument, given, "measured", expected)
