"""The one Patcher: hooks that run a plan inside a model, and leave nothing behind.

Rows leave at two places: in the decoder's pre-hook (pre-LLM stages) and before a decoder layer
(in-LLM stages). Everything about one forward pass lives in context variables, so an exception
leaves nothing behind and threads do not meet; everything about a conversation lives on its cache.
"""

from __future__ import annotations

import functools
import inspect
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import attention, compat
from mllm.cache import adopt, note_rows
from mllm.compressors.base import (
    AttentionRows,
    Context,
    Features,
    Keep,
    LayerPruner,
    Merge,
    Pool,
    Resize,
    TokenReducer,
    VisionAttention,
    VisionKeys,
    Write,
)
from mllm.errors import DataError, NoEffectError, PlanError
from mllm.ledger import Ledger, Record, Reduction
from mllm.models import resolve as resolve_family
from mllm.plan import Plan
from mllm.tokens import TokenTable, choose_rows, gather_rows, renumber


@dataclass
class _Forward:
    """State of one forward pass of the base model."""

    visual: Tensor | None  # bool [batch, rows], placeholders of this forward
    reduction: Reduction | None
    prompt: Tensor | None = None  # bool [batch, rows], rows before the first supervised token
    full: TokenTable | None = None
    table: TokenTable | None = None  # rows of the current stage
    images: list[list[int]] = field(default_factory=list)
    tables: list[tuple[int, TokenTable]] = field(default_factory=list)
    signals: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    selection_flops: float = 0.0
    past: list[int] = field(default_factory=list)
    past_logical: int = 0
    cache: Any = None
    ran: set[int] = field(default_factory=set)
    replaced: dict[str, Any] = field(default_factory=dict)  # layer arguments of this stage
    replay: dict[int, tuple[Tensor | None, dict]] = field(default_factory=dict)  # by first layer
    taps: Any = None
    notes: list[str] = field(default_factory=list)
    outer: Any = None


@dataclass
class _Call:
    """What the top-level call knows and the base model is not told."""

    labels: Tensor | None
    logits_to_keep: Any
    outer: _Call | None


