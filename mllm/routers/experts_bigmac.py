"""BigMac (arXiv:2502.16927): tokens are made narrow once, before they travel to their experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mllm.plan import register
from mllm.routers.experts import Choice, ExpertLayer, Experts, Mode


@dataclass
class _Narrow(Choice):
    """A base of its own, so that its field stands where it always has: before `mode`."""

    ratio: float = 0.25


@register("bigmac", paper="arXiv:2502.16927", stage="experts", trained=True)
@dataclass
class BigMac(Experts, _Narrow):
    """Experts on narrow tokens, beside the whole FFN: descend once, dispatch, ascend once.

    Every token is projected to `ratio` of its width before it goes to experts, and back behind
    them, so between processes it travels narrow. The router reads the whole token. An expert goes
    from narrow to the full width and back, without a gate. The paper trains from nothing; here the
    FFN stays as it is, and the way back starts at zero.

    Args:
        ratio: width of the tokens that experts see, as a share.
    """

    experts: int | tuple[int, ...] = 16
    top_k: int = 4
    mode: Mode = "dense"
    balance: float = 0.001

    first_only = False
    whole = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._demand("ratio", 0 < self.ratio <= 1, "over 0 and at most 1")

    def weights(self, best: Tensor) -> Tensor:
        return best

    def build(
        self, layer: int, experts: int, own: range, weights: dict[str, Tensor],
        act: Callable[[Tensor], Tensor], draw: torch.Generator,
    ) -> ExpertLayer:  # fmt: skip
        made = super().build(layer, experts, own, weights, act, draw)
        like = weights["up_proj"]
        width = like.shape[1]
        narrow = max(1, round(self.ratio * width))

        def drawn(rows: int, columns: int) -> Tensor:
            if like.is_meta:
                return like.new_empty(rows, columns)
            new = torch.empty(rows, columns).uniform_(-1, 1, generator=draw) * columns**-0.5
            return new.to(like)

        made.descend = nn.Parameter(drawn(narrow, width))
        made.ascend = nn.Parameter(like.new_zeros(width, narrow))
        # All are drawn, so that processes which share them start as one would.
        every = [(drawn(width, narrow), drawn(narrow, width)) for _ in range(experts)]
        made.up_proj = nn.Parameter(torch.stack([every[e][0] for e in own]))
        made.down_proj = nn.Parameter(torch.stack([every[e][1] for e in own]))
        return made

    def start(self, weights: dict[str, Tensor], own: range) -> dict[str, Tensor]:
        return {f"shared_{name}": w for name, w in weights.items()}
