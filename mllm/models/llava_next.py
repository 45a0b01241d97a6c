"""LLaVA-NeXT and LLaVA-OneVision: a base view, then the tiled picture row by row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import compat, flops
from mllm.errors import DataError
from mllm.models.llava import Llava
from mllm.tokens import Layout, Tiling


class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration`.

    The tiled view loses its padding and gets a separator behind every row.
    """

    per_token = False
    refuses: ClassVar[dict[str, str]] = {
        "Pool": "its images are several grids with separators",
        "Resize": "it fixes the size of its tiles",
    }
    needs: ClassVar[dict[str, tuple[int, ...]]] = {"pixel_values": (4, 5), "image_sizes": (2,)}

    def native_grid(self) -> None:
        return None

    @property
    def _side(self) -> int:
        """Cells of a tile in each direction."""
        return self.vision_config.image_size // self.vision_config.patch_size

    def shaped(
        self, samples: int, images: int, size: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        count, side = samples * images, self.vision_config.image_size
        tiles = self.patches(self._layout(list(size))) // self._side**2
        return {
            "pixel_values": torch.empty(count, tiles, 3, side, side, device="meta"),
            "image_sizes": torch.tensor([size] * count),
        }

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        pixels, layouts = inputs["pixel_values"], self.layouts(inputs)
        tiles = [self.patches(layout) // self._side**2 for layout in layouts]
        if pixels.dim() == 4:
            return list(pixels.split(tiles))
        return [picture[:n] for picture, n in zip(pixels, tiles, strict=True)]

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        return [self._layout(size) for size in inputs["image_sizes"].tolist()]

    def _layout(self, size: list[int]) -> Layout:
        """The layout of a picture of (height, width) pixels."""
        side, config = self._side, self.vision_config
        pixels = compat.best_resolution(size, self.model.config.image_grid_pinpoints)
        rows, cols = (length // config.image_size for length in pixels)
        height, width = rows * side, cols * side
        # Without the bars that the processor added above and below, or left and right.
        if size[1] / size[0] > width / height:
            height -= (height - int(round(size[0] * (width / size[1]), 7))) // 2 * 2
        else:
            width -= (width - int(round(size[1] * (height / size[0]), 7))) // 2 * 2
        tiling = Tiling(rows, cols, height, width)
        return Layout(((side, side), self._view(height, width)), "rows", tiling)

    def _view(self, height: int, width: int) -> tuple[int, int]:
        """Cells of the tiled view in the sequence."""
        return height, width

    def patches(self, layout: Layout) -> int:
        tiling = layout.tiling
        return self._side**2 * (1 + (tiling.rows * tiling.cols if tiling else 0))

    def to_rows(self, signal: Tensor, layouts: list[Layout]) -> Tensor:
        out, start = [], 0
        for layout in layouts:
            here = signal[start : start + self.patches(layout)]
            start += len(here)
            cells = self._cells(here, layout)
            full = cells.new_zeros(layout.tokens, *cells.shape[1:])
            out.append(full.index_copy(0, layout.places.cell.to(cells.device), cells))
        return torch.cat(out)

    def _cells(self, signal: Tensor, layout: Layout) -> Tensor:
        """A signal of one image per visual token that is no separator."""
        side, tiling = self._side, layout.tiling
        if tiling is None:
            return signal
        x = signal[side**2 :].unflatten(0, (tiling.rows, tiling.cols, side, side))
        x = x.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        top, left = (x.shape[0] - tiling.height) // 2, (x.shape[1] - tiling.width) // 2
        x = x[top : top + tiling.height, left : left + tiling.width]
        return torch.cat([signal[: side**2], self._shrunk(x, layout.grids[1]).flatten(0, 1)])

    def _shrunk(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """A signal `[rows, cols, ...]` of the tiled view at the size in the sequence."""
        if tuple(x.shape[:2]) == grid:
            return x
        flat = x.reshape(1, *x.shape[:2], -1).permute(0, 3, 1, 2)
        flat = F.interpolate(flat.float(), size=grid, mode="bilinear")
        return flat[0].permute(1, 2, 0).reshape(*grid, *x.shape[2:])

    def vision_flops(self, layout: Layout, projected: int) -> float:
        config, patches = self.vision_config, self.patches(layout)
        width = config.hidden_size * len(self.feature_blocks())
        tower = flops.vision_tower(config, self._side**2, self.prefix)
        return patches // self._side**2 * tower + flops.projector(
            width, self.text_config.hidden_size, patches if projected else 0
        )


class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration`.

    Large tiled views are made smaller; images among others have their base view alone.
    """

    def of_videos(self) -> OnevisionVideo | None:
        # Older versions put the separator behind a video outside of get_video_features.
        return OnevisionVideo(self.model) if compat.encodes_first(self.base) else None

    def shaped(
        self, samples: int, images: int, size: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        among = torch.full((samples,), images)
        return super().shaped(samples, images, size) | {"batch_num_images": among}

    def check(self, inputs: Mapping[str, Any]) -> None:
        super().check(inputs)
        among = inputs.get("batch_num_images")
        if among is not None and int(among.sum()) != len(inputs["image_sizes"]):
            raise DataError(
                f"batch_num_images speaks of {int(among.sum())} images",
                argument="batch_num_images",
                given=among.tolist(),
                expected=f"{len(inputs['image_sizes'])} images",
            )

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        layouts, among = super().layouts(inputs), inputs.get("batch_num_images")
        if among is None:
            return layouts
        base = Layout(((self._side, self._side),), "end")
        alone = [n == 1 for n in among.tolist() for _ in range(n)]
        return [
            layout if single else base for layout, single in zip(layouts, alone, strict=True)
        ]

    def _view(self, height: int, width: int) -> tuple[int, int]:
        most = int(self.model.config.vision_aspect_ratio.rsplit("_", 1)[-1])
        ratio = math.sqrt(height * width / (most * self._side**2))
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)


class OnevisionVideo(LlavaOnevision):
    """Videos of LLaVA-OneVision: every frame at half the side, one separator behind the video."""

    pixels = "pixel_values_videos"
    needs: ClassVar[dict[str, tuple[int, ...]]] = {"pixel_values_videos": (5,)}

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.image_token_id = model.config.video_token_id

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        return list(inputs[self.pixels])

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        videos, frames = inputs[self.pixels].shape[:2]
        half = -(-self._side // 2)
        return [Layout(((half, half),) * frames, "end", video=True)] * videos

    def patches(self, layout: Layout) -> int:
        return self._side**2 * len(layout.grids)

    def _cells(self, signal: Tensor, layout: Layout) -> Tensor:
        frames = signal.unflatten(0, (-1, self._side, self._side))
        small = [self._shrunk(x, grid) for x, grid in zip(frames, layout.grids, strict=True)]
        return torch.cat([x.flatten(0, 1) for x in small])
