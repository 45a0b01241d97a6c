"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, one square grid per image."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import flops
from mllm.errors import PlanError
from mllm.models.base import Family


class Llava(Family):
    """`LlavaForConditionalGeneration`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config = model.config
        kind = config.vision_config.model_type
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise PlanError(
                f"LLaVA with a {kind} tower is not supported",
                argument="model",
                given=kind,
                expected="clip_vision_model, siglip_vision_model",
            )
        self.tower = self.base.vision_tower
        inner = getattr(self.tower, "vision_model", self.tower)
        self.blocks = inner.encoder.layers
        self.projector = self.base.multi_modal_projector
        self.prefix = 1 if kind == "clip_vision_model" else 0
        if self.prefix and config.vision_feature_select_strategy != "default":
            raise PlanError(
                "a tower whose [CLS] is itself a visual token has no grid",
                argument="vision_feature_select_strategy",
                given=config.vision_feature_select_strategy,
                expected="default",
            )

    def _feature_layers(self) -> list[int]:
        chosen = self.model.config.vision_feature_layer
        return [chosen] if isinstance(chosen, int) else list(chosen)

    def feature_blocks(self) -> list[int]:
        # hidden_states[0] is the embedding, so hidden_states[i] is the output of block i - 1.
        depth = len(self.blocks)
        return [(i if i >= 0 else depth + 1 + i) - 1 for i in self._feature_layers()]

    def cls_feature(self, tower_output: Any) -> Tensor:
        hidden = tower_output.hidden_states
        return torch.cat([hidden[i][:, :1] for i in self._feature_layers()], dim=-1)

    def native_grid(self) -> tuple[int, int]:
        vision = self.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    def grid(self, pixel_values: Tensor) -> list[tuple[int, int]]:
        patch = self.model.config.vision_config.patch_size
        side = (pixel_values.shape[-2] // patch, pixel_values.shape[-1] // patch)
        return [side] * pixel_values.shape[0]

    def resized(self, pixel_values: Tensor, grid: tuple[int, int]) -> tuple[Tensor, dict]:
        patch = self.model.config.vision_config.patch_size
        size = (grid[0] * patch, grid[1] * patch)
        if tuple(pixel_values.shape[-2:]) == size:
            return pixel_values, {}
        small = F.interpolate(
            pixel_values.float(), size=size, mode="bilinear", antialias=True, align_corners=False
        )
        return small.to(pixel_values.dtype), {"interpolate_pos_encoding": True}

    def vision_flops(self, grid: tuple[int, int], projected: int) -> float:
        config = self.model.config.vision_config
        width = config.hidden_size * len(self.feature_blocks())
        return flops.vision_tower(
            config, grid[0] * grid[1], self.prefix
        ) + flops.projector(width, self.text_config.hidden_size, projected)
