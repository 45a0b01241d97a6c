"""Pre-LLM stages: what happens to visual tokens on their way from pixels to the decoder."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import attention
from mllm.compressors.base import (
    Context,
    Features,
    Keep,
    Merge,
    Pool,
    Resize,
    TokenReducer,
    VisionAttention,
    VisionKeys,
    Write,
)
from mllm.errors import PlanError
from mllm.ledger import Reduction
from mllm.tokens import choose_rows, gather_rows

if TYPE_CHECKING:
    from mllm.patcher import Patched


class VisionRun:
    """One call of get_image_features: runs the pre-LLM stages on its images."""

    def __init__(self, patched: Patched, pixel_values: Tensor) -> None:
        self.family, self.plan = patched.family, patched.plan
        self.stages = patched.reducers
        self.pixel_values = pixel_values
        grids = self.family.grid(pixel_values)
        images, (height, width) = len(grids), grids[0]
        device = pixel_values.device
        self.tokens = height * width
        index = torch.arange(self.tokens, device=device).repeat(images, 1)
        self.reduction = Reduction(
            grid=grids[0],
            keep=torch.ones(images, self.tokens, dtype=torch.bool, device=device),
            into=index,
        )
        full = self.family.vision_flops(grids[0], self.tokens)
        self.reduction.baseline_vision_flops = self.reduction.vision_flops = full
        self.signals: dict[Any, Tensor] = {}
        self.cls: Tensor | None = None
        self.resized: tuple[int, int] | None = None
        self.rows: Tensor | None = None

    def _at(self, site: str) -> list[tuple[int, TokenReducer]]:
        return [(n, s) for n, s in self.stages if s.site == site]

    def taps(self) -> dict[nn.Module, list[Any]]:
        """Taps for the declared signals of the tower."""
        found: dict[nn.Module, list[Any]] = {}
        for _, stage in self.stages:
            for signal in stage.reads().values():
                if isinstance(signal, VisionAttention | VisionKeys):
                    module = self.family.block_attention(self.family.block(signal.block))
                    found.setdefault(module, []).append(functools.partial(self._tap, signal))
        return found

    def _tap(self, signal: Any, query: Tensor, key: Tensor, mask: Any, scaling: Any) -> None:
        prefix = self.family.prefix
        if isinstance(signal, VisionKeys):
            self.signals[signal] = key.mean(1)[:, prefix:]
            return
        tokens = key.shape[2]
        if signal.query == "cls" and not prefix:
            raise PlanError(
                "the tower has no [CLS]", argument="query", given="cls", expected="received"
            )
        rows = tokens
        if prefix and signal.query != "received":
            first = torch.zeros(query.shape[0], 1, dtype=torch.long, device=query.device)
            scores = attention.row_attention(query, key, first, None, scaling, causal=False)
            scores, rows = scores[:, :, 0], 1
        else:
            scores = attention.received_attention(query, key, None, scaling)
        scores = scores[..., prefix:]
        self.signals[signal] = scores.sum(1) if signal.heads == "sum" else scores.mean(1)
        self.reduction.selection_flops += 2 * rows * tokens * query.shape[1] * query.shape[3]

    def _seeds(self, number: int) -> list[int]:
        """A seed per image from its bits: independent of the batch and of the image's place."""
        x = self.pixel_values.detach().contiguous()
        bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
        sums = bits.flatten(1).long().sum(1).tolist()
        own = getattr(self.plan.stages[number], "seed", 0)
        return [hash((s, self.plan.seed, own, number)) & (2**63 - 1) for s in sums]

    def _run(self, number: int, stage: TokenReducer, features: Tensor | None) -> list[Any]:
        signals: dict[str, Tensor] = {}
        for name, signal in stage.reads().items():
            if isinstance(signal, Features):
                signals[name] = features
                if signal.cls and self.cls is not None:
                    signals["cls"] = self.cls
            else:
                signals[name] = attention.captured(self.signals, signal, stage.info.name)
        ctx = Context(
            stage, signals, grid=self.reduction.grid, valid=self.reduction.keep,
            seeds=functools.partial(self._seeds, number),
        )
        actions = stage.reduce(ctx)
        self.reduction.ran.add(number)
        self.reduction.selection_flops += ctx.flops
        return actions

    def _apply(self, actions: list[Any], features: Tensor) -> Tensor:
        """Book the actions of a stage; returns the features, still of full length."""
        reduction = self.reduction
        for action in actions:
            if isinstance(action, Keep):
                dropped = reduction.keep & ~action.mask
                reduction.into = reduction.into.masked_fill(dropped, -1)
                reduction.keep = reduction.keep & action.mask
            elif isinstance(action, Merge):
                reduction.into = action.into
            elif isinstance(action, Write):
                features, reduction.order = action.values, action.order
            elif isinstance(action, Pool):
                grid, (rows, cols) = action.grid, reduction.grid
                x = features.transpose(1, 2).unflatten(2, (rows, cols))
                cells = F.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)
                features = self._place(cells, grid, features)
            else:
                raise PlanError(
                    f"{type(action).__name__} is not an action of this site",
                    argument="actions",
                    given=type(action).__name__,
                    expected="Keep, Merge, Write, Pool",
                )
        return features

    def _place(self, cells: Tensor, grid: tuple[int, int], features: Tensor | None) -> Tensor:
        """Put the tokens of a coarser grid on the middle tokens of their cells."""
        rows, cols = self.reduction.grid
        device = cells.device
        r, c = torch.arange(rows, device=device), torch.arange(cols, device=device)
        mid_r = ((torch.arange(grid[0], device=device) + 0.5) * rows / grid[0]).long()
        mid_c = ((torch.arange(grid[1], device=device) + 0.5) * cols / grid[1]).long()
        middle = (mid_r[:, None] * cols + mid_c).flatten()
        cell = (r * grid[0] // rows)[:, None] * grid[1] + c * grid[1] // cols
        into = middle[cell.flatten()]
        into[middle] = middle
        self.reduction.into = into.repeat(cells.shape[0], 1)
        self.reduction.keep = torch.zeros_like(self.reduction.keep)
        self.reduction.keep[:, middle] = True
        full = cells.new_zeros(cells.shape[0], self.tokens, cells.shape[2])
        full[:, middle] = cells
        return full

    def pixels(self) -> tuple[Tensor, dict]:
        """The pictures for the tower, and the arguments it needs for them."""
        pixel_values, extra = self.pixel_values, {}
        for number, stage in self._at("pixels"):
            for action in self._run(number, stage, None):
                if not isinstance(action, Resize):
                    raise PlanError(
                        f"{type(action).__name__} is not an action on pixels",
                        argument="actions", given=type(action).__name__, expected="Resize",
                    )
                self.resized = action.grid
                pixel_values, extra = self.family.resized(pixel_values, action.grid)
                cells = action.grid[0] * action.grid[1]
                self.reduction.vision_flops = self.family.vision_flops(action.grid, cells)
        return pixel_values, extra

    def before_projector(self, features: Tensor) -> Tensor:
        """Run the stages before the projector, which then projects only what is kept."""
        for number, stage in self._at("pre_projector"):
            features = self._apply(self._run(number, stage, features), features)
        keep = self.reduction.keep
        self.rows = choose_rows(keep, torch.ones_like(keep))
        self.reduction.vision_flops = self.family.vision_flops(
            self.reduction.grid, self.rows.shape[1]
        )
        return gather_rows(features, self.rows)

    def after_projector(self, projected: Tensor) -> Tensor:
        """Spread the projected tokens over their rows again."""
        full = projected.new_zeros(projected.shape[0], self.tokens, projected.shape[2])
        return full.scatter(1, self.rows[..., None].expand_as(projected), projected)

    def after(self, features: Tensor) -> Tensor:
        """Run the stages after the projector; features are of full length."""
        if self.resized is not None:
            features = self._place(features, self.resized, None)
        for number, stage in self._at("post_projector"):
            features = self._apply(self._run(number, stage, features), features)
        return features
