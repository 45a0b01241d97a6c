"""A cache of transformers that a plan uses: made its own, told what comes, measured."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from mllm.actions import Attend, BranchGate
from mllm.cache.layer import SlotLayer
from mllm.cache.slots import SlotTable
from mllm.compat import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from mllm.errors import CacheMismatchError, PlanError
from mllm.tokens import TokenTable


@dataclass
class CacheMark:
    """Whose cache it is; kept on the cache as `mllm`.

    Attributes:
        config_sha256, plan_sha256: of the model and of the plan that fill it.
        unverified: tokens that are certain, if the newest forward also held candidates of
            assisted decoding.
        carried: attributes of the base model that belong to the conversation, of every sample, or
            of every prompt whose beams they are: `[batch, ...]`.
        state: what methods remember about the conversation.
        lasting: by stage number, actions that hold for the conversation.
        pictured: bool `[batch]`, samples that have had images, where methods ask; None is all.
    """

    config_sha256: str
    plan_sha256: str
    unverified: int | None = None
    carried: dict[str, Tensor] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    lasting: dict[int, list[Any]] = field(default_factory=dict)
    pictured: Tensor | None = None

    def copy(self) -> CacheMark:
        """The mark for a snapshot: only `state` is changed in place."""
        return replace(self, state=dict(self.state))

    def rows(self, change: Callable[[Tensor], Tensor], batch: int) -> None:
        """What is known of samples goes through `change`, as their slots do.

        Args:
            change: of the batch axis, the first.
            batch: samples before.

        Raises:
            CacheMismatchError: actions that last speak of single samples.
        """
        if any(_of_samples(placed) for own in self.lasting.values() for placed in own):
            raise CacheMismatchError(
                "actions that last for the conversation know its samples by their order",
                argument="past_key_values",
                given="gates or biases of single samples",
                expected="a plan without, or the samples as they are",
            )
        carried = self.carried.items()
        self.carried = {k: change(x.repeat_interleave(batch // len(x), 0)) for k, x in carried}
        if self.pictured is not None:
            self.pictured = change(self.pictured)


def _of_samples(placed: Any) -> bool:
    """Whether an action that lasts says something else of one sample than of another."""
    action = placed.action
    number = isinstance(action, BranchGate) and not isinstance(action.scale, Tensor)
    return not number or placed.on is not None


def adopt(cache: Cache, windows: list[int | None], mark: CacheMark) -> None:
    """Turn the caller's DynamicCache, in place, into one with :class:`SlotLayer` layers.

    Args:
        cache: an empty cache, or one adopted before. Empty, it begins anew, whatever it has held.
        windows: per decoder layer the window that it sees, None is everything.
        mark: the model and plan in use.

    Raises:
        PlanError: the cache is of another kind.
        CacheMismatchError: another model or plan filled it, or none did, or a forward broke off.
    """
    _check_foreign(cache)
    own = bool(cache.layers) and all(type(layer) is SlotLayer for layer in cache.layers)
    if own and cache.get_seq_length():
        _check_mark(cache, mark, len(windows))
        _check_alike(cache)
        for layer in cache.layers:
            layer.unannounce()
        return
    kinds = [DynamicLayer if w is None else DynamicSlidingWindowLayer for w in windows]
    plain = own or type(cache) is DynamicCache and all(
        type(layer) is kind for layer, kind in zip(cache.layers, kinds, strict=False)
    )
    if not plain or getattr(cache, "offloading", False):
        raise PlanError(
            f"a {type(cache).__name__} with "
            f"{type(cache.layers[0]).__name__ if cache.layers else 'no'} layers cannot hold a "
            "plan's per-layer lengths",
            argument="past_key_values",
            given=type(cache).__name__,
            expected="a DynamicCache (no static, quantised, sliding or offloaded cache)",
        )
    layers = [
        SlotLayer(window, getattr(old, "record_past", False))
        for old, window in itertools.zip_longest(cache.layers[: len(windows)], windows)
    ]
    cache.layers = layers
    cache.layer_class_to_replicate = None
    cache.mllm = mark


def check_whole(cache: Cache) -> None:
    """CacheMismatchError where an unpatched model has added tokens, or a forward has broken off."""
    _check_foreign(cache)
    _check_alike(cache)


def _check_foreign(cache: Cache) -> None:
    """What an unpatched model has stored was not reduced, and nobody would notice."""
    layers = getattr(cache, "layers", ())
    foreign = [x for x in layers if not isinstance(x, SlotLayer) or x.foreign]
    if stored := max((int(x.get_seq_length()) for x in foreign), default=0):
        raise CacheMismatchError(
            f"this cache was filled with {stored} tokens without a plan",
            argument="past_key_values",
            given=type(cache).__name__,
            expected="a new cache, or one that this plan has filled",
        )


def _check_alike(cache: Cache) -> None:
    """Every forward adds the same tokens to all layers."""
    seen = [layer.seen for layer in cache.layers]
    if len(set(seen)) > 1:
        raise CacheMismatchError(
            f"a forward pass broke off and left {seen} tokens in the layers",
            argument="past_key_values",
            given=seen,
            expected="a new cache",
        )


def _check_mark(cache: Cache, mark: CacheMark, depth: int) -> None:
    held = cache.mllm
    if held.config_sha256 != mark.config_sha256 or len(cache.layers) != depth:
        what = "model"
    elif held.plan_sha256 != mark.plan_sha256:
        what = "plan"
    else:
        return
    raise CacheMismatchError(
        f"the cache was filled by another {what}",
        argument="past_key_values",
        given=getattr(held, "plan_sha256" if what == "plan" else "config_sha256")[:12],
        expected=f"a cache of this {what}, or a new cache",
    )


def note_rows(
    cache: Cache,
    layers: range,
    table: TokenTable,
    position: Tensor,
    padded: bool,
    advance: int,
    intact: int,
    dropped: bool = False,
) -> None:
    """Announce the rows of a forward to consecutive layers that all see the same rows.

    Args:
        cache: an adopted cache.
        layers: the layers.
        table: rows that they see.
        position: int64 `[1 or 3, batch, rows]`, what the rotary embedding is given.
        padded: whether any row is invalid.
        advance: tokens by which the logical length grows.
        intact: every token of this forward from this logical index on gets a slot.
        dropped: some token gets none.
    """
    new = SlotTable.of(table, position, padded)
    if table.valid.shape[1] == advance and not (padded or dropped):
        seen = cache.layers[layers[0]].seen
        new.know(list(range(seen, seen + advance)))
    for layer in (cache.layers[i] for i in layers):
        slots = new if layer.table is None else layer.table.cat(new)
        layer.note(slots, advance, intact, dropped)
    tell_compressed(cache)


def tell_compressed(cache: Cache) -> None:
    """Let all layers know if any is compressed: an unpatched model has to stop at the first."""
    if any(layer.compressed for layer in cache.layers):
        for layer in cache.layers:
            layer.planned = True


def cache_bytes(cache: Cache | None) -> tuple[int, int]:
    """Bytes of the tensors that a cache really holds: (keys and values, everything else).

    Room for growth and host memory count; tensors that layers share count once.
    """
    layers = [] if cache is None else cache.layers
    segments = [segment for layer in layers for segment in layer.segments]
    stored = [t for segment in segments for t in segment.tensors()]
    lasting = getattr(getattr(cache, "mllm", None), "lasting", {})
    for action in (p.action for placed in lasting.values() for p in placed):
        stored += [action.keys, action.values] if isinstance(action, Attend) else []
    meta = [t for segment in segments for t in segment.meta()]
    meta += [t for x in layers if x.table is not None for t in x.table.columns.values()]
    meta += [t for x in layers for t in (*x.shifts.values(), *x.samples.values())]
    return _storages(stored), _storages(meta)


def _storages(tensors: list[Tensor]) -> int:
    # Not by address: tensors without values (`mllm.hollow`) have none.
    found = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())
