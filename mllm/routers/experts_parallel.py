"""Experts spread over processes: DeepSpeed's groups and reductions, our router and experts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mllm.errors import PlanError
from mllm.routers.account import world
from mllm.routers.experts import STACKS, ExpertLayer


class Group:
    """The processes that share the experts of each layer.

    Expert parameters carry DeepSpeed's marks, so that its engine (ZeRO 0, 1 or 2) averages them
    over the processes that hold the same ones. Optimizers need :func:`optimizer_groups`.

    Args:
        size: processes that share one set of experts; DeepSpeed must be initialised
            (`deepspeed.init_distributed`).

    Raises:
        PlanError: DeepSpeed is missing or not initialised, or the size does not divide the world.
    """

    def __init__(self, size: int) -> None:
        fault = None
        if importlib.util.find_spec("deepspeed") is None:
            fault, expected = "DeepSpeed is not installed", "DS_BUILD_OPS=0 pip install deepspeed"
        elif not torch.distributed.is_initialized():
            fault, expected = "there is one process only", "deepspeed.init_distributed() before"
        elif world() % size:
            fault, expected = f"{world()} processes cannot be split so", f"a divisor of {world()}"
        if fault:
            raise PlanError(
                f"experts cannot be shared by {size} processes: {fault}",
                argument="ep_size",
                given=size,
                expected=expected,
            )
        from deepspeed.utils import groups

        self.name, self.size = f"ep_size_{size}", size
        if self.name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(size)
        self.group = groups._get_expert_parallel_group(self.name)
        self.rank = torch.distributed.get_rank(self.group)

    def own(self, experts: int) -> range:
        """Experts that this process has, of so many."""
        each = experts // self.size
        return range(self.rank * each, (self.rank + 1) * each)

    def share(self, layer: ExpertLayer) -> None:
        """Mark the parameters that differ between processes, and let rows travel."""
        for name in STACKS:
            if (parameter := getattr(layer, name, None)) is not None:
                parameter.allreduce, parameter.group_name = False, self.name
        layer.deepspeed = _mark(layer.experts, self.name)
        layer.exchange = self.exchange

    def gathered(self, own: Tensor) -> Tensor:
        """The experts of all processes of the group, in order."""
        parts = [torch.empty_like(own) for _ in range(self.size)]
        torch.distributed.all_gather(parts, own.contiguous(), group=self.group)
        return torch.cat(parts)

    def exchange(
        self, x: Tensor, counts: list[int], run: Callable[[Tensor, list[int]], Tensor]
    ) -> Tensor:
        """Rows to the processes of their experts, and the results back.

        Args:
            x: `[rows, width]`, sorted by expert.
            counts: rows of each expert, of all processes.
            run: the experts of this process, on rows sorted by expert and their counts.

        Returns:
            `[rows, width]`, in the order of `x`.
        """
        sent = torch.tensor(counts, device=x.device).view(self.size, -1)
        came = torch.empty_like(sent)
        torch.distributed.all_to_all_single(came, sent, group=self.group)
        out, back = sent.sum(1).tolist(), came.sum(1).tolist()
        rows = self._travel(x, out, back)
        # What came is sorted by process, then by expert.
        expert = torch.arange(came.shape[1], device=x.device).repeat(self.size)
        order = expert.repeat_interleave(came.flatten()).argsort(stable=True)
        y = run(rows[order], came.sum(0).tolist())
        home = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).to(order.device))
        return self._travel(y[home], back, out)

    def _travel(self, x: Tensor, out: list[int], back: list[int]) -> Tensor:
        return _Travel.apply(x, out, back, self.group)


class _Travel(torch.autograd.Function):
    """Rows to other processes; their gradients take the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, out: list[int], back: list[int], group: Any) -> Tensor:
        ctx.way = back, out, group
        room = x.new_empty(sum(back), x.shape[1])
        torch.distributed.all_to_all_single(room, x.contiguous(), back, out, group=group)
        return room

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _Travel.apply(grad, *ctx.way), None, None, None


def optimizer_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer with experts of their own, as DeepSpeed's engine wants them.

    Args:
        groups: of a model whose experts processes share.
    """
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    named = [{**group, "name": f"group_{number}"} for number, group in enumerate(groups)]
    split = split_params_into_different_moe_groups_for_optimizer(named)
    return [group for group in split if group["params"]]


def _mark(experts: int, group: str) -> nn.Module:
    """A module without parameters by which DeepSpeed's engine knows that there are experts."""
    from deepspeed.moe.layer import MoE

    class Mark(MoE):
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = experts
            # Asked for where checkpoints are written; this module has no experts of its own.
            self.expert_group_name, self.num_local_experts = group, 0

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """The groups exist already."""

    return Mark()
