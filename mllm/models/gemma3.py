"""Gemma 3: pooled square pictures, sliding and full layers, image blocks that see both ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from mllm import flops
from mllm.models.base import Family, join_patches
from mllm.tokens import Layout


class Gemma3(Family):
    """`Gemma3ForConditionalGeneration`."""

    hybrid = True
    joins = True
    refuses: ClassVar[dict[str, str]] = {"Resize": "it fixes the size of its pictures"}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.blocks = getattr(self.tower, "vision_model", self.tower).encoder.layers
        self.projector = self.base.multi_modal_projector
        self.side: int = self.projector.tokens_per_side
        self.join: int = self.projector.kernel_size

    def branch(self, layer: int, branch: str) -> nn.Module:
        block = self.layers[layer]
        if branch == "attn":
            return block.post_attention_layernorm
        return block.post_feedforward_layernorm

    def native_grid(self) -> tuple[int, int]:
        return self.side, self.side

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        return [Layout((self.native_grid(),))] * inputs["pixel_values"].shape[0]

    def patches(self, layout: Layout) -> int:
        return layout.cells * self.join**2

    def to_rows(self, signal: Tensor, layouts: list[Layout]) -> Tensor:
        return join_patches(signal, layouts, self.join)

    def vision_flops(self, layout: Layout, projected: int) -> float:
        config = self.vision_config
        projection = 2 * projected * config.hidden_size * self.text_config.hidden_size
        return flops.vision_tower(config, self.patches(layout), 0) + projection
