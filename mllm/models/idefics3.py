"""Idefics3 and SmolVLM: padded stacks of tiles per sample, s x s patches a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mllm import flops
from mllm.models.base import Shuffled, shrink
from mllm.tokens import Layout


class Idefics3(Shuffled):
    """`Idefics3ForConditionalGeneration`; a tile is an image of its own."""

    joins = True
    needs: ClassVar[dict[str, tuple[int, ...]]] = {"pixel_values": (5,)}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.blocks = self.tower.encoder.layers
        self.projector = self.base.connector
        self.join: int = model.config.scale_factor

    def native_grid(self) -> tuple[int, int]:
        side = self.vision_config.image_size // self.vision_config.patch_size // self.join
        return side, side

    def shaped(
        self, samples: int, images: int, size: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        pixels = super().shaped(samples, images, size)["pixel_values"]
        return {"pixel_values": pixels.unflatten(0, (samples, images))}

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        pixels = inputs["pixel_values"].flatten(0, 1)
        return [x for x, real in zip(pixels, self._real(pixels), strict=True) if real]

    def _real(self, pixels: Tensor) -> list[bool]:
        """Pictures of zeros only fill up the samples."""
        return (pixels != 0).flatten(1).any(1).tolist()

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        side = self.vision_config.patch_size * self.join
        height, width = inputs["pixel_values"].shape[-2:]
        return [Layout(((height // side, width // side),))] * len(self.pictures(inputs))

    def resized(
        self, inputs: Mapping[str, Any], grids: list[tuple[int, int]]
    ) -> dict[str, Any]:
        pixels, mask = inputs["pixel_values"], inputs.get("pixel_attention_mask")
        side = grids[0][0] * self.join * self.vision_config.patch_size
        if tuple(pixels.shape[-2:]) == (side, side):
            return {}
        small = shrink(pixels.flatten(0, 1), (side, side)).unflatten(0, pixels.shape[:2])
        if mask is None:
            return {"pixel_values": small}
        mask = F.interpolate(mask.float(), size=(side, side)).to(mask.dtype)
        return {"pixel_values": small, "pixel_attention_mask": mask}

    def vision_flops(self, layout: Layout, projected: int) -> float:
        config = self.vision_config
        width = config.hidden_size * self.join**2
        connector = 2 * projected * width * self.text_config.hidden_size
        return flops.vision_tower(config, self.patches(layout), 0) + connector


class SmolVLM(Idefics3):
    """`SmolVLMForConditionalGeneration`."""

    def _real(self, pixels: Tensor) -> list[bool]:
        real = super()._real(pixels)
        return real if any(real) else [True, *real[1:]]
