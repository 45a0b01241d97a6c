"""One forward pass of the decoder under a plan: rows leave, masks and positions follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mllm import compat, masks
from mllm.acting import act, inserted
from mllm.ask import kept
from mllm.cache import SlotTable, adopt, note_rows
from mllm.cache.events import CacheEvents
from mllm.calls import Brought
from mllm.capture import Captures
from mllm.changes import Changes
from mllm.compressors.base import LayerMethod
from mllm.errors import PlanError
from mllm.ledger import Reduction
from mllm.routers.account import Routing
from mllm.rows import Rows
from mllm.seats import Seats
from mllm.tokens import (
    Counts,
    TokenTable,
    count_rows,
    gather_parts,
    gather_rows,
    moved_left,
    renumber,
    scatter_back,
    supervised,
)

if TYPE_CHECKING:
    from mllm.patcher import Patched


@dataclass
class DecoderRun:
    """State of one forward pass of the decoder.

    Attributes:
        patched: the patched model (its plan, stages and family).
        brought: what the call of the base model brings.
        visual: bool `[batch, rows]`, placeholders of this forward; None without any.
        reduction, seats: what the pre-LLM stages decided, and of which rows; set when the decoder
            starts.
        counts: rows of every sample.
        known: bool `[batch, tokens]`, tokens of the conversation that are no padding.
        full: table of the rows as the caller gave them.
        rows: those of the current stage; `table` is theirs.
        tables: (first layer, table) of every stage.
        prompt: bool `[batch, rows]`, rows that a method may look at.
        images: per sample, its images in `reduction`.
        entered: visual rows of each sample that entered the decoder; None asks the device later.
        past, past_logical: stored slots per layer, and tokens seen, before this forward.
        held: per layer what its slots stood for before this forward; empty without a cache.
        events: tells cache methods what happens; None without a cache.
        replaced: by kind of layer and by what is stored, arguments that layers of the current
            stage get instead of the parent's.
        compacted: whether positions were renumbered inside the decoder.
        moves, given: by layer, what was done to its hidden states and its arguments, for a
            recompute.
        captures: declared signals. changes: actions inside of layers.
        reached: the layer that runs, or is about to.
        attention_table, attention_rotary: rows of its attention, and their rotary tables.
        protected: bool, by the rows of `full`; None is none.
        begins, ends: whether a prompt begins, and ends, with these rows; see
            :mod:`mllm.chunks`.
        stay: bool `[batch, rows]`, what the pre-LLM stages leave of a chunk; None is all.
        states: by stage number, what a method remembers.
        routing: what routers do; None if nothing is learnt.
    """

    patched: Patched
    brought: Brought
    visual: Tensor | None = None
    reduction: Reduction | None = None
    counts: Counts | None = None
    known: Tensor | None = None
    full: TokenTable | None = None
    rows: Rows | None = None
    tables: list[tuple[int, TokenTable]] = field(default_factory=list)
    prompt: Tensor | None = None
    images: list[list[int]] = field(default_factory=list)
    cache: Any = None
    past: list[int] = field(default_factory=list)
    past_logical: int = 0
    held: list[SlotTable | None] = field(default_factory=list)
    events: CacheEvents | None = None
    compacted: bool = False
    replaced: dict[Any, dict[str, Any]] = field(default_factory=dict)
    moves: dict[int, list[Callable[[Tensor], Tensor]]] = field(default_factory=dict)
    given: dict[int, dict[str, Any]] = field(default_factory=dict)
    captures: Captures | None = None
    changes: Changes | None = None
    reached: int = 0
    attention_table: TokenTable | None = None
    attention_rotary: Any = None
    protected: Tensor | None = None
    states: dict[int, dict[str, Any]] = field(default_factory=dict)
    selection_flops: float = 0.0
    notes: list[str] = field(default_factory=list)
    ran: set[int] = field(default_factory=set)
    seats: Seats | None = None
    itemsize: int = 0
    entered: list[int] | None = None
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
            mask = self.brought.mask  # the base model has made its own
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise PlanError(
                "a prepared attention mask (as static caches make it) cannot follow a plan",
                argument="attention_mask",
                given=type(mask).__name__,
                expected="None or [batch, tokens]",
            )
        cache = kwargs.get("past_key_values")
        if cache is None and compat.uses_cache(decoder, kwargs.get("use_cache")):
            cache = kwargs["past_key_values"] = compat.dynamic_cache(decoder)
        if cache is None and mask is None and (self.patched.cuts or self.patched.before):
            masks.refuse_packed(kwargs.get("position_ids"))
        self.past = [0] * len(layers)
        if cache is not None:
            adopt(cache, self.patched.windows, self.patched.new_mark())
            for layer, served in zip(cache.layers, self.patched.served, strict=True):
                layer.served = served
            self.past_logical = cache.get_seq_length()
        self.cache = cache
        self.known = known_tokens(embeds, self.past_logical, mask)
        if cache is not None:
            CacheEvents.verified(self, cache, self.known[:, : self.past_logical])
            self.past = [layer.slots for layer in cache.layers]
            self.held = [layer.table for layer in cache.layers]
        self.itemsize = embeds.element_size()
        self.name_rows(self.known[:, self.past_logical :], mask, prompt_length, labels)
        position = kwargs.get("position_ids")
        flat = position is None or position.dim() < 3
        if self.patched.family.mrope and self.visual is not None and flat:
            self.notes.append("positions without rows and columns: mm_token_type_ids is missing")
        if cache is None:
            self._nothing_stored()
        else:
            self.events = CacheEvents(self, prompt_length)
        self._drop_rows(kwargs)
        self.entered = None if self.visual is not None and self.seats.spaced else self.rows.seen
        self.rows = replace(self.rows, place=self._rotated_by(kwargs.get("position_ids")))
        self.tables.append((0, self.table))
        if 0 not in self.patched.cuts:
            self._note(0)
        self.captures = Captures(self)
        lasting = cache.mllm.lasting if self.past_logical else {}
        self.changes = Changes(self, lasting)
        self.attention_table = self.table
        if self.reduction is not None and self.reduction.protected is not None:
            self.protected = self.seats.spread(self.reduction.protected, self.full.valid)
        if self.visual is not None and self.patched.reads_embeds:
            self.captures.embeds = kwargs["inputs_embeds"], self.table.index

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

    def name_rows(
        self, valid: Tensor, mask: Tensor | None, length: int | None, labels: Tensor | None
    ) -> None:
        """Count the rows, and say what each is.

        Args:
            valid: bool `[batch, rows]`, no padding.
            mask: `[batch, tokens]`, that it comes from; None is no padding.
            length: logical length of the prompt, where generate() told it.
            labels: `[batch, rows]`, where the caller gave them.
        """
        self.counts = self.brought.counts
        if self.counts is None or mask is not self.brought.mask:
            self.counts = self._counted(valid, mask is None or self.brought.answering)
        self._make_table(valid)
        self.rows = Rows(self.full, self.counts.valid, self.counts.seen)
        if self.prompt is None:
            self.prompt = self._prompt_rows(length, labels)

    def _counted(self, valid: Tensor, unpadded: bool) -> Counts:
        if self.brought.marks:
            return count_rows(self.brought.marks, valid)
        batch, rows = valid.shape
        lengths = [rows] * batch if unpadded else valid.sum(1).tolist()
        return Counts({}, lengths, [0] * batch)

    def _make_table(self, valid: Tensor) -> None:
        if self.full is not None:  # a chunk of rows that were read before
            return
        start = self.past_logical
        if self.visual is None:
            self.full = TokenTable.text(valid, start)
            self.images = [[] for _ in range(valid.shape[0])]
            return
        self.visual = self.visual.to(valid.device)
        own = self.brought
        self.seats = Seats.of(own.marks, self.visual, own.reductions, self.counts)
        self.reduction, self.images = self.seats.reduction, self.seats.images
        self.full = TokenTable.prompt(valid, self.visual, start, self.seats.layouts)

    @property
    def table(self) -> TokenTable:
        """The rows of the current stage."""
        return self.rows.table

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
                keep, order = self.seats.kept(table)
            else:
                keep, order = self.stay, None
            if compact:
                moved = renumber(position, keep, table.valid, order)
                if first is not None:
                    delta = moved_left(position, moved, table.valid)
                    first.shift("llm", delta if shift is None else shift + delta)
                position = moved
            if self.stay is None:
                kept = self.reduction.kept
                exact = kept is not None and self.counts.seen == self.counts.visual
                own = [sum(kept[i] for i in x) for x in self.images] if exact else None
                counts = self.rows.counted(keep, own)
            else:
                counts = keep.sum(1).tolist(), self.rows.seen
            self.rows, index = self.rows.staying(keep, *counts, order if compact else None)
            kwargs["inputs_embeds"], position = gather_parts(
                index, [(kwargs["inputs_embeds"], 1), (position, position.dim() - 1)]
            )
            self.patched.family.take_rows(kwargs, index, self.table.valid)
        kwargs["position_ids"] = position
        self._substitute_mask(kwargs)
        self.rows = replace(self.rows, source=None)  # the decoder's own mask has these now

    def _substitute_mask(self, kwargs: dict) -> None:
        """Give the decoder the mask of the rows that are left."""
        prepared = kwargs.get("attention_mask")
        if isinstance(prepared, dict):
            kinds = [self.patched.family.kind(i) for i in range(len(self.past))]
            kwargs["attention_mask"] = {
                kind: masks.of_kind(self, kinds.index(kind), prepared[kind]) for kind in set(kinds)
            }
            return
        if prepared is not None and self.patched.family.hybrid:
            kwargs["attention_mask"] = masks.of_kind(self, 0, prepared)
            return
        mask = masks.slot_valid(self, 0)
        if mask is not None and mask.dim() == 3:
            mask = None  # every layer that has heads apart gets a mask of its own
        if mask is None and self.cache is None:
            # Without a mask or cache, transformers takes gaps in positions for packed sequences.
            mask = self.table.valid
        if mask is not None and self.cache is not None:
            # The decoder looks a 2-D mask up by logical position.
            first = self.cache.layers[0]
            mask = F.pad(mask, (max(0, first.seen - first.slots), 0), value=True)
        kwargs["attention_mask"] = mask

    @property
    def compact(self) -> bool:
        """Whether pre-LLM stages renumber positions."""
        return self.patched.positions(self.patched.before[0][1]) == "compact"

    def _note(self, layer: int) -> None:
        """Tell the caches of the layers up to the next cut which rows come."""
        if self.cache is None:
            return
        later = [cut for cut in self.patched.cuts if cut > layer]
        stop = later[0] if later else len(self.patched.layers)
        advance, intact = self.full.valid.shape[1], self.events.certain
        rows = self.rows
        dropped = rows.inserted or rows.lengths != self.counts.valid
        note_rows(
            self.cache, range(layer, stop), rows.table, rows.place, rows.padded, advance, intact,
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
            with kept():  # of the last norm
                self.captures.hidden(layer, "layer", hidden)
        if self.visual is not None:
            self.captures.before(layer, hidden, kwargs)
        if layer in self.patched.acts:
            hidden = self._cut(layer, hidden, kwargs)
        if self.patched.inner:
            with kept():
                injected = self.changes.injected(layer)
            for move in injected:
                hidden = self._move(layer, hidden, move)
        given = self.given[layer] = self._replaced(layer, hidden, kwargs)
        final = {**kwargs, **given}
        rotary = final["position_embeddings"]
        self.attention_table, self.attention_rotary = self.table, rotary
        if self.patched.inner:
            with kept():
                inside = self.changes.inside(layer, hidden, kwargs)
            if inside is not None:
                rotary[0].mllm_inside = {**getattr(rotary[0], "mllm_inside", {}), layer: inside}
        return (hidden, *args[1:]), final

    def _replaced(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Arguments of a layer that differ from its parent's; layers alike share them."""
        if len(self.tables) == 1 and not self.patched.apart and not self.differs(layer):
            return {}  # what the parent made is right
        held = self.held[layer] if self.held else None
        key = self.patched.family.kind(layer), held, layer * self.patched.apart
        if key not in self.replaced:
            given = self.arguments(layer, hidden, kwargs)
            self.replaced[key] = {k: v for k, v in given.items() if v is not kwargs.get(k)}
        return self.replaced[key]

    def differs(self, layer: int) -> bool:
        """Whether a layer stores other tokens than its parent thinks.

        The parent looks at the first layer of every kind, and cannot tell heads apart.
        """
        held = self.held[layer] if self.held else None
        first = self.patched.first_layer[self.patched.family.kind(layer)]
        return held is not None and (held is not self.held[first] or held.headwise)

    def arguments(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Mask and positions of a layer for the current rows.

        Args:
            layer: the layer.
            hidden: its input, for shape, type and device.
            kwargs: the arguments of its parent, for all rows that the decoder was given.
        """
        family, rotary = self.patched.family, kwargs["position_embeddings"]
        position, source = self.rows.position, self.rows.source
        if self.compacted:
            rotary = family.rotary(hidden, position, family.kind(layer))
        elif source is not None:
            rotary = tuple(gather_parts(source, [(t, t.dim() - 2) for t in rotary]))
        if position is None:
            position = kwargs.get("position_ids")
            if position is not None and source is not None:
                position = gather_rows(position, source, dim=position.dim() - 1)
        return {
            "attention_mask": masks.of_layer(self, layer, hidden, kwargs.get("attention_mask")),
            "position_embeddings": rotary,
            "position_ids": position,
        }

    def alone(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Arguments of a layer's attention over the current rows, without stored tokens."""
        return replace(self, cache=None, past_logical=0).arguments(layer, hidden, kwargs)

    def narrow(self, rows: Tensor, valid: Tensor, stored: bool) -> DecoderRun:
        """This run for some of its rows alone, as one layer's attention sees them.

        Args:
            rows: int64 `[batch, n]`, current rows.
            valid: bool `[batch, n]`.
            stored: whether they see stored tokens, and are stored.
        """
        cache = self.cache if stored else None
        return replace(self, rows=self.rows.only(rows, valid), cache=cache)

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
        first = len(self.tables) == 1
        position = kwargs.get("position_ids") if first else self.rows.position
        kind = f"layer {layer}"
        compact = cut and any(self.patched.positions(s) == "compact" for _, s in stages)
        cached = None if self.cache is None or not cut else self.cache.layers[layer]
        shift = None if cached is None else cached.shifts.get(kind)
        if position is not None:
            position = position.expand(hidden.shape[0], -1) if position.dim() == 2 else position
            if shift is not None:
                position = position - shift
        if self.visual is not None:
            keep, counts, moves, inserts = act(self, layer, stages)
            for move in moves:
                hidden = self._move(layer, hidden, move)
            if cut:
                before = replace(self.rows, position=position)
                keep = self.seats.with_newlines(before.table, keep)
                self.rows, hidden, index = before.leave(keep, counts, hidden)
                self.moves[layer].append(lambda x: gather_rows(x, index))
                for insert in inserts:
                    self.rows, move = inserted(self, insert, hidden, before)
                    hidden = self._move(layer, hidden, move)
                if compact:
                    position, valid = self.rows.position, self.table.valid
                    moved = renumber(position, valid, valid)
                    self.rows = replace(self.rows, position=moved)
                    if cached is not None:
                        delta = moved_left(position, moved, valid)
                        cached.shift(kind, delta if shift is None else shift + delta)
        else:
            self.rows = replace(self.rows, position=position)
            here = [(n, s) for n, s in self.deciding if layer in s.at()]
            for move in act(self, layer, here)[2] if here else ():
                hidden = self._move(layer, hidden, move)
        if cut:
            self.compacted |= compact
            if self.compacted:
                self.rows = replace(self.rows, place=self.rows.position[None])
            self._note(layer)
            self.tables.append((layer, self.table))
            self.replaced = {}
        return hidden

    def _move(self, layer: int, hidden: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        """Do something to the hidden states that enter a layer, and remember it."""
        self.moves[layer].append(move)
        return move(hidden)

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
            act(self, depth, stages)
        self.changes.finish()
        self.selection_flops += self.captures.flops

    def restore(self, hidden: Tensor, table: TokenTable | None = None) -> Tensor:
        """What came out of a layer, by default the last, at the length the caller knows.

        Dropped rows are zero. Padding rows keep what they had, so that keeping everything
        changes nothing.
        """
        table, full = table or self.table, self.full
        if self.rows.inserted:  # equally many in every sample
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


def known_tokens(embeds: Tensor, past: int, mask: Tensor | None) -> Tensor:
    """Tokens of a conversation that are no padding: bool `[batch, past + rows]`.

    Args:
        embeds: `[batch, rows, width]`.
        past: tokens before.
        mask: `[batch, tokens]`, of the newest; None is no padding.
    """
    known = embeds.new_ones(embeds.shape[0], past + embeds.shape[1], dtype=torch.bool)
    if mask is not None:
        known[:, -mask.shape[1] :] = mask[:, -known.shape[1] :].bool()
    return known
