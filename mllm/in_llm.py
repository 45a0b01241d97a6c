"""One forward pass of the decoder under a plan: rows leave, masks and positions follow."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import attention, compat
from mllm.cache import SlotLayer, adopt, note_rows
from mllm.compressors.base import AttentionRows, Context, LayerPruner
from mllm.errors import CacheMismatchError, PlanError
from mllm.ledger import Reduction
from mllm.tokens import (
    Counts,
    TokenTable,
    choose_rows,
    count_rows,
    gather_rows,
    on_device,
    places_of,
    renumber,
    split_images,
)

if TYPE_CHECKING:
    from mllm.patcher import Patched


@dataclass
class DecoderRun:
    """State of one forward pass, from the base model's hooks to the decoder's last layer.

    Attributes:
        patched: the patched model (its plan, stages and family).
        visual: bool `[batch, rows]`, placeholders of this forward; None without any.
        reduction: what the pre-LLM stages decided; set when the decoder starts.
        marks: `visual` by kind, `image` or `video`.
        reductions: by kind, set before the decoder runs.
        mask: the attention mask that the base model was given.
        call: the call of the model around this one, if there was one.
        counts: rows of every sample, as far as the base model's hooks have counted them.
        answering: whether all rows are tokens that generate() has appended.
        full: table of the rows as the caller gave them.
        table: table of the rows of the current stage.
        tables: (first layer, table) of every stage.
        prompt: bool `[batch, rows]`, rows that a method may look at.
        images: per sample, its images in `reduction`.
        past, past_logical: stored slots per layer, and tokens seen, before this forward.
        position: position ids of the current stage's rows.
        compacted: whether positions were renumbered inside the decoder.
        rows: int64 `[batch, rows]`, rows of the current stage among those that the decoder's
            own masks and rotary tables have; None is all of them.
        replaced: by kind of layer, arguments that layers of the current stage get instead of the
            parent's.
        replay: by first layer of a stage, its row choice and arguments.
    """

    patched: Patched
    visual: Tensor | None
    reduction: Reduction | None
    mask: Any
    call: Any = None
    counts: Counts | None = None
    answering: bool = False
    full: TokenTable | None = None
    table: TokenTable | None = None
    tables: list[tuple[int, TokenTable]] = field(default_factory=list)
    prompt: Tensor | None = None
    images: list[list[int]] = field(default_factory=list)
    cache: Any = None
    past: list[int] = field(default_factory=list)
    past_logical: int = 0
    position: Tensor | None = None
    compacted: bool = False
    rows: Tensor | None = None
    replaced: dict[str, dict[str, Any]] = field(default_factory=dict)
    replay: dict[int, tuple[Tensor | None, dict]] = field(default_factory=dict)
    signals: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    selection_flops: float = 0.0
    notes: list[str] = field(default_factory=list)
    ran: set[int] = field(default_factory=set)
    lengths: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    at: Tensor | None = None
    itemsize: int = 0
    marks: dict[str, Tensor] = field(default_factory=dict)
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
            self._check_foreign(cache)
            adopt(cache, self.patched.windows, None if mask is None else mask[:, :-rows])
            self.past = [layer.slots for layer in cache.layers]
            self._check_cache()
            self.past_logical = cache.get_seq_length()
        self.cache = cache
        valid = torch.ones(batch, rows, dtype=torch.bool, device=embeds.device)
        if mask is not None:
            valid = mask[:, -rows:].to(valid)
        if self.counts is None or mask is not self.mask:
            self.counts = self._counted(valid, mask is None or self.answering)
        self.lengths, self.seen = self.counts.valid, self.counts.seen
        self.itemsize = embeds.element_size()
        self._make_table(valid)
        position = kwargs.get("position_ids")
        flat = position is None or position.dim() < 3
        if self.patched.family.mrope and self.visual is not None and flat:
            self.notes.append("positions without rows and columns: mm_token_type_ids is missing")
        self.prompt = self._prompt_rows(prompt_length, labels)
        self._drop_rows(kwargs)
        self.tables.append((0, self.table))
        self._note(0)

    @staticmethod
    def _check_foreign(cache: Any) -> None:
        """What an unpatched model has stored was not reduced, and nobody would notice."""
        foreign = [x for x in getattr(cache, "layers", ()) if not isinstance(x, SlotLayer)]
        if stored := max((int(x.get_seq_length()) for x in foreign), default=0):
            raise CacheMismatchError(
                f"this cache was filled with {stored} tokens without a plan",
                argument="past_key_values",
                given=type(cache).__name__,
                expected="a new cache, or one that this plan has filled",
            )

    def _check_cache(self) -> None:
        """Layers that this plan gives the same rows must hold equally many slots."""
        bounds, kind = [0, *self.patched.cuts, len(self.past)], self.patched.family.kind
        found = {
            (a, kind(i), self.past[i])
            for a, b in zip(bounds, bounds[1:], strict=False)
            for i in range(a, b)
        }
        if len(found) > len({(a, k) for a, k, _ in found}):
            raise CacheMismatchError(
                f"the cache holds {self.past} tokens per layer, which "
                f"{self.patched.plan.spec!r} did not make",
                argument="past_key_values",
                given=self.past,
                expected="a cache of a plan with the same cuts, or a new cache",
            )

    def _counted(self, valid: Tensor, unpadded: bool) -> Counts:
        if self.marks:
            return count_rows(self.marks, valid)
        batch, rows = valid.shape
        lengths = [rows] * batch if unpadded else valid.sum(1).tolist()
        return Counts({}, lengths, [0] * batch)

    def _make_table(self, valid: Tensor) -> None:
        start = self.past_logical
        if self.visual is None:
            self.full = self.table = TokenTable.text(valid, start)
            self.images = [[] for _ in range(valid.shape[0])]
            return
        parts = [self.reductions[kind] for kind in self.marks]
        if len(parts) == 1:
            self.reduction = parts[0]
            self.images = split_images(self.counts.visual, self.reduction.sizes)
        else:
            self.reduction, self.images = Reduction.join(parts), self._both(parts)
        layouts = self.reduction.layouts
        self.visual = self.visual.to(valid.device)
        self.at = places_of(self.visual, sum(self.counts.visual))
        self.full = self.table = TokenTable.prompt(
            valid, self.visual, start, [[layouts[i] for i in own] for own in self.images]
        )

    def _both(self, parts: list[Reduction]) -> list[list[int]]:
        """Images and videos of every sample, in prompt order, as ordinals among both."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.visual]
        first = 0
        for (kind, visual), part in zip(self.marks.items(), parts, strict=True):
            own = split_images(self.counts.marked[kind], part.sizes)
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
        if not drops and shift is None and (first is None or not first.compressed):
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
            self._count(keep, None)
            rows = choose_rows(keep, table.valid, order if compact else None, max(self.lengths))
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
        sizes = torch.tensor([reduction.sizes[i] for i in images])
        token = torch.cat([torch.arange(reduction.sizes[i]) + reduction.starts[i] for i in images])
        token = on_device(token, reduction.keep)
        keep = ~table.visual
        keep = keep.flatten().index_copy(0, self.at, reduction.keep[token]).view_as(keep)
        order = None
        if reduction.order is not None:
            order = table.index.flatten()
            # Per visual row, the first row of its image.
            first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
            place = order[self.at[on_device(first, keep)]] + reduction.order[token]
            order = order.index_copy(0, self.at, place).view_as(table.index)
        return keep & table.valid, order

    def _count(self, keep: Tensor, visual: list[int] | None) -> None:
        """Count the rows that stay, `visual` of them visual; None asks the device."""
        texts = [n - v for n, v in zip(self.lengths, self.seen, strict=True)]
        if visual is None:
            visual = [n - t for n, t in zip(keep.sum(1).tolist(), texts, strict=True)]
        self.seen = visual
        self.lengths = [t + v for t, v in zip(texts, visual, strict=True)]

    @property
    def padded(self) -> bool:
        """Whether any row of the current stage is padding."""
        return min(self.lengths) < self.table.valid.shape[1]

    def _slot_valid(self, layer: int) -> Tensor | None:
        """Validity of a layer's slots with this forward's rows; None if nothing is padded."""
        valid = self.table.valid
        padded = self.padded
        old = None if self.cache is None else self.cache.layers[layer]
        if old is not None and old.slots:
            # The cache may have been told of the new rows already.
            return (
                torch.cat([old.valid[:, : old.slots], valid], 1) if padded or old.padded else None
            )
        return valid if padded else None

    def _note(self, layer: int) -> None:
        """Tell the caches of the layers up to the next cut which rows come."""
        if self.cache is None:
            return
        later = [cut for cut in self.patched.cuts if cut > layer]
        stop = later[0] if later else len(self.patched.layers)
        advance = self.full.valid.shape[1]
        note_rows(self.cache.layers[layer:stop], self.table, self.padded, advance)

    def taps(self) -> dict[nn.Module, list[Any]]:
        """Taps for the signals that in-LLM stages declared."""
        found: dict[nn.Module, list[Any]] = {}
        for number, stage in self.patched.pruners:
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
        scores = reduce(1)[..., -table.valid.shape[1] :]
        # Kept by the caller's rows: a cut may lie between this layer and the one that asks.
        full = scores.new_zeros(*scores.shape[:2], self.full.valid.shape[1])
        self.signals[slot] = full.scatter(2, table.index[:, None].expand_as(scores), scores)
        self.selection_flops += 2 * query.shape[1] * key.shape[2] * query.shape[3]

    def layer(self, layer: int, training: bool, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What decoder layer `layer` is given instead of its parent's arguments."""
        if training:
            # Lives as long as the arguments of a recompute; see `replayed`.
            kwargs["position_embeddings"][0].mllm_run = self
        if layer in self.patched.cuts:
            args = (self._cut(layer, args[0], kwargs), *args[1:])
        kind = self.patched.family.kind(layer)
        if kind not in self.replaced:
            self.replaced[kind] = self._arguments(layer, kind, args[0], kwargs)
        return args, {**kwargs, **self.replaced[kind]}

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
            mask = compat.causal_mask(
                family.text_config, hidden, self._slot_valid(layer), self.cache, layer
            )
        return {
            "attention_mask": mask,
            "position_embeddings": rotary,
            "position_ids": self.position,
        }

    def _mask_of_kind(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """The mask of a layer in a decoder whose layers see differently.

        Among the new rows it is the model's own pattern; stored slots are seen if they are valid
        and, in logical distance, within the layer's window.

        Args:
            layer: index of the layer.
            mask: the model's own mask `[batch or 1, 1, rows, slots]`, before rows left; None is
                causal.
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
        own = own & table.valid[:, None]
        if slots:
            there = old.valid[:, None, :slots]
            if window is not None:
                far = table.logical[:, :, None] - old.logical[:, None, :slots]
                there = there & (far < window)
            own = torch.cat([there.expand(-1, own.shape[1], -1), own], 2)
        return compat.mask_like(own[:, None], mask)

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
        first = max(cut for cut in cuts if cut <= layer)
        rows, replaced = run.replay[first]
        replaced = replaced[run.patched.family.kind(layer)]
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
                lines = max(layout.lines for layout in self.reduction.layouts)
                keep = table.with_newlines(keep, lines, max(map(len, self.images)))
            self._count(keep, None)
            rows = choose_rows(keep, table.valid, None, max(self.lengths))
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
        self.position = position
        self.compacted |= compact
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

    def restore(self, hidden: Tensor, table: TokenTable | None = None) -> Tensor:
        """What came out of a layer, by default the last, at the length the caller knows.

        Dropped rows are zero. Padding rows keep what they had, so that keeping everything
        changes nothing.
        """
        table, full = table or self.table, self.full
        written = table.valid | ~full.valid.gather(1, table.index)
        hidden = hidden.masked_fill(~written[..., None], 0)
        out = hidden.new_zeros(hidden.shape[0], full.valid.shape[1], hidden.shape[2])
        return out.scatter(1, table.index[..., None].expand_as(hidden), hidden)

    def restore_states(self, states: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """`hidden_states` of the decoder: what enters the first layer, and what leaves each."""
        restored, tables = [], dict(self.tables)
        table = tables[0]
        for i, hidden in enumerate(states):
            table = tables.get(max(0, i - 1), table)
            restored.append(None if hidden is None else self.restore(hidden, table))
        return tuple(restored)
