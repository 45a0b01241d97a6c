"""Where the visual tokens that the pre-LLM stages speak of stand among a forward's rows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm.ledger import Reduction
from mllm.signals import Beside
from mllm.tokens import Counts, Layout, TokenTable, on_device, places_of, split_images


@dataclass(frozen=True)
class Seats:
    """The pictures of a batch of prompts, in prompt order.

    Attributes:
        reduction: what the pre-LLM stages decided, of images and videos together.
        images: per sample, its pictures in `reduction`.
        at: int64 `[visual rows]`, the placeholders, counted over the whole batch.
    """

    reduction: Reduction
    images: list[list[int]]
    at: Tensor

    @classmethod
    def of(
        cls, marks: dict[str, Tensor], visual: Tensor, reductions: dict[str, Reduction],
        counts: Counts,
    ) -> Seats:  # fmt: skip
        """Find the pictures.

        Args:
            marks: placeholders by kind, bool `[batch, rows]`.
            visual: of any kind, on the device of the rows.
            reductions: by kind.
            counts: of the placeholders.
        """
        parts = [reductions[kind] for kind in marks]
        if len(parts) == 1:
            reduction, images = parts[0], split_images(counts.visual, parts[0].sizes)
        else:
            reduction, images = Reduction.join(parts), _both(marks, parts, counts)
        return cls(reduction, images, places_of(visual, sum(counts.visual)))

    @property
    def layouts(self) -> list[list[Layout]]:
        """Of the pictures of each sample."""
        return [[self.reduction.layouts[i] for i in own] for own in self.images]

    @property
    def spaced(self) -> bool:
        """Whether pictures have separators."""
        return any(layout.newline != "none" for layout in self.reduction.layouts)

    def with_newlines(self, table: TokenTable, keep: Tensor) -> Tensor:
        """Rows that stay, without the separators of lines of which nothing does."""
        if not self.spaced:
            return keep
        lines = max(layout.lines for layout in self.reduction.layouts)
        return table.with_newlines(keep, lines, max(map(len, self.images)))

    def spread(self, values: Tensor, rows: Tensor) -> Tensor:
        """What visual tokens have, over all rows.

        Args:
            values: `[tokens, ...]`, of the reduction.
            rows: `[batch, rows]`, for its shape.

        Returns:
            `[batch, rows, ...]`, zero elsewhere.
        """
        spread = values.new_zeros(*rows.shape, *values.shape[1:])
        return spread.flatten(0, 1).index_copy(0, self.at, values[self._tokens()]).view_as(spread)

    def unreduced(self) -> Beside:
        """The visual tokens of each sample as they were before any stage."""
        parts = self.reduction.features.split(self.reduction.sizes)
        none = self.reduction.features[:0]
        own = [torch.cat([none, *(parts[i] for i in images)]) for images in self.images]
        counts = on_device(torch.tensor([len(x) for x in own]), none)
        embeds = nn.utils.rnn.pad_sequence(own, batch_first=True)
        place = torch.arange(embeds.shape[1], device=none.device)
        return Beside(embeds, place < counts[:, None])

    def kept(self, table: TokenTable) -> tuple[Tensor, Tensor | None]:
        """Rows that stay, and their order if it is not the grid's: `[batch, rows]` each.

        Args:
            table: of the rows as the caller gave them.
        """
        reduction, token = self.reduction, self._tokens()
        keep = ~table.visual
        keep = keep.flatten().index_copy(0, self.at, reduction.keep[token]).view_as(keep)
        order = None
        if reduction.order is not None:
            sizes = [reduction.sizes[i] for own in self.images for i in own]
            starts = itertools.accumulate(sizes, initial=0)
            order = table.index.flatten()
            # Per visual row, the first row of its image.
            first = torch.cat([torch.full((n,), at) for n, at in zip(sizes, starts, strict=False)])
            place = order[self.at[on_device(first, keep)]] + reduction.order[token]
            order = order.index_copy(0, self.at, place).view_as(table.index)
        return keep & table.valid, order

    def _tokens(self) -> Tensor:
        """The visual token, in the reduction, of every visual row: int64 `[visual rows]`."""
        starts, sizes = self.reduction.starts, self.reduction.sizes
        images = [i for own in self.images for i in own]
        tokens = [torch.arange(sizes[i]) + starts[i] for i in images]
        return on_device(torch.cat(tokens), self.reduction.keep)


def _both(
    marks: dict[str, Tensor], parts: list[Reduction], counts: Counts
) -> list[list[int]]:
    """Images and videos of every sample, in prompt order, as ordinals among both."""
    found: list[list[tuple[int, int]]] = [[] for _ in counts.visual]
    first = 0
    for (kind, visual), part in zip(marks.items(), parts, strict=True):
        own = split_images(counts.marked[kind], part.sizes)
        for b, images in enumerate(own):
            rows = visual[b].nonzero()[:, 0].tolist()
            for i in images:
                found[b].append((rows[0], first + i))
                rows = rows[part.sizes[i] :]
        first += len(part.sizes)
    return [[image for _, image in sorted(sample)] for sample in found]
