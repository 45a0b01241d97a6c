"""Tells the cache methods of a plan what happens in a forward pass."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import ask, attention
from mllm.cache.ops import KVCache
from mllm.cache.slots import SlotTable
from mllm.compressors.base import CacheEvent
from mllm.signals import AttentionRows, ColumnMass

if TYPE_CHECKING:
    from mllm.in_llm import DecoderRun


class CacheEvents:
    """The events of one forward that has a cache.

    `costs` are what reading signals and choosing tokens has cost, in FLOPs per sample.

    Within `generate()` several rows behind the prompt are candidates of assisted decoding. Nothing
    is decided by them until it is known which of them stay: their forward ends without an event,
    and `verify_end` comes before the next one.

    Args:
        run: the forward, its table made.
        prompt_length: logical length of the prompt, where generate() told it.
    """

    def __init__(self, run: DecoderRun, prompt_length: int | None) -> None:
        self.run = run
        past, rows = run.past_logical, run.full.valid.shape[1]
        turn = rows > 1 if prompt_length is None else past < prompt_length
        turn = turn or not (run.begins and run.ends)
        self.phase = "prefill" if turn or not past else "decode" if rows == 1 else "verify"
        certain = past + (1 if self.phase == "verify" else rows)
        if self.phase == "prefill" and prompt_length is not None:
            certain = min(certain, prompt_length)
        self.certain = certain
        self._signals: dict[tuple[int, str, int], Tensor] = {}
        self.costs: list[float] = []
        run.cache.mllm.unverified = certain if certain < past + rows else None
        for layer in run.cache.layers:
            layer.journals = certain < past + rows

    @staticmethod
    def verified(run: DecoderRun, cache: Any, valid: Tensor) -> None:
        """Before a forward: `verify_end`, if the last one held candidates.

        Args:
            run: the forward.
            cache: its cache.
            valid: bool `[batch, tokens]`, stored tokens that are no padding.
        """
        certain = cache.mllm.unverified
        if certain is None:
            return
        cache.mllm.unverified = None
        accepted = cache.get_seq_length() - certain
        event = CacheEvent(
            run.patched.kv(cache), phase="verify", accepted=accepted, signals={}, valid=valid,
            notes=run.notes,
        )  # fmt: skip
        for number, stage in run.patched.compressors:
            seeds = functools.partial(ask.seeds, run, number, len(valid))
            with torch.no_grad():
                stage.verify_end(dataclasses.replace(event, seeds=seeds))

    def add_taps(self, taps: dict[nn.Module, list[Any]]) -> None:
        """Add what cache methods read while attention runs."""
        if self.phase == "verify":
            return
        cache = KVCache(self.run.cache, self.run.patched.family)
        for number, stage in self.run.patched.compressors:
            if self.phase == "decode" and not stage.due(cache):
                continue
            for name, signal in stage.reads().items():
                for own in self.run.patched.each_layer(signal):
                    module = self.run.patched.family.attention(own.layer)
                    tap = functools.partial(self._tap, (number, name, own.layer), own)
                    taps.setdefault(module, []).append(tap)

    def _tap(
        self, slot: tuple[int, str, int], signal: AttentionRows | ColumnMass, query: Tensor,
        key: Tensor, mask: Tensor | None, scaling: float | None, value: Tensor,
    ) -> None:
        run = self.run
        chosen = run.captures.chosen(slot[0], signal, run.attention_table, self.phase == "decode")
        cost = 2.0 * chosen.shape[1] * query.shape[1] * key.shape[2] * query.shape[3]
        self.costs.append(cost)
        held = run.held[signal.layer]
        if key.shape[2] == query.shape[2]:
            held = None  # nobody takes part in this attention, nor sees what is stored
        each = "none" if held is not None and held.headwise else signal.heads
        if isinstance(signal, ColumnMass):
            x, seen = attention.column_mass(query, key, chosen, mask, scaling, heads=each)
            if signal.visible:
                x = x / (seen[:, None] if x.dim() == 3 else seen).clamp(min=1)
        else:
            given = query, key, chosen.clamp(min=0), mask, scaling
            if signal.softmax:
                x = attention.row_scores(*given, heads=each)
            else:
                x = attention.reduce_heads(attention.row_logits(*given), each)
            real = (chosen >= 0)[..., None]
            x.masked_fill_(~(real[:, None] if x.dim() == 4 else real), 0)
        x = self._by_token(x, held)
        if each != signal.heads:
            x = attention.reduce_heads(x, signal.heads)
        self._signals[slot] = x[..., : self.certain]

    def _by_token(self, x: Tensor, held: SlotTable | None) -> Tensor:
        """Values per slot, `[batch, ..., slots]`, by logical index; heads come second if apart.

        Args:
            x: of stored slots and of the rows.
            held: what stored slots stand for; None is none.
        """
        table = self.run.attention_table
        length = self.run.past_logical + self.run.full.valid.shape[1]
        at = table.logical.masked_fill(~table.valid | table.inserted, length)
        if held is not None:
            old = held.logical.masked_fill(~held.valid, length)
            if held.headwise:
                old = old.repeat_interleave(x.shape[1] // old.shape[1], 1)
                at = at[:, None].expand(-1, x.shape[1], -1)
            at = torch.cat([old, at], -1)
        elif attention.free_to_read(x.device) and torch.equal(
            at, torch.arange(length).expand(len(at), -1)
        ):
            return x
        at = at.view(*at.shape[:-1], *[1] * (x.dim() - at.dim()), at.shape[-1])
        found = x.new_zeros(*x.shape[:-1], length + 1)
        return found.scatter(-1, at.expand(x.shape), x)[..., :length]

    @functools.cached_property
    def lengths(self) -> list[int]:
        """Tokens of every sample so far, without padding."""
        if self.certain == self.run.full.valid.shape[1]:
            return self.run.counts.valid
        return self.run.known[:, : self.certain].sum(1).tolist()

    def _entered(self, rows: int) -> list[tuple[int, Tensor]]:
        """See :class:`CacheEvent`; of the first rows."""
        found = []
        for first, table in self.run.tables:
            there = torch.zeros_like(self.run.full.valid)
            real = table.valid & ~table.inserted
            at = torch.where(real, table.index, there.shape[1])
            there = F.pad(there, (0, 1)).scatter(1, at, True)
            found.append((first, there[:, :rows]))
        return found

    def layer_end(self, layer: int) -> None:
        """A decoder layer has run."""
        if self.phase != "prefill":
            return
        self._tell("layer_end", layer)
        depth = len(self.run.patched.layers)
        for number, stage in self.run.patched.compressors:
            if stage.group and ((layer + 1) % stage.group == 0 or layer + 1 == depth):
                self._tell("group_end", layer, number)
            for name, signal in stage.reads().items():
                if signal.layer is None:  # or they would be there of all layers at once
                    self._signals.pop((number, name, layer), None)

    def forward_end(self) -> None:
        """All decoder layers have run."""
        if self.phase == "prefill":
            self._tell("prefill_end" if self.run.ends else "chunk_end")
        elif self.phase == "decode":
            self._tell("decode_step")
        self._signals = {}

    def _tell(self, name: str, layer: int | None = None, only: int | None = None) -> None:
        run = self.run
        ran = None if layer is None else layer + 1
        cache = KVCache(run.cache, run.patched.family, ran, self.certain, run.patched.alike)
        rows = self.certain - run.past_logical
        for number, stage in run.patched.compressors:
            if only is not None and number != only:
                continue
            found = {x[1:]: value for x, value in self._signals.items() if x[0] == number}
            signals: dict[Any, Tensor] = dict(found)
            for key, signal in stage.reads().items():
                at = layer if signal.layer is None else signal.layer
                if (key, at) in found:
                    signals[key] = found[key, at]
            event = CacheEvent(
                cache,
                phase=self.phase,
                layer=layer,
                prompt=run.prompt[:, :rows],
                visual=run.full.visual[:, :rows],
                start=run.past_logical,
                signals=signals,
                valid=run.known[:, : self.certain],
                lengths=self.lengths if self.phase == "prefill" else None,
                protected=None if run.protected is None else run.protected[:, :rows],
                entered=self._entered(rows) if self.phase == "prefill" else (),
                begins=run.begins,
                ends=run.ends,
                notes=run.notes,
                costs=self.costs,
                seeds=functools.partial(ask.seeds, run, number, len(run.known)),
            )
            with torch.no_grad():
                getattr(stage, name)(event)
            run.ran.add(number)
