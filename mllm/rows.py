"""The rows that decoder layers are given: some leave at a stage, new ones may come."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mllm.tokens import TokenTable, choose_rows, gather_parts, gather_rows, locate


@dataclass(frozen=True)
class Rows:
    """Rows of a forward as the layers of one stage see them.

    Attributes:
        table: what each is.
        lengths, seen: how many each sample has, and how many of them are visual; no padding.
        place: int64 `[1 or 3, batch, rows]`, what keys are rotated by; None as long as nobody asks.
        position: their position ids; None are those that the decoder was given.
        source: int64 `[batch, rows]`, where they are among the rows that the decoder's own masks
            and rotary tables have; None is the same rows.
        inserted: whether some have no source among the tokens.
    """

    table: TokenTable
    lengths: list[int]
    seen: list[int]
    place: Tensor | None = None
    position: Tensor | None = None
    source: Tensor | None = None
    inserted: bool = False

    @property
    def padded(self) -> bool:
        """Whether any row is padding."""
        return min(self.lengths) < self.table.valid.shape[1]

    def counted(self, keep: Tensor, seen: list[int] | None) -> tuple[list[int], list[int]]:
        """`lengths` and `seen` of the rows that stay; without `seen`, asks the device."""
        texts = [n - v for n, v in zip(self.lengths, self.seen, strict=True)]
        if seen is None:
            seen = [n - t for n, t in zip(keep.sum(1).tolist(), texts, strict=True)]
        return [t + v for t, v in zip(texts, seen, strict=True)], seen

    def staying(
        self, keep: Tensor, lengths: list[int], seen: list[int], order: Tensor | None = None
    ) -> tuple[Rows, Tensor]:
        """The rows that stay, without positions, and which they were: int64 `[batch, n]`.

        Args:
            keep: bool `[batch, rows]`.
            lengths, seen: of the rows that stay.
            order: int64 `[batch, rows]`, in which they stand, if it is not theirs.
        """
        # At least one row, if only to fill the rectangle.
        index = choose_rows(keep, self.table.valid, order, max(1, *lengths))
        table = self.table.take(index, keep.gather(1, index))
        return Rows(table, lengths, seen, source=self._source(index), inserted=self.inserted), index

    def leave(
        self, keep: Tensor, seen: list[int] | None, hidden: Tensor
    ) -> tuple[Rows, Tensor, Tensor]:
        """The rows that stay, their hidden states `[batch, n, width]`, and which they were.

        Args:
            keep: bool `[batch, rows]`.
            seen: visual ones that stay; None asks the device.
            hidden: `[batch, rows, width]`.
        """
        rows, index = self.staying(keep, *self.counted(keep, seen))
        parts = [(hidden, 1), (self.place, 2)]
        if self.position is not None:
            parts.append((self.position, self.position.dim() - 1))
        hidden, place, *position = gather_parts(index, parts)
        rows = replace(rows, place=place, position=position[0] if position else None)
        return rows, hidden, index

    def only(self, index: Tensor, valid: Tensor) -> Rows:
        """Some of the rows, `[batch, n]`; those that are not `valid` are padding."""
        position = self.position
        if position is not None:
            position = gather_rows(position, index, dim=position.dim() - 1)
        lengths, place = valid.sum(1).tolist(), gather_rows(self.place, index, dim=2)
        return replace(
            self, table=self.table.take(index, valid), lengths=lengths, place=place,
            position=position, source=self._source(index),
        )  # fmt: skip

    def insert(self, before: Rows, after: Tensor, length: int) -> tuple[Rows, Tensor]:
        """These rows and new ones: text without a token, at the position of what they follow.

        Args:
            before: the rows among which `after` names some, of which these are left.
            after: int64 `[batch, n]`, what each new row stands behind; -1 is nothing.
            length: rows of the forward's own input.

        Returns:
            The rows, and their order among these and the new ones: int64 `[batch, rows + n]`.
        """
        there, at = after >= 0, after.clamp(min=0)
        new = before.table.take(at, there & before.table.valid.gather(1, at))
        no, none = torch.zeros_like(new.valid), torch.full_like(new.image, -1)
        new = replace(
            new, visual=no, newline=no, inserted=~no, image=none, tile=none, frame=none,
            line=none, row=none.float(), col=none.float(), size=torch.zeros_like(new.size),
        )  # fmt: skip
        # Both are ordered by the rows that the action saw; what is new comes behind.
        stands = locate(self.table.index, before.table.index, length)
        order = torch.cat([stands, after], 1).argsort(dim=1, stable=True)

        def joined(own: Tensor, more: Tensor, dim: int = 1) -> Tensor:
            return gather_rows(torch.cat([own, more], dim), order, dim=dim)

        columns = (column.name for column in dataclasses.fields(TokenTable))
        table = TokenTable(**{n: joined(getattr(self.table, n), getattr(new, n)) for n in columns})
        position = self.position
        if position is not None:
            dim = position.dim() - 1
            position = joined(position, gather_rows(before.position, at, dim=dim), dim)
        rows = Rows(
            table,
            table.valid.sum(1).tolist(),
            self.seen,
            place=joined(self.place, gather_rows(before.place, at, dim=2), 2),
            position=position,
            source=joined(self.source, before._source(at)),
            inserted=True,
        )
        return rows, order

    def _source(self, index: Tensor) -> Tensor:
        return index if self.source is None else self.source.gather(1, index)
