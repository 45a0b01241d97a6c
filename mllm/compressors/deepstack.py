"""DeepStack: finer views of a picture are added to its tokens, one in each of the first layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mllm.compressors.base import Inject, LayerContext, LayerMethod, Positions, Views, register
from mllm.errors import PlanError


@register("deepstack", paper="arXiv:2406.04334", stage="llm", reference_layers=32)
@dataclass
class DeepStack(LayerMethod):
    """Show finer views of pictures to the first layers, without a longer sequence (DeepStack-L).

    A picture is in the sequence as ever. Its tiles, which :func:`mllm.views.tiled` cuts, are read
    by the same tower and projector and put together to a map; the map is sampled with the grid's
    own stride, so that each of `rows * columns` samples has one token at the place of every token
    of the picture. One sample after another is added to the hidden states of these tokens, before
    the layers `start`, `start + interval` and so on. Nothing is learnt, though the paper tunes the
    model with it. All pictures of a call have tiles, or none; the paper chooses a grid for each.

    Args:
        grid: rows and columns of tiles.
        start: the first decoder layer; None is 1, or earlier where there are too few layers.
        interval: from one of these layers to the next.
        positions: `original` is all there is: tokens stay where they are.
    """

    grid: tuple[int, ...] = (2, 2)
    start: int | None = None
    interval: int = 1
    positions: Positions | None = None

    differentiable = True
    oracle = "reference"
    actions = ("Inject",)
    identity = {}  # without tiles

    def __post_init__(self) -> None:
        super().__post_init__()
        two = len(self.grid) == 2 and min(self.grid) >= 1
        self._demand("grid", two, "rows and columns of tiles: 2/2")
        self._demand("interval", self.interval >= 1, "a number from 1")
        self._demand("start", self.start is None or self.start >= 0, "a number from 0")
        self._demand("positions", self.positions != "compact", "original: nothing moves")

    def _demand(self, field: str, fine: bool, expected: str) -> None:
        if not fine:
            value = getattr(self, field)
            raise PlanError(
                f"{self.info.name}: {field}={value!r} is not {expected}",
                argument=field,
                given=value,
                expected=expected,
            )

    def at_depth(self, num_layers: int, first_cut: int = 0) -> DeepStack:
        reach = (self.grid[0] * self.grid[1] - 1) * self.interval
        last = num_layers - 1 - reach
        fits = f"within {num_layers} layers: it adds to one and every {self.interval} up to {reach}"
        start = max(0, min(1, last)) if self.start is None else self.start
        self._demand("grid" if self.start is None else "start", start <= last, f"{fits} behind it")
        return self.replace(start=start)

    def at(self) -> Sequence[int]:
        return (self.start or 0,)

    def reads(self):
        return {"views": Views(tuple(self.grid))}

    def act(self, ctx: LayerContext) -> list[Any]:
        views = ctx["views"]
        if views is None:
            return []
        layers = range(ctx.layer, ctx.num_layers, self.interval)
        return [
            Inject(layer, ctx.visual, view)
            for layer, view in zip(layers, views.unbind(2), strict=False)
        ]
