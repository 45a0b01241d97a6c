"""Mistral 3: a Pixtral tower over pictures of any size, s x s patches a token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import flops
from mllm.errors import DataError, PlanError
from mllm.models.base import Family, join_patches, shrink, widest
from mllm.tokens import Layout


class Mistral3(Family):
    """`Mistral3ForConditionalGeneration`; pictures come padded, with `image_sizes` in pixels."""

    packed = True
    joins = True
    projecting = "multi_modal_projector"
    needs: ClassVar[dict[str, tuple[int, ...]]] = {"pixel_values": (4,), "image_sizes": (2,)}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.blocks = self.tower.transformer.layers
        self.projector = getattr(self.base, self.projecting)
        self.join: int = model.config.spatial_merge_size
        self.side: int = self.join * self.vision_config.patch_size
        layer = getattr(model.config, "vision_feature_layer", -1)
        if not isinstance(layer, int):
            raise PlanError(
                "the projector normalises features of one layer only",
                argument="vision_feature_layer",
                given=layer,
                expected="one layer",
            )
        # hidden_states[0] is the embedding.
        self.last = (layer if layer >= 0 else len(self.blocks) + 1 + layer) - 1

    def notes(self) -> list[str]:
        return [
            "the FLOPs of the tower are those of each picture alone: not of padding, nor of "
            "products with other pictures, which sdpa and eager compute and mask"
        ]

    def block_attention(self, block: int) -> nn.Module:
        return self.blocks[block].attention

    def feature_blocks(self) -> list[int]:
        return [self.last]

    def no_tokens(self, args: tuple) -> tuple:
        # It cannot join the patches of no picture.
        one = args[0].new_zeros(self.join**2, args[0].shape[1])
        return one, torch.tensor([[self.side, self.side]])

    def check(self, inputs: Mapping[str, Any]) -> None:
        super().check(inputs)
        sizes, pixels = inputs["image_sizes"], inputs["pixel_values"]
        whole = len(sizes) == len(pixels) and not (sizes % self.side).any()
        if not whole or (sizes > sizes.new_tensor(pixels.shape[-2:])).any():
            raise DataError(
                f"{len(pixels)} pictures of {tuple(pixels.shape[-2:])} pixels have other sizes",
                argument="image_sizes",
                given=sizes.tolist(),
                expected=f"height and width of each, multiples of {self.side}",
            )

    def shaped(
        self, samples: int, images: int, size: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        # Given with a side that is a part of a token, the processor rounds up.
        size = [-(-length // self.side) * self.side for length in size]
        count, channels = samples * images, self.vision_config.num_channels
        return {
            "pixel_values": torch.empty(count, channels, *size, device="meta"),
            "image_sizes": torch.tensor([size] * count),
        }

    def size_of(self, cells: int) -> tuple[int, int]:
        rows = widest(cells)
        return rows * self.side, cells // rows * self.side

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        sizes = inputs["image_sizes"].tolist()
        return [
            x[:, :height, :width]
            for x, (height, width) in zip(inputs["pixel_values"], sizes, strict=True)
        ]

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        return [
            Layout(((height // self.side, width // self.side),))
            for height, width in inputs["image_sizes"].tolist()
        ]

    def patches(self, layout: Layout) -> int:
        return layout.cells * self.join**2

    def to_rows(self, signal: Tensor, layouts: list[Layout]) -> Tensor:
        return join_patches(signal, layouts, self.join)

    def resized(self, inputs: Mapping[str, Any], grids: list[tuple[int, int]]) -> dict[str, Any]:
        sizes = [(rows * self.side, cols * self.side) for rows, cols in grids]
        most = [max(side) for side in zip(*sizes, strict=True)]
        small = []
        for picture, size in zip(self.pictures(inputs), sizes, strict=True):
            if tuple(picture.shape[-2:]) != size:
                picture = shrink(picture[None], size)[0]
            small.append(F.pad(picture, (0, most[1] - size[1], 0, most[0] - size[0])))
        return {
            "pixel_values": torch.stack(small),
            "image_sizes": inputs["image_sizes"].new_tensor(sizes),
        }

    def vision_flops(self, layout: Layout, projected: int) -> float:
        config, patches = self.vision_config, self.patches(layout)
        width, area = config.hidden_size, config.patch_size**2
        block = flops.vision_block(patches, width, config.intermediate_size, gated=True)
        merger = 2 * projected * width**2 * self.join**2
        return (
            2 * patches * config.num_channels * area * width
            + len(self.blocks) * block
            + merger
            + flops.projector(width, self.text_config.hidden_size, projected)
        )


class LightOnOcr(Mistral3):
    """`LightOnOcrForConditionalGeneration`."""

    projecting = "vision_projection"
