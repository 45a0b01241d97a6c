"""Looking to Learn: every word weighs what it sees against what it has read."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mllm.compressors.base import LayerContext, register
from mllm.routers.base import Score
from mllm.routers.slowfast import SlowFast, SlowKV


class Blend(nn.Module):
    """The share of what a token has seen in what it goes on with; nothing at first.

    Args:
        width: of what heads give.
        out: shares per token, 1 or `width`.
        hard: whether shares are 0 or 1, with the gradient of soft ones.
    """

    def __init__(self, width: int, out: int, hard: bool) -> None:
        super().__init__()
        self.width, self.out, self.hard = 2 * width, out, hard
        self.score = Score(2 * width, out, std=(6 * width) ** -0.5)
        self.warm = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """fp32 `[..., out]` of `[..., 2 * width]`: what was read, then what was seen."""
        read = self.score(x).sigmoid()
        if self.hard:
            read = read + ((read >= 0.5).float() - read).detach()
        return (1 - read) * torch.tanh(self.warm.to(x.device, torch.float32))

    def flops(self, x: Tensor) -> float:
        """Of one sample."""
        return 2.0 * x.shape[1] * self.width * self.out


@register("lookingtolearn", paper="arXiv:2510.08470", stage="llm", trained=True)
@dataclass
class LookingToLearn(SlowFast):
    """Blend, word by word, what text reads with what it sees (Looking to Learn).

    The paper's token-wise dynamic gating, put into a model that is there. In a gated layer the
    queries of text also attend to all visual tokens, as in `slowfast`, and a gate decides between
    what heads have read in the sequence, r, and what they have seen, s: with
    ``g = sigmoid(linear([r; s]))``, the output projection is given ``g r + (1 - g) s``. Visual
    tokens are those that come from the projector, whatever stages before the LLM leave of them.

    Of the authors' code are the linear gate, its sign, and its four kinds. Ours, for want of a
    published way to start from a trained model: s is made with the layer's own queries, and with
    keys and values that start as its own; `1 - g` is multiplied by ``tanh(warm)``, which starts at
    zero, so new parts change nothing; the gate is before the output projection, where theirs is
    behind one of its own and a norm; a hard gate is the soft one rounded, where theirs draws Gumbel
    noise at a falling temperature. Feature modulation, channel attention and contrastive losses,
    the paper's other parts, are not offered.

    Args:
        every: gated layers are this many apart, from the first on. The paper has one in each of
            its eight layers; 4 is a default of ours.
        layers: the gated layers themselves; None is as `every` says.
        system: whether text before the first picture has gates too.
        shares: one for each `token`, or for each `feature` of it.
        gate: `soft`, or `hard`: each share is all or nothing.
        positions: `original` is all there is: tokens stay where they are.
    """

    shares: Literal["token", "feature"] = "token"
    gate: Literal["soft", "hard"] = "soft"

    def parts_of(self, family: Any) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {}
        for layer in self.layers:
            attention = family.attention(layer)
            width = attention.o_proj.in_features
            out = width if self.shares == "feature" else 1
            found[f"{layer}_kv"] = SlowKV(attention)
            found[f"{layer}_gate"] = Blend(width, out, self.gate == "hard")
        return found

    def act(self, ctx: LayerContext) -> list[Any]:
        return [dataclasses.replace(attend, blends=True) for attend in super().act(ctx)]
