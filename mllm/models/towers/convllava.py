"""ConvLLaVA: ConvNeXt and a fifth stage that halves its map once more."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mllm import compat
from mllm.models.towers.base import Tower, TowerConfig, refuse, stride, tokens_of


class ConvLLaVAConfig(TowerConfig):
    """Configuration of :class:`ConvLLaVA`.

    Attributes:
        depth: layers of the fifth stage.
        width: its channels; None is twice those of the encoder.
    """

    model_type = "mllm_convllava"

    image_size: int = 1024
    depth: int = 6
    width: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if not self.encoders:
            return
        inner = self.inner(0)
        if not hasattr(inner, "hidden_sizes"):
            refuse(
                f"ConvLLaVA's encoder is a ConvNeXt, not a {inner.model_type}",
                "encoders", inner.model_type, "convnext or convnextv2",
            )  # fmt: skip
        self.patch_size = 2 * stride(inner)
        self.hidden_size = self.width or 2 * inner.hidden_sizes[-1]
        if self.image_size % self.patch_size:
            refuse(
                f"a picture of {self.image_size} pixels has no whole cells of {self.patch_size}",
                "image_size", self.image_size, f"a multiple of {self.patch_size}",
            )  # fmt: skip


class ConvLLaVA(Tower):
    """ConvNeXt with a fifth stage: 768 pixels are 144 visual tokens, 1024 are 256, 1536 are 576.

    The encoder's last map (1/32 of the picture) is halved by a strided convolution, and twice as
    many channels go through `depth` ConvNeXt layers. Cost grows with the area of the picture, not
    with its square, and pictures of any multiple of 64 pixels are taken.

    Source: ConvLLaVA, arXiv:2405.15738, and its code (alibaba/conv-llava): the stage is
    transformers' own `ConvNextStage`.
    """

    config_class = ConvLLaVAConfig
    any_size = True

    def __init__(self, config: ConvLLaVAConfig) -> None:
        super().__init__(config)
        inner = config.inner(0)
        stage = "ConvNextV2Stage" if inner.model_type == "convnextv2" else "ConvNextStage"
        self.stage = compat.part(stage)(
            inner, inner.hidden_sizes[-1], config.hidden_size, depth=config.depth
        )
        self.post_init()

    def features(self, pixels: Tensor) -> Tensor:
        return tokens_of(self.stage(self.encoders[0](pixels)))
