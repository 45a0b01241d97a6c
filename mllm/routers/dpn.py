"""DPN: behind some layers the grid of visual hidden states is pooled, as much as a router says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.compressors.base import (
    Grid,
    Hidden,
    Insert,
    Keep,
    LayerContext,
    LayerMethod,
    LayerSchedule,
    Merge,
    Positions,
    Write,
    merge_rows,
    register,
)
from mllm.errors import PlanError
from mllm.routers import stats
from mllm.routers.base import Score
from mllm.routers.depth import DepthRouter
from mllm.tokens import TokenTable

#: More rows or columns than a grid has.
SIDE = 1 << 16


class PoolRouter(nn.Module):
    """Chooses among pools from one vector per sample, in fp32.

    Args:
        width: of the vector.
        pools: to choose from.
        inner: width of the layer in between; 0 is one linear layer alone.
    """

    def __init__(self, width: int, pools: int, inner: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width)) if inner else None
        self.shift = nn.Parameter(torch.zeros(width)) if inner else None
        self.inner = Score(width, inner, bias=False, std=(3 * width) ** -0.5) if inner else None
        last = inner or width
        self.outer = Score(last, pools, bias=False, std=(3 * last) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Logits, fp32 `[..., pools]`, of `[..., width]`."""
        if self.inner is None:
            return self.outer(x)
        scale, shift = (p.to(x.device, torch.float32) for p in (self.scale, self.shift))
        with torch.autocast(x.device.type, enabled=False):
            x = F.layer_norm(x.float(), x.shape[-1:], scale, shift)
            return self.outer(F.gelu(self.inner(x)))


