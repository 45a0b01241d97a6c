"""LLaVA-1.5: a CLIP or SigLIP tower, a two-layer projector, one square grid per image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mllm import flops
from mllm.errors import PlanError
from mllm.models.base import Family, shrink
from mllm.tokens import Layout


class Llava(Family):
    """`LlavaForConditionalGeneration`."""

    per_token = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        config = model.config
        kind = self.vision_config.model_type
        if kind not in ("clip_vision_model", "siglip_vision_model"):
            raise PlanError(
                f"LLaVA with a {kind} tower is not supported",
                argument="model",
                given=kind,
                expected="clip_vision_model, siglip_vision_model",
            )
        inner = getattr(self.tower, "vision_model", self.tower)
        self.blocks = inner.encoder.layers
        self.projector = self.base.multi_modal_projector
        self.prefix = 1 if kind == "clip_vision_model" else 0
        wanted = "default" if self.prefix else "full"
        if config.vision_feature_select_strategy != wanted:
            raise PlanError(
                "a tower whose [CLS] is itself a visual token has no grid"
                if self.prefix
                else "a tower without [CLS] whose first patch is left out has no grid",
                argument="vision_feature_select_strategy",
                given=config.vision_feature_select_strategy,
                expected=wanted,
            )

    def _feature_layers(self) -> list[int]:
        chosen = self.model.config.vision_feature_layer
        return [chosen] if isinstance(chosen, int) else list(chosen)

    def feature_blocks(self) -> list[int]:
        # hidden_states[0] is the embedding, so hidden_states[i] is the output of block i - 1.
        depth = len(self.blocks)
        return [(i if i >= 0 else depth + 1 + i) - 1 for i in self._feature_layers()]

    @property
    def tower_widths(self) -> tuple[int, int]:
        width = self.vision_config.hidden_size
        return width * len(self.feature_blocks()), width

    def cls_feature(self, tower_output: Any) -> Tensor:
        hidden = tower_output.hidden_states
        return torch.cat([hidden[i][:, :1] for i in self._feature_layers()], dim=-1)

    def native_grid(self) -> tuple[int, int]:
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        pixels, patch = inputs["pixel_values"], self.vision_config.patch_size
        side = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        return [Layout((side,))] * pixels.shape[0]

    def resized(
        self, inputs: Mapping[str, Any], grids: list[tuple[int, int]]
    ) -> dict[str, Any]:
        pixels, patch = inputs["pixel_values"], self.vision_config.patch_size
        size = (grids[0][0] * patch, grids[0][1] * patch)
        if tuple(pixels.shape[-2:]) == size:
            return {}
        return {"pixel_values": shrink(pixels, size), "interpolate_pos_encoding": True}

    def vision_flops(self, layout: Layout, projected: int) -> float:
        config = self.vision_config
        width = config.hidden_size * len(self.feature_blocks())
        return flops.vision_tower(config, layout.cells, self.prefix) + flops.projector(
            width, self.text_config.hidden_size, projected
        )
