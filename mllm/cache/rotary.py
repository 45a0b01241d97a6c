"""Rotary positions of stored keys: put on and taken off by the model's own module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from mllm import attention

if TYPE_CHECKING:
    from mllm.models.base import Family


class Rotary:
    """The rotary embedding of one decoder layer: 1-D or M-RoPE, partial, scaled tables.

    A copy of a cache goes on with the same model, so a deep copy is the object itself.

    Args:
        family: the model's adapter.
        layer: 0-based; layers may rotate differently.
    """

    def __init__(self, family: Family, layer: int) -> None:
        self.family, self.layer = family, layer

    def __deepcopy__(self, memo: dict[int, Any]) -> Rotary:
        return self

    def rotate(self, k: Tensor, position: Tensor) -> Tensor:
        """Keys with their positions.

        Args:
            k: `[batch, kv_heads, slots, head_dim]`.
            position: int `[1 or 3, batch, slots]` or `[1 or 3, batch, kv_heads, slots]`.
        """
        return attention.rotate(k, *self._tables(k, position), self.family.neighbours)

    def unrotate(self, k: Tensor, position: Tensor) -> Tensor:
        """Undo :meth:`rotate`: keys as they were before rotary embedding."""
        return attention.unrotate(k, *self._tables(k, position), self.family.neighbours)

    def _tables(self, k: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        family, shape = self.family, position.shape[1:]
        flat = position.flatten(1, -2).long()
        flat = flat.expand(3, -1, -1) if family.mrope else flat[0]
        tables = family.rotary(k.float(), flat.to(k.device), family.kind(self.layer))
        cos, sin = (t.unflatten(0, shape[:-1]) for t in tables)
        return (cos[:, None], sin[:, None]) if len(shape) == 2 else (cos, sin)
