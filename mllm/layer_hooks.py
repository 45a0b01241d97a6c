"""Hooks on decoder layers: around each of them, in its branches, in place of FFNs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm import attention
from mllm.actions import IN_ATTENTION
from mllm.calls import run_of
from mllm.compressors.base import Hidden
from mllm.hooks import Hooks
from mllm.in_llm import DecoderRun
from mllm.routers.base import NAME
from mllm.routers.experts import ROUTING

if TYPE_CHECKING:
    from mllm.patcher import Patched


class LayerHooks:
    """What runs a plan's in-LLM stages, and its experts, at the layers of the decoder.

    Args:
        patched: the model and its plan; its experts are built.
    """

    def __init__(self, patched: Patched) -> None:
        self.patched, self.places = patched, patched.upcycled.places

    def install(self, hooks: Hooks) -> None:
        """Put in what the plan needs."""
        patched, family = self.patched, self.patched.family
        for i, layer in enumerate(patched.layers):  # a cache may hold other tokens in any of them
            hooks.pre(layer, functools.partial(self._layer_pre, i))
            if patched.compressors:
                hooks.post(layer, functools.partial(self._layer_post, i))
        for i in self.places:
            hooks.pre(family.attention(i), self._routing_pre)  # before others change its arguments
            hooks.wrap(family.mlp(i), "forward", functools.partial(self._run_experts, i))
        self._install_branches(hooks)

    def _install_branches(self, hooks: Hooks) -> None:
        """Hooks inside of decoder layers, where actions or signals need them."""
        patched, family = self.patched, self.patched.family
        changed = patched.layers_of({"BranchGate", "BranchRows", "LayerGate", *IN_ATTENTION})
        read = {(s.layer, s.of) for _, s in patched.signals if isinstance(s, Hidden)}

        def own(hook: Callable, layer: int, branch: str) -> Callable:
            # Inside of a compiled layer these run as they are.
            return torch.compiler.disable(functools.partial(hook, layer, branch))

        for i in range(len(patched.layers)):
            for branch, module in (("attn", family.attention(i)), ("mlp", family.mlp(i))):
                if i in changed or (i, branch) in read:
                    hooks.pre(module, own(self._branch_pre, i, branch))
                if i in changed:
                    hooks.post(family.branch(i, branch), own(self._branch_post, i, branch))

    def _layer_pre(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        run = run_of(self.patched)
        if run is None:
            return DecoderRun.replayed(layer, args, kwargs)
        args, kwargs = run.layer(layer, module.training, args, kwargs)
        if layer in self.places:
            kwargs["position_embeddings"][0].mllm_routing = run.table.valid, run.routing
        return args, kwargs

    def _layer_post(self, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        run = run_of(self.patched)
        if run is not None and run.events is not None:
            run.events.layer_end(layer)

    def _routing_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        # A recompute finds it on the same tensor as the forward did.
        ROUTING.set(getattr(kwargs["position_embeddings"][0], "mllm_routing", (None, None)))

    def _run_experts(self, layer: int, ffn: Any, args: tuple, kwargs: dict) -> Tensor:
        (hidden,) = args
        (valid, routing), inside = ROUTING.get(), attention.change()
        if valid is not None and inside is not None and inside.layer == layer:
            valid = inside.real("mlp", valid)
        token = ROUTING.set((valid, routing))
        try:
            # By the model's attribute: PEFT may have put a copy in its place.
            bank = getattr(self.patched.family.model, NAME)
            return bank(hidden, self.places[layer], str(layer))
        finally:
            ROUTING.reset(token)

    def _branch_pre(
        self, layer: int, branch: str, module: nn.Module, args: tuple, kwargs: dict
    ) -> Any:
        hidden, run = args[0] if args else kwargs["hidden_states"], run_of(self.patched)
        if run is not None and run.visual is not None:
            run.captures.hidden(layer, branch, hidden)
        if branch == "attn":
            # A recompute finds it on the same tensor as the forward did.
            on = getattr(kwargs["position_embeddings"][0], "mllm_inside", {})
            attention.set_change(on.get(layer))
        inside = attention.change()
        if inside is None or inside.layer != layer or branch not in inside.rows:
            return None
        hidden = inside.enter(branch, hidden)
        if branch == "attn":
            kwargs = {k: inside.given.get(k, value) for k, value in kwargs.items()}
        if args:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def _branch_post(
        self, layer: int, branch: str, module: nn.Module, args: tuple, output: Any
    ) -> Any:
        inside = attention.change()
        if inside is None or inside.layer != layer:
            return None
        if branch == "attn" and (run := run_of(self.patched)) is not None:
            run.changes.set_aside(layer)
        return inside.leave(branch, output)
