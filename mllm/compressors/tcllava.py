"""TC-LLaVA: frames have a time of their own, and see themselves whole, inside the LLM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm.compressors.base import (
    Grid,
    LayerContext,
    LayerMethod,
    LogitBias,
    Positions,
    Turn,
    register,
)
from mllm.routers.depth import DepthRouter
from mllm.tokens import TokenTable


@dataclass
class _Frames:
    """When tokens are, and in which frame, by logical index.

    Attributes:
        tokens: int64 `[batch, rows]`, rising.
        time: fp32 `[batch, rows]`.
        frame: int64 `[batch, rows]`, -1 for text.
        step: time of each later token.
    """

    tokens: Tensor
    time: Tensor
    frame: Tensor
    step: float

    def _row(self, tokens: Tensor) -> Tensor:
        return torch.searchsorted(self.tokens, tokens.contiguous()).clamp(
            max=self.tokens.shape[1] - 1
        )

    def turn(self, tokens: Tensor) -> Tensor:
        """How far tokens are turned."""
        behind = (tokens - self.tokens[:, -1:]).clamp(min=0)
        return self.time.gather(1, self._row(tokens)) + behind * self.step

    def show(self, queries: Tensor, keys: Tensor) -> Tensor:
        """What shows tokens to those of the same frame: fp32 `[batch, 1, queries, keys]`."""
        query, key = (
            self.frame.gather(1, self._row(x)).masked_fill(x > self.tokens[:, -1:], -1)
            for x in (queries, keys)
        )
        same = (query[:, :, None] == key[:, None]) & (key >= 0)[:, None]
        return torch.zeros(same.shape, device=same.device).masked_fill(same, math.inf)[:, None]


@register("tcllava", paper="arXiv:2409.03206", stage="llm")
@dataclass
class TCLLaVA(LayerMethod):
    """Turn queries and keys by the time of their frame, and show each frame to itself (TC-LLaVA).

    Every token has a second position, its time: that of text counts tokens, and all tokens of a
    frame have the same one. Queries and keys are rotated by their position and `gamma` times their
    time. In all layers the tokens of a frame see each other, those behind them too; everything
    else is causal. A picture is one frame. Nothing is learnt, and no token leaves: a model has to
    be tuned with it.

    Args:
        gamma: of time; 0 leaves positions as they are.
        mask: whether frames see themselves whole.
        positions: `original` is all there is: tokens stay where they are.
    """

    gamma: float = 0.5
    mask: bool = True
    positions: Positions | None = None

    actions = ("LogitBias", "Turn")
    oracle = "reference"
    identity = {"gamma": 0.0, "mask": False}

    demand = DepthRouter.demand

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("gamma", 0 <= self.gamma < math.inf, "a number from 0")
        self.demand("positions", self.positions != "compact", "original: nothing moves")
        used = {"LogitBias": self.mask, "Turn": self.gamma > 0}
        self.actions = tuple(name for name, is_used in used.items() if is_used)

    def at(self) -> Sequence[int]:
        return (0,)

    def reads(self):
        return {"table": Grid()}

    def act(self, ctx: LayerContext) -> list[Any]:
        frames, found = self._frames(ctx["table"]), []
        for layer in range(ctx.num_layers):
            found += [Turn(layer, frames.turn)] * (self.gamma > 0)
            found += [LogitBias(layer, frames.show)] * self.mask
        return found

    def _frames(self, table: TokenTable) -> _Frames:
        place = torch.arange(table.valid.shape[1], device=table.valid.device)
        frame = torch.where(table.visual, (table.image.long() << 32) + table.frame, -1)
        # A token begins a moment unless the one before is of its frame.
        last = torch.where(table.valid, place, -1).cummax(1).values
        before = F.pad(last[:, :-1], (1, 0), value=-1)
        same = (frame.gather(1, before.clamp(min=0)) == frame) & (before >= 0) & (frame >= 0)
        time = (table.valid & ~same).long().cumsum(1) - 1
        order = table.logical.argsort(dim=1, stable=True)  # rows may stand in another order
        tokens, frame, time = (x.gather(1, order) for x in (table.logical, frame, time))
        return _Frames(tokens, time.float() * self.gamma, frame, self.gamma)
