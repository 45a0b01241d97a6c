"""Tensors with a shape and no values, so that the engine's own code counts for a model of any size.

The weights and pixels of a model become hollow; then what is computed from them is a shape alone.
Whole numbers and masks are real: rows, positions and choices are what they would be. Where
something is decided by values that nobody has, random ones stand in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from mllm.compressors.base import CacheEvent, Context

_aten = torch.ops.aten
#: Operations whose results are no shapes.
_ASKING = {_aten._local_scalar_dense, _aten.equal, _aten.nonzero}
_INDEXING = {_aten.index, _aten.index_put, _aten.index_put_}
#: Operations that look at the shape of what they are given, and at no value.
_MAKING = {
    _aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.new_empty, _aten.zeros_like,
    _aten.ones_like, _aten.full_like, _aten.empty_like,
}  # fmt: skip
#: What a stage decides in.
_DECISIONS = ("reduce", "merge", "act", "layer_end", "group_end", "prefill_end")

_POWER: ContextVar[int] = ContextVar("mllm_hollow_power", default=1)


class Hollow(Tensor):
    """A tensor that says it is on the CPU, and has no values.

    Args:
        form: the same on the meta device.
    """

    form: Tensor

    @staticmethod
    def __new__(cls, form: Tensor) -> Hollow:
        hollow = Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride(), storage_offset=form.storage_offset(),
            dtype=form.dtype, device="cpu",
        )  # fmt: skip
        hollow.form = form
        return hollow

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.form.untyped_storage()

    def __repr__(self) -> str:
        return f"Hollow({list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:  # else it is taken apart, with its mask
            query, _, value = args[:3]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs, packet = dict(kwargs or {}), func.overloadpacket
        given: dict[int, Tensor] = {}

        def form(x: Tensor) -> Tensor:
            own = x.form if isinstance(x, Hollow) else x.to("meta")
            given[id(own)] = x
            return own

        def for_real() -> Any:
            fill = _blank if packet in _MAKING else filled
            return func(*pytree.tree_map_only(Hollow, fill, args),
                        **pytree.tree_map_only(Hollow, fill, kwargs))  # fmt: skip

        if packet in _ASKING:
            return for_real()
        forms = args
        if packet in _INDEXING:
            forms = (args[0], _whole(args[1]), *args[2:])
        forms, more = pytree.tree_map_only(Tensor, form, (forms, kwargs))
        if more.get("device") is not None:
            more["device"] = torch.device("meta")
        made, tree = pytree.tree_flatten(func(*forms, **more))
        found = [given.get(id(x), Hollow(x) if _stays(x) else None) for x in made]
        if not all(isinstance(x, Hollow) for x in found):
            real = pytree.tree_leaves(for_real())
            found = [x if isinstance(x, Hollow) else y for x, y in zip(found, real, strict=True)]
        return pytree.tree_unflatten(found, tree)


def _stays(x: Any) -> bool:
    """Whether what was computed from hollow tensors is hollow itself."""
    return isinstance(x, Tensor) and (x.dtype.is_floating_point or x.dtype == torch.uint8)


def _whole(indices: list[Tensor | None]) -> list[Tensor | None]:
    """Indices without masks, whose results have no shape that is known beforehand."""
    found: list[Tensor | None] = []
    for index in indices:
        mask = index is not None and index.dtype == torch.bool
        found += index.nonzero().unbind(1) if mask else [index]
    return found


def filled(x: Hollow) -> Tensor:
    """Random values in place of none: between zero and one."""
    values = torch.rand(x.shape) ** _POWER.get()
    return values.to(x.dtype)


def _blank(x: Hollow) -> Tensor:
    return torch.zeros((), dtype=x.dtype).expand(x.shape)


@contextlib.contextmanager
def guessing(seed: int, power: int) -> Iterator[None]:
    """While open, values that nobody has are random: uniform ones to some power."""
    token = _POWER.set(power)
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        _POWER.reset(token)


def hollow_out(model: nn.Module) -> None:
    """Make the weights and buffers of a model on the meta device hollow."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                hollow = Hollow(weight.detach())
                module._parameters[name] = nn.Parameter(hollow, requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                real = torch.zeros(buffer.shape, dtype=buffer.dtype)
                module._buffers[name] = Hollow(buffer) if _stays(buffer) else real


def let_guess(stage: Any) -> None:
    """Give a stage random values where its signals have none, whenever it decides.

    Not later, in the middle of what it computes: a choice that is made token by token needs the
    same values all the time.
    """

    def decide(decision: Any, given: Context | CacheEvent) -> Any:
        if isinstance(given, CacheEvent):
            signals = {k: _known(x) for k, x in given.signals.items()}
            given.cache.view = _guessed(given.cache.view)
            return decision(dataclasses.replace(given, signals=signals))
        given._signals = {k: _known(x) for k, x in given._signals.items()}
        for name in ("_route", "_attention_input"):  # what weights make of them
            if made := getattr(given, name, None):
                setattr(given, name, _guessed(made))
        return decision(given)

    for name in _DECISIONS:
        if hasattr(stage, name):
            setattr(stage, name, functools.partial(decide, getattr(stage, name)))


def _guessed(made: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: _known(made(*args, **kwargs))


def _known(value: Any) -> Any:
    """A signal with values."""
    if isinstance(value, Hollow):
        return filled(value)
    if dataclasses.is_dataclass(value):
        own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        hollow = {k: filled(x) for k, x in own.items() if isinstance(x, Hollow)}
        return dataclasses.replace(value, **hollow) if hollow else value
    return value
