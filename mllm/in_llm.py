"""One forward pass of the decoder under a plan: rows leave, masks and positions follow."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import compat
from mllm.actions import Insert, Keep, Merge, Protect, Write
from mllm.cache import SlotLayer, SlotTable, adopt, note_rows, refuse_flash
from mllm.cache.events import CacheEvents
from mllm.capture import Captures
from mllm.changes import Changes
from mllm.compressors.base import LayerContext, LayerMethod
from mllm.errors import CacheMismatchError, PlanError
from mllm.ledger import Reduction
from mllm.routers.account import Routing
from mllm.routers.base import NAME, active
from mllm.signals import Beside
from mllm.tokens import (
    Counts,
    Layout,
    TokenTable,
    choose_rows,
    count_rows,
    gather_parts,
    gather_rows,
    locate,
    on_device,
    places_of,
    renumber,
    scatter_back,
    split_images,
    supervised,
)

if TYPE_CHECKING:
    from mllm.patcher import Patched
    from mllm.pre_llm import Prompts


@dataclass
class DecoderRun:
    """State of one forward pass, from the base model's hooks to the decoder's last layer.

    Attributes:
        patched: the patched model (its plan, stages and family).
        visual: bool `[batch, rows]`, placeholders of this forward; None without any.
        reduction: what the pre-LLM stages decided; set when the decoder starts.
        marks: `visual` by kind, `image` or `video`.
        reductions: by kind, set before the decoder runs.
        layouts: by kind, of the pixels that the base model was given.
        mask: the attention mask that the base model was given.
        call: the call of the model around this one, if there was one.
        prompts: by kind, the text that pre-LLM stages read; empty if none does.
        counts: rows of every sample, as far as the base model's hooks have counted them.
        answering: whether all rows are tokens that generate() has appended.
        known: bool `[batch, tokens]`, tokens of the conversation that are no padding.
        full: table of the rows as the caller gave them.
        table: table of the rows of the current stage.
        tables: (first layer, table) of every stage.
        prompt: bool `[batch, rows]`, rows that a method may look at.
        images: per sample, its images in `reduction`.
        past, past_logical: stored slots per layer, and tokens seen, before this forward.
        held: per layer what its slots stood for before this forward; empty without a cache.
        events: tells cache methods what happens; None without a cache.
        position: position ids of the current stage's rows.
        place: int64 `[1 or 3, batch, rows]`, what keys of the current stage's rows are rotated by.
        compacted: whether positions were renumbered inside the decoder.
        rows: int64 `[batch, rows]`, rows of the current stage among those that the decoder's
            own masks and rotary tables have; None is all of them.
        replaced: by kind of layer and by what is stored, arguments that layers of the current
            stage get instead of the parent's.
        moves, given: by layer, what was done to its hidden states and its arguments, for a
            recompute.
        captures: declared signals. changes: actions inside of layers.
        reached: the layer that runs, or is about to.
        attention_table, attention_rotary: rows of its attention, and their rotary tables.
        protected: bool, by the rows of `full`; None is none.
        has_inserted: whether there are rows without a source.
        begins, ends: whether a prompt begins, and ends, with these rows; see
            :mod:`mllm.chunks`.
        stay: bool `[batch, rows]`, what the pre-LLM stages leave of a chunk; None is all.
        states: by stage number, what a method remembers.
        routing: what routers do; None if nothing is learnt.
    """

    patched: Patched
    visual: Tensor | None
    reduction: Reduction | None
    mask: Any
    call: Any = None
    prompts: dict[str, Prompts] = field(default_factory=dict)
    counts: Counts | None = None
    answering: bool = False
    known: Tensor | None = None
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
    replaced: dict[Any, dict[str, Any]] = field(default_factory=dict)
    moves: dict[int, list[Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    given: dict[int, dict[str, Any]] = field(default_factory=dict)
    captures: Captures | None = None
    changes: Changes | None = None
    reached: int = 0
    attention_table: TokenTable | None = None
    attention_rotary: Any = None
    protected: Tensor | None = None
    has_inserted: bool = False
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    selection_flops: float = 0.0
    notes: list[str] = field(default_factory=list)
    ran: set[int] = field(default_factory=set)
    lengths: list[int] = field(default_factory=list)
    seen: list[int] = field(default_factory=list)
    at: Tensor | None = None
    itemsize: int = 0
    entered: list[int] | None = None
    marks: dict[str, Tensor] = field(default_factory=dict)
    reductions: dict[str, Reduction] = field(default_factory=dict)
    layouts: dict[str, list[Layout]] = field(default_factory=dict)
    begins: bool = True
    ends: bool = True
    stay: Tensor | None = None
    routing: Routing | None = None

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
        if mask is not None and self.patched.family.hybrid:
            mask = self.mask  # the base model has made its own
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
            adopt(cache, self.patched.windows, self.patched.new_mark())
            self._check_cache(cache)
            for layer, served in zip(cache.layers, self.patched.served, strict=True):
                layer.served = served
            self.past_logical = cache.get_seq_length()
        self.cache = cache
        self.known = embeds.new_ones(batch, self.past_logical + rows, dtype=torch.bool)
        if mask is not None:
            self.known[:, -mask.shape[1] :] = mask[:, -self.known.shape[1] :].bool()
        valid = self.known[:, self.past_logical :]
        if cache is not None:
            CacheEvents.verified(self, cache, self.known[:, : self.past_logical])
            self.past = [layer.slots for layer in cache.layers]
            self.held = [layer.table for layer in cache.layers]
        if self.counts is None or mask is not self.mask:
            self.counts = self._counted(valid, mask is None or self.answering)
        self.lengths, self.seen = self.counts.valid, self.counts.seen
        self.itemsize = embeds.element_size()
        self._make_table(valid)
        position = kwargs.get("position_ids")
        flat = position is None or position.dim() < 3
        if self.patched.family.mrope and self.visual is not None and flat:
            self.notes.append("positions without rows and columns: mm_token_type_ids is missing")
        if self.prompt is None:
            self.prompt = self._prompt_rows(prompt_length, labels)
        if cache is None:
            self._nothing_stored()
        else:
            self.events = CacheEvents(self, prompt_length)
        self._drop_rows(kwargs)
        self.entered = None if self.visual is not None and self.spaced else self.seen
        self.place = self._rotated_by(kwargs.get("position_ids"))
        self.tables.append((0, self.table))
        if 0 not in self.patched.cuts:
            self._note(0)
        self.captures = Captures(self)
        lasting = cache.mllm.lasting if self.past_logical else {}
        self.changes = Changes(self, lasting)
        self.attention_table = self.table
        if self.reduction is not None and self.reduction.protected is not None:
            self.protected = self.protects()
        if self.visual is not None and self.patched.reads_embeds:
            self.captures.embeds = kwargs["inputs_embeds"], self.table.index

    def protects(self) -> Tensor:
        """Rows that the pre-LLM stages protect: bool `[batch, rows]`."""
        return self.spread(self.reduction.protected)

    def spread(self, values: Tensor) -> Tensor:
        """What visual tokens have, `[tokens, ...]`, over all rows: `[batch, rows, ...]`."""
        rows = values.new_zeros(*self.full.valid.shape, *values.shape[1:])
        own = values[self._tokens()]
        return rows.flatten(0, 1).index_copy(0, self.at, own).view_as(rows)

    def unreduced(self) -> Beside:
        """The visual tokens of each sample as they were before any stage."""
        parts = self.reduction.features.split(self.reduction.sizes)
        none = self.reduction.features[:0]
        own = [torch.cat([none, *(parts[i] for i in images)]) for images in self.images]
        counts = on_device(torch.tensor([len(x) for x in own]), none)
        embeds = nn.utils.rnn.pad_sequence(own, batch_first=True)
        place = torch.arange(embeds.shape[1], device=none.device)
        return Beside(embeds, place < counts[:, None])

    @staticmethod
    def _check_foreign(cache: Any) -> None:
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

    def _counted(self, valid: Tensor, unpadded: bool) -> Counts:
        if self.marks:
            return count_rows(self.marks, valid)
        batch, rows = valid.shape
        lengths = [rows] * batch if unpadded else valid.sum(1).tolist()
        return Counts({}, lengths, [0] * batch)

    def _make_table(self, valid: Tensor) -> None:
        start = self.past_logical
        if self.full is not None:  # a chunk of rows that were read before
            self.table = self.full
            return
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
    def pictured(self) -> Tensor | None:
        """Samples with images, which alone methods speak of: bool `[batch]`; None is all.

        Of a forward without any, those of the conversation.
        """
        if self.visual is None and self.past_logical:
            return self.cache.mllm.pictured
        there = [bool(own) for own in self.images]
        return None if all(there) else torch.tensor(there, device=self.full.valid.device)

    @property
    def deciding(self) -> list[tuple[int, LayerMethod]]:
        """Stages that also speak of rows behind a prompt, in a forward that has no others."""
        later = self.visual is None and self.past_logical
        return [(n, s) for n, s in self.patched.pruners if s.decodes] if later else []

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
            prompt = prompt & ~supervised(labels.to(prompt.device), self.visual)
        return prompt

    def _drop_rows(self, kwargs: dict) -> None:
        """Let the rows leave that the pre-LLM stages dropped; move positions and mask along."""
        table, cache = self.table, self.cache
        first = None if cache is None else cache.layers[0]
        shift = None if first is None else first.shifts.get("llm")
        drops = self.stay is not None or (self.patched.before and self.visual is not None)
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
            compact = self.stay is None and self.compact
            if self.stay is None:
                keep, order = self._kept_rows()
            else:
                keep, order = self.stay, None
            if compact:
                moved = renumber(position, keep, table.valid, order)
                if first is not None:
                    last = table.valid.long().cumsum(1).argmax(1, keepdim=True)
                    delta = (position - moved).gather(1, last)
                    first.shifts["llm"] = delta if shift is None else shift + delta
                position = moved
            if self.stay is None:
                kept = self.reduction.kept
                exact = kept is not None and self.counts.seen == self.counts.visual
                own = [sum(kept[i] for i in x) for x in self.images] if exact else None
                self._count(keep, own)
            else:
                self.lengths = keep.sum(1).tolist()
            # At least one row, if only to fill the rectangle.
            most = max(1, *self.lengths)
            rows = choose_rows(keep, table.valid, order if compact else None, most)
            self.table = table.take(rows, keep.gather(1, rows))
            kwargs["inputs_embeds"], position = gather_parts(
                rows, [(kwargs["inputs_embeds"], 1), (position, position.dim() - 1)]
            )
            self.patched.family.take_rows(kwargs, rows, self.table.valid)
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
        if prepared is not None and self.patched.family.hybrid:
            kwargs["attention_mask"], self.rows = self._mask_of_kind(0, prepared), None
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
            mask = F.pad(mask, (max(0, first.seen - first.slots), 0), value=True)
        kwargs["attention_mask"] = mask

    @property
    def compact(self) -> bool:
        """Whether pre-LLM stages renumber positions."""
        return self.patched.positions(self.patched.before[0][1]) == "compact"

    def _kept_rows(self) -> tuple[Tensor, Tensor | None]:
        """Rows that stay, and their order if it is not the grid's: `[batch, rows]` each."""
        table, reduction = self.table, self.reduction
        token = self._tokens()
        keep = ~table.visual
        keep = keep.flatten().index_copy(0, self.at, reduction.keep[token]).view_as(keep)
        order = None
        if reduction.order is not None:
            sizes = [reduction.sizes[i] for own in self.images for i in own]
            starts = itertools.accumulate(sizes, initial=0)
            order = table.index.flatten()
            # Per visual row, the first row of its image.
            first = torch.cat([torch.full((n,), at) for n, at in zip(sizes, starts, strict=False)])
            place = order[self.at[on_device(first, keep)]] + reduction.order[token]
            order = order.index_copy(0, self.at, place).view_as(table.index)
        return keep & table.valid, order

    def _tokens(self) -> Tensor:
        """The visual token, in the reduction, of every visual row: int64 `[visual rows]`."""
        starts, sizes = self.reduction.starts, self.reduction.sizes
        images = [i for own in self.images for i in own]
        tokens = [torch.arange(sizes[i]) + starts[i] for i in images]
        return on_device(torch.cat(tokens), self.reduction.keep)

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
        """Validity of a layer's slots with this forward's rows; None if nothing is padded.

        bool `[batch, slots]`, or `[batch, kv_heads, slots]` where heads hold different tokens.
        """
        valid, held = self.table.valid, self._held(layer)
        if not (self.padded or (held is not None and held.padded)):
            return None
        if held is None:
            return valid
        if held.headwise:
            valid = valid[:, None].expand(-1, held.valid.shape[1], -1)
        return torch.cat([held.valid, valid], -1)

    def _held(self, layer: int) -> SlotTable | None:
        """What a layer stored before this forward; None is nothing."""
        held = self.held[layer] if self.cache is not None else None
        return held if held is not None and held.slots else None

    def _note(self, layer: int) -> None:
        """Tell the caches of the layers up to the next cut which rows come."""
        if self.cache is None:
            return
        later = [cut for cut in self.patched.cuts if cut > layer]
        stop = later[0] if later else len(self.patched.layers)
        advance, intact = self.full.valid.shape[1], self.events.certain
        dropped = self.lengths != self.counts.valid
        note_rows(
            self.cache, range(layer, stop), self.table, self.place, self.padded, advance, intact,
            dropped,
        )  # fmt: skip

    def prompt_of(self, table: TokenTable) -> Tensor:
        """Rows of the prompt among those of a table: bool `[batch, rows]`."""
        return self.prompt.gather(1, table.index) & table.valid & ~table.inserted

    def protected_of(self, table: TokenTable) -> Tensor:
        """Protected rows among those of a table: bool `[batch, rows]`."""
        if self.protected is None:
            return torch.zeros_like(table.valid)
        return self.protected.gather(1, table.index) & table.valid & ~table.inserted

    def layer(self, layer: int, training: bool, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What decoder layer `layer` is given instead of its parent's arguments."""
        if layer < self.patched.first_hooked and not self.differs(layer):
            return args, kwargs
        if training:
            # Lives as long as the arguments of a recompute; see `replayed`.
            kwargs["position_embeddings"][0].mllm_run = self
        hidden, self.reached = args[0], layer
        self.moves[layer], self.attention_table = [], self.table
        if self.visual is not None or self.deciding:
            with _kept():  # of the last norm
                self.captures.hidden(layer, "layer", hidden)
        if self.visual is not None:
            self.captures.before(layer, hidden, kwargs)
        if layer in self.patched.acts:
            hidden = self._cut(layer, hidden, kwargs)
        if self.patched.inner:
            with _kept():
                injected = self.changes.injected(layer)
            for move in injected:
                hidden = self._move(layer, hidden, move)
        given = self.given[layer] = self._replaced(layer, hidden, kwargs)
        final = {**kwargs, **given}
        rotary = final["position_embeddings"]
        self.attention_table, self.attention_rotary = self.table, rotary
        if self.patched.inner:
            with _kept():
                inside = self.changes.inside(layer, hidden, kwargs)
            if inside is not None:
                rotary[0].mllm_inside = {**getattr(rotary[0], "mllm_inside", {}), layer: inside}
        return (hidden, *args[1:]), final

    def _replaced(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Arguments of a layer that differ from its parent's; layers alike share them."""
        if len(self.tables) == 1 and not self.patched.apart and not self.differs(layer):
            return {}  # what the parent made is right
        kind = self.patched.family.kind(layer)
        key = kind, self.held[layer] if self.held else None, layer * self.patched.apart
        if key not in self.replaced:
            given = self._arguments(layer, kind, hidden, kwargs)
            self.replaced[key] = {k: v for k, v in given.items() if v is not kwargs.get(k)}
        return self.replaced[key]

    def differs(self, layer: int) -> bool:
        """Whether a layer stores other tokens than its parent thinks.

        The parent looks at the first layer of every kind, and cannot tell heads apart.
        """
        held = self.held[layer] if self.held else None
        first = self.patched.first_layer[self.patched.family.kind(layer)]
        return held is not None and (held is not self.held[first] or held.headwise)

    def _arguments(self, layer: int, kind: str, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Mask and positions of a layer for the current rows.

        Args:
            layer: the layer, of `kind`.
            hidden: its input, for shape, type and device.
            kwargs: the arguments of its parent, for all rows that the decoder was given.
        """
        family, rotary = self.patched.family, kwargs["position_embeddings"]
        if self.compacted:
            rotary = family.rotary(hidden, self.position, kind)
        elif self.rows is not None:
            rotary = tuple(gather_parts(self.rows, [(t, t.dim() - 2) for t in rotary]))
        if kind:
            mask = self._mask_of_kind(layer, kwargs.get("attention_mask"))
        elif self.patched.inserts or self._crowded(layer):
            mask = self._mask_in_order(layer, kwargs.get("attention_mask"))
        else:
            valid = self._slot_valid(layer)
            if valid is not None and valid.dim() == 3:
                mask = self._mask_in_order(layer, kwargs.get("attention_mask"))
            else:
                mask = compat.causal_mask(family.text_config, hidden, valid, self.cache, layer)
        position = self.position
        if position is None and self.rows is None:
            position = kwargs.get("position_ids")
        elif position is None and (position := kwargs.get("position_ids")) is not None:
            position = gather_rows(position, self.rows, dim=position.dim() - 1)
        return {
            "attention_mask": mask,
            "position_embeddings": rotary,
            "position_ids": position,
        }

    def _crowded(self, layer: int) -> bool:
        """Whether a layer has more slots than tokens, and a backend that can be given any mask."""
        held = self._held(layer)
        if held is None or held.slots <= self.past_logical:
            return False
        return "flash" not in compat.attention_name(self.patched.family.attention(layer))

    def alone(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Arguments of a layer's attention over the current rows, without stored tokens."""
        run = dataclasses.replace(self, cache=None, past_logical=0)
        return run.attend(layer, hidden, kwargs)

    def narrow(self, rows: Tensor, valid: Tensor, stored: bool) -> DecoderRun:
        """This run for some of its rows alone, as one layer's attention sees them.

        Args:
            rows: int64 `[batch, n]`, current rows.
            valid: bool `[batch, n]`.
            stored: whether they see stored tokens, and are stored.
        """
        position = self.position
        return dataclasses.replace(
            self,
            table=self.table.take(rows, valid),
            rows=rows if self.rows is None else self.rows.gather(1, rows),
            position=None if position is None
            else gather_rows(position, rows, dim=position.dim() - 1),
            place=gather_rows(self.place, rows, dim=2),
            cache=self.cache if stored else None,
            lengths=valid.sum(1).tolist(),
        )  # fmt: skip

    def attend(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Arguments of a layer's attention for the current rows."""
        return self._arguments(layer, self.patched.family.kind(layer), hidden, kwargs)

    def _mask_in_order(self, layer: int, mask: Tensor | None) -> Tensor | None:
        """A causal mask by the order of rows, some of which have no place of their own.

        Args:
            layer: index of the layer.
            mask: the decoder's own mask, for its format.
        """
        held, rows = self._held(layer), self.table.valid.shape[1]
        padded = self._slot_valid(layer) is not None
        if mask is None and not padded and (held is None or rows == 1):
            return None
        own = torch.ones(rows, rows, dtype=torch.bool, device=self.table.valid.device).tril()
        own = self._with_stored(own & self.table.valid[:, None], held, None)
        return compat.mask_like(own, mask)

    def _with_stored(self, own: Tensor, held: SlotTable | None, window: int | None) -> Tensor:
        """What the rows see of each other, and what they see of stored slots.

        Args:
            own: bool `[batch, rows, rows]`.
            held: stored slots; None is none.
            window: see :attr:`SlotLayer.window`.

        Returns:
            bool `[batch, 1 or heads, rows, slots + rows]`.
        """
        own = own[:, None]
        if held is None:
            return own
        valid, logical = (
            t if held.headwise else t[:, None] for t in (held.valid, held.logical)
        )
        there = valid[:, :, None].expand(-1, -1, own.shape[2], -1)
        if window is not None:
            far = self.table.logical[:, None, :, None] - logical[:, :, None]
            there = there & (far < window)
        if held.headwise:
            refuse_flash(self.patched.family)
            heads = self.patched.family.text_config.num_attention_heads
            there = there.repeat_interleave(heads // there.shape[1], 1)
        return torch.cat([there, own.expand(-1, there.shape[1], -1, -1)], 3)

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
        if self.has_inserted:  # rows that stand behind others are not seen by these
            order = torch.ones_like(own[0]).tril()
            own = own & (order | ~table.inserted[:, None])
        return compat.mask_like(self._with_stored(own, self._held(layer), window), mask)

    @staticmethod
    def replayed(layer: int, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """What a layer had in the forward pass, when it is recomputed in the backward.

        transformers 5.17 recomputes a checkpointed layer with its hooks, newer versions without.
        Nothing is selected again.
        """
        run = getattr(kwargs["position_embeddings"][0], "mllm_run", None)
        if run is None:
            return None
        hidden = args[0]
        for move in run.moves.get(layer, ()):
            hidden = move(hidden)
        return (hidden, *args[1:]), {**kwargs, **run.given.get(layer, {})}

    def _cut(self, layer: int, hidden: Tensor, kwargs: dict) -> Tensor:
        """Run the stages of this layer and prepare what the layers from here on are given."""
        stages = [(n, s) for n, s in self.patched.pruners if layer in s.at()]
        cut = layer in self.patched.cuts
        position = kwargs.get("position_ids") if len(self.tables) == 1 else self.position
        kind = f"layer {layer}"
        compact = cut and any(self.patched.positions(s) == "compact" for _, s in stages)
        cached = None if self.cache is None or not cut else self.cache.layers[layer]
        shift = None if cached is None else cached.shifts.get(kind)
        if position is not None:
            position = position.expand(hidden.shape[0], -1) if position.dim() == 2 else position
            if shift is not None:
                position = position - shift
        if self.visual is not None:
            keep, counts, moves, inserts = self._act(layer, stages)
            for move in moves:
                hidden = self._move(layer, hidden, move)
            if cut:
                before = dataclasses.replace(self, position=position)
                hidden = self._leave(layer, keep, counts, hidden, position)
                for insert in inserts:
                    hidden = self._insert(layer, insert, hidden, before)
                if compact:
                    position, valid = self.position, self.table.valid
                    self.position = renumber(position, valid, valid)
                    last = valid.long().cumsum(1).argmax(1, keepdim=True)
                    if cached is not None:
                        delta = (position - self.position).gather(1, last)
                        cached.shifts[kind] = delta if shift is None else shift + delta
        else:
            self.position = position
            here = [(n, s) for n, s in self.deciding if layer in s.at()]
            for move in self._act(layer, here)[2] if here else ():
                hidden = self._move(layer, hidden, move)
        if cut:
            self.compacted |= compact
            if self.compacted:
                self.place = self.position[None]
            self._note(layer)
            self.tables.append((layer, self.table))
            self.replaced = {}
        return hidden

    def _leave(
        self, layer: int, keep: Tensor, counts: list[int] | None, hidden: Tensor,
        position: Tensor | None,
    ) -> Tensor:
        """Let rows leave before a layer; returns the hidden states of the others."""
        table = self.table
        if self.spaced:
            lines = max(layout.lines for layout in self.reduction.layouts)
            keep = table.with_newlines(keep, lines, max(map(len, self.images)))
        self._count(keep, counts)
        rows = choose_rows(keep, table.valid, None, max(self.lengths))
        self.table = table.take(rows, keep.gather(1, rows))
        parts = [(hidden, 1), (self.place, 2)]
        if position is not None:
            parts.append((position, position.dim() - 1))
        hidden, self.place, *moved = gather_parts(rows, parts)
        self.position = moved[0] if moved else None
        self.rows = rows if self.rows is None else self.rows.gather(1, rows)
        self.moves[layer].append(lambda x: gather_rows(x, rows))
        return hidden

    def _move(self, layer: int, hidden: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        """Do something to the hidden states that enter a layer, and remember it."""
        self.moves[layer].append(move)
        return move(hidden)

    def _act(
        self, layer: int, stages: list[tuple[int, LayerMethod]]
    ) -> tuple[Tensor, list[int] | None, list[Callable[[Tensor], Tensor]], list[Insert]]:
        """Ask the stages of a layer.

        Returns:
            Rows that stay, how many of them are visual (where that is known), changes of hidden
            states, and new rows.
        """
        table = self.table
        counts = None if self.visual is None or self.spaced else self.seen
        keep, writes, inserts = table.valid.clone(), [], []
        for number, stage in stages:
            for action in self._select(number, stage, layer, keep, counts):
                self._check(stage, action)
                if isinstance(action, Keep):
                    counts = None if self.spaced else action.counts
                    keep &= ~table.visual | table.newline | action.mask
                elif isinstance(action, Merge):
                    self._merge(action.into)
                elif isinstance(action, Write):
                    writes.append(action)
                elif isinstance(action, Insert):
                    inserts.append(action)
                elif isinstance(action, Protect):
                    self._protect(action.rows)
                else:
                    self.changes.add(number, action, table)
        if self.protected is not None:
            keep, counts = keep | self.protected_of(table), None
        visual = table.visual & ~table.newline & keep
        moves = []
        for write in writes:
            rows = visual if write.rows is None else write.rows & table.valid
            if self.pictured is not None:
                rows = rows & self.pictured[:, None]
            moves.append(
                lambda x, rows=rows, values=write.values: torch.where(
                    rows[..., None], values.to(x.dtype), x
                )
            )
        return keep, counts, moves, inserts

    @staticmethod
    def _check(stage: LayerMethod, action: Any) -> None:
        if type(action).__name__ not in stage.actions:
            raise PlanError(
                f"{stage.info.name} returns {type(action).__name__} but does not list it in "
                "its actions",
                argument="actions",
                given=type(action).__name__,
                expected=", ".join(stage.actions),
            )

    def _merge(self, into: Tensor) -> None:
        """Book what tokens stand for when others go into them."""
        table = self.table
        own = torch.arange(into.shape[1], device=into.device)
        goes = table.visual & table.valid & (into >= 0) & (into != own)
        size = table.size.masked_fill(goes, 0)
        size = size.scatter_add(1, into.clamp(min=0), table.size.masked_fill(~goes, 0))
        self.table = dataclasses.replace(table, size=size)

    def _protect(self, rows: Tensor) -> None:
        """Protect rows of the current table."""
        full = torch.zeros_like(self.full.valid)
        rows = (rows & self.table.valid & ~self.table.inserted).long()
        full = full.long().scatter_add(1, self.table.index, rows) > 0
        self.protected = full if self.protected is None else self.protected | full

    def _insert(
        self, layer: int, insert: Insert, hidden: Tensor, before: DecoderRun
    ) -> Tensor:
        """Put new rows behind others; returns the hidden states with them.

        Args:
            layer: index of the layer.
            insert: the action.
            hidden: `[batch, rows, width]`.
            before: this run as the action saw it, before rows left.
        """
        values = insert.rows.to(hidden)
        values = values.expand(len(hidden), *values.shape[-2:])
        after = insert.after if self.pictured is None else insert.after.where(self.pictured, -1)
        after = after[:, None].expand(-1, values.shape[1])
        there, at = after >= 0, after.clamp(min=0)
        new = before.table.take(at, there & before.table.valid.gather(1, at))
        no, none = torch.zeros_like(new.valid), torch.full_like(new.image, -1)
        new = dataclasses.replace(
            new, visual=no, newline=no, inserted=~no, image=none, tile=none, frame=none,
            line=none, row=none.float(), col=none.float(), size=torch.zeros_like(new.size),
        )  # fmt: skip
        # Both are ordered by the rows that the action saw; what is new comes behind.
        stands = locate(self.table.index, before.table.index, self.full.valid.shape[1])
        order = torch.cat([stands, after], 1).argsort(dim=1, stable=True)
        self.table = TokenTable(
            **{
                f.name: torch.cat([getattr(self.table, f.name), getattr(new, f.name)], 1).gather(
                    1, order
                )
                for f in dataclasses.fields(TokenTable)
            }
        )
        rows = at if before.rows is None else before.rows.gather(1, at)
        self.lengths = self.table.valid.sum(1).tolist()
        self.rows = torch.cat([self.rows, rows], 1).gather(1, order)
        place = torch.cat([self.place, gather_rows(before.place, at, dim=2)], 2)
        self.place = gather_rows(place, order, dim=2)
        if self.position is not None:
            dim = self.position.dim() - 1
            position = gather_rows(before.position, at, dim=dim)
            self.position = gather_rows(torch.cat([self.position, position], dim), order, dim=dim)
        self.has_inserted = True
        return self._move(
            layer, hidden, lambda x: gather_rows(torch.cat([x, values.to(x)], 1), order)
        )

    def context(
        self, number: int, stage: LayerMethod, layer: int, table: TokenTable, *,
        keep: Tensor | None = None, known: bool = False, counts: list[int] | None = None,
    ) -> LayerContext:
        """What a stage may read at a layer over the rows of `table`.

        Args:
            number: of the stage in its plan.
            stage: the stage.
            layer: the layer.
            table: the rows.
            keep: bool `[batch, rows]`, rows that other stages of this layer leave; None is all.
            known: whether signals that are yet to come may be missing.
            counts: visual rows that are left, of each sample.
        """
        signals, queries = self.captures.read(number, stage, layer, table, known)
        visual = table.visual & ~table.newline & table.valid
        if self.entered is None:
            first = self.tables[0][1]
            self.entered = (first.visual & ~first.newline & first.valid).sum(1).tolist()
        return LayerContext(
            stage, signals, queries=queries,
            layer=layer, num_layers=len(self.patched.layers), table=table,
            visual=visual if keep is None else visual & keep,
            prompt=self.prompt_of(table), protected=self.protected_of(table),
            images=[len(own) for own in self.images], entered=self.entered, counts=counts,
            state=self.states.setdefault(number, {}), width=self.full.valid.shape[1],
            seeds=functools.partial(self.seeds, number, len(self.images)),
            route=functools.partial(self.route, number), routing=self.routing, number=number,
            answers=self._answers(table), decoding=self.visual is None,
            answer_loss=functools.partial(self._answer_loss, table),
            seed_for=functools.partial(self.patched.plan.seed_for, number),
            attention_input=functools.partial(self.patched.family.attention_input, layer),
        )  # fmt: skip

    def _answers(self, table: TokenTable) -> Tensor:
        """Rows behind the prompt among those of a table: bool `[batch, rows]`."""
        valid = table.valid & ~table.inserted
        return valid if self.visual is None else valid & ~self.prompt.gather(1, table.index)

    def _answer_loss(self, table: TokenTable, hidden: Tensor) -> Tensor:
        """What the head would lose if `hidden`, over the rows of `table`, left the last layer."""
        labels = self.call.labels.to(hidden.device)
        following = F.pad(labels[:, 1:], (0, 1), value=-100).gather(1, table.index)
        there = (following != -100) & table.valid & ~table.inserted
        if self.pictured is not None:
            there = there & self.pictured[:, None]
        model = self.patched.family.model
        logits = model.get_output_embeddings()(self.patched.family.final_norm(hidden[there]))
        lost = F.cross_entropy(logits.float(), following[there], reduction="sum")
        return lost / there.sum().clamp(min=1)

    def route(self, number: int, x: Tensor, part: str, *more: Any) -> Tensor:
        """What a trained part of stage `number` makes of `x`; its cost, where it says one."""
        model = self.patched.family.model
        module = active(model)._modules[str(number)][part]
        if hasattr(module, "flops"):
            self.selection_flops += module.flops(x, *more)
        # By the model's attribute: PEFT may have put a copy in its place.
        return getattr(model, NAME)(x, number, part, *more)

    def seeds(self, number: int, batch: int, *more: int) -> list[int]:
        """A seed per sample from the bits of its pictures, for stage `number` and what else."""
        bits, images = self.reduction.bits if self.reduction else [], self.images or [()] * batch
        seed_for = self.patched.plan.seed_for
        return [seed_for(number, *(bits[i] for i in own), *more) for own in images]

    def _select(
        self, number: int, stage: LayerMethod, layer: int, keep: Tensor, counts: list[int] | None
    ) -> list[Any]:
        """The actions of a stage."""
        with _kept():  # signals of earlier layers are brought to the rows of this one
            ctx = self.context(number, stage, layer, self.table, keep=keep, counts=counts)
        budget = getattr(stage, "keep", None)
        if isinstance(budget, int) and any(
            there < budget * images
            for there, images in zip(ctx.counts(), ctx.n_images, strict=True)
        ):
            self.notes.append(
                f"{stage.info.name}: fewer than keep={budget} tokens per image arrive at "
                f"layer {layer}"
            )
        self.ran.add(number)
        if stage.differentiable and compat.reentrant(self.patched.layers[layer - 1]):
            raise PlanError(
                f"{stage.info.name} learns or merges, and reentrant checkpointing gives that no "
                "gradient",
                argument="use_reentrant",
                given=True,
                expected="False",
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and stage.differentiable), _kept():
            actions = stage.act(ctx)
        self.selection_flops += ctx.flops
        self.notes += ctx.remarks
        return actions

    def remember(self) -> None:
        """Keep which samples of the conversation have had images."""
        if self.cache is None or not any(s.decodes for _, s in self.patched.pruners):
            return
        mark, batch = self.cache.mllm, self.full.valid.shape[0]
        none = torch.zeros(batch, dtype=torch.bool, device=self.full.valid.device)
        if self.visual is None:
            mark.pictured = mark.pictured if self.past_logical else none
            return
        own = self.pictured
        before = none if not self.past_logical else mark.pictured
        mark.pictured = None if own is None or before is None else own | before

    def finish(self, hidden: Tensor) -> None:
        """The last layer has run: stages behind it, and what was put off until now."""
        depth = len(self.patched.layers)
        self.reached = depth
        if depth in self.patched.acts:
            self.captures.hidden(depth, "layer", hidden)
            stages = [(n, s) for n, s in self.patched.pruners if depth in s.at()]
            self._act(depth, stages)
        self.changes.finish()
        self.selection_flops += self.captures.flops

    def restore(self, hidden: Tensor, table: TokenTable | None = None) -> Tensor:
        """What came out of a layer, by default the last, at the length the caller knows.

        Dropped rows are zero. Padding rows keep what they had, so that keeping everything
        changes nothing.
        """
        table, full = table or self.table, self.full
        if self.has_inserted:  # equally many in every sample
            count = table.inserted.shape[1] - int(table.inserted[0].sum())
            rows = table.inserted.int().argsort(dim=1, stable=True)[:, :count]
            table, hidden = table.take(rows, table.valid.gather(1, rows)), gather_rows(hidden, rows)
        written = table.valid | ~full.valid.gather(1, table.index)
        return scatter_back(hidden, table.index, full.valid.shape[1], written)

    def restore_states(self, states: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """`hidden_states` of the decoder: what enters the first layer, and what leaves each."""
        restored, tables = [], dict(self.tables)
        table = tables[0]
        for i, hidden in enumerate(states):
            table = tables.get(max(0, i - 1), table)
            restored.append(None if hidden is None else self.restore(hidden, table))
        return tuple(restored)


def _kept() -> Any:
    """While open, what autograd saves is kept, and no business of a checkpoint around it.

    transformers 5.17 checkpoints a layer with its hooks, but nothing of a plan is computed again.
    """
    return torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
