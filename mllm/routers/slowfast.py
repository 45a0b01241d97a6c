"""Slow-fast: text looks up what the compressed picture has lost, in some layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.compressors.base import Attend, LayerContext, LayerMethod, Positions, Unreduced, register
from mllm.routers.base import Score
from mllm.routers.depth import DepthRouter


class SlowKV(nn.Module):
    """Keys and values of slow tokens, which start as those of a layer's own attention.

    Args:
        attention: of the layer.
    """

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        key, value = attention.k_proj, attention.v_proj
        biases = [p.weight.new_zeros(len(p.weight)) if p.bias is None else p.bias
                  for p in (key, value)]  # fmt: skip
        self.weight = nn.Parameter(torch.cat([key.weight, value.weight]).detach().clone())
        self.bias = nn.Parameter(torch.cat(biases).detach().clone())
        self.norm = copy.deepcopy(getattr(attention, "k_norm", None))
        self.head_dim = attention.head_dim

    def forward(self, x: Tensor) -> Tensor:
        """Keys, then values, `[..., 2 * kv_heads * head_dim]`, of `[..., width]`."""
        both = F.linear(x, self.weight.to(x), self.bias.to(x))
        if self.norm is None:
            return both
        keys, values = both.chunk(2, -1)
        keys = self.norm(keys.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        return torch.cat([keys, values], -1)


class Gate(nn.Module):
    """How much of what a token has found it takes; nothing at first.

    Args:
        width: of what the heads give.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.score = Score(width, std=(3 * width) ** -0.5)
        self.warm = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """fp32 `[..., 1]` of `[..., width]`."""
        return torch.tanh(self.score(x)) * torch.tanh(self.warm.to(x.device, torch.float32))


@register("slowfast", paper="arXiv:2504.01328", stage="llm", trained=True)
@dataclass
class SlowFast(LayerMethod):
    """Let text attend, in some layers, to visual tokens that have left the sequence (Slow-Fast).

    The slow tokens are all visual tokens as they come from the projector. The fast ones are those
    that stages before the LLM leave of them (`adaptivepool`, `pllava` for videos), and they alone
    are in the sequence. In a hybrid layer the queries of text also meet keys and values of the slow
    tokens, without positions and in any order, made by projections that start as the layer's own;
    what they find is multiplied by a gate, which every token computes from what its heads give and
    which starts at zero. So new parts change nothing. Keys and values of slow tokens are kept on
    the cache for answers; a later turn with pictures puts its own in their place.

    Args:
        every: hybrid layers are this many apart, from the first on.
        layers: the hybrid layers themselves; None is as `every` says.
        system: whether text before the first picture attends too.
        positions: `original` is all there is: tokens stay where they are.
    """

    every: int = 4
    layers: tuple[int, ...] | None = None
    system: bool = True
    positions: Positions | None = None

    differentiable = True
    oracle = "reference"
    actions = ("Attend",)
    identity = {}

    demand = DepthRouter.demand

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand("every", self.every >= 1, "a number from 1")
        self.demand("positions", self.positions != "compact", "original: nothing moves")

    def at_depth(self, num_layers: int, first_cut: int = 0) -> SlowFast:
        own = tuple(range(0, num_layers, self.every)) if self.layers is None else self.layers
        fine = bool(own) and min(own) >= 0 and max(own) < num_layers and len(set(own)) == len(own)
        self.demand("layers", fine, f"different layers from 0 to {num_layers - 1}")
        return self.replace(layers=tuple(sorted(own)))

    def at(self) -> Sequence[int]:
        return self.layers or ()

    def reads(self):
        return {"slow": Unreduced()}

    def parts_of(self, family: Any) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for layer in self.layers:
            attention = family.attention(layer)
            found[f"{layer}_kv"] = SlowKV(attention)
            found[f"{layer}_gate"] = Gate(attention.o_proj.in_features)
        return found

    def act(self, ctx: LayerContext) -> list[Any]:
        slow = ctx["slow"]
        both = ctx.route(f"{ctx.layer}_kv", ctx.attention_input(slow.embeds))
        ctx.book(2.0 * slow.embeds.shape[1] * slow.embeds.shape[2] * both.shape[-1])
        keys, values = both.chunk(2, -1)
        rows = ctx.text | ctx.answers
        if not self.system:
            rows = rows & (ctx.visual.long().cumsum(1) > 0)
        return [Attend(ctx.layer, rows, keys, values, slow.valid, f"{ctx.layer}_gate")]
