"""Merging tokens inside a vision tower: within its blocks or behind them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm import attention
from mllm.compressors.base import TowerContext, merge_rows
from mllm.errors import PlanError
from mllm.tokens import along

if TYPE_CHECKING:
    from mllm.ledger import Reduction
    from mllm.patcher import Patched


class TowerRun:
    """One call of the tower: which tokens are left, and what each stands for.

    Attributes:
        size: fp32 `[images, tokens]`, original tokens per token.
        into: int64 `[images, patches]`, patch that has received each patch.
        seats: int64 `[images, tokens]`, patch in whose place each token is; -1 for [CLS].
        rows: tokens in the attention and in the MLP of each block that has run.
        depth: blocks whose output the projector sees.
        grid: (rows, cols) of the patches.
        flops: what choosing has cost, per image.
    """

    def __init__(
        self, patched: Patched, images: int, grid: tuple[int, int], device: Any
    ) -> None:
        self.patched, self.family, self.grid = patched, patched.family, grid
        prefix, patches = self.family.prefix, grid[0] * grid[1]
        own = torch.arange(patches, device=device).expand(images, -1)
        self.size = torch.ones(images, prefix + patches, device=device)
        self.into = own
        self.seats = torch.cat([own.new_full((images, prefix), -1), own], 1)
        self.rows: list[tuple[int, int]] = []
        self.ran: set[int] = set()
        self._keys: dict[int, Tensor] = {}
        self.depth, self.flops = self.family.block(None) + 1, 0.0
        self.stages = {
            block: (number, stage)
            for number, stage in patched.mergers
            for block in stage.blocks(self.depth)
        }
        self.proportional = any(stage.proportional for _, stage in patched.mergers)

    def taps(self) -> dict[nn.Module, list[Any]]:
        """Taps for the keys of the blocks at which tokens merge."""
        return {
            self.family.block_attention(block): [functools.partial(self._tap, block)]
            for block in self.stages
        }

    def _tap(self, block: int, query: Tensor, key: Tensor, *_: Any) -> None:
        self._keys[block] = key.mean(1)

    def block(self, number: int, x: Tensor, mask: Tensor | None, kwargs: dict) -> Tensor:
        """What runs instead of a block's forward."""
        norm1, attend, norm2, mlp = self.family.block_parts(number)
        block = self.family.blocks[number]
        if block.training and getattr(block, "gradient_checkpointing", False):
            raise PlanError(
                "a tower that merges tokens cannot be recomputed",
                argument="gradient_checkpointing",
                given=True,
                expected="a frozen tower in eval mode, or no checkpointing of the tower",
            )
        if self.proportional and x.shape[1] < self.family.prefix + self.into.shape[1]:
            bias = self.size.log()[:, None, None].to(x.dtype).expand(-1, -1, x.shape[1], -1)
            mask = bias if mask is None else mask + bias
        x = x + attend(hidden_states=norm1(x), attention_mask=mask, **kwargs)[0]
        before = x.shape[1]
        _, stage = self.stages.get(number, (None, None))
        if stage is not None and stage.behind == "attention":
            x = self._merge(number, x)
        self.rows.append((before, x.shape[1]))
        x = x + mlp(norm2(x))
        return self._merge(number, x) if stage is not None and stage.behind == "block" else x

    def _merge(self, number: int, x: Tensor) -> Tensor:
        stage_number, stage = self.stages[number]
        prefix, count = self.family.prefix, x.shape[1]
        ctx = TowerContext(
            stage, self._keys.pop(number), x, block=number, depth=self.depth,
            grid=self.grid, prefix=prefix, size=self.size,
        )  # fmt: skip
        with torch.no_grad(), attention.exact(x.device):
            into = stage.merge(ctx).into
        self.flops += ctx.flops
        self.ran.add(stage_number)
        own = torch.arange(count, device=x.device)
        stay = into == own
        left = stay.sum(1)
        if bool((left != left[0]).any()) or not bool(stay[:, :prefix].all()):
            raise PlanError(
                f"{stage.info.name} must leave equally many tokens of every image, and [CLS]",
                argument="into",
                given=left.tolist(),
                expected="one count for all images",
            )
        rows = stay.int().argsort(dim=1, descending=True, stable=True)[:, : int(left[0])]
        x = along(merge_rows(x, into, self.size), rows, 1)
        size = torch.zeros_like(self.size).scatter_add(1, into, self.size)
        seat_of = along(self.seats, into, 1)  # patch that receives, by current token
        token_of = torch.full_like(self.into, -1).scatter(
            1, self.seats[:, prefix:], own[prefix:].expand(len(x), -1)
        )
        self.into = seat_of.gather(1, token_of.gather(1, self.into))
        self.size, self.seats = along(size, rows, 1), along(self.seats, rows, 1)
        return x

    def spread(self, x: Tensor) -> Tensor:
        """What was read at the tokens that are left, at their patches; zero at the others.

        Args:
            x: `[images, tokens without [CLS], ...]`.
        """
        seats = self.seats[:, self.family.prefix :]
        at = seats.view(*seats.shape, *[1] * (x.dim() - 2)).expand_as(x)
        return x.new_zeros(len(x), self.into.shape[1], *x.shape[2:]).scatter(1, at, x)

    def finish(self, reduction: Reduction) -> Tensor:
        """Book what was merged; returns the patch of each feature: int64 `[images, tokens]`."""
        seats = self.seats[:, self.family.prefix :]
        keep = torch.zeros_like(self.into, dtype=torch.bool).scatter(1, seats, True)
        reduction.keep = keep.flatten()
        reduction.counts = [seats.shape[1]] * len(keep)
        reduction.into = self.into.flatten()
        reduction.ran |= self.ran
        reduction.selection_flops = [x + self.flops for x in reduction.selection_flops]
        return seats

    def saved(self) -> float:
        """FLOPs of one image that the tower did not need."""
        config = self.family.vision_config
        total, full = 0.0, self.family.prefix + self.into.shape[1]
        width, mlp = config.hidden_size, config.intermediate_size
        for attended, through in self.rows:
            total += 8 * width**2 * (full - attended) + 4 * width * (full**2 - attended**2)
            total += 4 * width * mlp * (full - through)
        return total
