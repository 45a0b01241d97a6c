"""Pooling: every grid of an image becomes coarser ones; nothing is chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import (
    Budget,
    Context,
    Features,
    Grid,
    Keep,
    Merge,
    Positions,
    TokenReducer,
    Write,
    register,
    remembered,
    resolve,
)
from mllm.compressors.sanity import grid_within
from mllm.errors import PlanError

Size = tuple[int, int, int]  # frames, rows, cols
TINY = torch.finfo(torch.float64).tiny


class Stack(NamedTuple):
    """Neighbouring tokens that are one grid, or the frames of a video."""

    start: int
    size: Size

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1] * self.size[2]


@lru_cache(maxsize=256)
def stacks(grid) -> list[Stack]:
    """The grids of an image: its views under anyres, or all frames of a video as one."""
    found, start = [], 0
    for tile in range(int(grid.tile.max()) + 1):
        own = grid.tile == tile
        size = tuple(int(x[own].max()) + 1 for x in (grid.frame, grid.row, grid.col))
        found.append(Stack(start, size))
        start += found[-1].tokens
    return found


def shares(budget: int, parts: Sequence[int]) -> list[int]:
    """A budget over parts by their size: rounded down, the rest by largest remainder."""
    total = sum(parts)
    given = [budget * n // total for n in parts]
    order = sorted(range(len(parts)), key=lambda i: -(budget * parts[i] % total))
    for i in order[: budget - sum(given)]:
        given[i] += 1
    return given


@remembered
def seats(size: Size, levels: tuple[Size, ...]) -> tuple[Tensor, Tensor]:
    """Tokens that pooled ones stand at, and where each token goes.

    A pooled token stands in the middle of its cell, or, where one of a level before stands there,
    at the nearest token that is free.

    Returns:
        int64 `[pooled]` and int64 `[tokens]`: the seat in the first level, -1 without levels.
    """
    frames, rows, cols = size
    places = torch.cartesian_prod(*(torch.arange(n) for n in size))
    free, taken = torch.ones(len(places), dtype=torch.bool), []
    for level in levels:
        middle = [
            ((torch.arange(m) + 0.5) * n / m).long() for n, m in zip(size, level, strict=True)
        ]
        for place in torch.cartesian_prod(*middle):
            seat = int((place[0] * rows + place[1]) * cols + place[2])
            if not free[seat]:
                distance = (places - place).square().sum(1).masked_fill(~free, len(places) ** 2)
                seat = int(distance.argmin())
            free[seat] = False
            taken.append(seat)
    into = torch.full((len(places),), -1)
    if levels:
        of, m = torch.tensor(taken), levels[0]
        cell = places * torch.tensor(m) // torch.tensor(size)
        into = of[(cell[:, 0] * m[1] + cell[:, 1]) * m[2] + cell[:, 2]]
        into[of] = of
    return torch.tensor(taken, dtype=torch.long), into


class Pooling(TokenReducer):
    """Pools every grid; a subclass says to which sizes.

    A pooled token has the row and the position of the middle of its cell. Separators stay behind
    the rows that these are in.
    """

    first = True
    actions = ("Keep", "Merge", "Write")
    oracle = "rebuild"

    def reads(self):
        return {"features": Features(), "grid": Grid()}

    def levels(self, grids: list[Stack]) -> list[list[Size]]:
        """Sizes that each grid is pooled to, in the order of the sequence; no more than it has."""
        raise NotImplementedError

    def mean(self, x: Tensor, size: Size) -> Tensor:
        """`[images, width, frames, rows, cols]` at another size."""
        return F.adaptive_avg_pool3d(x, size)

    def source(self, ctx: Context) -> Tensor:
        """What is pooled: `[images, tokens, width]`."""
        return ctx["features"]

    def made(self, ctx: Context, x: Tensor, size: Size) -> Tensor:
        """The tokens of one level, in order: `[images, pooled, width]`.

        Args:
            ctx: the context.
            x: `[images, width, frames, rows, cols]`, one grid.
            size: of the level.
        """
        return self.mean(x.float(), size).flatten(2).transpose(1, 2).to(x)

    def reduce(self, ctx: Context) -> list:
        x, grids = self.source(ctx), stacks(ctx["grid"])
        at, into, made = [], [], []
        for grid, levels in zip(grids, self.levels(grids), strict=True):
            own = x[:, grid.start : grid.start + grid.tokens]
            own = own.transpose(1, 2).unflatten(2, grid.size)
            made += [self.made(ctx, own, size) for size in levels]
            seat, goes = seats(grid.size, tuple(levels))
            at.append(seat + grid.start)
            into.append(torch.where(goes < 0, -1, goes + grid.start))
        return placed(ctx, torch.cat(at), torch.cat(into), torch.cat(made, 1))


def placed(ctx: Context, seat: Tensor, into: Tensor, made: Tensor) -> list:
    """Actions that put new tokens in the seats of old ones.

    Args:
        ctx: the context.
        seat: int64 `[new]`, on the CPU: tokens at which the new ones stand, in their order.
        into: int64 `[tokens]`, on the CPU: the seat that each token goes to, or -1.
        made: `[images, new, width]`.
    """
    images, tokens = ctx.valid.shape
    place = torch.zeros(tokens, dtype=torch.long)
    place[seat] = torch.arange(len(seat))
    seat, into, place = (t.to(made.device, non_blocking=True) for t in (seat, into, place))
    values = made.new_zeros(images, tokens, made.shape[2]).index_copy(1, seat, made)
    return [
        Keep(torch.zeros_like(ctx.valid).index_fill(1, seat, True), [len(seat)] * images),
        Merge(into.expand(images, -1)),
        Write(values, order=place.expand(images, -1)),
    ]


class PoolingWithin(Pooling):
    """Pools every grid once, to the largest size of its shape within its share of `keep`."""

    def levels(self, grids: list[Stack]) -> list[list[Size]]:
        budget = resolve(self.keep, sum(g.tokens for g in grids))
        found = []
        for n, g in zip(shares(budget, [g.tokens for g in grids]), grids, strict=True):
            frames = min(g.size[0], n)
            small = grid_within(n // frames, g.size[1:]) if n else ()
            found.append([(frames, *small)] if n else [])
        return found


def _fit(size: Sequence[int], grid: Size) -> Size:
    return tuple(min(pair) for pair in zip(size, grid, strict=True))


@register("adaptivepool", stage="pre_llm")
@dataclass
class AdaptivePool(Pooling):
    """Average-pool every grid to a fixed number of rows and columns.

    Args:
        grid: rows and columns; no more than the picture has. Each view of a tiled picture, and
            each frame of a video, is pooled to it.
        positions: `compact` or `original` (the cell's middle token); None is `compact`.
    """

    grid: tuple[int, ...] = (12, 12)
    positions: Positions | None = None

    identity = {"grid": (1024, 1024)}

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self, "grid", self.grid, 2)

    def levels(self, grids: list[Stack]) -> list[list[Size]]:
        return [[_fit((g.size[0], *self.grid), g.size)] for g in grids]


@register("pyramid", stage="pre_llm")
@dataclass
class Pyramid(Pooling):
    """Average-pool every grid to several sizes at once, a spatial pyramid.

    The picture is in the sequence once for each level, the finest first: 12 x 12, 6 x 6, 3 x 3 and
    the whole are 190 tokens of 576. A frame of a video has its own pyramid.

    Args:
        keep: visual tokens per image; the finest level is the largest of the picture's shape with
            which all levels are within it.
        count: levels; each has half the rows and columns of the one before, up to the whole.
        grids: instead of `keep` and `count`, the sizes themselves: `12/6/3/1`, `12x8/6x4`.
        positions: `compact` or `original` (the cell's middle token, or a free one near it); None
            is `compact`. The levels of a tiled picture stay where their seats are.
    """

    keep: Budget = 0.333
    count: int = 4
    grids: tuple[str, ...] | None = None
    positions: Positions | None = None

    identity = {"keep": 1.0, "count": 1}

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self, "count", (self.count,), 1)
        for text in self.grids or ():
            sides = text.split("x")
            if len(sides) > 2 or not all(s.isdecimal() and int(s) for s in sides):
                raise PlanError(
                    f"pyramid: {text!r} is not a grid",
                    argument="grids",
                    given="/".join(self.grids),
                    expected="12/6/3/1, or rows x columns: 12x8/6x4",
                )

    def levels(self, grids: list[Stack]) -> list[list[Size]]:
        if self.grids is None:
            budget = resolve(self.keep, sum(g.tokens for g in grids))
            parts = shares(budget, [g.tokens for g in grids])
            return [self._within(n, g.size) for n, g in zip(parts, grids, strict=True)]
        found = []
        for g in grids:
            sides = [[int(s) for s in text.split("x")] for text in self.grids]
            sizes = [_fit((g.size[0], side[0], side[-1]), g.size) for side in sides]
            if sum(f * r * c for f, r, c in sizes) > g.tokens:
                raise PlanError(
                    f"pyramid: {'/'.join(self.grids)} are more than {g.tokens} tokens",
                    argument="grids",
                    given="/".join(self.grids),
                    expected="fewer or smaller grids",
                )
            found.append(sizes)
        return found

    def _within(self, budget: int, size: Size) -> list[Size]:
        """The levels under a finest one that fits."""
        frames, rows, cols = size
        for cells in range(budget // frames, 0, -1):
            finest = grid_within(cells, (rows, cols))
            levels = [tuple(max(1, n >> i) for n in finest) for i in range(self.count)]
            levels = list(dict.fromkeys(levels))  # the whole once
            if frames * sum(r * c for r, c in levels) <= budget:
                return [(frames, *level) for level in levels]
        return [(budget, 1, 1)] if budget else []  # less than a token for each frame


@register("ggem", paper="arXiv:2212.04114", stage="pre_llm")
@dataclass
class GGeM(PoolingWithin):
    """Pool the grid by generalised means, one exponent for each group of channels (GGeM).

    A cell becomes ``mean(x ** p) ** (1 / p)``: the average at p = 1, towards the maximum as p
    grows. In the paper p is learnt and the features are positive; here p is given, and the power
    is odd, ``sign(x) |x| ** p``, since projected features have both signs.

    Args:
        keep: visual tokens per image; the largest grid of the picture's shape within it.
        p: exponents, each for an equal part of the channels.
        positions: `compact` or `original` (the cell's middle token); None is `compact`.
    """

    keep: Budget = 0.25
    p: tuple[float, ...] = (3.0,)
    positions: Positions | None = None

    identity = {"keep": 1.0, "p": (1.0,)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(p > 0 for p in self.p):
            raise PlanError(
                f"ggem: p={self.p} must be positive", argument="p", given=self.p, expected="p > 0"
            )

    def mean(self, x: Tensor, size: Size) -> Tensor:
        group = torch.arange(x.shape[1], device=x.device) * len(self.p) // x.shape[1]
        p = torch.tensor(self.p).to(x.device, non_blocking=True)[group].view(-1, 1, 1, 1)
        # In fp64, where powers neither overflow nor vanish.
        x = F.adaptive_avg_pool3d(x.sign() * x.abs().double().pow(p), size)
        return (x.sign() * x.abs().clamp(min=TINY).pow(1 / p)).float()


@register("pllava", paper="arXiv:2404.16994", stage="pre_llm")
@dataclass
class PLLaVA(Pooling):
    """Average-pool a video over time and space at once (PLLaVA).

    The operator alone: the released model is tuned with it, and its LoRA scaled down at
    inference. Where there are fewer frames than asked for, the authors repeat them; here they
    stay as they are. A picture is one frame.

    Args:
        frames: frames of a video after pooling.
        grid: rows and columns of a frame.
        positions: `compact` or `original` (the cell's middle token); None is `compact`.
    """

    frames: int = 16
    grid: tuple[int, ...] = (12, 12)
    positions: Positions | None = None

    identity = {"frames": 1024, "grid": (1024, 1024)}

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sizes(self, "frames", (self.frames,), 1)
        _check_sizes(self, "grid", self.grid, 2)

    def levels(self, grids: list[Stack]) -> list[list[Size]]:
        return [[_fit((self.frames, *self.grid), g.size)] for g in grids]

    def reduce(self, ctx: Context) -> list:
        if all(grid.size[0] == 1 for grid in stacks(ctx["grid"])):
            ctx.remark("one frame, pooled in space alone")
        return super().reduce(ctx)


def _check_sizes(stage: Pooling, field: str, sizes: Sequence[int], count: int) -> None:
    if len(sizes) != count or min(sizes) < 1:
        raise PlanError(
            f"{stage.info.name}: {field}={sizes} is not {count} numbers from 1",
            argument=field,
            given="/".join(map(str, sizes)),
            expected="/".join(["12"] * count),
        )
