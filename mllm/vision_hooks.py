"""Hooks on the vision path: around get_image_features, in the tower, at the projector."""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from mllm import attention, compat, placeholders
from mllm.bound import Bound
from mllm.calls import call_of, prompt_of, run_of
from mllm.errors import PlanError
from mllm.hooks import Hooks
from mllm.pre_llm import VisionRun
from mllm.views import VIEW

_VISION: ContextVar[VisionRun | None] = ContextVar("mllm_vision", default=None)
#: Arguments that say where the tower is read.
_WHERE = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")


class VisionHooks:
    """What runs a plan's pre-LLM stages when the model looks at pictures.

    Args:
        patched: the model and its plan.
    """

    def __init__(self, patched: Bound) -> None:
        self.patched, self.family = patched, patched.family

    def install(self, hooks: Hooks) -> None:
        """Put in what the plan needs."""
        patched, family = self.patched, self.family
        for kind in [kind for kind, of in patched.kinds.items() if of is not None]:
            features = functools.partial(self._features, kind)
            hooks.wrap(family.base, f"get_{kind}_features", features)
        if patched.early or patched.before_projecting or patched.space is not None:
            hooks.pre(family.projector, self._projector_pre)
        if patched.early or patched.replaces:
            hooks.post(family.projector, self._projector_post)
        if patched.early:
            hooks.post(family.tower, self._tower_post)
        for i in patched.tower_blocks:
            hooks.post(family.blocks[i], functools.partial(self._block_post, i))
        for i, block in enumerate(family.blocks if patched.mergers else ()):
            hooks.wrap(block, "forward", functools.partial(self._block, i))

    def take_views(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take the tiles of pictures out of the arguments of a call; see :class:`Views`."""
        names = [name for name in kwargs if self.patched.view_grids and name.startswith(VIEW)]
        return {name.removeprefix(VIEW): kwargs.pop(name) for name in names}

    def _features(self, kind: str, original: Any, args: tuple, kwargs: dict) -> Any:
        patched, inside = self.patched, _VISION.get()
        if inside is not None and inside.patched is patched:
            return original(*args, **kwargs)  # videos read by the method for images
        inputs = compat.arguments(inspect.signature(original), args, kwargs)
        for name in _WHERE:
            configured = getattr(self.family.model.config, name, None)
            if inputs.get(name) not in (None, configured):
                raise PlanError(
                    f"a plan reads the tower where the config says: {name}={configured!r}",
                    argument=name,
                    given=inputs[name],
                    expected="set it in the config before mllm.patch",
                )
        decoder_run, call, prompt = run_of(patched), call_of(patched), prompt_of(patched)
        known, prompts = None, {}
        if decoder_run is not None:
            brought = decoder_run.brought
            known, prompts = brought.layouts.get(kind), brought.prompts
        elif patched.reads_prompts and prompt.given is not None:
            given = prompt.given
            marks, counts, _ = placeholders.find(patched, given["input_ids"], given, drafts=False)
            prompts = placeholders.prompts(given, marks, counts, prompt.length)
        stages = None if call is None else call.stages
        run = VisionRun(patched, patched.kinds[kind], inputs, known, prompts.get(kind), stages)
        inputs.update(run.pixels())
        token = _VISION.set(run)
        try:
            with attention.taps(run.signals.taps()):
                output = original(**inputs)
        finally:
            _VISION.reset(token)
        if patched.view_grids:
            self._add_views(run, original, inputs, prompt.views if call is None else call.views)
        output.pooler_output = run.after(output.pooler_output)
        output.mllm_reduction = run.reduction
        if decoder_run is not None:
            decoder_run.brought.reductions[kind] = run.reduction
        return output

    def _add_views(
        self, run: VisionRun, features: Any, inputs: dict[str, Any], views: dict[str, Any]
    ) -> None:
        """Let the tiles of a call's pictures through the tower."""
        if run.family.pixels in views:
            run.family.check(views)
            taken = inspect.signature(features).parameters
            inputs = {**inputs, **{name: x for name, x in views.items() if name in taken}}
            made = features(**inputs).pooler_output
            run.add_views(made, run.family.layouts(views), self.patched.view_grids[0])

    def _projector_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if (run := _VISION.get()) is None:
            return None
        run.signals.unprojected = args[0]
        if self.patched.replaces:
            return self.family.no_tokens(args), kwargs
        if self.patched.early:
            return (run.before_projector(args[0]), *args[1:]), kwargs

    def _projector_post(self, module: nn.Module, args: tuple, output: Tensor) -> Any:
        if (run := _VISION.get()) is not None:
            replaces = self.patched.replaces
            return run.not_projected(output) if replaces else run.after_projector(output)

    def _tower_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        if (run := _VISION.get()) is not None and self.family.prefix:
            run.cls = self.family.cls_feature(output)

    def _block_post(self, block: int, module: nn.Module, args: tuple, output: Any) -> None:
        if (run := _VISION.get()) is not None:
            run.signals.blocks[block] = output[0] if isinstance(output, tuple) else output

    def _block(self, block: int, original: Any, args: tuple, kwargs: dict) -> Any:
        """What runs instead of a tower block's forward, where tokens may merge."""
        if (run := _VISION.get()) is None:
            return original(*args, **kwargs)
        given = {**dict(zip(("hidden_states", "attention_mask"), args, strict=False)), **kwargs}
        hidden, mask = given.pop("hidden_states"), given.pop("attention_mask", None)
        return run.tower.block(block, hidden, mask, given)
