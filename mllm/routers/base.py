"""What trained stages share: their parameters in the model, scores in fp32, choices without luck.

A stage is hyper-parameters; what it learns is a submodule of the model that it is patched into,
:data:`NAME`. There optimizers, PEFT (`modules_to_save=["mllm"]`), DeepSpeed and FSDP find it. No
other name of the model changes, and `remove()` takes it out.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: The submodule of a patched model that holds what its plan has learnt.
NAME = "mllm"


class Score(nn.Module):
    """A linear layer that computes in fp32, whatever its inputs, its weights or autocast are.

    Not an `nn.Linear`, which LoRA's `all-linear` and quantisers would take for one of the model's.

    Args:
        width: of the input, `[..., width]`.
        out: of the output, fp32 `[..., out]`.
        bias: whether there is one; it starts at zero.
        std: of the normal distribution that weights start from; 0 is zero.
    """

    def __init__(self, width: int, out: int = 1, bias: bool = True, std: float = 0.0) -> None:
        super().__init__()
        start = torch.randn(out, width) * std if std else torch.zeros(out, width)
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros(out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (
            None if p is None else p.to(x.device, torch.float32) for p in (self.weight, self.bias)
        )
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.float(), weight, bias)


class RouterBank(nn.Module):
    """What all stages of a plan learn: `mllm.<stage>.<part>.<parameter>`.

    Args:
        stages: modules by part, by the number of the stage in its plan.
    """

    def __init__(self, stages: dict[int, dict[str, nn.Module]]) -> None:
        super().__init__()
        for number, parts in stages.items():
            self.add_module(str(number), nn.ModuleDict(parts))

    def forward(self, x: Tensor, stage: int, part: str, *more: Any) -> Tensor:
        """What a part makes of `x`; by a call, so that sharded parameters are gathered."""
        return self._modules[str(stage)][part](x, *more)

    def idle(self, x: Tensor, stages: Iterable[int]) -> Tensor:
        """Zero, from all parameters of some stages: fp32 scalar.

        A batch without images uses no router over depth, and others of its step wait for their
        gradients.

        Args:
            x: `[batch, rows, width]`, what enters the decoder.
            stages: numbers of stages that have parts; a part that does not take hidden states
                says in `width` what it takes.
        """
        x = x[:1, :1].detach()
        parts = [part for n in stages for part in self._modules[str(n)].values()]
        widths = [getattr(part, "width", x.shape[-1]) for part in parts]
        found = [
            part(x[..., :1].expand(-1, -1, width)).sum()
            for part, width in zip(parts, widths, strict=True)
        ]
        return 0.0 * torch.stack(found).sum()


def active(model: nn.Module) -> nn.Module:
    """The bank of a patched model, also where PEFT trains a copy of it (`modules_to_save`)."""
    bank = getattr(model, NAME)
    copies = getattr(bank, "modules_to_save", None)
    return bank if copies is None else copies[bank.active_adapters[0]]


def choose(scores: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """The `count` best candidates of each sample: bool `[batch, rows]`.

    Ties are broken by the place among the sample's candidates, spread evenly over them: a router
    that has learnt nothing keeps tokens from everywhere, and the same ones in any batch and on any
    device.

    Args:
        scores: `[batch, rows]`.
        candidates: bool `[batch, rows]`.
        count: int64 `[batch]`.
    """
    place = candidates.long().cumsum(1)
    first = (place * 40503 % 65536).argsort(dim=1, stable=True)  # 2**16 / the golden ratio
    ranked = scores.detach().float().masked_fill(~candidates, float("-inf"))
    then = ranked.gather(1, first).argsort(dim=1, descending=True, stable=True)
    order = first.gather(1, then)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    return candidates & (rank < count[:, None])
