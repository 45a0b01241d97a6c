"""The token table: for every row of the current forward, where it comes from. Pure torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from mllm import kernels


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
    def lines(self) -> int:
        """More than the highest line of its separators."""
        return len(self.grids) + self.grids[-1][0]

    @property
    def places(self) -> Places:
        """Where each token is, on the CPU."""
        return _places(self)


@dataclass(frozen=True, eq=False)
class Places:
    """Per token of one image, `[tokens]` each; one object per layout, to cache things by.

    Attributes:
        newline: bool, separators.
        tile, frame, row, col: int64 grid and place in it; a separator stands behind its row.
        part: int64, picture of the tower that it comes from: a frame, the base view, or one of
            the tiles behind it.
        line: int64, what a separator separates: it stays while a cell of its line stays.
        cell: int64 `[cells]`, tokens that are no separators.
        parts: pictures of the tower.
        tiles: rows and columns of tiles behind the base view; zeros without tiles.
    """

    newline: Tensor
    tile: Tensor
    frame: Tensor
    row: Tensor
    col: Tensor
    line: Tensor
    part: Tensor
    cell: Tensor
    parts: int
    tiles: tuple[int, int]

    def cells(self) -> Places:
        """The tokens that are no separators alone."""
        return _cells(self)


def remembered(make: Callable) -> Callable:
    """`lru_cache` for tensors that are made of a layout alone.

    They are ordinary ones whoever asks first: those of inference mode could not be saved for the
    gradient of a training that comes later.
    """
    return lru_cache(maxsize=256)(torch.inference_mode(False)(make))


@remembered
def _cells(places: Places) -> Places:
    columns = ("newline", "tile", "frame", "row", "col", "line", "part")
    own = {name: getattr(places, name)[places.cell] for name in columns}
    return Places(**own, cell=places.cell, parts=places.parts, tiles=places.tiles)


@remembered
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
    tiling, part = layout.tiling, place[0] + place[1]
    if tiling is not None:
        tile = [
            _tile_of(at, layout.grids[-1][i], length, count, layout.grids[0][i])
            for i, (at, length, count) in enumerate(
                [(place[2], tiling.height, tiling.rows), (place[3], tiling.width, tiling.cols)]
            )
        ]
        part = torch.where(part > 0, 1 + tile[0] * tiling.cols + tile[1], 0)
    count = len(layout.grids) if tiling is None else 1 + tiling.rows * tiling.cols
    cell = newline.logical_not().nonzero()[:, 0]
    tiles = (0, 0) if tiling is None else (tiling.rows, tiling.cols)
    return Places(newline.bool(), *place, part=part, cell=cell, parts=count, tiles=tiles)


def _tile_of(at: Tensor, size: int, length: int, tiles: int, side: int) -> Tensor:
    """The tile, along one axis, of places in a tiled view of `size` cells.

    The view shows the middle `length` of `tiles * side` cells, perhaps made smaller.
    """
    middle = (2 * at + 1) * length // (2 * size) + (tiles * side - length) // 2
    return (middle // side).clamp(max=tiles - 1)


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


@dataclass(frozen=True)
class Counts:
    """Rows of every sample of a forward, known without asking the device again.

    Attributes:
        marked: placeholders by kind, `image` or `video`.
        valid: rows that are no padding.
        seen: placeholders that are no padding.
    """

    marked: dict[str, list[int]]
    valid: list[int]
    seen: list[int]

    @property
    def visual(self) -> list[int]:
        """Placeholders of all kinds."""
        return [sum(own) for own in zip(*self.marked.values(), strict=True)]


def count_rows(marks: dict[str, Tensor], mask: Tensor | None) -> Counts:
    """Count in one read from the device.

    Args:
        marks: bool `[batch, rows]` by kind, placeholders.
        mask: `[batch, rows]`, zero at padding; None is no padding.
    """
    visual = torch.stack(list(marks.values()))
    valid = torch.ones_like(visual[0]) if mask is None else mask.to(visual)
    seen = visual.any(0) & valid
    *marked, valid, seen = torch.cat([visual, valid[None], seen[None]]).sum(2).tolist()
    return Counts(dict(zip(marks, marked, strict=True)), valid, seen)


def supervised(labels: Tensor, visual: Tensor | None) -> Tensor:
    """Rows from the first supervised one on, which are no prompt: bool `[batch, rows]`.

    Args:
        labels: `[batch, rows]`, -100 is not supervised.
        visual: bool `[batch, rows]`, placeholders; a prompt goes on at least to its last image.
    """
    own = labels != -100
    if visual is not None:
        own = own & (visual.flip(1).cumsum(1).flip(1) == 0)
    return own.long().cumsum(1) > 0


def on_device(values: Tensor, like: Tensor) -> Tensor:
    """A tensor made on the CPU, beside `like`, without waiting for the device."""
    return values.to(like.device, non_blocking=True)


def places_of(marked: Tensor, total: int) -> Tensor:
    """Flat indices of the `total` true elements of a bool tensor, in order: int64 `[total]`.

    What `nonzero` gives, without asking the device how many there are.
    """
    return marked.flatten().int().argsort(descending=True, stable=True)[:total]


@dataclass
class TokenTable:
    """Rows of one forward pass; every field is `[batch, rows]`.

    Attributes:
        valid: bool, false for padding and for rows kept only to fill the rectangle.
        visual: bool, placeholders of visual tokens (newline tokens included).
        newline: bool, visual rows that separate lines of a tile; outside every budget.
        inserted: bool, rows without a source; they have the logical index and the input row of
            the row that they stand behind.
        image: int32 ordinal of the image within its sample, -1 for text.
        tile, frame: int32 ordinals within the image, -1 for text.
        row, col: float32 place in the image's grid, -1 for text.
        line: int32, in images with separators: what the row's separator separates.
        size: float32, how many of the tokens that entered the decoder the row stands for.
        logical: int64 index in the uncompressed sequence.
        index: int64 row of the forward's own input that this row came from.
    """

    valid: Tensor
    visual: Tensor
    newline: Tensor
    inserted: Tensor
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
            valid=valid, visual=no, newline=no, inserted=no, image=minus, tile=minus, frame=minus,
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
        images = [(i, layout) for sample in layouts for i, layout in enumerate(sample)]
        if not images:
            return table
        names = ("newline", "tile", "frame", "row", "col", "line")
        columns = [
            torch.stack(
                [torch.full_like(x.places.tile, i), *(getattr(x.places, n).long() for n in names)]
            )
            for i, x in images
        ]
        at = places_of(visual, sum(x.tokens for _, x in images))
        values = on_device(torch.cat(columns, 1), visual)
        for name, own in zip(("image", *names), values, strict=True):
            column = getattr(table, name)
            own = own.to(column.dtype)
            setattr(table, name, column.flatten().index_copy(0, at, own).view_as(column))
        return table

    def with_newlines(self, keep: Tensor, lines: int, images: int) -> Tensor:
        """`keep` with separators kept where a cell of their line is: bool `[batch, rows]`.

        Args:
            keep: bool `[batch, rows]`.
            lines: more than the highest `line`.
            images: more than the highest `image`.
        """
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


def choose_rows(
    keep: Tensor, valid: Tensor, order: Tensor | None = None, count: int | None = None
) -> Tensor:
    """Rows that stay, as a rectangle: int64 `[batch, most kept in the batch]`.

    Samples that keep fewer rows are filled up, first with their padding rows and then with rows
    that were dropped; the caller masks these. Everything stays in sequence order, so padding
    stays on its side and keeping all rows changes nothing.

    Args:
        keep: bool `[batch, rows]`, valid rows that stay.
        valid: bool `[batch, rows]`.
        order: int64 `[batch, rows]`, another sequence order; must be distinct per sample.
        count: the most kept in the batch; None asks the device.
    """
    if count is None:
        count = int(keep.sum(1).max())
    rank = torch.where(keep, 2, torch.where(valid, 0, 1))
    rows = rank.argsort(dim=1, descending=True, stable=True)[:, :count]
    key = rows if order is None else order.gather(1, rows)
    return rows.gather(1, key.argsort(dim=1, stable=True))


def locate(rows: Tensor, among: Tensor, size: int) -> Tensor:
    """Where each of `rows` is in `among`: int64 `[batch, n]`; the first place if in several.

    Args:
        rows: int64 `[batch, n]`, 0 <= rows < size; each is somewhere in `among`.
        among: int64 `[batch, m]`.
        size: exclusive upper bound of both.
    """
    place = torch.arange(among.shape[1], device=among.device).expand_as(among)
    table = among.new_zeros(among.shape[0], size)
    return table.scatter_reduce(1, among, place, "amin", include_self=False).gather(1, rows)


def along(x: Tensor, at: Tensor, dim: int) -> Tensor:
    """`x` `[batch, ...]` with axis `dim` replaced by the chosen places, int64 `[batch, n]`."""
    dim %= x.dim()
    shape, view = list(x.shape), [1] * x.dim()
    shape[dim] = view[dim] = at.shape[1]
    view[0] = at.shape[0]
    return x.gather(dim, at.view(view).expand(shape))


def gather_rows(x: Tensor, rows: Tensor, dim: int = 1) -> Tensor:
    """`x` with its row axis `dim` (batch just before it) replaced by the chosen rows.

    Args:
        x: `[..., batch or 1, rows, ...]`.
        rows: int64 `[batch, kept]`.
        dim: the row axis of `x`.
    """
    return gather_parts(rows, [(x, dim)])[0]


def gather_parts(rows: Tensor, parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """The chosen rows of several tensors.

    Args:
        rows: int64 `[batch, kept]`.
        parts: tensors and their row axes, as in :func:`gather_rows`.
    """
    return kernels.run("compact", _gather_parts, rows, parts)


def _gather_parts(rows: Tensor, parts: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    return [_gather_rows(x, rows, dim) for x, dim in parts]


def _gather_rows(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    shape = list(x.shape)
    shape[dim - 1] = rows.shape[0]
    x = x.expand(shape)
    if dim == 1 and x.dim() > 2:  # whole rows at once, many times as fast as their elements
        return x.flatten(0, 1).index_select(0, _flat(rows, x.shape[1])).unflatten(0, rows.shape)
    shape[dim] = rows.shape[1]
    view = [1] * x.dim()
    view[dim - 1], view[dim] = rows.shape
    return x.gather(dim, rows.view(view).expand(shape))


def scatter_back(x: Tensor, rows: Tensor, length: int, real: Tensor | None = None) -> Tensor:
    """Rows back to where they came from, among zeros: `[batch, length, width]`.

    Args:
        x: `[batch, kept, width]`.
        rows: int64 `[batch, kept]` below `length`, distinct per sample.
        length: rows of the result.
        real: bool `[batch, kept]`; other rows of `x` become zeros. None is all.
    """
    return kernels.run("scatter_back", _scatter_back, x, rows, length, real)


def _scatter_back(x: Tensor, rows: Tensor, length: int, real: Tensor | None = None) -> Tensor:
    if real is not None:
        x = x.masked_fill(~real[..., None], 0)
    full = x.new_zeros(len(x) * length, x.shape[2])
    return full.index_copy_(0, _flat(rows, length), x.flatten(0, 1)).unflatten(0, (len(x), length))


def _flat(rows: Tensor, length: int) -> Tensor:
    """Rows of samples that stand behind each other, `length` of each: int64 `[batch * n]`."""
    return (rows + length * torch.arange(len(rows), device=rows.device)[:, None]).flatten()


def renumber(
    position: Tensor, keep: Tensor, valid: Tensor, order: Tensor | None = None
) -> Tensor:
    """Positions that run on without gaps over the kept rows: int64 `[batch, rows]`.

    Counting starts at the position of a sample's first valid row. Other rows keep theirs.

    Args:
        position: int64 `[batch, rows]`.
        keep: bool `[batch, rows]`, a subset of `valid`.
        valid: bool `[batch, rows]`.
        order: int64 `[batch, rows]` below the number of rows, sequence order, if it is not that
            of the columns.
    """
    if order is None:
        place = keep.long().cumsum(1) - 1
    else:
        last = order.shape[1]
        place = order.masked_fill(~keep, last).argsort(dim=1, stable=True).argsort(dim=1)
    first = valid.int().argmax(1, keepdim=True)
    return torch.where(keep, position.gather(1, first) + place, position)


def moved_left(position: Tensor, moved: Tensor, valid: Tensor) -> Tensor:
    """How far the last row of every sample has moved: int64 `[batch, 1]`.

    Args:
        position, moved: int64 `[batch, rows]`, before and after.
        valid: bool `[batch, rows]`.
    """
    last = valid.long().cumsum(1).argmax(1, keepdim=True)
    return (position - moved).gather(1, last)
