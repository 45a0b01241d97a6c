"""DeepSeek-VL: a SigLIP tower, a two-layer projector, one square grid per image."""

from __future__ import annotations

from torch import nn

from mllm import flops
from mllm.models.base import PerPatch
from mllm.tokens import Layout


class DeepseekVL(PerPatch):
    """`DeepseekVLForConditionalGeneration`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.blocks = getattr(self.tower, "vision_model", self.tower).encoder.layers
        self.projector = self.base.aligner

    def vision_flops(self, layout: Layout, projected: int) -> float:
        config = self.vision_config
        return flops.vision_tower(config, layout.cells, 0) + flops.projector(
            config.hidden_size, self.text_config.hidden_size, projected
        )
