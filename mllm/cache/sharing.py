"""What layers do alike is done once: they share the result."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def once(memo: list, key: Any, make: Callable[[], T]) -> T:
    """What `make` gives, or what it gave for the same `key` before.

    Only the newest result is remembered, and only weakly, or a snapshot would hold all since.

    Args:
        memo: where it is remembered; empty at first.
        key: a tuple of plain values, or an object that stands for itself.
        make: makes an object to which weak references are possible.
    """
    if memo and _same(memo[0], key) and (made := memo[1]()) is not None:
        return made
    made = make()
    memo[:] = [key, weakref.ref(made)]
    return made


def _same(key: Any, other: Any) -> bool:
    return key is other or (isinstance(key, tuple) and isinstance(other, tuple) and key == other)


class Change:
    """What happens to the batch axis of everything that a layer holds: call it with a tensor.

    Args:
        apply: what is called.
        key: the same for all layers that are changed alike; see :func:`once`.
    """

    def __init__(self, apply: Callable, key: Any) -> None:
        self.apply, self.key = apply, key

    def __call__(self, x):
        return self.apply(x)
