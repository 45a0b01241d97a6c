"""Experts in place of an FFN: the module that runs, and the base of the methods."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.compressors.base import _Method
from mllm.errors import PlanError
from mllm.routers.account import Routing, summed
from mllm.routers.dispatch import (
    ALIKE,
    choose,
    combine,
    gated_ffn,
    group,
    grouped_ffn,
    within_capacity,
)

#: Parameters that are stacked over experts.
STACKS = ("gate_proj", "up_proj", "down_proj")
Mode = Literal["sparse", "dense", "first_half", "second_half"]


#: Padding and account of the forward pass whose layer is running: bool `[batch, rows]`.
ROUTING: ContextVar[tuple[Tensor | None, Routing | None]] = ContextVar(
    "mllm_routing", default=(None, None)
)


class ExpertLayer(nn.Module):
    """A router and its experts, in place of the FFN of one decoder layer.

    Parameters: `gate` fp32 `[experts, width]`; `gate_proj`, `up_proj` `[experts, inner, width]` and
    `down_proj` `[experts, width, inner]`; with experts that are always on, `shared_*` of the same
    kinds, without the first dimension; `mix_weight`, `mix_bias` of a residual FFN; `descend`
    `[narrow, width]` and `ascend` `[width, narrow]` around experts of a narrower width, which have
    no `gate_proj`.

    Args:
        stage: the method.
        layer: 0-based decoder layer.
        experts: how many it has.
        act: the activation of the dense FFN.

    Attributes:
        number: of the stage in its plan.
    """

    number: int = 0
    exchange: Callable | None = None  # of expert parallelism

    def __init__(
        self, stage: Experts, layer: int, experts: int, act: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.stage, self.layer, self.experts, self.act = stage, layer, experts, act

    def extra_repr(self) -> str:
        return f"layer={self.layer}, experts={self.experts}, top_k={self.stage.top_k}"

    def flops_row(self) -> float:
        """FLOPs of every row: the router, and what is always on."""
        cost = 2.0 * self.gate.numel()
        if hasattr(self, "descend"):
            cost += 4.0 * self.descend.numel()
        if hasattr(self, "shared_up_proj"):
            cost += 6.0 * self.shared_up_proj.numel()
        return cost + (2.0 * self.mix_weight.numel() if hasattr(self, "mix_weight") else 0.0)

    def flops_choice(self) -> float:
        """FLOPs of a row in one expert."""
        stacks = [p for n in STACKS if (p := getattr(self, n, None)) is not None]
        return sum(2.0 * p[0].numel() for p in stacks)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[batch, rows, width]`; rows that are padding get zeros."""
        valid, routing = ROUTING.get()
        if valid is None or valid.shape != hidden.shape[:2]:
            valid = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
        row, x = valid.flatten().nonzero()[:, 0], hidden.flatten(0, 1)
        x, sample = x[row], row // max(1, hidden.shape[1])
        stage = self.stage
        with torch.autocast(hidden.device.type, enabled=False):
            logits = F.linear(x.float(), self.gate.float())
            scores = logits.softmax(-1)
            best, expert = choose(scores, stage.top_k)
            weight = stage.weights(best)
        fits = None
        if stage.capacity_factor is not None:
            capacity = stage.capacity(valid.sum(1), self.experts)
            priority = best[:, 0].detach() if stage.prioritised else None
            fits = within_capacity(expert, sample, capacity, self.experts, priority)
            weight = weight * fits
        narrow = F.linear(x, self.descend) if hasattr(self, "descend") else x
        y = combine(self._run(narrow, expert, fits, hidden), weight, stage.whole)
        if hasattr(self, "ascend"):
            y = F.linear(y, self.ascend)
        if hasattr(self, "shared_up_proj"):
            shared = gated_ffn(
                x, self.shared_gate_proj, self.shared_up_proj, self.shared_down_proj, self.act
            )
            y = self._mixed(x, shared, y)
        if routing is not None:
            y = self._account(routing, y, logits, scores, expert, fits, sample, valid)
        out = torch.zeros_like(hidden.flatten(0, 1), dtype=y.dtype)
        return out.index_copy(0, row, y).view_as(hidden)

    def _run(self, x: Tensor, expert: Tensor, fits: Tensor | None, hidden: Tensor) -> Tensor:
        """What the chosen experts say: `[rows, k, width]`."""
        k = self.stage.top_k
        flat = expert if fits is None else expert.masked_fill(~fits, self.experts)
        order, counts = group(flat.flatten(), self.experts)
        counts = counts.tolist()
        order = order[: sum(counts)]
        if self.exchange is None:
            ran = self._experts(x[order // k], counts, min(ALIKE, hidden.shape[:2].numel()))
        else:
            ran = self.exchange(x[order // k], counts, self._experts)
        y = x.new_zeros((expert.numel(), x.shape[1]), dtype=ran.dtype)
        return y.index_copy(0, order, ran).view(len(x), k, -1)

    def _experts(self, x: Tensor, counts: list[int], least: int = 1) -> Tensor:
        gate = getattr(self, "gate_proj", None)
        return grouped_ffn(x, counts, gate, self.up_proj, self.down_proj, self.act, least)

    def _mixed(self, x: Tensor, shared: Tensor, routed: Tensor) -> Tensor:
        if not hasattr(self, "mix_weight"):
            return shared + routed
        with torch.autocast(x.device.type, enabled=False):
            mix = F.linear(x.float(), self.mix_weight.float(), self.mix_bias.float()).softmax(-1)
        return combine(torch.stack([shared, routed], 1), mix.flip(-1), whole=True)

    def _account(
        self, routing: Routing, y: Tensor, logits: Tensor, scores: Tensor, expert: Tensor,
        fits: Tensor | None, sample: Tensor, valid: Tensor,
    ) -> Tensor:  # fmt: skip
        """Write down what happened; returns `y`, by which the auxiliary losses learn."""
        stage, samples = self.stage, len(valid)
        everyone = summed if routing.learns else lambda x: x.detach()
        rows = everyone(torch.tensor(len(scores), device=scores.device)).clamp(min=1)
        balance = stage.balance_loss(scores, expert, sample, samples, everyone)
        z = logits.logsumexp(-1).square().sum() / rows
        with torch.no_grad():
            dropped = torch.zeros(samples, dtype=torch.long, device=scores.device)
            taken = expert.flatten()
            if fits is not None:
                dropped.index_add_(0, sample, (~fits).sum(1))
                taken = expert[fits]
            entropy = -(scores * scores.clamp(min=1e-12).log()).sum(-1)
            routing.note(
                self.number,
                self.layer,
                load=torch.bincount(taken, minlength=self.experts),
                entropy=entropy.sum() / max(len(entropy), 1),
                dropped=dropped,
                rows=torch.tensor(len(scores)),
                choices=torch.tensor(expert.numel()),
                balance=balance,
                z=z,
            )
        losses = {"balance": (balance, stage.balance), "z": (z, stage.z)}
        return routing.collect(self.number, self.layer, losses, y)


@dataclass
class Choice(_Method):
    """What the fields of a method stand behind: how many experts there are, and how many run.

    Args:
        experts: of every layer that has some, or of each of these layers in turn.
        top_k: experts that a row goes to.
    """

    experts: int | tuple[int, ...] = 8
    top_k: int = 2


@dataclass
class Experts(Choice):
    """A trained stage that puts experts in place of the FFNs of decoder layers.

    The weights start from the model's own FFNs, and live in a submodule `mllm` of the model.

    Args:
        experts, top_k: as in :class:`Choice`.
        mode: decoder layers: every second from the first ("sparse"), all ("dense"), or a half.
        layers: 0-based decoder layers, instead of `mode`.
        capacity_factor: room of an expert, as a multiple of an even share of the choices of a
            sample without its padding; none is room for all.
        min_capacity: rows that an expert has room for at least.
        balance: coefficient of the load-balance loss, of each layer; the layers are summed.
        z: coefficient of the router z-loss (arXiv:2202.08906), of each layer.

    Attributes:
        whole: the weights of a row add up to one.
        prioritised: where there is no room, rows with higher scores come first.
        first_only: the balance loss counts first choices, not all of them.
        per_sequence: the balance loss is that of every sample, then the mean.
    """

    mode: Mode = "sparse"
    layers: tuple[int, ...] | None = None
    capacity_factor: float | None = None
    min_capacity: int = 0
    balance: float = 0.01
    z: float = 0.0

    site = "experts"
    paper_positions = "original"
    actions = ()
    positions: ClassVar[None] = None
    identity: ClassVar[dict[str, Any] | None] = {}
    oracle = "reference"
    named = ("experts", "top_k")
    whole: ClassVar[bool] = True
    prioritised: ClassVar[bool] = False
    first_only: ClassVar[bool] = True
    per_sequence: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.experts, tuple) and len(self.experts) == 1:
            self.experts = self.experts[0]
        super().__post_init__()
        counts = self.experts if isinstance(self.experts, tuple) else (self.experts,)
        self._demand("experts", bool(counts) and min(counts) >= 1, "a number from 1")
        self._demand("top_k", 1 <= self.top_k <= min(counts), f"from 1 to {min(counts)} (experts)")
        factor = self.capacity_factor
        self._demand("capacity_factor", factor is None or factor > 0, "above 0, or none")
        self._demand("min_capacity", self.min_capacity >= 0, "from 0")
        for name in ("balance", "z"):
            value = getattr(self, name)
            self._demand(name, math.isfinite(value) and value >= 0, "a number from 0")

    def _demand(self, name: str, fine: bool, expected: str) -> None:
        if not fine:
            value = getattr(self, name)
            raise PlanError(
                f"{self.info.name}: {name}={value!r} is not {expected}",
                argument=name, given=value, expected=expected,
            )  # fmt: skip

    def at(self, depth: int) -> list[int]:
        """Decoder layers that get experts, of a model with so many.

        Raises:
            PlanError: a layer outside of the model; as many numbers of experts as layers.
        """
        if self.layers is not None:
            chosen = list(self.layers)
            self._demand("layers", bool(chosen) and 0 <= min(chosen) <= max(chosen) < depth,
                         f"0 <= layer < {depth}")  # fmt: skip
        else:
            chosen = list({
                "sparse": range(0, depth, 2),
                "dense": range(depth),
                "first_half": range(depth // 2),
                "second_half": range(depth // 2, depth),
            }[self.mode])  # fmt: skip
        if isinstance(self.experts, tuple):
            expected = f"one number, or {len(chosen)} of them"
            self._demand("experts", len(self.experts) == len(chosen), expected)
        return chosen

    def count(self, place: int) -> int:
        """Experts of the layer at `place` of those that have some."""
        return self.experts[place] if isinstance(self.experts, tuple) else self.experts

    def weights(self, best: Tensor) -> Tensor:
        """Weights of the chosen experts from their scores: fp32 `[rows, k]`.

        That of a single expert is 1 in value and its score in gradient, else no answer would ever
        teach the router.
        """
        return best / (best.detach() if self.top_k == 1 else best.sum(-1, keepdim=True))

    def capacity(self, rows: Tensor, experts: int) -> Tensor:
        """Rows of each sample that an expert takes, int64 `[samples]`."""
        wanted = rows * (self.capacity_factor * self.top_k / experts)
        return wanted.ceil().long().clamp(min=max(1, self.min_capacity))

    def balance_loss(
        self, scores: Tensor, expert: Tensor, sample: Tensor, samples: int, everyone: Callable
    ) -> Tensor:
        """Experts times the sum of mean score times share of choices; 1 is ideal.

        Args:
            scores: fp32 `[rows, experts]`.
            expert: int64 `[rows, k]`.
            sample: int64 `[rows]`, below `samples`.
            samples: how many.
            everyone: the sum over processes of a tensor.
        """
        chosen = expert[:, :1] if self.first_only else expert
        count = torch.zeros_like(scores).scatter_(1, chosen, 1.0 / chosen.shape[1])
        if self.per_sequence:
            rows = torch.bincount(sample, minlength=samples).clamp(min=1)[:, None]
            share = count.new_zeros(samples, scores.shape[1]).index_add_(0, sample, count) / rows
            of = everyone(torch.tensor(samples, device=scores.device))
            scaled = (share / rows)[sample] / of
        else:
            rows = everyone(torch.tensor(len(scores), device=scores.device)).clamp(min=1)
            scaled = everyone(count.sum(0)) / rows**2
        return scores.shape[1] * (scores * scaled).sum()

    def build(
        self, layer: int, experts: int, own: range, weights: dict[str, Tensor],
        act: Callable[[Tensor], Tensor], draw: torch.Generator,
    ) -> ExpertLayer:  # fmt: skip
        """Experts of one decoder layer from the weights of its FFN.

        Args:
            layer: 0-based decoder layer.
            experts: how many it gets.
            own: those that this process has.
            weights: `gate_proj`, `up_proj` `[inner, width]` and `down_proj` `[width, inner]`.
            act: the FFN's activation.
            draw: random numbers of the router, on the CPU.
        """
        made = ExpertLayer(self, layer, experts, act)
        width = weights["up_proj"].shape[1]
        gate = torch.empty(experts, width).uniform_(-(width**-0.5), width**-0.5, generator=draw)
        made.gate = nn.Parameter(gate.to(weights["up_proj"].device))
        for name, stack in self.start(weights, own).items():
            setattr(made, name, nn.Parameter(stack.detach().clone()))
        return made

    def start(self, weights: dict[str, Tensor], own: range) -> dict[str, Tensor]:
        """Weights by name that the experts `own` start from: copies of the dense FFN."""
        return {name: w.expand(len(own), *w.shape) for name, w in weights.items()}
