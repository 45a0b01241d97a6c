"""The token table: for every row of the current forward, where it comes from. Pure torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """A picture cut into tiles for the tower.

    Attributes:
        rows, cols: tiles.
        height, width: cells of the tiled view without the padding of the picture.
    """

    rows: int
    cols: int
    height: int
    width: int


@dataclass(frozen=True)
class Layout:
    """How the visual tokens of one image lie in the sequence: grids, one after another.

    Attributes:
        grids: (rows, cols) of every grid; a base view and a tiled view under anyres.
        newline: separators of the last grid: `"rows"` one token behind each of its rows, `"end"`
            one token behind the image.
        tiling: the tiles that the last grid was put together from.
        video: whether the grids are frames.
    """

    grids: tuple[tuple[int, int], ...]
    newline: Literal["none", "rows", "end"] = "none"
    tiling: Tiling | None = None
    video: bool = False

    @property
    def plain(self) -> bool:
        """One grid without separators."""
        return len(self.grids) == 1 and self.newline == "none"

    @property
    def cells(self) -> int:
        """Tokens that stand for a part of the picture."""
        return sum(rows * cols for rows, cols in self.grids)

    @property
    def tokens(self) -> int:
        """All visual tokens, separators included."""
        return self.cells + {"none": 0, "rows": self.grids[-1][0], "end": 1}[self.newline]

    @property
    def places(self) -> Places:
        """Where each token is, on the CPU."""
        return _places(self)


@dataclass(frozen=True)
class Places:
    """Per token of one image, `[tokens]` each.

    Attributes:
        newline: bool, separators.
        tile, frame, row, col: int64 grid and place in it; a separator stands behind its row.
        line: int64, what a separator separates: it stays while a cell of its line stays.
        cell: int64 `[cells]`, tokens that are no separators.
    """

    newline: Tensor
    tile: Tensor
    frame: Tensor
    row: Tensor
    col: Tensor
    line: Tensor
    cell: Tensor


@lru_cache(maxsize=256)
def _places(layout: Layout) -> Places:
    parts, line = [], 0  # newline, tile, frame, row, col, line: int64 [6, tokens] each
    for grid, (height, width) in enumerate(layout.grids):
        last = grid == len(layout.grids) - 1
        spaced = last and layout.newline == "rows"
        wide = width + spaced
        row = torch.arange(height).repeat_interleave(wide)
        col = torch.arange(wide).repeat(height)
        part = torch.zeros(6, height * wide, dtype=torch.long)
        part[2 if layout.video else 1] = grid
        part[0], part[3], part[4], part[5] = col == width, row, col, line + spaced * row
        parts.append(part)
        if layout.newline == "rows":
            line += 1
    if layout.newline == "end":
        end = parts[-1][:, -1:].clone()
        end[0], end[4] = 1, end[4] + 1
        parts.append(end)
    newline, *place = torch.cat(parts, 1).unbind()
    return Places(newline.bool(), *place, newline.logical_not().nonzero()[:, 0])


def split_images(counts: Sequence[int], sizes: Sequence[int]) -> list[list[int]] | None:
    """The images of every sample, in prompt order; None if placeholders and images disagree.

    generate() repeats samples for beams and returned sequences, while images stay as they are:
    repeated samples share their images.

    Args:
        counts: visual tokens of each sample.
        sizes: visual tokens of each image.
    """
    total = sum(sizes)
    if not total or sum(counts) % total:
        return None
    repeat, found, image = sum(counts) // total, [], 0
    for sample in range(0, len(counts), repeat):
        own, left = [], counts[sample]
        while left > 0 and image < len(sizes):
            own.append(image)
            left -= sizes[image]
            image += 1
        if left or counts[sample : sample + repeat] != [counts[sample]] * repeat:
            return None
        found += [own] * repeat
    return found if image == len(sizes) else None


@dataclass
class TokenTable:
    """Rows of one forward pass; every field is `[batch, rows]`.

    Attributes:
        valid: bool, false for padding and for rows kept only to fill the rectangle.
        visual: bool, placeholders of visual tokens (newline tokens included).
        newline: bool, visual rows that separate lines of a tile; outside every budget.
        image: int32 ordinal of the image within its sample, -1 for text.
        tile, frame: int32 ordinals within the image, -1 for text.
        row, col: float32 place in the image's grid, -1 for text.
        line: int32, in images with separators: what the row's separator separates.
        size: float32, how many original tokens the row stands for.
        logical: int64 index in the uncompressed sequence.
        index: int64 row of the forward's own input that this row came from.
    """

    valid: Tensor
    visual: Tensor
    newline: Tensor
    image: Tensor
    tile: Tensor
    frame: Tensor
    row: Tensor
    col: Tensor
    line: Tensor
    size: Tensor
    logical: Tensor
    index: Tensor

    @classmethod
    def text(cls, valid: Tensor, start: int) -> TokenTable:
        """A table without visual rows; logical indices count from `start`."""
        batch, rows = valid.shape
        index = torch.arange(rows, device=valid.device).expand(batch, rows)
        no = torch.zeros_like(valid)
        minus = torch.full_like(index, -1, dtype=torch.int32)
        place = torch.full_like(index, -1, dtype=torch.float32)
        return cls(
            valid=valid, visual=no, newline=no, image=minus, tile=minus, frame=minus,
            row=place, col=place, line=minus, size=torch.ones_like(place), logical=index + start,
            index=index,
        )

    @classmethod
    def prompt(
        cls, valid: Tensor, visual: Tensor, start: int, layouts: list[list[Layout]]
    ) -> TokenTable:
        """A table of a prompt with images.

        Args:
            valid: bool `[batch, rows]`.
            visual: bool `[batch, rows]`.
            start: logical index of the first row.
            layouts: layout of every image, per sample, in prompt order.
        """
        table = cls.text(valid, start)
        table.visual = visual
        names = ("newline", "tile", "frame", "row", "col", "line")
        for name in (*names, "image"):
            setattr(table, name, getattr(table, name).clone())
        device = visual.device
        for b, sample in enumerate(layouts):
            if not sample:
                continue
            rows = visual[b].nonzero()[:, 0]
            for name in names:
                column = getattr(table, name)
                values = torch.cat([getattr(x.places, name) for x in sample])
                column[b, rows] = values.to(device, column.dtype)
            sizes = torch.tensor([x.tokens for x in sample])
            image = torch.arange(len(sample)).repeat_interleave(sizes)
            table.image[b, rows] = image.to(device, torch.int32)
        return table

    def with_newlines(self, keep: Tensor) -> Tensor:
        """`keep` with separators kept where a cell of their line is: bool `[batch, rows]`."""
        lines, images = int(self.line.max()) + 1, int(self.image.max()) + 1
        key = (self.image.long() * lines + self.line).clamp(min=0)
        cells = (keep & self.visual & ~self.newline).long()
        counts = cells.new_zeros(key.shape[0], max(1, images * lines)).scatter_add(1, key, cells)
        there = counts.gather(1, key) > 0
        return torch.where(self.newline, self.valid & there, keep)

    def take(self, rows: Tensor, valid: Tensor) -> TokenTable:
        """The table of the chosen rows, int64 `[batch, kept]`, with their validity."""
        columns = {
            f.name: getattr(self, f.name).gather(1, rows) for f in dataclasses.fields(self)
        }
        return TokenTable(**{**columns, "valid": valid})


def choose_rows(keep: Tensor, valid: Tensor, order: Tensor | None = None) -> Tensor:
    """Rows that stay, as a rectangle: int64 `[batch, most kept in the batch]`.

    Samples that keep fewer rows are filled up, first with their padding rows and then with rows
    that were dropped; the caller masks these. Everything stays in sequence order, so padding
    stays on its side and keeping all rows changes nothing.

    Args:
        keep: bool `[batch, rows]`, valid rows that stay.
        valid: bool `[batch, rows]`.
        order: int64 `[batch, rows]`, another sequence order; must be distinct per sample.
    """
    count = int(keep.sum(1).max())
    rank = torch.where(keep, 2, torch.where(valid, 0, 1))
    rows = rank.argsort(dim=1, descending=True, stable=True)[:, :count]
    key = rows if order is None else order.gather(1, rows)
    return rows.gather(1, key.argsort(dim=1, stable=True))


def gather_rows(x: Tensor, rows: Tensor, dim: int = 1) -> Tensor:
    """`x` with its row axis `dim` (batch just before it) replaced by the chosen rows.

    Args:
        x: `[..., batch or 1, rows, ...]`.
        rows: int64 `[batch, kept]`.
        dim: the row axis of `x`.
    """
    shape = list(x.shape)
    shape[dim - 1] = rows.shape[0]
    x = x.expand(shape)
    shape[dim] = rows.shape[1]
    view = [1] * x.dim()
    view[dim - 1], view[dim] = rows.shape
    return x.gather(dim, rows.view(view).expand(shape))


def renumber(
    position: Tensor, keep: Tensor, valid: Tensor, order: Tensor | None = None
) -> Tensor:
    """Positions that run on without gaps over the kept rows: int64 `[batch, rows]`.

    Counting starts at the position of a sample's first valid row. Other rows keep theirs.

    Args:
        position: int64 `[batch, rows]`.
        keep: bool `[batch, rows]`, a subset of `valid`.
        valid: bool `[batch, rows]`.
        order: int64 `[batch, rows]`, sequence order, if it is not that of the columns.
    """
    if order is None:
        place = keep.long().cumsum(1) - 1
    else:
        last = int(order.max()) + 1
        place = order.masked_fill(~keep, last).argsort(dim=1, stable=True).argsort(dim=1)
    first = valid.int().argmax(1, keepdim=True)
    return torch.where(keep, position.gather(1, first) + place, position)
