"""The one Patcher: hooks that run a plan inside a model, and leave nothing behind.

Rows leave at two places: in the decoder's pre-hook (pre-LLM stages) and before a decoder layer
(in-LLM stages). Everything about one forward pass lives in context variables, so an exception
leaves nothing behind and threads do not meet; everything about a conversation lives on its cache.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mllm import attention, compat
from mllm.cache import CacheMark, KVCache, cache_bytes
from mllm.compressors.base import (
    AttentionRows,
    CacheCompressor,
    LayerPruner,
    TokenReducer,
    VisionAttention,
    VisionKeys,
)
from mllm.errors import DataError, NoEffectError, PlanError
from mllm.in_llm import DecoderRun
from mllm.ledger import Ledger, Record, Reduction
from mllm.models import resolve as resolve_family
from mllm.models.base import Family
from mllm.plan import Plan
from mllm.pre_llm import VisionRun
from mllm.tokens import split_images
from mllm.validate import check_plan, family_notes


@dataclass
class _Call:
    """What the top-level call knows and the base model is not told."""

    patched: Patched
    labels: Tensor | None
    logits_to_keep: Any
    outer: _Call | None


_FORWARD: ContextVar[DecoderRun | None] = ContextVar("mllm_forward", default=None)
_CALL: ContextVar[_Call | None] = ContextVar("mllm_call", default=None)
_VISION: ContextVar[VisionRun | None] = ContextVar("mllm_vision", default=None)
_PROMPT: ContextVar[int | None] = ContextVar("mllm_prompt", default=None)


def _outer(variable: ContextVar, patched: Patched) -> Any:
    """What surrounds a new call of `patched`.

    A model is not called inside itself, so state of its own was left by an interrupt: torch runs
    hooks after an exception, but not after a KeyboardInterrupt.
    """
    state = variable.get()
    while state is not None and state.patched is patched:
        state = state.outer
    return state


class Patched:
    """A model with a plan inside; made by :func:`mllm.patch`. A context manager.

    Attributes:
        model: the model that was given.
        plan: the plan, with layers fixed for the model's depth.
        family: the adapter of the model's family.
    """

    def __init__(self, model: nn.Module, plan: Any, *, unvalidated: bool = False) -> None:
        self.model = model
        self.family = resolve_family(model)
        self.kinds = {"image": self.family, "video": self.family.of_videos()}
        self.layers = list(self.family.layers)
        self.windows = [self.family.window(i) for i in range(len(self.layers))]
        self.first_layer = {self.family.kind(i): i for i in range(len(self.layers))[::-1]}
        requested = Plan.of(plan)
        self.plan = Plan(
            [
                s.at_depth(len(self.layers), self.family.first_cut)
                if isinstance(s, LayerPruner)
                else s
                for s in requested.stages
            ],
            requested.seed,
        )
        self.plan_notes = [
            f"{s.info.name}: layer {s.paper_layer} of {s.info.reference_layers} scaled to "
            f"layer {now.layer} of {len(self.layers)}"
            for s, now in zip(requested.stages, self.plan.stages, strict=True)
            if isinstance(s, LayerPruner) and s.layer is None
        ]
        stages = list(enumerate(self.plan.stages))
        self.reducers = [(i, s) for i, s in stages if isinstance(s, TokenReducer)]
        self.pruners = [(i, s) for i, s in stages if isinstance(s, LayerPruner)]
        self.compressors = [(i, s) for i, s in stages if isinstance(s, CacheCompressor)]
        check_plan(self, unvalidated)
        self.plan_notes += family_notes(self)
        self.cuts = sorted({s.layer for _, s in self.pruners})
        self.mark = CacheMark(compat.config_sha256(model), self.plan.sha256)
        self._base_signature = inspect.signature(self.family.base.forward)
        self._decoder_names = list(inspect.signature(self.family.decoder.forward).parameters)
        self._records: list[Record] = []
        self._handles: list[Any] = []
        self._served: list[tuple[nn.Module, Any]] = []
        self._wrapped: list[tuple[nn.Module, str, Any]] = []
        self._install()

    def positions(self, stage: Any) -> str:
        """`original` or `compact`; where nothing was asked for, what the family can do."""
        card = "original" if self.family.mrope else stage.paper_positions
        return stage.positions or card

    def site(self, stage: TokenReducer) -> str:
        """Where a pre-LLM stage works; behind projectors that join patches."""
        joined = stage.site == "pre_projector" and not self.family.per_token
        return "post_projector" if joined else stage.site

    def tapped(self) -> list[nn.Module]:
        """Attention modules that some stage reads from."""
        found = []
        for _, stage in [*self.reducers, *self.pruners, *self.compressors]:
            for signal in stage.reads().values():
                if isinstance(signal, VisionAttention | VisionKeys):
                    found.append(self.family.block_attention(self.family.block(signal.block)))
                elif isinstance(signal, AttentionRows):
                    found.append(self.family.attention(signal.layer))
        return list(dict.fromkeys(found))

    # Installing and removing

    def _install(self) -> None:
        family = self.family
        for module in self.tapped():
            name = f"mllm_{compat.attention_name(module)}"
            self._served.append((module, compat.serve(module, name)))

        def pre(module: nn.Module, hook: Any) -> None:
            self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

        def post(module: nn.Module, hook: Any, always: bool = False) -> None:
            self._handles.append(module.register_forward_hook(hook, always_call=always))

        for top in {id(m): m for m in (self.model, family.model)}.values():
            pre(top, self._top_pre)
            post(top, self._top_post, always=True)
        pre(family.base, self._base_pre)
        post(family.base, self._base_post, always=True)
        pre(family.decoder, self._decoder_pre)
        post(family.decoder, self._decoder_post)
        for i, layer in enumerate(self.layers):
            pre(layer, functools.partial(self._layer_pre, i))
            if self.compressors:
                post(layer, functools.partial(self._layer_post, i))
        if any(self.site(stage) == "pre_projector" for _, stage in self.reducers):
            pre(family.projector, self._projector_pre)
            post(family.projector, self._projector_post)
            post(family.tower, self._tower_post)

        for kind in [kind for kind, of in self.kinds.items() if of is not None]:
            self._wrap(family.base, f"get_{kind}_features", self._features, kind)
        self._wrap(family.model, "generate", self._generate)
        family.base.mllm_patched = True

    def _wrap(self, owner: nn.Module, name: str, around: Any, *more: Any) -> None:
        """Put `around(*more, original, args, kwargs)` in place of a method of this instance."""
        original = getattr(owner, name)

        # generate() reads the signature of get_image_features to choose its arguments.
        @functools.wraps(original)
        def wrapper(*args, **kwargs):
            return around(*more, original, args, kwargs)

        self._wrapped.append((owner, name, owner.__dict__.get(name)))
        setattr(owner, name, wrapper)

    def remove(self) -> None:
        """Take the plan out; the model is exactly what it was. May be called twice."""
        for handle in self._handles:
            handle.remove()
        for module, config in self._served:
            module.config = config
        for owner, name, before in self._wrapped:
            delattr(owner, name)
            if before is not None:
                setattr(owner, name, before)
        if self._wrapped:
            del self.family.base.mllm_patched
        self._handles, self._served, self._wrapped = [], [], []
        self._forget()

    def _forget(self) -> None:
        _CALL.set(_outer(_CALL, self))
        _FORWARD.set(_outer(_FORWARD, self))

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self._handles else "removed"
        return f"Patched({type(self.model).__name__}, {self.plan.spec!r}, {state})"

    def new_mark(self) -> CacheMark:
        """What a new cache is told of the model and plan that fill it."""
        return CacheMark(self.mark.config_sha256, self.mark.plan_sha256)

    def kv(self, cache: Any) -> KVCache:
        """Look at a cache that this model has filled, and change it, by logical index.

        Args:
            cache: `past_key_values` of a forward or of `generate()`.

        Raises:
            CacheMismatchError: a cache that no patched model has used.
        """
        return KVCache(cache, self.family)

    @property
    def ledger(self) -> Ledger:
        """The account of the newest prefill."""
        return Ledger(self._records)

    # The call, from the outside in

    def _generate(self, generate: Any, args: tuple, kwargs: dict) -> Any:
        config = kwargs.get("generation_config") or self.family.model.generation_config
        name = kwargs.get("cache_implementation") or config.cache_implementation
        if name not in (None, "dynamic"):
            raise PlanError(
                f"a {name} cache cannot hold a plan's per-layer lengths",
                argument="cache_implementation",
                given=name,
                expected="dynamic",
            )
        chunk = kwargs.get("prefill_chunk_size") or config.prefill_chunk_size
        if chunk:
            raise PlanError(
                "a prompt that is read in chunks has no last row to decide by until the end",
                argument="prefill_chunk_size",
                given=chunk,
                expected="None",
            )
        self._forget()
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        self._carry_on(kwargs.get("past_key_values"))
        if self.family.mrope and ids is not None and kwargs.get("past_key_values") is None:
            # Positions come from the pictures, before the prompt is read.
            encoders = kwargs.get("mm_encoder_outputs") or {}
            for kind, family in self.kinds.items():
                if family is not None:
                    self._placeholders(kind, family, ids, kwargs, encoders.get(kind))
        token = _PROMPT.set(None if ids is None else ids.shape[1])
        try:
            return generate(*args, **kwargs)
        finally:
            _PROMPT.reset(token)

    def _top_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        outer = _outer(_CALL, self) if module is self.model else _CALL.get()
        labels = kwargs.get("labels")
        if labels is None and outer is not None and outer.patched is self:
            labels = outer.labels  # a PEFT wrapper's call, around this one
        _CALL.set(_Call(self, labels, kwargs.get("logits_to_keep", 0), outer))

    def _top_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        if (call := _CALL.get()) is not None:
            _CALL.set(call.outer)

    def _carry_on(self, cache: Any) -> None:
        """Give the base model back what it remembered of this conversation.

        In between it may have had another one, or the cache comes from a file.
        """
        mark = getattr(cache, "mllm", None)
        for name, value in ({} if mark is None else mark.carried).items():
            setattr(self.family.base, name, value)

    def _base_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = compat.arguments(self._base_signature, args, kwargs)
        if _PROMPT.get() is None:  # generate() has done so
            self._carry_on(given.get("past_key_values"))
        ids, encoders = given.get("input_ids"), given.get("mm_encoder_outputs") or {}
        length, cache = _PROMPT.get(), given.get("past_key_values")
        if length is not None and cache is not None and cache.get_seq_length() >= length:
            ids = None  # an image token behind the prompt is a candidate copied from it
        seen: dict[str, Tensor] = {}
        reductions: dict[str, Reduction] = {}
        for kind, family in self.kinds.items():
            encoded = encoders.get(kind)
            if family is None:
                if given.get("pixel_values_videos") is not None or encoded is not None:
                    raise DataError(
                        f"the tokens of videos cannot be reduced in {type(self.model).__name__}",
                        argument="pixel_values_videos",
                        given="a video",
                        expected="images",
                    )
                continue
            visual = self._placeholders(kind, family, ids, given, encoded)
            if visual is not None:
                seen[kind] = visual
                if encoded is not None:
                    reductions[kind] = encoded.mllm_reduction
        visual = None if not seen else functools.reduce(torch.logical_or, seen.values())
        mask = given.get("attention_mask")
        outer = _outer(_FORWARD, self)
        run = DecoderRun(self, visual, None, mask, outer=outer, seen=seen, reductions=reductions)
        _FORWARD.set(run)

    def _placeholders(
        self, kind: str, family: Family, ids: Tensor | None, given: dict[str, Any], encoded: Any
    ) -> Tensor | None:
        """Rows of images or of videos: bool `[batch, rows]`, None without any."""
        has_pixels = given.get(family.pixels) is not None or encoded is not None
        if ids is None and has_pixels:
            raise DataError(
                "visual rows cannot be found without input_ids",
                argument="input_ids",
                given=None,
                expected="input_ids with the pixels",
            )
        if ids is None or not (has_pixels or ids.shape[1] > 1):
            return None
        visual = ids == family.image_token_id
        counts = visual.sum(1).tolist()
        found = any(counts)
        if found != has_pixels:
            raise DataError(
                f"the prompt has {kind} placeholders but no pixels were given"
                if found
                else f"pixels were given but the prompt has no {kind} placeholder",
                argument=family.pixels if found else "input_ids",
                given=None if found else f"no token {family.image_token_id}",
                expected="as many placeholders as visual tokens",
            )
        if not found:
            return None
        reduction = getattr(encoded, "mllm_reduction", None)
        if encoded is not None and reduction is None:
            raise DataError(
                "mm_encoder_outputs were not computed by the patched model",
                argument="mm_encoder_outputs",
                given=type(encoded).__name__,
                expected=f"get_{kind}_features of the patched model, or {family.pixels}",
            )
        self._check_counts(family, kind, counts, given, encoded, reduction)
        return visual

    def _check_counts(
        self,
        family: Family,
        kind: str,
        counts: list[int],
        given: dict[str, Any],
        encoded: Any,
        reduction: Reduction | None,
    ) -> None:
        """Every sample's placeholders are whole images, and there are as many as were given."""
        if encoded is None:
            family.check(given)
            sizes = [layout.tokens for layout in family.layouts(given)]
            total = sum(sizes)
        else:
            sizes, total = reduction.sizes, sum(len(f) for f in encoded.pooler_output)
        if sum(counts) != total or split_images(counts, sizes) is None:
            tokens = " or ".join(str(n) for n in dict.fromkeys(sizes))
            raise DataError(
                f"the samples have {counts} {kind} placeholders for {len(sizes)} {kind}s of "
                f"{tokens} visual tokens",
                argument="input_ids",
                given=counts,
                expected=f"{tokens} placeholders per {kind}, {total} in the batch",
            )

    def _base_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        if (run := _FORWARD.get()) is not None:
            attention.close_taps()
            _FORWARD.set(run.outer)

    # Pre-LLM stages: around get_image_features and get_video_features

    def _features(self, kind: str, original: Any, args: tuple, kwargs: dict) -> Any:
        inside = _VISION.get()
        if inside is not None and inside.patched is self:  # videos read by the method for images
            return original(*args, **kwargs)
        inputs = compat.arguments(inspect.signature(original), args, kwargs)
        for name in (
            "vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio"
        ):
            configured = getattr(self.family.model.config, name, None)
            if inputs.get(name) not in (None, configured):
                raise PlanError(
                    f"a plan reads the tower where the config says: {name}={configured!r}",
                    argument=name,
                    given=inputs[name],
                    expected="set it in the config before mllm.patch",
                )
        run = VisionRun(self, self.kinds[kind], inputs)
        inputs.update(run.pixels())
        token = _VISION.set(run)
        try:
            with attention.taps(run.taps()):
                output = original(**inputs)
        finally:
            _VISION.reset(token)
        output.pooler_output = run.after(output.pooler_output)
        output.mllm_reduction = run.reduction
        if (decoder_run := _FORWARD.get()) is not None:
            decoder_run.reductions[kind] = run.reduction
        return output

    def _projector_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if (run := _VISION.get()) is not None:
            return (run.before_projector(args[0]), *args[1:]), kwargs

    def _projector_post(self, module: nn.Module, args: tuple, output: Tensor) -> Any:
        if (run := _VISION.get()) is not None:
            return run.after_projector(output)

    def _tower_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        run = _VISION.get()
        if run is not None and self.family.prefix:
            run.cls = self.family.cls_feature(output)

    # The decoder

    def _decoder_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        run = _FORWARD.get()
        if run is None:
            return None
        kwargs = {**dict(zip(self._decoder_names, args, strict=False)), **kwargs}
        call = _CALL.get()
        run.start(kwargs, _PROMPT.get(), None if call is None else call.labels)
        if self.compressors or (run.visual is not None and self.pruners):
            if self.pruners and call is None and module.training and torch.is_grad_enabled():
                raise PlanError(
                    "the model was wrapped after it was patched, so supervised tokens cannot be "
                    "told from the prompt",
                    argument="model",
                    given=type(self.model).__name__,
                    expected="patch the wrapped (PEFT) model",
                )
            attention.open_taps(run.taps())
        return (), kwargs

    def _layer_pre(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        run = _FORWARD.get()
        if run is None:
            return DecoderRun.replayed(self.cuts, layer, args, kwargs)
        return run.layer(layer, module.training, args, kwargs)

    def _layer_post(self, layer: int, module: nn.Module, args: tuple, output: Any) -> None:
        run = _FORWARD.get()
        if run is not None and run.events is not None:
            run.events.layer_end(layer)

    def _decoder_post(self, module: nn.Module, args: tuple, output: Any) -> Any:
        run = _FORWARD.get()
        if run is None:
            return None
        if run.events is not None:
            run.events.forward_end()
        if run.cache is not None:
            base, names = self.family.base, self.family.carried
            carried = {name: getattr(base, name) for name in names}
            run.cache.mllm.carried = {k: v for k, v in carried.items() if v is not None}
        if run.visual is None:
            self._book_text(run)
            return output
        ran = run.ran | run.reduction.ran
        missing = [s.info.name for n, s in enumerate(self.plan.stages) if n not in ran]
        if missing:
            raise NoEffectError(
                f"visual rows were present but {', '.join(missing)} did not run",
                argument="plan",
                given=self.plan.spec,
                expected="every stage runs",
            )
        hidden = output.last_hidden_state
        output.last_hidden_state = run.restore(hidden)
        self._book(run, self.plan_notes + run.notes, hidden.element_size())
        return output

    def _book_text(self, run: DecoderRun) -> None:
        """A decode step, or a text-only prefill: the first turn's, or a later turn's."""
        past, rows, length = run.past_logical, run.full.valid.shape[1], _PROMPT.get()
        # Within generate(), several rows behind the prompt are candidates to verify.
        new_turn = rows > 1 if length is None else past < length
        if not past or new_turn:
            itemsize = next(self.family.decoder.parameters()).element_size()
            self._book(run, ["no visual tokens: the plan had nothing to do"], itemsize)
        elif self._records:
            self._records[-1].decode_steps += 1

    def _book(self, run: DecoderRun, notes: list[str], itemsize: int) -> None:
        cache = run.cache
        if not run.past_logical:
            self._records.clear()  # a new conversation
        stored, meta = cache_bytes(cache)
        call = _CALL.get()
        rows = run.full.valid.shape[1]
        asked = call.logits_to_keep if call is not None else 0
        asked = asked.numel() if isinstance(asked, Tensor) else asked
        record = Record(
            config=self.family.text_config,
            full=run.full,
            tables=run.tables,
            past=run.past,
            past_logical=run.past_logical,
            windows=self.windows,
            images=run.images,
            reduction=run.reduction,
            logit_rows=min(asked, rows) if asked else rows,
            kv_bytes=stored,
            kv_meta_bytes=meta,
            itemsize=cache.layers[0].dtype.itemsize if stored else itemsize,
            cached=stored > 0,
            selection_flops=run.selection_flops,
            notes=notes,
        )
        self._records.append(record)
