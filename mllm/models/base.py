"""The base of family adapters."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Family:
    """What the engine needs to know of a model.

    Attributes:
        model: the conditional-generation model.
        base: the module that merges features into embeddings and calls the decoder.
        decoder: the language model without its head; `layers` are its decoder layers.
        tower: the vision tower; `blocks` are its transformer blocks.
        projector: the module from tower width to LLM width.
        image_token_id: placeholder of visual tokens.
        prefix: tower tokens before the patches ([CLS]).
    """

    prefix = 0

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base = model.base_model
        self.decoder = model.get_decoder()
        self.layers: nn.ModuleList = self.decoder.layers
        self.image_token_id: int = model.config.image_token_id

    tower: nn.Module
    blocks: nn.ModuleList
    projector: nn.Module

    @property
    def text_config(self) -> Any:
        """Config of the decoder."""
        return self.decoder.config

    def attention(self, layer: int) -> nn.Module:
        """Attention module of a decoder layer."""
        return self.layers[layer].self_attn

    def block_attention(self, block: int) -> nn.Module:
        """Attention module of a tower block."""
        return self.blocks[block].self_attn

    def feature_blocks(self) -> list[int]:
        """Tower blocks whose outputs feed the projector, 0-based."""
        raise NotImplementedError

    def block(self, block: int | None) -> int:
        """A tower block as a 0-based index; None is the one whose output is projected."""
        return self.feature_blocks()[-1] if block is None else block % len(self.blocks)

    def native_grid(self) -> tuple[int, int] | None:
        """(rows, cols) of every image, if the family has one size for all."""
        return None

    def cls_feature(self, tower_output: Any) -> Tensor:
        """The [CLS] feature beside the patch features that are projected: `[images, 1, width]`."""
        raise NotImplementedError

    def grid(self, pixel_values: Tensor) -> list[tuple[int, int]]:
        """(rows, cols) of visual tokens of every image."""
        raise NotImplementedError

    def resized(self, pixel_values: Tensor, grid: tuple[int, int]) -> tuple[Tensor, dict]:
        """Pictures that yield `grid` tokens, and the arguments the tower needs for them."""
        raise NotImplementedError

    def vision_flops(self, grid: tuple[int, int], projected: int) -> float:
        """FLOPs of one image through the tower, and of `projected` tokens in the projector."""
        raise NotImplementedError
