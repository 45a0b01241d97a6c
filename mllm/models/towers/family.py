"""LLaVA with a tower of this package, for the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from mllm.models.base import Family, shrink
from mllm.tokens import Layout


class TowerFamily(Family):
    """:class:`mllm.models.towers.TowerLlava`."""

    per_token = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.blocks = nn.ModuleList()  # attention over the visual tokens, of which there is none
        self.projector = self.base.multi_modal_projector
        self.refuses = {}
        if not self.tower.has_grid:
            reason = "its visual tokens have no places in the picture"
            self.refuses = {"Pool": reason, "Resize": reason}
        elif not self.tower.any_size:
            self.refuses = {"Resize": "its tower takes pictures of one size"}

    def new_parameters(self) -> list[nn.Parameter]:
        return self.tower.new_parameters()

    def notes(self) -> list[str]:
        if not self.tower.reads_text:
            return []
        return ["the FLOPs of the tower are those without a question"]

    def native_grid(self) -> tuple[int, int]:
        return self.vision_config.grid

    def check(self, inputs: Mapping[str, Any]) -> None:
        super().check(inputs)
        self.tower.check_size(*inputs["pixel_values"].shape[-2:])

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        pixels, grid = inputs["pixel_values"], self.native_grid()
        if self.tower.any_size:
            grid = tuple(side // self.vision_config.patch_size for side in pixels.shape[-2:])
        return [Layout((grid,))] * pixels.shape[0]

    def resized(self, inputs: Mapping[str, Any], grids: list[tuple[int, int]]) -> dict[str, Any]:
        pixels, patch = inputs["pixel_values"], self.vision_config.patch_size
        size = (grids[0][0] * patch, grids[0][1] * patch)
        same = tuple(pixels.shape[-2:]) == size
        return {} if same else {"pixel_values": shrink(pixels, size)}

    def vision_flops(self, layout: Layout, projected: int) -> float:
        side = self.vision_config.image_size
        size = (side, side)
        if self.tower.any_size:
            size = tuple(n * self.vision_config.patch_size for n in layout.grids[0])
        layers = [m for m in self.projector.modules() if isinstance(m, nn.Linear)]
        products = sum(m.in_features * m.out_features for m in layers)
        return self.tower.flops(*size) + 2.0 * projected * products
