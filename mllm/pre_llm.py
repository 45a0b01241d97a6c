"""Pre-LLM stages: what happens to visual tokens on their way from pixels to the decoder."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.ask import precisely
from mllm.compressors.base import (
    Context,
    Features,
    Grid,
    Keep,
    Merge,
    Pool,
    Protect,
    Resize,
    TokenReducer,
    Unprojected,
    Write,
)
from mllm.compressors.elastic import linear_flops
from mllm.errors import DataError, PlanError
from mllm.ledger import Reduction
from mllm.routers.base import NAME, active
from mllm.tokens import Layout, choose_rows, gather_rows, on_device, places_of, scatter_back
from mllm.tower import TowerRun
from mllm.vision_signals import Group, Prompts, VisionSignals

if TYPE_CHECKING:
    from mllm.models.base import Family
    from mllm.patcher import Patched


class VisionRun:
    """One call of get_image_features: runs the pre-LLM stages on its images.

    Tokens of all images lie flat, image after image; a stage sees `[images, cells]` per group of
    equal images.
    """

    def __init__(
        self,
        patched: Patched,
        family: Family,
        inputs: Mapping[str, Any],
        layouts: list[Layout] | None = None,
        prompts: Prompts | None = None,
        stages: Mapping[int, TokenReducer] | None = None,
    ) -> None:
        self.patched, self.family, self.inputs = patched, family, inputs
        self.stages = stages or {}  # by number, in training
        pixels = inputs[family.pixels]
        if layouts is None:
            family.check(inputs)
            layouts = family.layouts(inputs)
        full = [self.family.vision_flops(x, x.cells) for x in layouts]
        projected = [0 if patched.replaces else x.cells for x in layouts]
        own = [
            self.family.vision_flops(x, n) for x, n in zip(layouts, projected, strict=True)
        ]
        into = on_device(torch.cat([torch.arange(x.tokens) for x in layouts]), pixels)
        self.reduction = Reduction(
            layouts=layouts,
            keep=torch.ones_like(into, dtype=torch.bool),
            into=into,
            vision_flops=own,
            projected=projected,
            baseline_vision_flops=full,
            selection_flops=[0.0] * len(layouts),
            counts=[x.cells for x in layouts],
        )
        if any(s.site in ("decoder", "cache") and s.draws for s in patched.plan.stages):
            self.reduction.bits = self._bits(range(len(layouts)))
        self.groups = self._groups(pixels)
        self.cls: Tensor | None = None
        self.resized: list[tuple[int, int]] = []
        self.rows: Tensor | None = None
        self.tower: TowerRun | None = None
        if patched.mergers:  # of families with one grid for all images
            self.tower = TowerRun(patched, len(layouts), layouts[0].grids[0], pixels.device)
        self.signals = VisionSignals(patched, family, self.reduction, prompts, self.tower)

    def _groups(self, like: Tensor) -> list[Group]:
        members: dict[Layout, list[int]] = {}
        for image, layout in enumerate(self.reduction.layouts):
            members.setdefault(layout, []).append(image)
        starts = torch.tensor(self.reduction.starts)
        return [
            Group(
                layout,
                images,
                on_device(starts[images][:, None] + layout.places.cell, like),
            )
            for layout, images in members.items()
        ]

    def _at(self, site: str) -> list[tuple[int, TokenReducer]]:
        stages = [(n, self.stages.get(n, s)) for n, s in self.patched.reducers]
        return [(n, s) for n, s in stages if self.patched.site(s) == site]

    # Stages

    def _bits(self, images: Sequence[int]) -> list[int]:
        """A number per image from its bits: independent of the batch and of its place there."""
        pictures, sums = self.family.pictures(self.inputs), []
        for image in images:
            x = pictures[image].detach().contiguous()
            bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
            sums.append(bits.long().sum())
        return torch.stack(sums).tolist()

    def _seeds(self, number: int, group: Group) -> list[int]:
        """A seed per image."""
        return [self.patched.plan.seed_for(number, bits) for bits in self._bits(group.images)]

    def _run(
        self, number: int, stage: TokenReducer, group: Group, features: Tensor | None
    ) -> list[Any]:
        """Actions of a stage for a group; features are `[images, cells, width]`."""
        if not group.layout.plain:
            check_grids(stage)
        with precisely(stage, group.at.device):
            ctx, booked = self._context(number, stage, group, features)
            actions = stage.reduce(ctx)
        ctx.book(sum(booked))
        self.reduction.ran.add(number)
        self.reduction.notes += ctx.remarks
        costs = np.broadcast_to(ctx.flops, len(group.images)).tolist()
        for image, cost in zip(group.images, costs, strict=True):
            self.reduction.selection_flops[image] += cost
        return actions

    def _context(
        self, number: int, stage: TokenReducer, group: Group, features: Tensor | None
    ) -> tuple[Context, list[float]]:
        """What a stage is given for a group, and where its trained parts book their cost."""
        signals: dict[str, Any] = {}
        for name, signal in stage.reads().items():
            if isinstance(signal, Features):
                signals[name] = features
                if signal.cls and self.cls is not None:
                    signals["cls"] = self.cls
            elif isinstance(signal, Grid):
                signals[name] = group.layout.places.cells()
            else:
                signals[name] = self.signals.read(signal, group, stage.info.name)
        counts = [self.reduction.counts[i] for i in group.images]
        ctx = Context(
            stage, signals, grid=group.layout.grids[0] if group.layout.plain else None,
            valid=self.reduction.keep[group.at], counts=None if None in counts else counts,
            seeds=functools.partial(self._seeds, number, group),
            route=functools.partial(_route, self.patched, number, booked := []),
            project=functools.partial(_project, self.family.projector, booked),
        )
        return ctx, booked

    def _apply(self, actions: list[Any], group: Group, features: Tensor) -> Tensor:
        """Book the actions of a stage; returns the group's features, still of full length."""
        reduction, at = self.reduction, group.at
        for action in actions:
            if isinstance(action, Keep):
                self._keep(action, group)
            elif isinstance(action, Merge):
                token = on_device(group.layout.places.cell, at)
                into = token[action.into.clamp(min=0)].masked_fill(action.into < 0, -1)
                reduction.into[at] = into
            elif isinstance(action, Write):
                features = action.values
                if action.order is not None and group.layout.plain:
                    if reduction.order is None:
                        reduction.order = torch.zeros_like(reduction.into)
                    reduction.order[at] = action.order
            elif isinstance(action, Protect):
                if reduction.protected is None:
                    reduction.protected = torch.zeros_like(reduction.keep)
                reduction.protected[at] |= action.rows
            elif isinstance(action, Pool):
                grid, (rows, cols) = action.grid, group.layout.grids[0]
                x = features.transpose(1, 2).unflatten(2, (rows, cols))
                cells = F.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)
                features = self._place(cells, grid, group)
            else:
                raise PlanError(
                    f"{type(action).__name__} is not an action of this site",
                    argument="actions",
                    given=type(action).__name__,
                    expected="Keep, Merge, Write, Pool, Protect",
                )
        return features

    def _keep(self, action: Keep, group: Group) -> None:
        """Let tokens go, but no protected ones."""
        reduction, at = self.reduction, group.at
        keep, mask, counts = reduction.keep[at], action.mask, action.counts
        if reduction.protected is not None:
            mask, counts = mask | reduction.protected[at], None
        dropped = keep & ~mask
        # What was merged into a token goes with it; an image begins with a cell.
        gone = torch.zeros(len(at), group.layout.tokens, dtype=torch.bool, device=at.device)
        gone = gone.scatter(1, at - at[:, :1], dropped)
        into = reduction.into[at]
        reduction.into[at] = into.masked_fill((into >= 0) & gone.gather(1, into.clamp(min=0)), -1)
        reduction.keep[at] = keep & mask
        self._count(group, counts)

    def _count(self, group: Group, counts: Sequence[int] | None) -> None:
        for image, n in zip(group.images, counts or [None] * len(group.images), strict=True):
            self.reduction.counts[image] = n

    def _place(self, cells: Tensor, grid: tuple[int, int], group: Group) -> Tensor:
        """Put the tokens of a coarser grid on the middle tokens of their cells."""
        rows, cols = group.layout.grids[0]
        device, reduction = cells.device, self.reduction
        r, c = torch.arange(rows, device=device), torch.arange(cols, device=device)
        mid_r = ((torch.arange(grid[0], device=device) + 0.5) * rows / grid[0]).long()
        mid_c = ((torch.arange(grid[1], device=device) + 0.5) * cols / grid[1]).long()
        middle = (mid_r[:, None] * cols + mid_c).flatten()
        cell = (r * grid[0] // rows)[:, None] * grid[1] + c * grid[1] // cols
        into = middle[cell.flatten()]
        into[middle] = middle
        keep = torch.zeros_like(into, dtype=torch.bool)
        keep[middle] = True
        reduction.into[group.at], reduction.keep[group.at] = into, keep
        self._count(group, [grid[0] * grid[1]] * len(group.images))
        full = cells.new_zeros(cells.shape[0], rows * cols, cells.shape[2])
        full[:, middle] = cells
        return full

    # The way of the picture

    def pixels(self) -> dict[str, Any]:
        """Arguments of get_image_features that change: smaller pictures."""
        for number, stage in self._at("pixels"):
            self.resized = [(0, 0)] * len(self.reduction.layouts)
            for group in self.groups:
                for action in self._run(number, stage, group, None):
                    if not isinstance(action, Resize):
                        raise PlanError(
                            f"{type(action).__name__} is not an action on pixels",
                            argument="actions", given=type(action).__name__, expected="Resize",
                        )
                    grid = self.family.picture_grid(action.grid)
                    small = Layout((grid,))
                    for image in group.images:
                        self.resized[image] = grid
                        self.reduction.vision_flops[image] = self.family.vision_flops(
                            small, small.cells
                        )
                        self.reduction.projected[image] = small.cells
        return self.family.resized(self.inputs, self.resized) if self.resized else {}

    def before_projector(self, features: Tensor) -> Tensor:
        """Run the stages before the projector, which then projects only what is kept.

        Only families with one token per patch and one grid for all images have this site.
        """
        (group,) = self.groups
        if self.tower is not None:
            self.rows = self.tower.finish(self.reduction)
            cost = self.family.vision_flops(group.layout, self.rows.shape[1]) - self.tower.saved()
            self.reduction.vision_flops = [cost] * len(self.rows)
            self.reduction.projected = [self.rows.shape[1]] * len(self.rows)
            return features
        for number, stage in self._at("pre_projector"):
            actions = self._run(number, stage, group, features)
            features = self._apply(actions, group, features)
        keep = self.reduction.keep[group.at]
        counts = [self.reduction.counts[i] for i in group.images]
        most = None if None in counts else max(counts)
        self.rows = choose_rows(keep, torch.ones_like(keep), count=most)
        # Every image's own tokens, as everywhere: what a batch fills up is not counted.
        own = counts if most is not None else [self.rows.shape[1]] * len(keep)
        self.reduction.vision_flops = [self.family.vision_flops(group.layout, n) for n in own]
        self.reduction.projected = own
        return gather_rows(features, self.rows)

    def not_projected(self, nothing: Tensor) -> Tensor:
        """Zeros for the tokens of a projector that was given nothing.

        Args:
            nothing: what it has made of that, or next to it, so that its parameters have a
                gradient.
        """
        flat = sum(layout.cells for layout in self.reduction.layouts)
        count = len(self.signals.unprojected) if nothing.dim() == 3 else flat
        return nothing.new_zeros(count, *nothing.shape[1:]) + 0.0 * nothing.sum()

    def after_projector(self, projected: Tensor) -> Tensor:
        """Spread the projected tokens over their rows again."""
        return scatter_back(projected, self.rows, self.groups[0].layout.tokens)

    def after(self, features: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
        """Run the stages after the projector.

        Args:
            features: as the model made them, fewer if the pictures were made smaller: stacked
                `[images, tokens, width]`, or a list of `[tokens, width]` per image or per sample.

        Returns:
            Features of full length, packed in the same way.
        """
        sizes = self.reduction.sizes
        made = [rows * cols for rows, cols in self.resized] or sizes
        stacked = isinstance(features, Tensor)
        flat = features.flatten(0, 1) if stacked else torch.cat(list(features))
        if self.patched.reads_unreduced:
            self.reduction.features = flat
        flat = self._reduce(flat, made)
        if stacked:
            return flat.view(len(sizes), -1, flat.shape[1])
        lengths, image = [], 0
        for part in features:
            left, length = len(part), 0
            while left > 0:
                left, length, image = left - made[image], length + sizes[image], image + 1
            lengths.append(length)
        return list(flat.split(lengths))

    def add_views(
        self, features: Tensor | Sequence[Tensor], layouts: list[Layout], grid: tuple[int, int]
    ) -> None:
        """Keep what tiles show at the tokens of their pictures.

        Args:
            features: of the tiles, as the model made them.
            layouts: of the tiles, picture after picture in reading order.
            grid: rows and columns of tiles.

        Raises:
            DataError: they are not so many tiles for each picture, as large as itself.
        """
        own, (rows, cols) = self.reduction.layouts, grid
        name = f"view_{self.family.pixels}"
        if layouts != [layout for layout in own for _ in range(rows * cols)]:
            raise DataError(
                f"{len(layouts)} tiles for {len(own)} pictures, or of other sizes than these",
                argument=name,
                given=[layout.grids for layout in layouts[:4]],
                expected=f"{rows * cols} tiles for each picture, as large as itself",
            )
        if not all(layout.plain for layout in own):
            raise DataError(
                "tiles have a place in pictures of one grid only",
                argument=name,
                given=[layout.grids for layout in own[:4]],
                expected="no video, and no picture that the processor cuts up",
            )
        flat = features.flatten(0, 1) if isinstance(features, Tensor) else torch.cat(list(features))
        found, parts = [], iter(flat.split([layout.tokens for layout in layouts]))
        for layout in own:
            (high, wide), width = layout.grids[0], flat.shape[1]
            x = torch.cat([next(parts) for _ in range(rows * cols)])
            # One map of all tiles, then the cells of the map at every token.
            x = x.view(rows, cols, high, wide, width).transpose(1, 2)
            x = x.reshape(high, rows, wide, cols, width).transpose(1, 2)
            found.append(x.reshape(high * wide, rows * cols, width))
        self.reduction.views = torch.cat(found)
        for image, layout in enumerate(own):
            cost = self.family.vision_flops(layout, layout.cells) * rows * cols
            self.reduction.vision_flops[image] += cost

    def _reduce(self, features: Tensor, made: list[int]) -> Tensor:
        """:meth:`after` on `[tokens of all images, width]`, `made` of them for each image."""
        if self.resized:
            parts = features.split(made)
            features = features.new_zeros(len(self.reduction.keep), features.shape[1])
            for group in self.groups:
                cells = torch.stack([parts[i] for i in group.images])
                grid = self.resized[group.images[0]]
                features = self._write(features, group, self._place(cells, grid, group))
        for number, stage in self._at("post_projector"):
            for group in self.groups:
                own = features[group.at]
                changed = self._apply(self._run(number, stage, group, own), group, own)
                if changed is not own:
                    features = self._write(features, group, changed)
        self._keep_newlines()
        return features

    @staticmethod
    def _write(features: Tensor, group: Group, values: Tensor) -> Tensor:
        return features.index_copy(0, group.at.flatten(), values.flatten(0, 1).to(features))

    def _keep_newlines(self) -> None:
        """A separator stays while a cell of its line does."""
        reduction = self.reduction
        for group in self.groups:
            layout, places, at = group.layout, group.layout.places, group.at
            if layout.newline == "none":
                continue
            behind = places_of(places.newline, layout.tokens - layout.cells)
            there = torch.zeros(len(at), layout.lines, device=at.device).index_add(
                1, on_device(places.line[places.cell], at), reduction.keep[at].float()
            )
            stay = there[:, on_device(places.line[behind], at)] > 0
            tokens = at[:, :1] + on_device(behind, at)  # an image begins with a cell
            reduction.keep[tokens] = stay
            reduction.into[tokens] = torch.where(stay, reduction.into[tokens], -1)


def check_grids(stage: TokenReducer) -> None:
    """PlanError if a stage needs pictures of one grid: a video is several."""
    if {"Pool", "Resize"} & set(stage.actions):
        raise PlanError(
            f"{stage.info.name} cannot work on a video, which is several grids",
            argument="plan",
            given=stage.info.name,
            expected="a method that chooses tokens",
        )


def _route(
    patched: Patched, number: int, booked: list[float], x: Tensor, part: str, *more: Any
) -> Tensor:
    model = patched.family.model
    booked.append(active(model)._modules[str(number)][part].flops(x, *more))
    # By the model's attribute: PEFT may have put a copy in its place.
    return getattr(model, NAME)(x, number, part, *more)


def _project(projector: nn.Module, booked: list[float], x: Tensor) -> Tensor:
    booked.append(linear_flops(projector, x.shape[1]))
    return projector(x)


def idle(patched: Patched, number: int, stage: TokenReducer, like: Tensor) -> Tensor:
    """Zero, from all that a stage learns, by an empty picture of 2 x 2 tokens: fp32 scalar.

    A batch without pictures uses none of it, and others of its step wait for its gradients.
    """
    width, block = patched.family.tower_widths
    signals: dict[str, Any] = {}
    for name, signal in stage.reads().items():
        if isinstance(signal, Grid):
            signals[name] = Layout(((2, 2),)).places
        elif isinstance(signal, Features):
            signals[name] = like.new_zeros(1, 4, like.shape[-1])
        else:
            wide = width if isinstance(signal, Unprojected) else block * len(signal.blocks)
            signals[name] = like.new_zeros(1, 4, wide)
    ctx = Context(
        stage, signals, valid=like.new_ones(1, 4, dtype=torch.bool),
        route=functools.partial(_route, patched, number, []),
        project=patched.family.projector,
    )  # fmt: skip
    made = [action.values for action in stage.reduce(ctx) if isinstance(action, Write)]
    return 0.0 * made[0].float().sum()
