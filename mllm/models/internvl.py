"""InternVL: one square grid per tile, 2 x 2 patches a token, [CLS] left behind in the tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from mllm import flops
from mllm.errors import PlanError
from mllm.models.base import Shuffled, shrink
from mllm.tokens import Layout


class InternVL(Shuffled):
    """`InternVLForConditionalGeneration`; a tile is an image of its own."""

    prefix = 1

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.blocks = self.tower.encoder.layer
        self.projector = self.base.multi_modal_projector
        self.join = round(1 / model.config.downsample_ratio)
        self.patch: int = self.vision_config.patch_size[0]
        strategy = model.config.vision_feature_select_strategy
        if strategy != "default":
            raise PlanError(
                "a tower whose [CLS] is itself a visual token has no grid",
                argument="vision_feature_select_strategy",
                given=strategy,
                expected="default",
            )

    def block_attention(self, block: int) -> nn.Module:
        return self.blocks[block].attention

    def feature_blocks(self) -> list[int]:
        # hidden_states[0] is the embedding; -1 is the last block.
        layer = self.model.config.vision_feature_layer
        return [(layer if layer >= 0 else len(self.blocks) + 1 + layer) - 1]

    @property
    def tower_widths(self) -> tuple[int, int]:
        width = self.vision_config.hidden_size
        return width * self.join**2, width

    def unprojected(self, features: Tensor, layouts: list[Layout]) -> Tensor:
        return features.flatten(0, 1)  # patches are joined before the projector

    def native_grid(self) -> tuple[int, int]:
        side = self.vision_config.image_size[0] // self.patch // self.join
        return side, side

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        tiles, _, height, width = inputs["pixel_values"].shape
        side = self.patch * self.join
        return [Layout(((height // side, width // side),))] * tiles

    def resized(
        self, inputs: Mapping[str, Any], grids: list[tuple[int, int]]
    ) -> dict[str, Any]:
        pixels = inputs["pixel_values"]
        side = grids[0][0] * self.join * self.patch
        same = tuple(pixels.shape[-2:]) == (side, side)
        return {} if same else {"pixel_values": shrink(pixels, (side, side))}

    def vision_flops(self, layout: Layout, projected: int) -> float:
        config = self.vision_config
        width = config.hidden_size * self.join**2
        return flops.vision_tower(config, self.patches(layout), self.prefix) + flops.projector(
            width, self.text_config.hidden_size, projected
        )
