"""One forward pass of the decoder under a plan: rows leave, masks and positions follow."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import attention, compat
from mllm.cache import SlotTable, adopt, note_rows, refuse_flash
from mllm.cache.events import CacheEvents
from mllm.compressors.base import AttentionRows, CacheCompressor, Context, LayerPruner
from mllm.errors import CacheMismatchError, PlanError
from mllm.ledger import Reduction
from mllm.tokens import TokenTable, choose_rows, gather_rows, renumber, split_images

if TYPE_CHECKING:
    from mllm.patcher import Patched


@dataclass
class DecoderRun:
    """State of one forward pass, from the base model's hooks to the decoder's last layer.

    Attributes:
        patched: the patched model (its plan, stages and family).
        visual: bool `[batch, rows]`, placeholders of this forward; None without any.
        reduction: what the pre-LLM stages decided; set when the decoder starts.
        seen, reductions: both by kind, `image` or `video`; the latter are set before the
            decoder runs.
        mask: the attention mask that the base model was given.
        full: table of the rows as the caller gave them.
        table: table of the rows of the current stage.
        tables: (first layer, table) of every stage.
        prompt: bool `[batch, rows]`, rows that a method may look at.
        images: per sample, its images in `reduction`.
        past, past_logical: stored slots per layer, and tokens seen, before this forward.
        held: per layer what its slots stood for before this forward.
        events: tells cache methods what happens; None without a cache or such methods.
        position: position ids of the current stage's rows.
        place: int64 `[1 or 3, batch, rows]`, what keys of the current stage's rows are rotated by.
        compacted: whether positions were renumbered inside the decoder.
        rows: int64 `[batch, rows]`, rows of the current stage among those that the decoder's
            own masks and rotary tables have; None is all of them.
        replaced: by kind of layer and by what is stored, arguments that layers of the current
            stage get instead of the parent's.
        replay: by first layer of a stage, its row choice and arguments.
    """

    patched: Patched
    visual: Tensor | None
    reduction: Reduction | None
    mask: Any
    outer: DecoderRun | None
    full: TokenTable | None = None
    table: TokenTable | None = None
    tables: list[tuple[int, TokenTable]] = field(default_factory=list)
    prompt: Tensor | None = None
    images: list[list[int]] = field(default_factory=list)
    cache: Any = None
    past: list[int] = field(default_factory=list)
    past_logical: int = 0
    held: list[SlotTable | None] = field(default_factory=list)
    events: CacheEvents | None = None
    position: Tensor | None = None
    place: Tensor | None = None
    compacted: bool = False
    rows: Tensor | None = None
    replaced: dict[tuple[str, SlotTable | None], dict[str, Any]] = field(default_factory=dict)
    replay: dict[int, tuple[Tensor | None, dict]] = field(default_factory=dict)
    signals: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    selection_flops: float = 0.0
    notes: list[str] = field(default_factory=list)
    ran: set[int] = field(default_factory=set)
    seen: dict[str, Tensor] = field(default_factory=dict)
    reductions: dict[str, Reduction] = field(default_factory=dict)

    def start(
        self, kwargs: dict[str, Any], prompt_length: int | None, labels: Tensor | None
    ) -> None:
        """Read the decoder's arguments, let pre-LLM rows leave, and change `kwargs` in place.

        Args:
            kwargs: the decoder's arguments.
            prompt_length: logical length of the prompt, where generate() told it.
            labels: `[batch, rows]`, where the caller gave them.

        Raises:
            PlanError: a mask or cache of a kind that cannot follow a plan.
        """
        decoder, layers = self.patched.family.decoder, self.patched.layers
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        if isinstance(mask, dict) and self.patched.family.hybrid:
            mask = self.mask  # the base model has made one of each kind
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise PlanError(
                "a prepared attention mask (as static caches make it) cannot follow a plan",
                argument="attention_mask",
                given=type(mask).__name__,
                expected="None or [batch, tokens]",
            )
        batch, rows = embeds.shape[:2]
        cache = kwargs.get("past_key_values")
        if cache is None and compat.uses_cache(decoder, kwargs.get("use_cache")):
            cache = kwargs["past_key_values"] = compat.dynamic_cache(decoder)
        self.past = [0] * len(layers)
        if cache is not None:
            past_valid = None if mask is None else mask[:, :-rows]
            adopt(cache, self.patched.windows, past_valid, self.patched.new_mark())
            CacheEvents.verified(self.patched, cache)
            self.past = [layer.slots for layer in cache.layers]
            self.held = [layer.table for layer in cache.layers]
            self.past_logical = cache.get_seq_length()
            self._check_cache(cache)
        self.cache = cache
        valid = torch.ones(batch, rows, dtype=torch.bool, device=embeds.device)
        if mask is not None:
            valid = mask[:, -rows:].to(valid)
        self._make_table(valid)
        position = kwargs.get("position_ids")
        flat = position is None or position.dim() < 3
        if self.patched.family.mrope and self.visual is not None and flat:
            self.notes.append("positions without rows and columns: mm_token_type_ids is missing")
        self.prompt = self._prompt_rows(prompt_length, labels)
        if self.patched.compressors:
            if cache is None:
                self._nothing_stored()
            else:
                self.events = CacheEvents(self, prompt_length)
        self._drop_rows(kwargs)
        self.place = self._rotated_by(kwargs.get("position_ids"))
        self.tables.append((0, self.table))
        self._note(0)

    @staticmethod
    def _check_cache(cache: Any) -> None:
        """Every forward adds the same tokens to all layers."""
        seen = [layer.seen for layer in cache.layers]
        if len(set(seen)) > 1:
            raise CacheMismatchError(
                f"a forward pass broke off and left {seen} tokens in the layers",
                argument="past_key_values",
                given=seen,
                expected="a new cache",
            )

    def _nothing_stored(self) -> None:
        for number, stage in self.patched.compressors:
            self.notes.append(f"{stage.info.name}: no cache, nothing to do")
            self.ran.add(number)

    def _rotated_by(self, position: Tensor | None) -> Tensor:
        """Position ids of the current rows as the rotary embedding takes them."""
        table = self.table
        if position is None:
            position = table.index + self.past_logical
        position = position[None] if position.dim() == 2 else position[-3:]  # without text's row
        axes = 3 if self.patched.family.mrope else 1
        return position.expand(axes, *table.valid.shape)

    def _make_table(self, valid: Tensor) -> None:
        start = self.past_logical
        if self.visual is None:
            self.full = self.table = TokenTable.text(valid, start)
            self.images = [[] for _ in range(valid.shape[0])]
            return
        parts = [self.reductions[kind] for kind in self.seen]
        if len(parts) == 1:
            self.reduction = parts[0]
            self.images = split_images(self.visual.sum(1).tolist(), self.reduction.sizes)
        else:
            self.reduction, self.images = Reduction.join(parts), self._both(parts)
        layouts = self.reduction.layouts
        self.full = self.table = TokenTable.prompt(
            valid, self.visual, start, [[layouts[i] for i in own] for own in self.images]
        )

    def _both(self, parts: list[Reduction]) -> list[list[int]]:
        """Images and videos of every sample, in prompt order, as ordinals among both."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.visual]
        first = 0
        for visual, part in zip(self.seen.values(), parts, strict=True):
            own = split_images(visual.sum(1).tolist(), part.sizes)
            for b, images in enumerate(own):
                rows = visual[b].nonzero()[:, 0].tolist()
                for i in images:
                    found[b].append((rows[0], first + i))
                    rows = rows[part.sizes[i] :]
            first += len(part.sizes)
        return [[image for _, image in sorted(sample)] for sample in found]

    @property
    def spaced(self) -> bool:
        """Whether images have separators."""
        return any(layout.newline != "none" for layout in self.reduction.layouts)

    def _prompt_rows(self, length: int | None, labels: Tensor | None) -> Tensor:
        """Rows of the prompt: no candidate of assisted decoding, nothing that is supervised."""
        prompt = self.full.valid
        if length is not None:
            prompt = prompt & (self.full.logical < length)
        if labels is not None:
            supervised = (labels != -100).to(prompt.device)
            if self.visual is not None:  # a prompt goes on at least to its last image
                supervised &= self.visual.flip(1).cumsum(1).flip(1) == 0
            prompt = prompt & (supervised.long().cumsum(1) == 0)
        return prompt

    def _drop_rows(self, kwargs: dict) -> None:
        """Let the rows leave that the pre-LLM stages dropped; move positions and mask along."""
        table, cache = self.table, self.cache
        first = None if cache is None else cache.layers[0]
        shift = None if first is None else first.shifts.get("llm")
        drops = self.patched.reducers and self.visual is not None
        stored = first is not None and (
            first.compressed or (first.planned and self.patched.family.hybrid)
        )
        if not drops and shift is None and not stored:
            return
        position = kwargs.get("position_ids")
        if position is None:
            position = table.index[:1] + self.past_logical
        position = position.expand(*position.shape[:-2], *table.valid.shape)
        if shift is not None:
            position = position - shift
        if drops:
            keep, order = self._kept_rows()
            compact = self.patched.positions(self.patched.reducers[0][1]) == "compact"
            if compact:
                moved = renumber(position, keep, table.valid, order)
                if first is not None:
                    last = table.valid.long().cumsum(1).argmax(1, keepdim=True)
                    delta = (position - moved).gather(1, last)
                    first.shifts["llm"] = delta if shift is None else shift + delta
                position = moved
            rows = choose_rows(keep, table.valid, order if compact else None)
            self.table = table.take(rows, keep.gather(1, rows))
            kwargs["inputs_embeds"] = gather_rows(kwargs["inputs_embeds"], rows)
            self.patched.family.take_rows(kwargs, rows, self.table.valid)
            position = gather_rows(position, rows, dim=position.dim() - 1)
            self.rows = rows
        kwargs["position_ids"] = position
        prepared = kwargs.get("attention_mask")
        if isinstance(prepared, dict):
            kinds = [self.patched.family.kind(i) for i in range(len(self.past))]
            kwargs["attention_mask"] = {
                kind: self._mask_of_kind(kinds.index(kind), prepared[kind]) for kind in set(kinds)
            }
            self.rows = None
            return
        self.rows = None
        mask = self._slot_valid(0)
        if mask is not None and mask.dim() == 3:
            mask = None  # every layer that has heads apart gets a mask of its own
        if mask is None and cache is None:
            # Without a mask or cache, transformers takes gaps in positions for packed sequences.
            mask = self.table.valid
        if mask is not None and first is not None:
            # The decoder looks a 2-D mask up by logical position.
            mask = F.pad(mask, (first.seen - first.slots, 0), value=True)
        kwargs["attention_mask"] = mask

    def _kept_rows(self) -> tuple[Tensor, Tensor | None]:
        """Rows that stay, and their order if it is not the grid's: `[batch, rows]` each."""
        table, reduction = self.table, self.reduction
        images = [i for own in self.images for i in own]
        starts, sizes, device = reduction.starts, reduction.sizes, reduction.keep.device
        token = torch.cat([torch.arange(sizes[i]) + starts[i] for i in images]).to(device)
        keep = ~table.visual
        keep[table.visual] = reduction.keep[token]
        order = None
        if reduction.order is not None:
            order = table.index.clone()
            lengths = torch.tensor([sizes[i] for i in images])
            ends = lengths.cumsum(0)
            first = order[table.visual][(ends - lengths).to(device)]
            first = first.repeat_interleave(lengths.to(device), output_size=int(ends[-1]))
            order[table.visual] = first + reduction.order[token]
        return keep & table.valid, order

    def _slot_valid(self, layer: int) -> Tensor | None:
        """Validity of a layer's slots with this forward's rows; None if nothing is padded.

        bool `[batch, slots]`, or `[batch, kv_heads, slots]` where heads hold different tokens.
        """
        valid = self.table.valid
        padded = not bool(valid.all())
        old = None if self.cache is None else self.cache.layers[layer]
        if old is not None and old.slots:
            held = self.held[layer]
            if not (padded or held.padded):
                return None
            if held.headwise:
                valid = valid[:, None].expand(-1, held.valid.shape[1], -1)
            return torch.cat([held.valid, valid], -1)
        return valid if padded else None

    def _note(self, layer: int) -> None:
        """Tell the caches of the layers up to the next cut which rows come."""
        if self.cache is None:
            return
        later = [cut for cut in self.patched.cuts if cut > layer]
        stop = later[0] if later else len(self.patched.layers)
        padded = not bool(self.table.valid.all())
        advance = self.full.valid.shape[1]
        intact = self.past_logical
        if self.visual is not None and self.table.valid.shape[1] != advance:
            intact += int(self.visual.any(0).nonzero().max()) + 1  # only visual rows leave
        note_rows(
            self.cache, range(layer, stop), self.table, self.place, padded, advance, intact
        )

    def taps(self) -> dict[nn.Module, list[Any]]:
        """Taps for the signals that in-LLM stages declared."""
        found: dict[nn.Module, list[Any]] = {}
        for number, stage in [*self.patched.pruners, *self.patched.compressors]:
            for name, signal in stage.reads().items():
                module = self.patched.family.attention(signal.layer)
                tap = functools.partial(self._tap, (number, name), signal)
                found.setdefault(module, []).append(tap)
        return found

    def _tap(
        self, slot: tuple[int, str], signal: AttentionRows,
        query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None,
    ) -> None:
        table = self.table
        prompt = self.prompt.gather(1, table.index) & table.valid
        last = prompt.long().cumsum(1).argmax(1, keepdim=True)
        rows = attention.row_attention(query, key, last, mask, scaling)
        reduce = {"mean": rows.mean, "sum": rows.sum, "max": rows.amax}[signal.heads]
        if isinstance(self.patched.plan.stages[slot[0]], CacheCompressor):
            if self.cache is not None:
                self.signals[slot] = self._by_token(rows[:, :, 0], signal)
            self.selection_flops += 2 * query.shape[1] * key.shape[2] * query.shape[3]
            return
        scores = reduce(1)[..., -table.valid.shape[1] :]
        # Kept by the caller's rows: a cut may lie between this layer and the one that asks.
        full = scores.new_zeros(*scores.shape[:2], self.full.valid.shape[1])
        self.signals[slot] = full.scatter(2, table.index[:, None].expand_as(scores), scores)
        self.selection_flops += 2 * query.shape[1] * key.shape[2] * query.shape[3]

    def _by_token(self, rows: Tensor, signal: AttentionRows) -> Tensor:
        """Attention `[batch, heads, slots]` by logical index, then reduced over heads."""
        table, held = self.table, self.held[signal.layer]
        length = self.past_logical + self.full.valid.shape[1]
        at = table.logical.masked_fill(~table.valid, length)
        if held is not None:
            old = held.logical.masked_fill(~held.valid, length)
            if held.headwise:
                group = rows.shape[1] // old.shape[1]
                old = old.repeat_interleave(group, 1)
                at = at[:, None].expand(-1, rows.shape[1], -1)
            at = torch.cat([old, at], -1)
        at = at if at.dim() == 3 else at[:, None].expand(rows.shape)
        found = rows.new_zeros(*rows.shape[:2], length + 1).scatter(2, at, rows)[..., :length]
        return {"mean": found.mean, "sum": found.sum, "max": found.amax}[signal.heads](
            1, keepdim=True
        )

    def layer(self, layer: int, training: bool, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What decoder layer `layer` is given instead of its parent's arguments."""
        if training:
            # Lives as long as the arguments of a recompute; see `replayed`.
            kwargs["position_embeddings"][0].mllm_run = self
        if layer in self.patched.cuts:
            args = (self._cut(layer, args[0], kwargs), *args[1:])
        held = self.held[layer] if self.held else None
        kind = self.patched.family.kind(layer)
        if len(self.tables) == 1 and not self._differs(held, kind):
            return args, kwargs  # what the parent made is right
        if (kind, held) not in self.replaced:
            self.replaced[kind, held] = self._arguments(layer, kind, args[0], kwargs)
        return args, {**kwargs, **self.replaced[kind, held]}

    def _differs(self, held: SlotTable | None, kind: str) -> bool:
        """Whether a layer before the first cut stores other tokens than the parent thinks.

        The parent looks at the first layer of every kind, and cannot tell heads apart.
        """
        first = self.patched.first_layer[kind]
        return held is not None and (held is not self.held[first] or held.headwise)

    def _arguments(self, layer: int, kind: str, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Mask and positions of the layers of one kind until the next cut."""
        family, rotary = self.patched.family, kwargs["position_embeddings"]
        if self.compacted:
            rotary = family.rotary(hidden, self.position, kind)
        elif self.rows is not None:
            rotary = tuple(gather_rows(t, self.rows, dim=t.dim() - 2) for t in rotary)
        if kind:
            mask = self._mask_of_kind(layer, kwargs.get("attention_mask"))
        else:
            valid = self._slot_valid(layer)
            if valid is not None and valid.dim() == 3:
                mask = self._mask_of_kind(layer, None, kwargs.get("attention_mask"))
            else:
                mask = compat.causal_mask(family.text_config, hidden, valid, self.cache, layer)
        first = len(self.tables) == 1
        return {
            "attention_mask": mask,
            "position_embeddings": rotary,
            "position_ids": kwargs.get("position_ids") if first else self.position,
        }

    def _mask_of_kind(
        self, layer: int, mask: Tensor | None, like: Tensor | None = None
    ) -> Tensor | None:
        """The mask of a layer in a decoder whose layers see differently.

        Among the new rows it is the model's own pattern; stored slots are seen if they are valid
        and, in logical distance, within the layer's window.

        Args:
            layer: index of the layer.
            mask: the model's own mask `[batch or 1, 1, rows, slots]`, before rows left; None is
                causal.
            like: a mask of the model's format, where that is not `mask`.
        """
        table, window = self.table, self.patched.windows[layer]
        old = None if self.cache is None else self.cache.layers[layer]
        slots = 0 if old is None else old.slots
        seen = self.past_logical + self.full.valid.shape[1]
        if mask is None and (window is None or seen < window) and self._slot_valid(layer) is None:
            return None
        if mask is None:
            own = table.logical[:, :, None] >= table.logical[:, None]
        else:
            own = mask[:, 0, :, -mask.shape[2] :]
            own = own if own.dtype == torch.bool else own == 0
            own = own.expand(len(table.valid), -1, -1)
            if self.rows is not None:
                own = own.gather(1, self.rows[:, :, None].expand(-1, -1, own.shape[2]))
                own = own.gather(2, self.rows[:, None].expand(-1, own.shape[1], -1))
        own = (own & table.valid[:, None])[:, None]
        if slots:
            held = self.held[layer]
            there, at = (t if held.headwise else t[:, None] for t in (held.valid, held.logical))
            there = there[:, :, None].expand(-1, -1, own.shape[2], -1)
            if window is not None:
                there = there & (table.logical[:, None, :, None] - at[:, :, None] < window)
            if held.headwise:
                refuse_flash(self.patched.family)
                config = self.patched.family.text_config
                there = there.repeat_interleave(config.num_attention_heads // there.shape[1], 1)
            own = torch.cat([there, own.expand(-1, there.shape[1], -1, -1)], 3)
        return compat.mask_like(own, mask if like is None else like)

    @staticmethod
    def replayed(
        cuts: list[int], layer: int, args: tuple, kwargs: dict
    ) -> tuple[tuple, dict] | None:
        """What a layer had in the forward pass, when it is recomputed in the backward.

        transformers 5.17 recomputes a checkpointed layer with its hooks, newer versions without.
        Nothing is selected again.
        """
        run = getattr(kwargs["position_embeddings"][0], "mllm_run", None)
        if run is None:
            return None
        first = max((cut for cut in cuts if cut <= layer), default=None)
        if first is None:
            return None
        rows, replaced = run.replay[first]
        replaced = replaced[run.patched.family.kind(layer), run.held[layer] if run.held else None]
        if layer == first and rows is not None:
            args = (gather_rows(args[0], rows), *args[1:])
        return args, {**kwargs, **replaced}

    def _cut(self, layer: int, hidden: Tensor, kwargs: dict) -> Tensor:
        """Run the stages of this layer and prepare what the layers from here on are given."""
        stages = [(n, s) for n, s in self.patched.pruners if s.layer == layer]
        first = len(self.tables) == 1
        position = kwargs.get("position_ids") if first else self.position
        kind = f"layer {layer}"
        compact = any(self.patched.positions(s) == "compact" for _, s in stages)
        cached = None if self.cache is None else self.cache.layers[layer]
        shift = None if cached is None else cached.shifts.get(kind)
        if position is not None:
            position = position.expand(hidden.shape[0], -1) if position.dim() == 2 else position
            if shift is not None:
                position = position - shift
        rows = None
        if self.visual is not None:
            table = self.table
            keep = table.valid.clone()
            for number, stage in stages:
                keep &= ~table.visual | table.newline | self._select(number, stage, keep)
            if self.spaced:
                keep = table.with_newlines(keep)
            rows = choose_rows(keep, table.valid)
            if compact:
                moved = renumber(position, keep, table.valid)
                last = keep.long().cumsum(1).argmax(1, keepdim=True)
                if cached is not None:
                    delta = (position - moved).gather(1, last)
                    cached.shifts[kind] = delta if shift is None else shift + delta
                position = moved
            hidden = gather_rows(hidden, rows)
            self.table = table.take(rows, keep.gather(1, rows))
            if position is not None:
                position = gather_rows(position, rows, dim=position.dim() - 1)
            self.rows = rows if self.rows is None else self.rows.gather(1, rows)
            self.place = gather_rows(self.place, rows, dim=2)
        self.position = position
        self.compacted |= compact
        if self.compacted:
            self.place = position[None]
        self._note(layer)
        self.tables.append((layer, self.table))
        self.replaced = {}
        self.replay[layer] = rows, self.replaced
        return hidden

    def _select(self, number: int, stage: LayerPruner, keep: Tensor) -> Tensor:
        table = self.table
        signals = {}
        for name in stage.reads():
            scores = attention.captured(self.signals, (number, name), stage.info.name)
            at = table.index[:, None].expand(-1, scores.shape[1], -1)
            signals[name] = scores.gather(2, at)
        images = torch.tensor([len(s) for s in self.images], device=keep.device)
        visual = table.visual & ~table.newline & keep
        ctx = Context(stage, signals, visual=visual, images=images)
        if isinstance(stage.keep, int) and bool((ctx.visual.sum(1) < stage.keep * images).any()):
            self.notes.append(
                f"{stage.info.name}: fewer than keep={stage.keep} tokens per image arrive at "
                f"layer {stage.layer}"
            )
        self.ran.add(number)
        with torch.no_grad():
            action = stage.select(ctx)
        self.selection_flops += ctx.flops
        return action.mask

    def restore(self, hidden: Tensor) -> Tensor:
        """The decoder's output at the length the caller knows.

        Dropped rows are zero. Padding rows keep what they had, so that keeping everything
        changes nothing.
        """
        table, full = self.table, self.full
        written = table.valid | ~full.valid.gather(1, table.index)
        hidden = hidden.masked_fill(~written[..., None], 0)
        out = hidden.new_zeros(hidden.shape[0], full.valid.shape[1], hidden.shape[2])
        return out.scatter(1, table.index[..., None].expand_as(hidden), hidden)