_FORWARD: ContextVar[_Forward | None] = ContextVar("mllm_forward", default=None)
_CALL: ContextVar[_Call | None] = ContextVar("mllm_call", default=None)
_VISION: ContextVar[_VisionRun | None] = ContextVar("mllm_vision", default=None)
_PROMPT: ContextVar[int | None] = ContextVar("mllm_prompt", default=None)


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
        self._layers = list(self.family.layers)
        requested = Plan.of(plan)
        self.plan = Plan(
            [
                s.at_depth(len(self._layers)) if isinstance(s, LayerPruner) else s
                for s in requested.stages
            ],
            requested.seed,
        )
        self.plan_notes = [
            f"{s.info.name}: layer {s.paper_layer} of {s.info.reference_layers} scaled to "
            f"layer {now.layer} of {len(self._layers)}"
            for s, now in zip(requested.stages, self.plan.stages, strict=True)
            if isinstance(s, LayerPruner) and s.layer is None
        ]
        stages = list(enumerate(self.plan.stages))
        self.reducers = [(i, s) for i, s in stages if isinstance(s, TokenReducer)]
        self.pruners = [(i, s) for i, s in stages if isinstance(s, LayerPruner)]
        self._validate(unvalidated)
        self._cuts = sorted({s.layer for _, s in self.pruners})
        self._base_signature = inspect.signature(self.family.base.forward)
        self._decoder_names = list(inspect.signature(self.family.decoder.forward).parameters)
        self._records: list[Record] = []
        self._handles: list[Any] = []
        self._served: list[tuple[nn.Module, Any]] = []
        self._install()

    # What can be refused before anything runs

    def _validate(self, unvalidated: bool) -> None:
        if "mllm_get_image_features" in self.family.base.__dict__:
            raise PlanError(
                "the model is already patched",
                argument="model",
                given=type(self.model).__name__,
                expected="one plan with all stages, or remove() first",
            )
        sites = [("pixels", "pre_projector", "post_projector").index(s.site)
                 for _, s in self.reducers]
        if sites != sorted(sites):
            raise PlanError(
                "pre-LLM stages must follow the picture's way: pixels, before the projector, "
                "after it",
                argument="plan",
                given=self.plan.spec,
                expected="another order",
            )
        for _, stage in self.reducers[1:]:
            if stage.first:
                raise PlanError(
                    f"{stage.info.name} needs the full grid: two stages would write the same rows",
                    argument="plan",
                    given=self.plan.spec,
                    expected=f"{stage.info.name} as the first pre-LLM stage",
                )
        if len({s.positions for _, s in self.reducers}) > 1:
            raise PlanError(
                "pre-LLM stages disagree about positions",
                argument="positions",
                given=", ".join(f"{s.info.name}={s.positions}" for _, s in self.reducers),
                expected="one choice for all pre-LLM stages",
            )
        depth = len(self._layers)
        for _, stage in self.pruners:
            if not stage.first_layer <= stage.layer < depth:
                raise PlanError(
                    f"{stage.info.name}: layer={stage.layer} is outside of the model",
                    argument="layer",
                    given=stage.layer,
                    expected=f"{stage.first_layer} <= layer < {depth}",
                )
        grid = self._full_grid()
        for stage in self.plan.stages:
            keep = getattr(stage, "keep", None)
            if isinstance(keep, int) and grid and keep > grid[0] * grid[1]:
                raise PlanError(
                    f"{stage.info.name}: keep={keep} is more than the {grid[0] * grid[1]} visual "
                    "tokens of an image",
                    argument="keep",
                    given=keep,
                    expected=f"1 <= keep <= {grid[0] * grid[1]}",
                )
        flash = [m for m in self._tapped() if "flash" in compat.attention_name(m)]
        other = [m for m in self._tapped() if compat.attention_name(m) not in compat.SERVED]
        if other or (flash and not unvalidated):
            name = compat.attention_name((other or flash)[0])
            raise PlanError(
                f"reading attention under {name} is "
                + ("not supported" if other else "written but was never validated"),
                argument="attn_implementation",
                given=name,
                expected="sdpa or eager" + ("" if other else ", or patch(..., unvalidated=True)"),
            )

    def _full_grid(self) -> tuple[int, int] | None:
        """Grid of an image of the tower's native size, if the family has one."""
        vision = self.family.model.config.vision_config
        side = vision.image_size // vision.patch_size
        return side, side

    def _block(self, block: int | None) -> int:
        blocks = len(self.family.blocks)
        return self.family.feature_blocks()[-1] if block is None else block % blocks

    def _tapped(self) -> list[nn.Module]:
        """Attention modules that some stage reads from."""
        found = []
        for _, stage in [*self.reducers, *self.pruners]:
            for signal in stage.reads().values():
                if isinstance(signal, VisionAttention | VisionKeys):
                    found.append(self.family.block_attention(self._block(signal.block)))
                elif isinstance(signal, AttentionRows):
                    found.append(self.family.attention(signal.layer))
        return list(dict.fromkeys(found))

    # Installing and removing

    def _install(self) -> None:
        family = self.family
        for module in self._tapped():
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
        for i in range(self._cuts[0] if self._cuts else len(self._layers), len(self._layers)):
            pre(self._layers[i], functools.partial(self._layer_pre, i))
        if any(stage.site == "pre_projector" for _, stage in self.reducers):
            pre(family.projector, self._projector_pre)
            post(family.projector, self._projector_post)
        if any(isinstance(s, Features) and s.cls for _, r in self.reducers
               for s in r.reads().values()):
            post(family.tower, self._tower_post)

        features = family.base.get_image_features
        generate = family.model.generate

        # generate() reads the signature of get_image_features to choose its arguments.
        @functools.wraps(features)
        def get_image_features(*args, **kwargs):
            return self._image_features(features, args, kwargs)

        @functools.wraps(generate)
        def patched_generate(*args, **kwargs):
            return self._generate(generate, args, kwargs)

        family.base.get_image_features = get_image_features
        family.base.mllm_get_image_features = features
        family.model.generate = patched_generate

    def remove(self) -> None:
        """Take the plan out; the model is exactly what it was. May be called twice."""
        for handle in self._handles:
            handle.remove()
        for module, config in self._served:
            module.config = config
        if self._handles:
            del self.family.base.get_image_features, self.family.base.mllm_get_image_features
            del self.family.model.generate
        self._handles, self._served = [], []

    def __enter__(self) -> Patched:
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self._handles else "removed"
        return f"Patched({type(self.model).__name__}, {self.plan.spec!r}, {state})"

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
        ids = kwargs.get("input_ids", kwargs.get("inputs", args[0] if args else None))
        token = _PROMPT.set(None if ids is None else ids.shape[1])
        try:
            return generate(*args, **kwargs)
        finally:
            _PROMPT.reset(token)

    def _top_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        outer = _CALL.get()
        labels = kwargs.get("labels")
        if labels is None and outer is not None:
            labels = outer.labels
        _CALL.set(_Call(labels, kwargs.get("logits_to_keep", 0), outer))

    def _top_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        if (call := _CALL.get()) is not None:
            _CALL.set(call.outer)

    def _base_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = self._base_signature.bind(*args, **kwargs).arguments
        ids, pixels = given.get("input_ids"), given.get("pixel_values")
        encoded = (given.get("mm_encoder_outputs") or {}).get("image")
        has_pixels = pixels is not None or encoded is not None
        if ids is None and has_pixels:
            raise DataError(
                "visual rows cannot be found without input_ids",
                argument="input_ids",
                given=None,
                expected="input_ids with the pixels",
            )
        visual = None
        if ids is not None and (has_pixels or ids.shape[1] > 1):
            visual = ids == self.family.image_token_id
            found = bool(visual.any())
            if found != has_pixels:
                raise DataError(
                    "the prompt has image placeholders but no pixels were given"
                    if found
                    else "pixels were given but the prompt has no image placeholder",
                    argument="pixel_values" if found else "input_ids",
                    given=None if found else f"no token {self.family.image_token_id}",
                    expected="as many image placeholders as visual tokens",
                )
            visual = visual if found else None
        reduction = getattr(encoded, "mllm_reduction", None)
        if encoded is not None and reduction is None:
            raise DataError(
                "mm_encoder_outputs were not computed by the patched model",
                argument="mm_encoder_outputs",
                given=type(encoded).__name__,
                expected="get_image_features of the patched model, or pixel_values",
            )
        _FORWARD.set(_Forward(visual, reduction, outer=_FORWARD.get()))

    def _base_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        if (forward := _FORWARD.get()) is not None:
            if forward.taps is not None:
                attention.close_taps(forward.taps)
            _FORWARD.set(forward.outer)

    # Pre-LLM stages: around get_image_features

    def _image_features(self, original: Any, args: tuple, kwargs: dict) -> Any:
        kwargs = {**dict(zip(("pixel_values",), args, strict=False)), **kwargs}
        run = _VisionRun(self, kwargs["pixel_values"])
        kwargs["pixel_values"], extra = run.pixels()
        token = _VISION.set(run)
        try:
            with attention.taps(run.taps()):
                output = original(*args[1:], **kwargs, **extra)
        finally:
            _VISION.reset(token)
        features = output.pooler_output
        stacked = run.after(torch.stack(list(features)))
        output.pooler_output = stacked if isinstance(features, Tensor) else list(stacked)
        output.mllm_reduction = run.reduction
        if (forward := _FORWARD.get()) is not None:
            forward.reduction = run.reduction
        return output

    def _projector_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if (run := _VISION.get()) is not None:
            return (run.before_projector(args[0]), *args[1:]), kwargs

    def _projector_post(self, module: nn.Module, args: tuple, output: Tensor) -> Any:
        if (run := _VISION.get()) is not None:
            return run.after_projector(output)

    def _tower_post(self, module: nn.Module, args: tuple, output: Any) -> None:
        if (run := _VISION.get()) is not None and self.family.prefix:
            run.cls = self.family.cls_feature(output)

    # The decoder

    def _decoder_pre(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        forward = _FORWARD.get()
        if forward is None:
            return None
        kwargs = {**dict(zip(self._decoder_names, args, strict=False)), **kwargs}
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise PlanError(
                "a prepared attention mask (as static caches make it) cannot follow a plan",
                argument="attention_mask",
                given=type(mask).__name__,
                expected="None or [batch, tokens]",
            )
        batch, rows = embeds.shape[:2]
        cache = kwargs.get("past_key_values")
        if cache is None and compat.uses_cache(module, kwargs.get("use_cache")):
            cache = kwargs["past_key_values"] = compat.dynamic_cache(module)
        if cache is not None:
            adopt(cache, len(self._layers), None if mask is None else mask[:, :-rows])
            forward.past = [layer.slots for layer in cache.layers]
            forward.past_logical = cache.get_seq_length()
        else:
            forward.past = [0] * len(self._layers)
        forward.cache = cache
        valid = torch.ones(batch, rows, dtype=torch.bool, device=embeds.device)
        if mask is not None:
            valid = mask[:, -rows:].to(valid)
        self._make_table(forward, valid)
        self._drop_rows(forward, kwargs)
        forward.tables.append((0, forward.table))
        self._note(forward, 0, self._cuts[0] if self._cuts else len(self._layers))
        if forward.visual is not None and self.pruners:
            self._check_training(module)
            forward.taps = attention.open_taps(self._decoder_taps(forward))
        return (), kwargs

    def _make_table(self, forward: _Forward, valid: Tensor) -> None:
        start = forward.past_logical
        if forward.visual is None:
            forward.full = forward.table = TokenTable.text(valid, start)
            forward.images = [[] for _ in range(valid.shape[0])]
            return
        grid = forward.reduction.grid
        tokens, images = grid[0] * grid[1], forward.reduction.keep.shape[0]
        counts = forward.visual.sum(1).tolist()
        # generate() repeats samples for beams and returned sequences; features keep their order.
        repeat = max(1, sum(counts) // (images * tokens))
        ends, at = [], 0
        for sample in range(0, len(counts), repeat):
            number = counts[sample] // tokens
            ends += [list(range(at, at + number))] * repeat
            at += number
        forward.images = ends
        grids = [[grid] * len(sample) for sample in forward.images]
        forward.full = forward.table = TokenTable.prompt(valid, forward.visual, start, grids)
        forward.prompt = self._prompt_rows(forward)

    def _prompt_rows(self, forward: _Forward) -> Tensor:
        """Rows of the prompt: no candidate of assisted decoding, nothing that is supervised."""
        table = forward.full
        prompt = table.valid
        if (length := _PROMPT.get()) is not None:
            prompt = prompt & (table.logical < length)
        if (call := _CALL.get()) is not None and call.labels is not None:
            supervised = (call.labels != -100).to(prompt.device)
            prompt = prompt & (supervised.long().cumsum(1) == 0)
        return prompt

    def _check_training(self, decoder: nn.Module) -> None:
        if decoder.training and torch.is_grad_enabled() and _CALL.get() is None:
            raise PlanError(
                "the model was wrapped after it was patched, so supervised tokens cannot be told "
                "from the prompt",
                argument="model",
                given=type(self.model).__name__,
                expected="patch the wrapped (PEFT) model",
            )

    def _drop_rows(self, forward: _Forward, kwargs: dict) -> None:
        """Let the rows leave that the pre-LLM stages dropped; move positions and mask along."""
        table, cache = forward.table, forward.cache
        first = None if cache is None else cache.layers[0]
        shift = None if first is None else first.shifts.get("llm")
        drops = self.reducers and forward.visual is not None
        if not drops and shift is None and (first is None or first.seen == first.slots):
            return
        position = kwargs.get("position_ids")
        if position is None:
            position = table.index[:1] + forward.past_logical
        position = position.expand(*position.shape[:-2], *table.valid.shape)
        if shift is not None:
            position = position - shift
        if drops:
            keep, order = self._kept_rows(forward)
            compact = self.reducers[0][1].positions == "compact"
            if compact:
                moved = renumber(position, keep, table.valid, order)
                if first is not None:
                    last = table.valid.long().cumsum(1).argmax(1, keepdim=True)
                    delta = (position - moved).gather(1, last)
                    first.shifts["llm"] = delta if shift is None else shift + delta
                position = moved
            rows = choose_rows(keep, table.valid, order if compact else None)
            forward.table = table.take(rows, keep.gather(1, rows))
            kwargs["inputs_embeds"] = gather_rows(kwargs["inputs_embeds"], rows)
            position = gather_rows(position, rows, dim=position.dim() - 1)
        kwargs["position_ids"] = position
        mask = self._slot_valid(forward, 0)
        if mask is not None and first is not None:
            # The decoder looks a 2-D mask up by logical position.
            mask = F.pad(mask, (first.seen - first.slots, 0), value=True)
        kwargs["attention_mask"] = mask

    def _kept_rows(self, forward: _Forward) -> tuple[Tensor, Tensor | None]:
        """Rows that stay, and their order if it is not the grid's: `[batch, rows]` each."""
        table, reduction = forward.table, forward.reduction
        which = torch.tensor(
            [i for sample in forward.images for i in sample], device=reduction.keep.device
        )
        keep = ~table.visual
        keep[table.visual] = reduction.keep[which].flatten()
        order = None
        if reduction.order is not None:
            order, tokens = table.index.clone(), reduction.order.shape[1]
            starts = order[table.visual].view(-1, tokens)[:, :1]
            order[table.visual] = (starts + reduction.order[which]).flatten()
        return keep & table.valid, order

    def _slot_valid(self, forward: _Forward, layer: int) -> Tensor | None:
        """Validity of a layer's slots with this forward's rows; None if nothing is padded."""
        valid = forward.table.valid
        padded = not bool(valid.all())
        old = None if forward.cache is None else forward.cache.layers[layer]
        if old is not None and old.slots:
            return torch.cat([old.valid, valid], 1) if padded or old.padded else None
        return valid if padded else None

    def _note(self, forward: _Forward, start: int, stop: int) -> bool:
        """Tell the caches of some layers which rows come; returns whether any is padding."""
        padded = not bool(forward.table.valid.all())
        if forward.cache is not None:
            advance = forward.full.valid.shape[1]
            note_rows(forward.cache.layers[start:stop], forward.table, padded, advance)
        return padded

    def _decoder_taps(self, forward: _Forward) -> dict[nn.Module, list[Any]]:
        taps: dict[nn.Module, list[Any]] = {}
        for number, stage in self.pruners:
            for name, signal in stage.reads().items():
                module = self.family.attention(signal.layer)
                tap = functools.partial(self._row_tap, forward, (number, name), signal)
                taps.setdefault(module, []).append(tap)
        return taps

    @staticmethod
    def _row_tap(
        forward: _Forward, slot: tuple[int, str], signal: AttentionRows,
        query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None,
    ) -> None:
        table = forward.table
        prompt = forward.prompt.gather(1, table.index) & table.valid
        last = prompt.long().cumsum(1).argmax(1, keepdim=True)
        rows = attention.row_attention(query, key, last, mask, scaling)
        reduce = {"mean": rows.mean, "sum": rows.sum, "max": rows.amax}[signal.heads]
        forward.signals[slot] = reduce(1)[..., -table.valid.shape[1] :]
        forward.selection_flops += 2 * query.shape[1] * key.shape[2] * query.shape[3]

    # In-LLM stages: before a decoder layer

    def _layer_pre(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        forward = _FORWARD.get()
        mark = kwargs["position_embeddings"][0]
        if forward is None:
            # transformers 5.17 recomputes a checkpointed layer with its hooks, in the backward.
            past = getattr(mark, "mllm_forward", None)
            return None if past is None else self._replay(past, layer, args, kwargs)
        if forward.table is None:
            return None
        if module.training:
            mark.mllm_forward = forward  # lives as long as the arguments of the recompute
        if layer in self._cuts:
            args = (self._cut(forward, layer, args[0], kwargs), *args[1:])
        return args, {**kwargs, **forward.replaced}

    def _replay(self, forward: _Forward, layer: int, args: tuple, kwargs: dict) -> Any:
        """Give a recomputed layer what it had in the forward pass; nothing is selected again."""
        first = max(c for c in self._cuts if c <= layer)
        rows, replaced = forward.replay[first]
        if layer == first and rows is not None:
            args = (gather_rows(args[0], rows), *args[1:])
        return args, {**kwargs, **replaced}

    def _cut(self, forward: _Forward, layer: int, hidden: Tensor, kwargs: dict) -> Tensor:
        """Run the stages of this layer and prepare what the layers from here on are given."""
        stages = [(n, s) for n, s in self.pruners if s.layer == layer]
        given = {**kwargs, **forward.replaced}
        position, rotary = given.get("position_ids"), given["position_embeddings"]
        kind = f"layer {layer}"
        compact = any(s.positions == "compact" for _, s in stages)
        cached = None if forward.cache is None else forward.cache.layers[layer]
        shift = None if cached is None else cached.shifts.get(kind)
        if position is not None:
            position = position.expand(hidden.shape[0], -1) if position.dim() == 2 else position
            if shift is not None:
                position = position - shift
        rows = None
        if forward.visual is not None:
            table = forward.table
            keep = table.valid.clone()
            for number, stage in stages:
                keep &= ~table.visual | self._select(forward, number, stage, keep)
            rows = choose_rows(keep, table.valid)
            if compact:
                moved = renumber(position, keep, table.valid)
                last = keep.long().cumsum(1).argmax(1, keepdim=True)
                if cached is not None:
                    delta = (position - moved).gather(1, last)
                    cached.shifts[kind] = delta if shift is None else shift + delta
                position = moved
            hidden = gather_rows(hidden, rows)
            forward.table = table.take(rows, keep.gather(1, rows))
            if position is not None:
                position = gather_rows(position, rows, dim=position.dim() - 1)
            if not compact:
                rotary = tuple(gather_rows(t, rows, dim=t.dim() - 2) for t in rotary)
        if compact:
            rotary = self.family.decoder.rotary_emb(hidden, position)
        later = [c for c in self._cuts if c > layer]
        stop = later[0] if later else len(self._layers)
        mask = compat.causal_mask(
            self.family.decoder.config,
            hidden,
            self._slot_valid(forward, layer),
            forward.cache,
            layer,
        )
        self._note(forward, layer, stop)
        forward.tables.append((layer, forward.table))
        forward.replaced = {
            "attention_mask": mask,
            "position_embeddings": rotary,
            "position_ids": position,
        }
        forward.replay[layer] = rows, forward.replaced
        return hidden

    def _select(self, forward: _Forward, number: int, stage: LayerPruner, keep: Tensor) -> Tensor:
        table = forward.table
        signals = {
            name: forward.signals[number, name]
            for name in stage.reads()
            if (number, name) in forward.signals
        }
        images = torch.tensor([len(s) for s in forward.images], device=keep.device)
        ctx = Context(stage, signals, visual=table.visual & keep, images=images)
        if isinstance(stage.keep, int) and bool((ctx.visual.sum(1) < stage.keep * images).any()):
            forward.notes.append(
                f"{stage.info.name}: fewer than keep={stage.keep} tokens per image arrive at "
                f"layer {stage.layer}"
            )
        forward.ran.add(number)
        with torch.no_grad():
            action = stage.select(ctx)
        forward.selection_flops += ctx.flops
        return action.mask

    # After the decoder

    def _decoder_post(self, module: nn.Module, args: tuple, output: Any) -> Any:
        forward = _FORWARD.get()
        if forward is None or forward.full is None:
            return None
        if forward.visual is None:
            self._book_text(forward)
            return output
        forward.ran |= forward.reduction.ran
        missing = [s.info.name for n, s in enumerate(self.plan.stages) if n not in forward.ran]
        if missing:
            raise NoEffectError(
                f"visual rows were present but {', '.join(missing)} did not run",
                argument="plan",
                given=self.plan.spec,
                expected="every stage runs",
            )
        table, full = forward.table, forward.full
        hidden = output.last_hidden_state
        # Back to the length the caller knows. Padding rows keep what they had; dropped rows are 0.
        written = table.valid | ~full.valid.gather(1, table.index)
        hidden = hidden * written[..., None].to(hidden.dtype)
        out = hidden.new_zeros(hidden.shape[0], full.valid.shape[1], hidden.shape[2])
        index = table.index[..., None].expand_as(hidden)
        output.last_hidden_state = out.scatter(1, index, hidden)
        self._book(forward, self.plan_notes + forward.notes, hidden.element_size())
        return output

    def _book_text(self, forward: _Forward) -> None:
        """A decode step, or a text-only prefill."""
        if forward.past_logical and self._records and forward.full.valid.shape[1] == 1:
            self._records[-1].decode_steps += 1
        elif not forward.past_logical:
            self._book(forward, ["no visual tokens: the plan had nothing to do"], 2)

    def _book(self, forward: _Forward, notes: list[str], itemsize: int) -> None:
        cache = forward.cache
        if not forward.past_logical:
            self._records.clear()  # a new conversation
        tensors = [] if cache is None else [t for x in cache.layers for t in (x.keys, x.values)]
        tensors = [t for t in tensors if t is not None]
        meta = {} if cache is None else {id(t): t for x in cache.layers
                                         for t in (x.valid, x.logical) if t is not None}
        call = _CALL.get()
        rows = forward.full.valid.shape[1]
        asked = call.logits_to_keep if call is not None else 0
        asked = asked.numel() if isinstance(asked, Tensor) else asked
        record = Record(
            config=self.family.text_config,
            full=forward.full,
            tables=forward.tables,
            past=forward.past,
            past_logical=forward.past_logical,
            images=forward.images,
            reduction=forward.reduction,
            logit_rows=min(asked, rows) if asked else rows,
            kv_bytes=sum(t.nbytes for t in tensors),
            kv_meta_bytes=sum(t.nbytes for t in meta.values()),
            itemsize=tensors[0].element_size() if tensors else itemsize,
            cached=bool(tensors),
            selection_flops=forward.selection_flops,
            notes=notes,
        )
        self._records.append(record)


class _VisionRun:
    """One call of get_image_features: runs the pre-LLM stages on its images."""

    def __init__(self, patched: Patched, pixel_values: Tensor) -> None:
        self.family, self.plan = patched.family, patched.plan
        self.stages, self._block = patched.reducers, patched._block
        self.pixel_values = pixel_values
        grids = self.family.grid(pixel_values)
        images, (height, width) = len(grids), grids[0]
        device = pixel_values.device
        self.tokens = height * width
        index = torch.arange(self.tokens, device=device).repeat(images, 1)
        self.reduction = Reduction(
            grid=grids[0],
            keep=torch.ones(images, self.tokens, dtype=torch.bool, device=device),
            into=index,
        )
        full = self.family.vision_flops(grids[0], self.tokens)
        self.reduction.baseline_vision_flops = self.reduction.vision_flops = full
        self.signals: dict[Any, Tensor] = {}
        self.cls: Tensor | None = None
        self.resized: tuple[int, int] | None = None
        self.rows: Tensor | None = None

    def _at(self, site: str) -> list[tuple[int, TokenReducer]]:
        return [(n, s) for n, s in self.stages if s.site == site]

    def taps(self) -> dict[nn.Module, list[Any]]:
        """Taps for the declared signals of the tower."""
        found: dict[nn.Module, list[Any]] = {}
        for _, stage in self.stages:
            for signal in stage.reads().values():
                if isinstance(signal, VisionAttention | VisionKeys):
                    module = self.family.block_attention(self._block(signal.block))
                    found.setdefault(module, []).append(functools.partial(self._tap, signal))
        return found

    def _tap(self, signal: Any, query: Tensor, key: Tensor, mask: Any, scaling: Any) -> None:
        prefix = self.family.prefix
        if isinstance(signal, VisionKeys):
            self.signals[signal] = key.mean(1)[:, prefix:]
            return
        tokens = key.shape[2]
        if signal.query == "cls" and not prefix:
            raise PlanError(
                "the tower has no [CLS]", argument="query", given="cls", expected="received"
            )
        rows = tokens
        if prefix and signal.query != "received":
            first = torch.zeros(query.shape[0], 1, dtype=torch.long, device=query.device)
            scores = attention.row_attention(query, key, first, None, scaling, causal=False)
            scores, rows = scores[:, :, 0], 1
        else:
            scores = attention.received_attention(query, key, None, scaling)
        scores = scores[..., prefix:]
        self.signals[signal] = scores.sum(1) if signal.heads == "sum" else scores.mean(1)
        self.reduction.selection_flops += 2 * rows * tokens * query.shape[1] * query.shape[3]

    def _seeds(self, number: int) -> list[int]:
        """A seed per image from its bits: independent of the batch and of the image's place."""
        x = self.pixel_values.detach().contiguous()
        bits = x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
        sums = bits.flatten(1).long().sum(1).tolist()
        own = getattr(self.plan.stages[number], "seed", 0)
        return [hash((s, self.plan.seed, own, number)) & (2**63 - 1) for s in sums]

    def _run(self, number: int, stage: TokenReducer, features: Tensor | None) -> list[Any]:
        signals: dict[str, Tensor] = {}
        for name, signal in stage.reads().items():
            if isinstance(signal, Features):
                signals[name] = features
                if signal.cls and self.cls is not None:
                    signals["cls"] = self.cls
            else:
                signals[name] = self.signals[signal]
        ctx = Context(
            stage, signals, grid=self.reduction.grid, valid=self.reduction.keep,
            seeds=functools.partial(self._seeds, number),
        )
        actions = stage.reduce(ctx)
        self.reduction.ran.add(number)
        self.reduction.selection_flops += ctx.flops
        return actions

    def _apply(self, actions: list[Any], features: Tensor) -> Tensor:
        """Book the actions of a stage; returns the features, still of full length."""
        reduction = self.reduction
        for action in actions:
            if isinstance(action, Keep):
                dropped = reduction.keep & ~action.mask
                reduction.into = reduction.into.masked_fill(dropped, -1)
                reduction.keep = reduction.keep & action.mask
            elif isinstance(action, Merge):
                reduction.into = action.into
            elif isinstance(action, Write):
                features, reduction.order = action.values, action.order
            elif isinstance(action, Pool):
                grid, (rows, cols) = action.grid, reduction.grid
                x = features.transpose(1, 2).unflatten(2, (rows, cols))
                cells = F.adaptive_avg_pool2d(x, grid).flatten(2).transpose(1, 2)
                features = self._place(cells, grid, features)
            else:
                raise PlanError(
                    f"{type(action).__name__} is not an action of this site",
                    argument="actions",
                    given=type(action).__name__,
                    expected="Keep, Merge, Write, Pool",
                )
        return features

    def _place(self, cells: Tensor, grid: tuple[int, int], features: Tensor | None) -> Tensor:
        """Put the tokens of a coarser grid on the middle tokens of their cells."""
        rows, cols = self.reduction.grid
        device = cells.device
        r, c = torch.arange(rows, device=device), torch.arange(cols, device=device)
        mid_r = ((torch.arange(grid[0], device=device) + 0.5) * rows / grid[0]).long()
        mid_c = ((torch.arange(grid[1], device=device) + 0.5) * cols / grid[1]).long()
        middle = (mid_r[:, None] * cols + mid_c).flatten()
        cell = (r * grid[0] // rows)[:, None] * grid[1] + c * grid[1] // cols
        into = middle[cell.flatten()]
        into[middle] = middle
        self.reduction.into = into.repeat(cells.shape[0], 1)
        self.reduction.keep = torch.zeros_like(self.reduction.keep)
        self.reduction.keep[:, middle] = True
        full = cells.new_zeros(cells.shape[0], self.tokens, cells.shape[2])
        full[:, middle] = cells
        return full

    def pixels(self) -> tuple[Tensor, dict]:
        """The pictures for the tower, and the arguments it needs for them."""
        pixel_values, extra = self.pixel_values, {}
        for number, stage in self._at("pixels"):
            for action in self._run(number, stage, None):
                if not isinstance(action, Resize):
                    raise PlanError(
                        f"{type(action).__name__} is not an action on pixels",
                        argument="actions", given=type(action).__name__, expected="Resize",
                    )
                self.resized = action.grid
                pixel_values, extra = self.family.resized(pixel_values, action.grid)
                cells = action.grid[0] * action.grid[1]
                self.reduction.vision_flops = self.family.vision_flops(action.grid, cells)
        return pixel_values, extra

    def before_projector(self, features: Tensor) -> Tensor:
        """Run the stages before the projector, which then projects only what is kept."""
        for number, stage in self._at("pre_projector"):
            features = self._apply(self._run(number, stage, features), features)
        keep = self.reduction.keep
        self.rows = choose_rows(keep, torch.ones_like(keep))
        self.reduction.vision_flops = self.family.vision_flops(
            self.reduction.grid, self.rows.shape[1]
        )
        return gather_rows(features, self.rows)

    def after_projector(self, projected: Tensor) -> Tensor:
        """Spread the projected tokens over their rows again."""
        full = projected.new_zeros(projected.shape[0], self.tokens, projected.shape[2])
        return full.scatter(1, self.rows[..., None].expand_as(projected), projected)

    def after(self, features: Tensor) -> Tensor:
        """Run the stages after the projector; features are of full length."""
        if self.resized is not None:
            features = self._place(features, self.resized, None)
        for number, stage in self._at("post_projector"):
            features = self._apply(self._run(number, stage, features), features)
        return features
