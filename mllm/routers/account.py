"""What routers did in one forward pass, and the losses that they add to the model's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


def world() -> int:
    """Processes that train together."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if there else 1


def rank() -> int:
    """The number of this process among those that train together."""
    return torch.distributed.get_rank() if world() > 1 else 0


def summed(x: Tensor) -> Tensor:
    """The sum over all processes, without gradient."""
    x = x.detach().clone()
    if world() > 1:
        torch.distributed.all_reduce(x)
    return x


def loss_factor(labels: Tensor, items: Any) -> Any:
    """What a sum over processes of auxiliary losses is multiplied with, beside the answers' loss.

    Trainers take the mean of what every process reports; or, where they tell the model how many
    labels the whole step has, the sum over its micro-batches.

    Args:
        labels: int64 `[batch, rows]`, of this process and micro-batch.
        items: `num_items_in_batch` of the call, or None.
    """
    if items is None:
        return float(world())
    here = summed((labels[..., 1:] != -100).sum())
    return here / torch.as_tensor(items, device=here.device)


@dataclass
class Routing:
    """The account of a forward pass; tensors stay on their device until somebody asks.

    Attributes:
        learns: whether the auxiliary losses of this pass are part of its loss.
        factor: what they are multiplied with: see :func:`loss_factor`.
        learnt: passes that the model has learnt from before this one.
        stats: by stage and layer, sums that :mod:`mllm.routers.stats` reads.
        scale: the gradient of the loss, once its backward has begun.
    """

    learns: bool = False
    factor: Any = 1.0
    learnt: int = 0
    stats: dict[tuple[int, int], dict[str, Tensor]] = field(default_factory=dict)
    scale: Tensor | None = None
    # By stage, layer and name, as they are and as they count; a recompute writes them again.
    _losses: dict[tuple[int, int, str], tuple[Tensor, Tensor]] = field(default_factory=dict)
    _outside: list[Tensor] = field(default_factory=list)

    def note(self, stage: int, layer: int, **sums: Tensor) -> None:
        """Keep sums of a layer; nothing waits for the device until they are read."""
        self.stats[stage, layer] = {name: x.detach() for name, x in sums.items()}

    def penalise(self, stage: int, layer: int, name: str, loss: Tensor, coefficient: float) -> None:
        """Take a loss that was computed outside of layers, where no checkpoint drops its graph.

        Args:
            stage: number of the stage in its plan.
            layer: decoder layer.
            name: of the loss.
            loss: scalar, a mean over what this process has.
            coefficient: what it is multiplied with.
        """
        weighted = loss * (coefficient * self.factor / world())
        self._losses[stage, layer, name] = loss.detach(), weighted.detach()
        self._outside.append(weighted - weighted.detach())

    def reach(self, zero: Tensor) -> None:
        """Take a zero by which parameters get a gradient."""
        self._outside.append(zero)

    def collect(
        self, stage: int, layer: int, losses: dict[str, tuple[Tensor, float]], rows: Tensor
    ) -> Tensor:
        """Take losses from inside of a layer, which a checkpoint may run again.

        Args:
            stage: number of the stage in its plan.
            layer: decoder layer.
            losses: by name, scalar and coefficient: this process's part of a sum over all of them.
            rows: what the layer goes on with.

        Returns:
            `rows`; their backward hands the losses the gradient that the whole loss has.
        """
        total = 0.0
        for name, (loss, coefficient) in losses.items():
            weighted = loss * (coefficient * self.factor)
            self._losses[stage, layer, name] = loss.detach(), weighted.detach()
            total = total + weighted
        return _Inject.apply(rows, total, self) if self.learns else rows

    @property
    def losses(self) -> dict[str, Tensor]:
        """By name, the sum over layers, before coefficients."""
        found: dict[str, Tensor] = {}
        for (_, _, name), (loss, _) in self._losses.items():
            found[name] = found.get(name, 0) + loss
        return found

    def added(self) -> Tensor | float:
        """What the auxiliary losses add to the loss, without gradient."""
        found = [weighted for _, weighted in self._losses.values()]
        return sum(x.to(found[0].device) for x in found)

    def total(self, loss: Tensor) -> Tensor:
        """`loss` with the auxiliary losses."""
        found = _Total.apply(loss, torch.as_tensor(self.added(), device=loss.device), self)
        for zero in self._outside:
            found = found + zero.to(found)
        self._outside.clear()  # so that nothing holds the graph
        return found


class _Inject(torch.autograd.Function):
    """Rows pass; a loss gets the gradient that the whole loss has.

    So a loss inside of a checkpointed layer learns, also where its first run has no graph.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, loss: Tensor, routing: Routing) -> Tensor:
        ctx.routing, ctx.like = routing, loss
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = ctx.routing.scale
        own = torch.zeros_like(ctx.like) if scale is None else scale.to(ctx.like.dtype)
        return grad, own, None


class _Total(torch.autograd.Function):
    """A loss and more; its own gradient is what :class:`_Inject` hands on."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, more: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return loss + more.to(loss.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.routing.scale = grad
        return grad, None, None