class Token(nn.Module):
    """The learnt vector of a token that no vocabulary has.

    Args:
        width: of hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, width) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """The vector `[1, width]`, in the kind of `x`."""
        return self.weight.to(x)


@register("dpn", paper="arXiv:2503.20322", stage="llm", reference_layers=32, trained=True)
@dataclass
class DPN(LayerMethod):
    """Pool the grid of visual hidden states behind some layers, each sample as it needs (DPN).

    At each of `layers` a router chooses one of `pools` for a sample, by what `query` says of
    picture and question: the likeliest at inference, a drawn one in training. Every cell of the
    grid becomes one token, which stands where the middle of its cell stood; at the edge of a grid
    cells may be smaller. A hinge loss pushes the router towards coarser pools.

    Args:
        pools: height and width of cells, the finest first.
        pool: `max` or `avg` of a cell's tokens.
        choice: by layer, the pool that all samples get instead of the router's; None asks the
            router.
        query: what the router reads: the `last` token of the prompt; the mean of the `text` behind
            the first picture; or a learnt `router` token, inserted behind the prompt, which the
            authors put into the vocabulary and into every turn of the user.
        router: `mlp`, or the authors' later `linear` layer.
        weight: `straight` pools with the weight 1 in value and the probability in gradient. Under
            `probability` what was pooled is multiplied by it, 1 x 1 cells too, as in the authors'
            code, whose models have learnt to live with it.
        temperature: the router's logits are divided by it.
        least: the router may not choose a pool that leaves fewer visual tokens of a sample.
        target: of the mean, over samples, of the likeliest pool's index times its probability.
        auxiliary: coefficient of the loss, averaged over layers.
        layers: before which to pool; None is behind 7, 15 and 23 of 32.
        positions: `compact` (the authors') or `original` (the middle of the cell).
    """

    pools: tuple[str, ...] = ("1x1", "1x2", "2x2")
    pool: Literal["max", "avg"] = "max"
    choice: tuple[int, ...] | None = None
    query: Literal["last", "text", "router"] = "last"
    router: Literal["mlp", "linear"] = "mlp"
    weight: Literal["straight", "probability"] = "straight"
    temperature: float = 10.0
    least: int = 18
    target: float = 1.5
    auxiliary: float = 0.001
    layers: tuple[int, ...] | None = None
    positions: Positions | None = None

    differentiable = True
    paper_positions = "compact"
    oracle = "rebuild"
    actions = ("Keep", "Merge", "Write")
    identity = {"choice": (0, 0, 0)}
    paper_layers: ClassVar[tuple[int, ...]] = (8, 16, 24)

    demand = DepthRouter.demand
    scaled = LayerSchedule.scaled

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("pools", bool(self.pools) and all(map(_is_cell, self.pools)),
                    "heights and widths of cells: 1x1/1x2/2x2")  # fmt: skip
        self.sizes = [tuple(int(n) for n in text.split("x")) for text in self.pools]
        layers = self.paper_layers if self.layers is None else self.layers
        self.demand("layers", bool(layers) and list(layers) == sorted(set(layers)),
                    "different layers in order")  # fmt: skip
        if self.choice is not None:
            fine = len(self.choice) == len(layers) and all(c < len(self.pools) for c in self.choice)
            self.demand("choice", fine and min(self.choice) >= 0,
                        f"one of the {len(self.pools)} pools, from 0, for each of {len(layers)} "
                        "layers")  # fmt: skip
        for name in ("target", "auxiliary"):
            self.demand(name, getattr(self, name) >= 0, "a number from 0")
        self.demand("temperature", self.temperature > 0, "over 0")
        self.demand("least", self.least >= 1, "a number from 1")
        self._first = 0
        if self.query == "router":
            self.actions = (*type(self).actions, "Insert")

    def at_depth(self, num_layers: int, first_cut: int = 0) -> DPN:
        inserts = self.query == "router"
        placed = LayerSchedule.at_depth(self, num_layers, first_cut + inserts).replace()
        placed._first = first_cut
        if inserts and placed.layers[0] <= first_cut:
            raise PlanError(
                f"dpn: the router's token is inserted before layer {first_cut} and has to be read "
                "behind it",
                argument="layers",
                given=placed.layers,
                expected=f"layers from {first_cut + 1}",
            )
        return placed

    def at(self) -> Sequence[int]:
        return ((self._first,) if self.query == "router" else ()) + (self.layers or ())

    def reads(self):
        return {"hidden": Hidden(), "table": Grid()}

    def parts(self, width: int, heads: int) -> dict[str, nn.Module]:
        inner = width // 4 if self.router == "mlp" else 0
        found: dict[str, nn.Module] = {
            str(layer): PoolRouter(width, len(self.pools), inner) for layer in self.layers
        }
        return found | ({"token": Token(width)} if self.query == "router" else {})

    def act(self, ctx: LayerContext) -> list[Any]:
        x, table = ctx["hidden"], ctx["table"]
        if ctx.layer not in self.layers:
            there = ctx.visual.any(1)
            return [Insert(ctx.route("token", x), torch.where(there, _last(ctx.prompt), -1))]
        logits = ctx.route(str(ctx.layer), self._query(ctx, x, table))
        ctx.book(self._cost(x.shape[2]))
        p = (logits / self.temperature).softmax(-1)
        sizes = torch.tensor(self.sizes, device=x.device)
        stride = ctx.state.get("stride", torch.ones_like(ctx.images)[:, None].expand(-1, 2))
        seats = torch.stack([_seats(table, ctx.visual, stride, size) for size in self.sizes], 1)
        place = torch.arange(x.shape[1], device=x.device)
        left = ((seats == place) & ctx.visual[:, None]).sum(2)
        fine = (left >= self.least) | (left == ctx.visual.sum(1, keepdim=True))
        some = fine.any(1)
        if self.choice is not None:
            chosen = torch.full_like(ctx.images, self.choice[self.layers.index(ctx.layer)])
            some = torch.ones_like(some)
        elif ctx.learns:
            drawn = p.detach().masked_fill(~fine, 0).where(some[:, None], p.detach())
            chosen = drawn.multinomial(1)[:, 0]
        else:
            chosen = p.masked_fill(~fine, -1).argmax(1)
        pick = chosen[:, None]
        ctx.state["stride"] = stride * torch.where(some[:, None], sizes[chosen], 1)
        into = seats.gather(1, pick[..., None].expand(-1, -1, len(place)))[:, 0]
        into = torch.where(some[:, None] & ctx.visual, into, place)
        stays = ctx.visual & (into == place)
        own = p.gather(1, pick)
        self._penalise(ctx, p)
        ctx.note(**stats.depth_sums(own.expand_as(into), stays, ctx.visual))
        return [
            Keep(stays), Merge(into), Write(self._weighted(ctx, self._pooled(x, into, stays), own))
        ]  # fmt: skip

    def _cost(self, width: int) -> float:
        """FLOPs of a router."""
        pools, inner = len(self.pools), width // 4
        return 2.0 * (inner * (width + pools) if self.router == "mlp" else width * pools)

    def _query(self, ctx: LayerContext, x: Tensor, table: TokenTable) -> Tensor:
        """What the router reads: `[batch, width]`."""
        if self.query == "last":
            return x.gather(1, _last(ctx.prompt)[:, None, None].expand(-1, -1, x.shape[2]))[:, 0]
        if self.query == "router":
            rows = table.inserted & table.valid
        else:
            rows = ctx.text & (ctx.visual.long().cumsum(1) > 0)
        return (x.float() * rows[..., None]).sum(1) / rows.sum(1, keepdim=True).clamp(min=1)

    def _pooled(self, x: Tensor, into: Tensor, stays: Tensor) -> Tensor:
        if self.pool == "avg":
            return torch.where(stays[..., None], merge_rows(x, into), x)
        return x.scatter_reduce(1, into[..., None].expand_as(x), x, "amax")

    def _weighted(self, ctx: LayerContext, x: Tensor, own: Tensor) -> Tensor:
        if self.weight == "probability":
            return (x.float() * own[..., None]).to(x.dtype)
        if not ctx.learns:
            return x
        # The probability minus itself: nothing is rounded, and the router learns.
        return x + ((own - own.detach())[..., None] * x.float()).to(x.dtype)

    def _penalise(self, ctx: LayerContext, p: Tensor) -> None:
        there = ctx.visual.any(1)
        best, index = p.max(1)
        reached = (best * index).masked_fill(~there, 0).sum() / there.sum().clamp(min=1)
        ctx.penalise("pools", F.relu(self.target - reached) / len(self.layers), self.auxiliary)


def _is_cell(text: str) -> bool:
    sides = text.split("x")
    return len(sides) == 2 and all(side.isdecimal() and int(side) > 0 for side in sides)


def _last(rows: Tensor) -> Tensor:
    """The last true row of each sample, or row 0: int64 `[batch]`."""
    return rows.long().cumsum(1).argmax(1)


def _seats(table: TokenTable, visual: Tensor, stride: Tensor, size: tuple[int, int]) -> Tensor:
    """The row that stays of every visual row's cell: int64 `[batch, rows]`.

    It is the middle of the cell, or what of the cell's upper left quarter comes last; without any
    of that, the first.

    Args:
        table: the rows.
        visual: bool `[batch, rows]`, rows to pool.
        stride: int64 `[batch, 2]`, rows and columns of the picture's own grid that one of the grid
            as it is now stands for.
        size: rows and columns of a cell.
    """
    place = torch.arange(visual.shape[1], device=visual.device).expand_as(visual)
    grid = torch.stack([table.image, table.tile, table.frame])
    grid = (grid.diff(dim=2, prepend=grid[..., :1]) != 0).any(0).long().cumsum(1)
    early, key = visual, grid
    for axis, at in enumerate((table.row, table.col)):
        now = at.long().clamp(min=0) // stride[:, axis : axis + 1]
        early = early & (now % size[axis] <= size[axis] // 2)
        key = key * SIDE + now // size[axis]
    order = key.masked_fill(~visual, -1).argsort(dim=1, stable=True)
    ranked = key.masked_fill(~visual, -1).gather(1, order)
    number = (ranked.diff(dim=1, prepend=ranked[:, :1]) != 0).long().cumsum(1)
    cell = torch.empty_like(number).scatter(1, order, number)
    # Of early ones the last, of others the first.
    rank = torch.where(early, place, -1 - place)
    best = rank.new_full(rank.shape, -(SIDE**2)).scatter_reduce(1, cell, rank, "amax")
    best = best.gather(1, cell)
    return torch.where(best < 0, -1 - best, best)
