"""GLM-4.1V and GLM-4.6V: packed pictures as Qwen-VL's, joined before the projector."""

from __future__ import annotations

from torch import Tensor, nn

from mllm import flops
from mllm.models.qwen_vl import Qwen2VL
from mllm.tokens import Layout


class Glm4V(Qwen2VL):
    """`Glm4vForConditionalGeneration` and `Glm46VForConditionalGeneration`."""

    neighbours = True

    def of_videos(self) -> Qwen2VL:
        own = super().of_videos()
        own.image_token_id = self.image_token_id  # frames have the placeholders of images
        own.repeats = False  # transformers looks for those of videos
        return own

    def branch(self, layer: int, branch: str) -> nn.Module:
        block = self.layers[layer]
        return block.post_self_attn_layernorm if branch == "attn" else block.post_mlp_layernorm

    @property
    def tower_widths(self) -> tuple[int, int]:
        return self.vision_config.out_hidden_size, self.vision_config.hidden_size

    def unprojected(self, features: Tensor, layouts: list[Layout]) -> Tensor:
        return features  # patches are joined before the projector

    def _width(self) -> tuple[int, int, int]:
        config = self.vision_config
        return config.hidden_size, config.out_hidden_size, config.out_hidden_size

    def _blocks_flops(self, layout: Layout) -> float:
        (width, mlp, _), patches = self._width(), self.patches(layout)
        spans = [rows * cols * self.merge**2 for rows, cols in layout.grids]
        return len(self.blocks) * flops.vision_block(patches, width, mlp, gated=True, spans=spans)

    def _merger_flops(self, tokens: int) -> float:
        width, inner = self.vision_config.out_hidden_size, self.vision_config.intermediate_size
        return 2 * tokens * (width**2 + 3 * width * inner)

    def vision_flops(self, layout: Layout, projected: int) -> float:
        width, _, out = self._width()
        joining = 2 * layout.cells * self.merge**2 * width * out
        return super().vision_flops(layout, projected) + joining
