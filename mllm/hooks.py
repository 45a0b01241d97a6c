"""What is put into the modules of a model and taken out again: hooks, attributes, submodules."""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from mllm import compat

_MISSING = object()
_KINDS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
)


class Hooks:
    """Changes of single modules; true while any are in. Copies of the modules are without them."""

    def __init__(self) -> None:
        self._handles: list[Any] = []
        self._attributes: list[tuple[nn.Module, str, Any]] = []  # (module, name, before)
        self._children: list[tuple[nn.Module, str]] = []
        self._touched: set[nn.Module] = set()

    def __bool__(self) -> bool:
        return bool(self._touched)

    def pre(self, module: nn.Module, hook: Callable) -> None:
        """Call `hook(module, args, kwargs)` before a forward."""
        self._touch(module)
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def post(self, module: nn.Module, hook: Callable) -> None:
        """Call `hook(module, args, output)` after a forward."""
        self._touch(module)
        self._handles.append(module.register_forward_hook(hook))

    def wrap(self, module: nn.Module, name: str, around: Callable) -> None:
        """Let `around(method, args, kwargs)` stand for a method; the signature stays."""
        method = getattr(module, name)

        # generate() reads the signature of get_image_features to choose its arguments.
        @functools.wraps(method)
        def wrapper(*args, **kwargs):
            return around(method, args, kwargs)

        self.set(module, name, wrapper)

    def serve(self, module: nn.Module) -> None:
        """Let :mod:`mllm.attention` serve an attention module."""
        before = compat.serve(module, f"mllm_{compat.attention_name(module)}")
        self._touch(module)
        self._attributes.append((module, "config", before))

    def set(self, module: nn.Module, name: str, value: Any) -> None:
        """Set an attribute of one module."""
        self._touch(module)
        self._note(module, name, value)

    def add(self, module: nn.Module, name: str, child: nn.Module) -> None:
        """Give a module another submodule."""
        self._touch(module)
        self._children.append((module, name))
        module.add_module(name, child)

    def _touch(self, module: nn.Module) -> None:
        if module not in self._touched:
            self._touched.add(module)
            # Not `__deepcopy__`: a wrapper that has none (PEFT's) would take it for its own.
            self._note(module, "__reduce_ex__", functools.partial(self._plain, module))

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        self._attributes.append((module, name, module.__dict__.get(name, _MISSING)))
        setattr(module, name, value)

    def _plain(self, module: nn.Module, protocol: Any) -> tuple[Any, ...]:
        """What `copy.deepcopy` and `pickle` make a copy of: an ordinary module."""
        state = dict(module.__dict__)
        for owner, name, before in reversed(self._attributes):
            if owner is module and before is _MISSING:
                del state[name]
            elif owner is module:
                state[name] = before
        if added := {name for owner, name in self._children if owner is module}:
            state["_modules"] = {k: m for k, m in state["_modules"].items() if k not in added}
        own = {handle.id for handle in self._handles}
        for name in _KINDS:
            hooks = [(i, hook) for i, hook in state[name].items() if i not in own]
            state[name] = type(state[name])(hooks)
        return copyreg.__newobj__, (type(module),), state

    def remove(self) -> None:
        """Take everything out."""
        for handle in self._handles:
            handle.remove()
        for module, name, before in reversed(self._attributes):
            delattr(module, name)
            if before is not _MISSING:
                setattr(module, name, before)
        for module, name in self._children:
            delattr(module, name)
        for held in (self._handles, self._attributes, self._children, self._touched):
            held.clear()
