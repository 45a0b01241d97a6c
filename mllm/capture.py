"""Capturing what in-LLM methods declared that they read, while it exists."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mllm import attention, compat, flops
from mllm.ask import context
from mllm.signals import (
    AttentionRows,
    ColumnMass,
    Grid,
    Hidden,
    Keys,
    Queries,
    Rotary,
    Text,
    TextEmbeds,
    Unreduced,
    Values,
    Views,
)
from mllm.tokens import TokenTable, along, locate

if TYPE_CHECKING:
    from mllm.compressors.base import LayerMethod
    from mllm.in_llm import DecoderRun

# The axis of rows in the value of each signal.
_AXIS = {
    AttentionRows: -1, ColumnMass: -1, Keys: 2, Queries: 2, Values: 2, Hidden: 1, Rotary: 1
}  # fmt: skip


def declared(stages: list[tuple[int, LayerMethod]]) -> dict[tuple[int, Any], int]:
    """Signals of decoder layers that stages read: (stage number, signal) to its latest reader."""
    found: dict[tuple[int, Any], int] = {}
    for number, stage in stages:
        for here in stage.at():
            for signal in stage.reads().values():
                if type(signal) in _AXIS:
                    key = number, signal.at(here)
                    found[key] = max(here, found.get(key, 0))
    return found


def reads_before(signal: Any) -> bool:
    """Whether a signal is read in a call of its own, before its layer runs."""
    return getattr(signal, "when", "after") == "before"


def pick(mask: Tensor, count: int | None = None) -> Tensor:
    """The rows of a mask in order: int64 `[batch, count]`, -1 fills up at the end.

    Args:
        mask: bool `[batch, rows]`.
        count: at least the most in the batch; None asks the device for it.
    """
    count = int(mask.sum(1).max()) if count is None else count
    rows = mask.int().argsort(dim=1, descending=True, stable=True)[:, :count]
    return rows.masked_fill(~mask.gather(1, rows), -1)


class Captures:
    """Signals of one forward of the decoder, by the rows that they had when they existed.

    Attributes:
        embeds: what entered the decoder, and the `index` of its rows; kept if a stage reads it.
        flops: what reading has cost, per sample.
    """

    def __init__(self, run: DecoderRun) -> None:
        self.run, self.patched = run, run.patched
        self.embeds: tuple[Tensor, Tensor] | None = None
        self.flops = 0.0
        self._found: dict[tuple[int, Any], tuple[Tensor, Tensor]] = {}
        self._queries: dict[tuple[int, Any], Tensor] = {}
        self._chosen: dict[tuple[int, Any], Tensor] = {}  # while a call of its own is made
        self._texts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def taps(self) -> dict[nn.Module, list[Any]]:
        """Taps for what is read while a layer's attention runs."""
        found: dict[nn.Module, list[Any]] = {}
        for key in self.patched.signals:
            _, signal = key
            if not isinstance(signal, Hidden) and not reads_before(signal):
                module = self.patched.family.attention(signal.layer)
                found.setdefault(module, []).append(functools.partial(self._tap, key))
        return found

    def hidden(self, layer: int, of: str, hidden: Tensor) -> None:
        """Hidden states as they come by."""
        inside = layer < len(self.patched.layers)
        for key in self.patched.signals:
            if key[1] == Hidden(layer, of):
                self._found[key] = hidden, self.run.table.index
            elif key[1] == Hidden(layer, of, norm=True):
                normed = self.patched.family.final_norm(hidden) if inside else hidden
                self._found[key] = normed, self.run.table.index

    def before(self, layer: int, hidden: Tensor, kwargs: dict) -> None:
        """Read the attention of a layer that is about to run, without its cache."""
        keys = [k for k in self.patched.signals if reads_before(k[1]) and k[1].layer == layer]
        if not keys:
            return
        run, family = self.run, self.patched.family
        with torch.no_grad():
            given = run.alone(layer, hidden, kwargs)
            given["hidden_states"] = family.attention_input(layer, hidden)
            cos, sin = given["position_embeddings"]
            tables = {True: (cos, sin), False: (torch.ones_like(cos), torch.zeros_like(sin))}
            turned = [getattr(key[1], "rope", True) for key in keys]
            for rope in set(turned):
                given["position_embeddings"] = tables[rope]
                read = [key for key, own in zip(keys, turned, strict=True) if own is rope]
                self._read_only(layer, read, given)

    def _read_only(self, layer: int, keys: list[tuple[int, Any]], given: dict[str, Any]) -> None:
        """Call a layer's attention for some signals, and compute no more than they need."""
        family, table = self.patched.family, self.run.attention_table
        module, size = family.attention(layer), given["hidden_states"].shape[1]
        readers = [functools.partial(self._tap, key) for key in keys]
        rows, values = None, True
        if compat.splits_projections(module):
            values = any(isinstance(signal, Values) for _, signal in keys)
            if not any(isinstance(signal, Queries) for _, signal in keys):
                for number, signal in keys:
                    if isinstance(signal, AttentionRows | ColumnMass):
                        self._chosen[number, signal] = self.chosen(number, signal, table)
                first = table.index.new_zeros(len(table.index), 1)
                rows = torch.cat([first, *self._chosen.values()], 1).clamp(min=0)
                rows = rows if rows.shape[1] < size else None
        attention.read_only(module, readers, rows, values, **given)
        self._chosen.clear()
        queries = size if rows is None else rows.shape[1]
        self.flops += flops.attention_reading(
            family.text_config, size, queries, size if values else 1
        )

    def _tap(
        self, slot: tuple[int, Any], query: Tensor, key: Tensor, mask: Tensor | None,
        scaling: float | None, value: Tensor,
    ) -> None:
        number, signal = slot
        table, rows = self.run.attention_table, query.shape[2]
        if isinstance(signal, Rotary):
            both = torch.cat(self.run.attention_rotary, -1)
            self._found[slot] = both.expand(len(query), -1, -1), table.index
            return
        if isinstance(signal, Values):
            value = value[:, :, -rows:]
            if table is not self.run.table:
                value = _only(value, table.valid, 2)
            self._found[slot] = value, table.index
            return
        if getattr(signal, "rope", True) is False and not reads_before(signal):
            # Stored keys have positions that are not known here.
            key, cos_sin = key[:, :, -rows:], self.run.attention_rotary
            cos, sin = (table[:, None] for table in cos_sin)
            turns = self.patched.family.neighbours
            query, key = (attention.unrotate(x, cos, sin, turns) for x in (query, key))
            mask = None if mask is None else mask[..., -rows:]
        if isinstance(signal, Keys):
            value = query if isinstance(signal, Queries) else key[:, :, -rows:]
            if table is not self.run.table:
                value = _only(value, table.valid, 2)
            self._found[slot] = value, table.index
            return
        chosen = self._chosen.get(slot)
        if chosen is None:
            chosen = self.chosen(number, signal, table)
        cost = 2.0 * chosen.shape[1] * query.shape[1] * key.shape[2] * query.shape[3]
        self.flops += cost
        if isinstance(signal, ColumnMass):
            x, seen = attention.column_mass(query, key, chosen, mask, scaling, heads=signal.heads)
            if signal.visible:
                seen = seen.clamp(min=1)
                x = x / (seen[:, None] if x.dim() == 3 else seen)
        else:
            given = query, key, chosen.clamp(min=0), mask, scaling
            if signal.softmax:
                x = attention.row_scores(*given, heads=signal.heads)
            else:
                x = attention.reduce_heads(attention.row_logits(*given), signal.heads)
            real = chosen >= 0
            x.masked_fill_(~(real[:, None, :, None] if x.dim() == 4 else real[..., None]), 0)
            own = table.index.gather(1, chosen.clamp(min=0))
            self._queries[slot] = torch.where(real, own, -1)
        x = x[..., -rows:]
        self._found[slot] = x if table is self.run.table else _only(x, table.valid, -1), table.index

    def chosen(
        self, number: int, signal: Any, table: TokenTable, answering: bool = False
    ) -> Tensor:
        """Query rows of a signal: int64 `[batch, queries]`, -1 fills up.

        Args:
            number: of the stage in its plan.
            signal: the signal.
            table: rows of the layer's attention.
            answering: whether the rows are behind the prompt; then all of them are meant.
        """
        if answering:
            return pick(table.valid, table.valid.shape[1])
        prompt = self.run.prompt_of(table)
        if signal.rows == "last":
            return prompt.long().cumsum(1).argmax(1, keepdim=True)
        if signal.rows == "prompt":
            return pick(prompt)
        if signal.rows == "visual":
            return pick(prompt & table.visual & ~table.newline)
        if signal.rows == "text":
            return pick(prompt & question(table))
        if signal.rows == "window":
            behind = prompt.flip(1).long().cumsum(1).flip(1)
            return pick(prompt & (behind <= signal.window))
        stage = self.patched.plan.stages[number]
        ctx = context(self.run, number, stage, signal.layer, table, known=True)
        with attention.exact(table.valid.device):
            return pick(signal.rows(ctx) & table.valid)

    def read(
        self, number: int, stage: LayerMethod, here: int, table: TokenTable, known: bool = False
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Signals of a stage, and the queries of its rows, by name, over the rows of `table`.

        Args:
            number: of the stage in its plan.
            stage: the stage.
            here: the layer before which it acts.
            table: the rows.
            known: leave out what is yet to come instead of raising.
        """
        signals: dict[str, Any] = {}
        queries: dict[str, Tensor] = {}
        size = self.run.full.valid.shape[1]
        for name, signal in stage.reads().items():
            if isinstance(signal, Grid):
                signals[name] = table
            elif isinstance(signal, TextEmbeds):
                signals[name] = self._text(signal, table)
            elif isinstance(signal, Unreduced):
                signals[name] = self.run.seats.unreduced()
            elif isinstance(signal, Views):
                signals[name] = self._views(table, stage.info.name)
            else:
                slot = number, signal.at(here)
                if known and slot not in self._found:
                    continue
                value, index = attention.captured(self._found, slot, stage.info.name)
                whole = isinstance(signal, Keys | Values) and reads_before(signal)
                if whole and not known and self.patched.signals[slot] == here:
                    del self._found[slot]  # those of all layers are as large as the cache
                if index is not table.index:
                    at, axis = locate(table.index, index, size), _AXIS[type(signal)]
                    there = index.gather(1, at) == table.index
                    value = _only(along(value, at, axis), there, axis)
                signals[name] = value
                if slot in self._queries:
                    own = self._queries[slot]
                    at = locate(own.clamp(min=0), table.index, size)
                    queries[name] = torch.where(own < 0, -1, at)
        return signals, queries

    def _views(self, table: TokenTable, method: str) -> Tensor | None:
        views = self.run.reduction.views
        if views is None:
            self.run.notes.append(f"{method}: no tiles of the pictures came, nothing is added")
            return None
        return along(self.run.seats.spread(views, self.run.full.valid), table.index, 1)

    def _text(self, signal: TextEmbeds, table: TokenTable) -> Text:
        size = self.run.full.valid.shape[1]
        if signal.which not in self._texts:  # text rows do not leave
            text = self.run.prompt_of(table) & ~table.visual
            rows = pick(text & question(table) if signal.which == "question" else text)
            own = table.index.gather(1, rows.clamp(min=0))
            embeds, index = self.embeds
            self._texts[signal.which] = along(embeds, locate(own, index, size), 1), rows >= 0, own
        embeds, valid, own = self._texts[signal.which]
        rows = locate(own, table.index, size).masked_fill(~valid, 0)
        return Text(embeds, valid, rows)


def _only(x: Tensor, there: Tensor, axis: int) -> Tensor:
    """`x` with zeros at rows that are not there: they took no part in a layer's attention.

    Args:
        x: `[batch, ...]`.
        there: bool `[batch, rows]`.
        axis: the axis of rows.
    """
    shape = [1] * x.dim()
    shape[0], shape[axis] = there.shape
    return x.masked_fill(~there.view(shape), 0)


def question(table: TokenTable) -> Tensor:
    """Text rows behind a sample's first visual token: bool `[batch, rows]`."""
    seen = (table.visual & table.valid).long().cumsum(1) > 0
    return seen & ~table.visual & table.valid
