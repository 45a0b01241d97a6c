"""What learned token compression shares: several budgets in one set of weights, and attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm.errors import PlanError
from mllm.routers.schedules import draw


class Elastic:
    """One set of weights for several budgets; beside a method's kind, and before it.

    A subclass has the fields `keep` (None is the most), `train` (`draw`: one of the budgets in
    each forward, `sum`: all of them, their losses averaged, `keep`: that one alone) and `weights`
    (how often each is drawn), which an adapter does not depend on, and says which budgets are
    `trained`.
    """

    free = ("keep", "train", "weights")

    def __post_init__(self) -> None:
        super().__post_init__()
        trained, weights = self.trained(), self.weights
        if self.keep is None:
            self.keep = max(self.served(), default=0)
        if self.keep not in self.served():
            below = [n for n in trained if n < self.keep]
            near = [max(below, default=None), min(set(trained) - set(below), default=None)]
            near = " or ".join(str(n) for n in near if n is not None)
            raise self._wrong("keep", "a trained budget; nearest", near or "none")
        whole = weights is None or (len(weights) == len(trained) and min(weights) >= 0)
        if not whole or (weights and not sum(weights)):
            raise self._wrong("weights", f"{len(trained)} weights", "one from 0 for each budget")

    def trained(self) -> Sequence[int]:
        """Budgets that training has."""
        raise NotImplementedError

    def served(self) -> Sequence[int]:
        """Budgets that inference may have."""
        return self.trained()

    def in_training(self, seed: int, step: int) -> list[Any]:
        if self.train == "keep":
            return [self]
        every = self.trained()
        if self.train == "draw":
            every = [draw(every, self.weights, seed, step)]
        return [self.replace(keep=n) for n in every]

    def _wrong(self, field: str, what: str, expected: str) -> PlanError:
        given = getattr(self, field)
        return PlanError(
            f"{self.info.name}: {field}={given!r} is not {what}: {expected}",
            argument=field, given=given, expected=expected,
        )  # fmt: skip


def check_heads(name: str, heads: int, width: int) -> None:
    """PlanError unless heads divide a width."""
    if heads < 1 or width % heads:
        raise PlanError(
            f"{name}: {heads} heads do not divide the width {width}",
            argument="heads",
            given=heads,
            expected=f"a divisor of {width}",
        )


class Attention(nn.Module):
    """Attention as in `nn.MultiheadAttention`, without dropout.

    Args:
        width: of queries and the output.
        heads: a divisor of it.
        source: width of what keys and values are made of; None is that of queries.
    """

    def __init__(self, width: int, heads: int, source: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (
            nn.Linear(n, width) for n in (width, source or width, source or width, width)
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """`[batch, queries, width]`.

        Args:
            query: `[batch or 1, queries, width]`.
            key: `[batch or 1, keys, source]`.
            value: `[batch, keys, source]`.
            mask: bool, broadcast to `[batch, heads, queries, keys]`; false is hidden.
        """
        query, key, value = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part, x in ((self.query, query), (self.key, key), (self.value, value))
        )
        query, key = (x.expand(len(value), -1, -1, -1) for x in (query, key))
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(x.transpose(1, 2).flatten(2))

    def flops(self, queries: int, keys: int) -> float:
        """Of one sample."""
        width, source = self.key.out_features, self.key.in_features
        return 4.0 * width * (queries * width + keys * source + queries * keys)


def start(module: nn.Module) -> None:
    """Draw linear layers as the authors do: from a truncated normal of 0.02, without biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)


def mlp(width: int, hidden: int, out: int) -> nn.Sequential:
    """Two linear layers with a GELU between them."""
    return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, out))


def linear_flops(module: nn.Module, rows: int) -> float:
    """Products of all linear layers of a module, each on `rows` rows."""
    sizes = [m.in_features * m.out_features for m in module.modules() if isinstance(m, nn.Linear)]
    return 2.0 * rows * sum(sizes)


def spread(tokens: int, count: int) -> tuple[Tensor, Tensor]:
    """Seats of queries that have no place of their own: even in reading order, as they come.

    Returns:
        int64 `[count]`, the middle of each of `count` spans, and int64 `[tokens]`, the seat of the
        span that a token is in (-1 without any).
    """
    if not count:
        return torch.zeros(0, dtype=torch.long), torch.full((tokens,), -1)
    seat = (2 * torch.arange(count) + 1) * tokens // (2 * count)
    into = seat[torch.arange(tokens) * count // tokens]
    into[seat] = seat
    return seat, into
