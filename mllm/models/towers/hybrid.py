"""DeepSeek-VL's hybrid encoder: SAM at high resolution beside SigLIP at low."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mllm import compat
from mllm.models.towers.base import Tower, TowerConfig, refuse, tokens_of


class HybridConfig(TowerConfig):
    """Configuration of :class:`Hybrid`: its encoders are SAM's and one of low resolution."""

    model_type = "mllm_deepseek_hybrid"

    image_size: int = 1024

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if len(self.encoders or ()) != 2:
            return
        kinds = [self.inner(number).model_type for number in (0, 1)]
        if kinds[0] != "sam_vision_model":
            refuse(
                f"the first encoder of Hybrid is SAM's, not a {kinds[0]}",
                "encoders", ", ".join(kinds), "sam_vision_model, and then one of low resolution",
            )  # fmt: skip
        self.patch_size = self.image_size // self.side(1)
        self.hidden_size = 4 * self.channels(0) + self.channels(1)

    @property
    def grid(self) -> tuple[int, int]:
        return self.side(1), self.side(1)


class HybridProjector(nn.Module):
    """Each resolution to half of the LLM's width, then GELU and a linear layer.

    Args:
        high: channels of high resolution, the first ones.
        low: channels of low resolution.
        width: of the LLM.
    """

    def __init__(self, high: int, low: int, width: int) -> None:
        super().__init__()
        self.sizes = [high, low]
        self.high_up, self.low_up = nn.Linear(high, width // 2), nn.Linear(low, width - width // 2)
        self.act, self.proj = nn.GELU(), nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        high, low = features.split(self.sizes, -1)
        return self.proj(self.act(torch.cat([self.high_up(high), self.low_up(low)], -1)))


class Hybrid(Tower):
    """SAM-B at 1024 pixels and SigLIP-L at 384: 24 x 24 = 576 visual tokens.

    SAM's 64 x 64 map of 256 channels is resized to four times SigLIP's grid, and two strided
    convolutions make 24 x 24 of 1024 channels of it. Each resolution has its own LayerNorm, and its
    own branch of the projector. The picture is given once, at SAM's size.

    Source: DeepSeek-VL, arXiv:2403.05525. The convolutions are those of transformers'
    `DeepseekVLHybridModel`, whose second path from the middle of SAM, which starts at zero, is left
    out, and which has no LayerNorms.
    """

    config_class = HybridConfig
    count = (2, 2)

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.down = compat.part("DeepseekVLSamVisionProj")(config.inner(0), config.grid[0])
        self.high_norm = nn.LayerNorm(4 * config.channels(0))
        self.low_norm = nn.LayerNorm(config.channels(1))
        self.post_init()

    def projector(self, text_config: Any) -> nn.Module:
        high, low = 4 * self.config.channels(0), self.config.channels(1)
        return HybridProjector(high, low, text_config.hidden_size)

    def features(self, pixels: Tensor) -> Tensor:
        sam, siglip = self.encoders
        high = self.high_norm(tokens_of(self.down(sam(pixels))))
        return torch.cat([high, self.low_norm(tokens_of(siglip(pixels)))], -1)
