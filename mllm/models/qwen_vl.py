"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: packed pictures of any size, 2 x 2 patches a token, M-RoPE."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mllm import flops
from mllm.errors import DataError
from mllm.models.base import Family, shrink, widest
from mllm.tokens import Layout, remembered


class Qwen2VL(Family):
    """`Qwen2VLForConditionalGeneration`."""

    joins = True
    packed = True
    mrope = True
    carried = ("rope_deltas",)
    sizes = "image_grid_thw"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.needs = {self.pixels: (2,), self.sizes: (2,)}
        self.blocks = self.tower.blocks
        self.projector = self.tower.merger
        self.merge: int = self.vision_config.spatial_merge_size

    def of_videos(self) -> Qwen2VL:
        own = copy.copy(self)
        own.pixels, own.sizes = "pixel_values_videos", "video_grid_thw"
        own.needs = {own.pixels: (2,), own.sizes: (2,)}
        own.image_token_id = self.model.config.video_token_id
        return own

    def block_attention(self, block: int) -> nn.Module:
        return self.blocks[block].attn

    def check(self, inputs: Mapping[str, Any]) -> None:
        super().check(inputs)
        told = int(inputs[self.sizes].prod(-1).sum())
        if told != len(inputs[self.pixels]):
            raise DataError(
                f"{self.sizes} speaks of {told} patches",
                argument=self.pixels,
                given=list(inputs[self.pixels].shape),
                expected=f"{told} patches",
            )

    def shaped(
        self, samples: int, images: int, size: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        config, count = self.vision_config, samples * images
        side = self.merge * config.patch_size
        rows, cols = (max(1, round(length / side)) * self.merge for length in size)
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        return {
            self.pixels: torch.empty(count * rows * cols, values, device="meta"),
            self.sizes: torch.tensor([[1, rows, cols]] * count),
        }

    def size_of(self, cells: int) -> tuple[int, int]:
        side = self.merge * self.vision_config.patch_size
        rows = widest(cells)
        return rows * side, cells // rows * side

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        patches = inputs[self.sizes].prod(-1).tolist()
        return list(inputs[self.pixels].split(patches))

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        return [
            Layout(((height // self.merge, width // self.merge),) * frames, video=frames > 1)
            for frames, height, width in inputs[self.sizes].tolist()
        ]

    @property
    def tower_widths(self) -> tuple[int, int]:
        return (self._width()[0],) * 2

    def patches(self, layout: Layout) -> int:
        return layout.cells * self.merge**2

    def to_rows(self, signal: Tensor, layouts: list[Layout]) -> Tensor:
        # The patches of one token lie together.
        return signal.unflatten(0, (-1, self.merge**2)).mean(1)

    def resized(
        self, inputs: Mapping[str, Any], grids: list[tuple[int, int]]
    ) -> dict[str, Any]:
        config, merge = self.vision_config, self.merge
        side = merge * config.patch_size
        packed = []
        for picture, layout, grid in zip(
            self.pictures(inputs), self.layouts(inputs), grids, strict=True
        ):
            (old,) = layout.grids
            if old != grid:
                # [rows, cols, merge, merge, channels x frames, patch, patch] and back
                x = picture.view(*old, merge, merge, -1, config.patch_size, config.patch_size)
                x = x.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, old[0] * side, old[1] * side)
                x = shrink(x[None], (grid[0] * side, grid[1] * side))[0]
                x = x.view(-1, grid[0], merge, config.patch_size, grid[1], merge,
                           config.patch_size)
                picture = x.permute(1, 4, 2, 5, 0, 3, 6).reshape(-1, picture.shape[1])
            packed.append(picture)
        sizes = [[1, rows * merge, cols * merge] for rows, cols in grids]
        like = inputs["image_grid_thw"]
        return {
            "pixel_values": torch.cat(packed),
            "image_grid_thw": torch.tensor(sizes, dtype=like.dtype, device=like.device),
        }

    def _width(self) -> tuple[int, int, int]:
        """Width of the tower, of its MLP, and of the projected tokens."""
        config = self.vision_config
        return config.embed_dim, int(config.embed_dim * config.mlp_ratio), config.hidden_size

    def _blocks_flops(self, layout: Layout) -> float:
        width, mlp, _ = self._width()
        spans = [rows * cols * self.merge**2 for rows, cols in layout.grids]
        block = flops.vision_block(self.patches(layout), width, mlp, spans=spans)
        return len(self.blocks) * block

    def _merger_flops(self, tokens: int) -> float:
        width, _, out = self._width()
        joined = width * self.merge**2
        return 2 * tokens * (joined**2 + joined * out)

    def vision_flops(self, layout: Layout, projected: int) -> float:
        config = self.vision_config
        values = config.in_channels * config.temporal_patch_size * config.patch_size**2
        embed = 2 * self.patches(layout) * values * self._width()[0]
        return embed + self._blocks_flops(layout) + self._merger_flops(projected)


class Qwen25VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration`: most tower blocks attend within windows."""

    def block(self, block: int | float | None) -> int:
        # Attention within a window says nothing of the whole picture.
        whole = self.vision_config.fullatt_block_indexes
        if isinstance(block, float):
            return min(whole, key=lambda i: abs(i - block * len(self.blocks)))
        return max(whole) if block is None else super().block(block)

    def _windows(self, layout: Layout) -> tuple[Tensor, list[int]]:
        config = self.vision_config
        return _windows(layout, config.window_size // self.merge // config.patch_size)

    def to_rows(self, signal: Tensor, layouts: list[Layout]) -> Tensor:
        merged, out, start = super().to_rows(signal, layouts), [], 0
        for layout in layouts:
            order = self._windows(layout)[0].to(merged.device)
            here = merged[start : start + layout.cells]
            out.append(torch.empty_like(here).index_copy(0, order, here))
            start += layout.cells
        return torch.cat(out)

    def _width(self) -> tuple[int, int, int]:
        config = self.vision_config
        return config.hidden_size, config.intermediate_size, config.out_hidden_size

    def _blocks_flops(self, layout: Layout) -> float:
        (width, mlp, _), patches = self._width(), self.patches(layout)
        spans = [n * self.merge**2 for n in self._windows(layout)[1]]
        frames = [rows * cols * self.merge**2 for rows, cols in layout.grids]
        whole = set(self.vision_config.fullatt_block_indexes)
        return sum(
            flops.vision_block(
                patches, width, mlp, gated=True, spans=frames if i in whole else spans
            )
            for i in range(len(self.blocks))
        )


@remembered
def _windows(layout: Layout, side: int) -> tuple[Tensor, list[int]]:
    """Tokens of one image in the order of windows of `side` x `side`; the tokens of each."""
    windows, count = [], 0
    for rows, cols in layout.grids:
        row, col = torch.arange(rows)[:, None] // side, torch.arange(cols) // side
        windows.append((count + row * -(-cols // side) + col).flatten())
        count = int(windows[-1][-1]) + 1
    window = torch.cat(windows)
    return window.argsort(stable=True), window.bincount().tolist()


class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration`: features of inner tower blocks join the first layers.

    The decoder adds them to the visual rows by itself, behind each of its first layers, so rows
    can leave before all of these or after all of them.
    """

    refuses: ClassVar[dict[str, str]] = {
        action: "its decoder adds features of the full grid to the same rows"
        for action in ("Pool", "Resize")
    }

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.first_cut = len(self.vision_config.deepstack_visual_indexes)

    def take_rows(self, arguments: dict[str, Any], rows: Tensor, valid: Tensor) -> None:
        visual = arguments.get("visual_pos_masks")
        if visual is None:
            return
        ordinal = (visual.flatten().long().cumsum(0) - 1).view_as(visual)
        there = visual.gather(1, rows) & valid
        chosen = ordinal.gather(1, rows)[there]
        arguments["visual_pos_masks"] = there
        arguments["deepstack_visual_embeds"] = [
            embeds[chosen] for embeds in arguments["deepstack_visual_embeds"]
        ]

    def _width(self) -> tuple[int, int, int]:
        config = self.vision_config
        return config.hidden_size, config.intermediate_size, config.out_hidden_size

    def vision_flops(self, layout: Layout, projected: int) -> float:
        inner = self.first_cut * self._merger_flops(layout.cells)
        return super().vision_flops(layout, projected) + inner
