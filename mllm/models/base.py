"""The base of family adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import DataError
from mllm.tokens import Layout


def shrink(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures `[n, channels, height, width]` at another size, antialiased."""
    small = F.interpolate(
        pixels.float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )
    return small.to(pixels.dtype)


def widest(cells: int) -> int:
    """Rows of the grid of so many cells that is nearest to a square, and no higher than wide."""
    return next(rows for rows in range(math.isqrt(cells), 0, -1) if cells % rows == 0)


def join_patches(signal: Tensor, layouts: list[Layout], side: int) -> Tensor:
    """The mean over the `side` x `side` patches of every token.

    Args:
        signal: `[patches of all images, ...]`, each image in reading order.
        layouts: layouts of the images, plain grids.
        side: patches that the projector joins in each direction.
    """
    parts, start = [], 0
    for layout in layouts:
        ((rows, cols),) = layout.grids
        here = signal[start : start + layout.cells * side**2]
        here = here.unflatten(0, (rows, side, cols, side)).mean((1, 3)).flatten(0, 1)
        parts.append(here)
        start += layout.cells * side**2
    return torch.cat(parts)


class Family:
    """What the engine needs to know of a model; a family file holds only what differs.

    `inputs` below are the arguments of the model's `get_image_features` by name.

    Attributes:
        model: the conditional-generation model.
        base: the module that merges features into embeddings and calls the decoder.
        decoder: the language model without its head; `layers` are its decoder layers.
        tower: the vision tower; `blocks` are its transformer blocks over the visual tokens, none
            where it has no such attention.
        projector: the module from tower width to LLM width.
        image_token_id: placeholder of visual tokens.
        prefix: tower tokens before the patches ([CLS]).
        per_token: every projected token comes from one tower token, and an image is one plain
            grid: stages before the projector can run there.
        joins: the projector joins patches by itself, and cannot take tokens without neighbours.
        pixels: the argument that has the pixels.
        refuses: actions that the family cannot do, with the reason.
        packed: the tower takes all pictures as one sequence.
        mrope: rotary positions have a row and a column; they cannot be renumbered.
        neighbours: rotary embedding turns channels with their neighbours, not with those of the
            other half.
        hybrid: rows see more or less than all before them, or not the same in all layers; the base
            model makes the masks, one of each kind of layer.
        asks: arguments without which rows do not see what the model has learnt to see.
        first_cut: first decoder layer before which rows may leave.
        carried: attributes of `base` that belong to a conversation; the engine keeps them on its
            cache.
        needs: tensors that pictures come as, and the dimensions that each may have.
        repeats: whether transformers repeats such pictures with their prompts, for beams or several
            answers.
    """

    prefix = 0
    per_token = False
    joins = False
    pixels = "pixel_values"
    refuses: ClassVar[dict[str, str]] = {}
    packed = False
    mrope = False
    neighbours = False
    hybrid = False
    asks: ClassVar[tuple[str, ...]] = ()
    first_cut = 0
    carried: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[dict[str, tuple[int, ...]]] = {"pixel_values": (4,)}
    repeats = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.base = model.base_model
        self.decoder = model.get_decoder()
        self.tower = model.get_encoder("image")
        self.layers: nn.ModuleList = self.decoder.layers
        self.image_token_id: int = model.config.image_token_id

    blocks: nn.ModuleList
    projector: nn.Module

    @property
    def text_config(self) -> Any:
        """Config of the decoder."""
        return self.decoder.config

    @property
    def vision_config(self) -> Any:
        """Config of the tower."""
        return self.model.config.vision_config

    def new_parameters(self) -> list[nn.Parameter]:
        """Parameters of the tower that came with the projector: they are trained with it."""
        return []

    def notes(self) -> list[str]:
        """What a ledger of this model should say."""
        return []

    def of_videos(self) -> Family | None:
        """The adapter of the same model for the inputs of `get_video_features`, if it has any."""
        return None

    def attention(self, layer: int) -> nn.Module:
        """Attention module of a decoder layer."""
        return self.layers[layer].self_attn

    def attention_input(self, layer: int, hidden: Tensor) -> Tensor:
        """What the attention of a decoder layer is given when `hidden` enters the layer."""
        return self.layers[layer].input_layernorm(hidden)

    def final_norm(self, hidden: Tensor) -> Tensor:
        """What the norm behind the last decoder layer makes of hidden states."""
        return self.decoder.norm(hidden)

    def mlp(self, layer: int) -> nn.Module:
        """MLP of a decoder layer."""
        return self.layers[layer].mlp

    def branch(self, layer: int, branch: str) -> nn.Module:
        """The module whose output a branch, `"attn"` or `"mlp"`, adds to the residual."""
        return self.attention(layer) if branch == "attn" else self.mlp(layer)

    def block_parts(self, block: int) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """Norm, attention, norm and MLP of a tower block: each pair adds to the residual.

        Only families with `per_token` need it.
        """
        x = self.blocks[block]
        return x.layer_norm1, x.self_attn, x.layer_norm2, x.mlp

    def kind(self, layer: int) -> str:
        """What tells layers apart that have other masks and positions; empty if nothing does."""
        return self.text_config.layer_types[layer] if self.hybrid else ""

    def window(self, layer: int) -> int | None:
        """Tokens that a decoder layer sees, the query included; None is everything."""
        sliding = self.kind(layer) == "sliding_attention"
        return self.text_config.sliding_window if sliding else None

    def rotary(self, hidden: Tensor, position: Tensor, kind: str) -> tuple[Tensor, Tensor]:
        """Rotary tables `[batch, rows, dim]` of the layers of a kind."""
        return self.decoder.rotary_emb(hidden, position, *self.turned_by(kind))

    def turned_by(self, kind: str) -> tuple[str, ...]:
        """What else the rotary module asks for of layers of a kind."""
        return (kind,) if kind else ()

    def block_attention(self, block: int) -> nn.Module:
        """Attention module of a tower block."""
        return self.blocks[block].self_attn

    def feature_blocks(self) -> list[int]:
        """Tower blocks whose outputs feed the projector, 0-based."""
        return [len(self.blocks) - 1]

    def block(self, block: int | float | None) -> int:
        """A tower block as a 0-based index; None is the one whose attention methods read.

        A float is a share of the depth.
        """
        if block is None:
            return self.feature_blocks()[-1]
        if isinstance(block, float):
            return min(len(self.blocks) - 1, round(block * len(self.blocks)))
        return block % len(self.blocks)

    @property
    def tower_widths(self) -> tuple[int, int]:
        """Widths of a row of :meth:`unprojected`, and of what a tower block makes."""
        return (self.vision_config.hidden_size,) * 2

    def unprojected(self, features: Tensor, layouts: list[Layout]) -> Tensor:
        """What the projector is given as one row per visual token: `[tokens, width]`."""
        return self.to_rows(features.flatten(0, -2), layouts)

    def no_tokens(self, args: tuple) -> tuple:
        """Arguments of the projector, from its own, for no tokens, or the fewest that it takes."""
        return (args[0][:0], *args[1:])

    def native_grid(self) -> tuple[int, int] | None:
        """(rows, cols) of every image, if the family has one size for all."""
        return None

    def cls_feature(self, tower_output: Any) -> Tensor:
        """The [CLS] feature beside the patch features that are projected: `[images, 1, width]`."""
        raise NotImplementedError

    def shaped(
        self, samples: int, images: int, size: tuple[int, int] | None
    ) -> dict[str, Tensor]:
        """Pictures as the processor would give them, with pixels on the meta device.

        Args:
            samples: in the batch.
            images: of each sample; a tile, where tiles are images of their own.
            size: (height, width) in pixels, where :meth:`native_grid` is None.
        """
        side = self.vision_config.image_size
        high, wide = side if isinstance(side, list | tuple) else (side, side)
        return {self.pixels: torch.empty(samples * images, 3, high, wide, device="meta")}

    def size_of(self, cells: int) -> tuple[int, int] | None:
        """(height, width) of a picture of so many visual tokens, nearly square; None if unknown."""
        return None

    def check(self, inputs: Mapping[str, Any]) -> None:
        """Refuse pictures that the processor of another model made.

        Raises:
            DataError: a tensor is missing or has another number of dimensions.
        """
        for name, dims in self.needs.items():
            value = inputs.get(name)
            if not isinstance(value, Tensor) or value.dim() not in dims:
                kind = type(self.model).__name__
                raise DataError(
                    f"these are no pictures for {kind}: another model's processor made them",
                    argument=name,
                    given=list(value.shape) if isinstance(value, Tensor) else value,
                    expected=f"a tensor of {' or '.join(map(str, dims))} dimensions",
                )

    def pictures(self, inputs: Mapping[str, Any]) -> list[Tensor]:
        """The pixels of every image, in prompt order."""
        return list(inputs[self.pixels])

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        """How the visual tokens of every image lie."""
        raise NotImplementedError

    def patches(self, layout: Layout) -> int:
        """Tower tokens of an image, without the prefix."""
        return layout.cells

    def to_rows(self, signal: Tensor, layouts: list[Layout]) -> Tensor:
        """A signal per tower patch as one per visual token.

        Un-permutes windows, averages the patches that the projector joins, and applies the
        family's unpadding and resizing; separators get zeros.

        Args:
            signal: `[patches of all images, ...]`, in the tower's order.
            layouts: layouts of the images.

        Returns:
            `[visual tokens of all images, ...]`.
        """
        return signal

    def picture_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The grid nearest to `grid`, and within it, of a picture that the tower can take."""
        return grid

    def resized(
        self, inputs: Mapping[str, Any], grids: list[tuple[int, int]]
    ) -> dict[str, Any]:
        """Arguments to change so that every image yields its grid of visual tokens."""
        raise NotImplementedError

    def take_rows(self, arguments: dict[str, Any], rows: Tensor, valid: Tensor) -> None:
        """Let side features of the decoder leave with their rows; changes `arguments` in place.

        Args:
            arguments: the decoder's arguments.
            rows: int64 `[batch, kept]`, rows that stay.
            valid: bool `[batch, kept]`.
        """

    def vision_flops(self, layout: Layout, projected: int) -> float:
        """FLOPs of one image through the tower, and of `projected` tokens in the projector."""
        raise NotImplementedError


class PerPatch(Family):
    """A family with one visual token per tower patch, and one grid per image."""

    per_token = True

    def native_grid(self) -> tuple[int, int]:
        side = self.vision_config.image_size // self.vision_config.patch_size
        return side, side

    def layouts(self, inputs: Mapping[str, Any]) -> list[Layout]:
        pixels, patch = inputs["pixel_values"], self.vision_config.patch_size
        side = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        return [Layout((side,))] * pixels.shape[0]

    def resized(
        self, inputs: Mapping[str, Any], grids: list[tuple[int, int]]
    ) -> dict[str, Any]:
        pixels, patch = inputs["pixel_values"], self.vision_config.patch_size
        size = (grids[0][0] * patch, grids[0][1] * patch)
        if tuple(pixels.shape[-2:]) == size:
            return {}
        return {"pixel_values": shrink(pixels, size), "interpolate_pos_encoding": True}


class Shuffled(Family):
    """A family whose projector joins squares of `join` x `join` patches (pixel shuffle)."""

    join: int

    def patches(self, layout: Layout) -> int:
        return layout.cells * self.join**2

    def to_rows(self, signal: Tensor, layouts: list[Layout]) -> Tensor:
        return join_patches(signal, layouts, self.join)

    def picture_grid(self, grid: tuple[int, int]) -> tuple[int, int]:
        return min(grid), min(grid)  # the pixel shuffle knows squares only
