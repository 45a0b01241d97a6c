"""KIVI: stored tokens in few bits, the newest ones as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from mllm.cache.quantised import BITS, Quantised, check_size
from mllm.compressors.base import CacheCompressor, CacheEvent, register

__all__ = ["KIVI", "Quantiser"]


@dataclass
class Quantiser(CacheCompressor):
    """Base of methods that store tokens in few bits; subclasses say which and when."""

    stores: ClassVar[bool] = True

    def demand_bits(self, *names: str) -> None:
        """PlanError for fields that are no number of bits."""
        for name in names:
            expected = ", ".join(map(str, BITS[:-1])) + f" or {BITS[-1]}, which changes nothing"
            self.demand(name, getattr(self, name) in (None, *BITS), expected)

    def fits(self, head_dim: int) -> None:
        check_size(head_dim, self.group_size, "channels of a head")


@register("kivi", paper="arXiv:2402.02750", stage="cache")
@dataclass
class KIVI(Quantiser):
    """Store tokens in 2, 4 or 8 bits: keys by channel, values by token (KIVI).

    A prompt, or a chunk of one, attends as it is. When it ends, all but a remainder of every
    head's tokens are quantised, and while an answer grows, `residual` more as soon as there are so
    many. Each is rounded once; what a method lets go later leaves the others as they are. The
    authors keep the newest `residual` values plain at any time; here values follow their keys.

    Args:
        bits: 2, 4, 8, or 16, which changes nothing.
        key_bits, value_bits: the same, of keys or values alone; None is `bits`.
        group_size: tokens that keys share bounds with, and channels that values do: a divisor of
            the head's channels; one group if the head has fewer.
        residual: plain tokens that are quantised together, a multiple of `group_size`.
    """

    bits: int = 2
    key_bits: int | None = None
    value_bits: int | None = None
    group_size: int = 32
    residual: int = 32

    identity = {"bits": 16}
    chunks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.demand_bits("bits", "key_bits", "value_bits")
        self.demand("group_size", self.group_size > 0, "a whole number from 1")
        whole = self.residual > 0 and self.residual % self.group_size == 0
        self.demand("residual", whole, f"a multiple of group_size={self.group_size}")

    def prefill_end(self, event: CacheEvent) -> None:
        key, value = (self.bits if own is None else own for own in (self.key_bits, self.value_bits))
        if key == value == 16:
            return

        def make(keys: Tensor, values: Tensor, valid: Tensor) -> Any:
            return Quantised.of(keys, values, valid, key, value, self.group_size)

        event.cache.convert(None, make, blocks=self.residual)

    chunk_end = decode_step = verify_end = prefill_end
