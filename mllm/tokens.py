"""The token table: for every row of the current forward, where it comes from. Pure torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


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
            row=place, col=place, size=torch.ones_like(place), logical=index + start, index=index,
        )

    @classmethod
    def prompt(
        cls, valid: Tensor, visual: Tensor, start: int, grids: list[list[tuple[int, int]]]
    ) -> TokenTable:
        """A table of a prompt with images laid out as plain grids, one after another.

        Args:
            valid: bool `[batch, rows]`.
            visual: bool `[batch, rows]`.
            start: logical index of the first row.
            grids: (rows, cols) of every image, per sample, in prompt order.
        """
        table = cls.text(valid, start)
        table.visual = visual
        for name in ("image", "tile", "frame", "row", "col"):
            setattr(table, name, getattr(table, name).clone())
        for b, sample in enumerate(grids):
            rows = visual[b].nonzero()[:, 0]
            at = 0
            for ordinal, (height, width) in enumerate(sample):
                here = rows[at : at + height * width]
                cell = torch.arange(height * width, device=rows.device)
                table.image[b, here] = ordinal
                table.tile[b, here] = 0
                table.frame[b, here] = 0
                table.row[b, here] = (cell // width).float()
                table.col[b, here] = (cell % width).float()
                at += height * width
        return table

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
