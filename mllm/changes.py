"""What actions change inside decoder layers: branches, heads, logits, and stored tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mllm import flops
from mllm.actions import (
    Attend,
    BranchGate,
    BranchRows,
    Evict,
    HeadGate,
    Inject,
    LayerGate,
    LogitBias,
    Turn,
)
from mllm.ask import route
from mllm.attention import rotate
from mllm.cache import KVCache, SlotTable
from mllm.cache.adoption import tell_compressed
from mllm.errors import PlanError
from mllm.tokens import TokenTable, along, choose_rows, gather_rows, locate, scatter_back

if TYPE_CHECKING:
    from mllm.in_llm import DecoderRun


@dataclass
class _Beside:
    """Keys and values beside the sequence, as a layer attends to them.

    Attributes:
        keys, values: `[batch, n, kv_heads * head_dim]`.
        valid: bool `[batch, n]`, some of every sample.
        rows: bool `[batch, rows]`, which attend; None is all.
        gate: of what the heads give.
        blends: see :class:`mllm.actions.Attend`.
    """

    keys: Tensor
    values: Tensor
    valid: Tensor
    rows: Tensor | None
    gate: Callable[[Tensor], Tensor]
    blends: bool

    def add(self, query: Tensor, output: Tensor, scaling: float | None) -> Tensor:
        """What the heads give, `[batch, rows, heads, head_dim]`, with what they find here."""
        heads, width = query.shape[1], query.shape[3]
        keys, values = (
            x.to(query.dtype).unflatten(2, (-1, width)).transpose(1, 2)
            for x in (self.keys, self.values)
        )
        keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (keys, values))
        found = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=self.valid[:, None, None], scale=scaling
        ).transpose(1, 2)
        given = output.flatten(2)
        if self.blends:
            given, found = torch.cat([given, found.flatten(2).to(given)], 2), found - output
        gate = self.gate(given)
        if self.rows is not None:
            gate = gate.masked_fill(~self.rows[..., None], 0)
        gate = gate.unflatten(2, (-1, width if gate.shape[2] > 1 else 1))
        return output + (gate * found).to(output.dtype)


@dataclass
class Inside:
    """What one layer changes; it lies on the layer's rotary table, where a recompute finds it.

    Attributes:
        layer: the layer, `module` its attention.
        length: rows that the layer is given.
        rows: by branch, int64 `[batch, n]`, rows that take part; `meant`, where there may be
            fillers, tells these from them.
        given: arguments of the attention under `rows["attn"]`.
        scale: by branch, a number or `[batch or 1, rows or 1, 1]`; `whole` is that of both.
        heads: `[batch or 1, rows or 1, heads]`.
        bias: functions of logical indices `queries` and `keys`; `there` are keys that are valid.
        turns: functions of logical indices, and `rotary` of positions.
        beside: keys and values beside the sequence.
    """

    layer: int
    module: nn.Module
    length: int
    rows: dict[str, Tensor] = field(default_factory=dict)
    meant: dict[str, Tensor] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    scale: dict[str, Any] = field(default_factory=dict)
    whole: Tensor | None = None
    heads: Tensor | None = None
    bias: list[Callable[[Tensor, Tensor], Tensor]] = field(default_factory=list)
    beside: list[_Beside] = field(default_factory=list)
    turns: list[Callable[[Tensor], Tensor]] = field(default_factory=list)
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    queries: Tensor | None = None
    keys: Tensor | None = None
    there: Tensor | None = None
    _attended: Tensor | None = None

    def enter(self, branch: str, hidden: Tensor) -> Tensor:
        """The rows of a branch's input that take part."""
        return gather_rows(hidden, self.rows[branch]) if branch in self.rows else hidden

    def real(self, branch: str, valid: Tensor) -> Tensor:
        """Rows of a branch's input that take part: bool, from those of the layer that are valid."""
        if branch not in self.rows:
            return valid
        return valid.gather(1, self.rows[branch]) & self.meant.get(branch, True)

    def leave(self, branch: str, output: Any) -> Any:
        """What the branch adds to the residual, of full length."""
        x, *more = output if isinstance(output, tuple) else (output,)
        if branch in self.rows:
            x = scatter_back(x, self.rows[branch], self.length, self.meant.get(branch))
        if branch in self.scale:
            scale = self.scale[branch]
            x = x * (scale.to(x.dtype) if isinstance(scale, Tensor) else scale)
        if self.whole is not None and branch == "attn":
            self._attended = x
        elif self.whole is not None:  # the residual has all of the attention by now
            x = x * self.whole.to(x.dtype) + self._attended * (self.whole - 1).to(x.dtype)
            self._attended = None
        return (x, *more) if isinstance(output, tuple) else x

    def finish(self, query: Tensor, output: Tensor, scaling: float | None) -> Tensor:
        """What heads give, `[batch, rows, heads, head_dim]`, for the output projection."""
        if self.heads is not None:
            output = output * self.heads.to(output.dtype)[..., None]
        for beside in self.beside:
            output = beside.add(query, output, scaling)
        return output

    def turn(self, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys `[batch, heads, n, head_dim]`, rotated further."""
        if not self.turns:
            return query, key
        return self._turned(query, self.queries), self._turned(key, self.keys)

    def _turned(self, x: Tensor, tokens: Tensor) -> Tensor:
        position = torch.stack([turn(tokens) for turn in self.turns]).sum(0)
        cos, sin = self.rotary(x.new_zeros(1, dtype=torch.float32), position)
        scale = torch.hypot(cos, sin)  # of the model's own rotation, which has been applied
        return rotate(x, (cos / scale)[:, None], (sin / scale)[:, None])

    def mask(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        """The attention mask with the bias, additive."""
        if not self.bias:
            return mask
        least = torch.finfo(query.dtype).min
        queries, keys = query.shape[2], key.shape[2]
        if mask is None:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
            mask = mask.tril(keys - queries)[None, None]
        if mask.dtype == torch.bool:
            mask = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(
                ~mask, least
            )
        total, there = mask[..., :keys], self.there[:, None, None]
        added = [bias(self.queries, self.keys).to(query.dtype) for bias in self.bias]
        for x in added:
            total = torch.where((x == float("inf")) & there, 0, total)
        for x in added:
            total = total + x.masked_fill(x == float("inf"), 0)
        return total.clamp(min=least)


@dataclass(eq=False)
class _Placed:
    """An action and what it speaks of.

    Attributes:
        action: the action.
        on: bool `[batch]`, samples with images then; None is all of them.
        table: the rows, if it speaks of rows.
        number: of its stage in the plan.
    """

    action: Any
    on: Tensor | None
    table: TokenTable | None = None
    number: int = 0

    def later(self) -> _Placed:
        """The action as tokens behind this forward know it: it holds for all rows."""
        if self.table is None:
            return self
        action = dataclasses.replace(self.action, rows=None)
        return dataclasses.replace(self, action=action, table=None)

    def where(self, x: Tensor, other: Any) -> Tensor:
        """`x` `[batch or 1, ...]` for its samples, `other` for the rest."""
        if self.on is None:
            return x
        return torch.where(self.on.view(-1, *[1] * (x.dim() - 1)), x, other)


class Changes:
    """Actions of one forward that are still to be applied, and those that a conversation keeps.

    Attributes:
        lasting: by stage number, actions of the conversation with their samples.
        counts: by (layer, branch), rows of each sample that take part.
        passed: by layer, rows that pass it by: bool, of the layer's table.
    """

    def __init__(self, run: DecoderRun, lasting: dict[int, list[_Placed]]) -> None:
        self.run, self.lasting = run, dict(lasting)
        self.counts: dict[tuple[int, str], Tensor] = {}
        self.passed: dict[int, Tensor] = {}
        self._acted: set[int] = set()
        self._placed: list[_Placed] = []
        self._pending: list[tuple[Evict, int, TokenTable]] = []

    def add(self, number: int, action: Any, table: TokenTable) -> None:
        """Take an action of a stage over the rows of `table`.

        It speaks of samples with images alone, so that a sample without is what it is alone.
        """
        if isinstance(action, Turn) and self.run.past_logical:
            name = self.run.patched.plan.stages[number].info.name
            raise PlanError(
                f"{name} cannot place pictures of a later turn behind those of an earlier one",
                argument="past_key_values",
                given="a later turn with pictures",
                expected="the whole conversation, without a cache",
            )
        on = self.run.pictured
        if number not in self._acted:  # what it said of these samples in an earlier turn is void
            self._acted.add(number)
            old = self.lasting.get(number, [])
            self.lasting[number] = [
                dataclasses.replace(p, on=~on if p.on is None else p.on & ~on)
                for p in old if on is not None
            ]  # fmt: skip
        if _lasts(action):
            by_row = table if isinstance(action, Attend) else None
            self.lasting[number].append(_Placed(action, on, by_row, number))
        elif isinstance(action, Evict):
            for layer in action.layers:
                if layer < self.run.reached:
                    self._let_go(action, layer, table)
                else:
                    self._pending.append((action, layer, table))
        else:
            self._placed.append(_Placed(action, on, table))

    def _of(self, kind: type, layer: int, branch: str | None = None) -> list[_Placed]:
        every = [p for placed in self.lasting.values() for p in placed]
        return [
            p
            for p in every + self._placed
            if isinstance(p.action, kind) and p.action.layer == layer
            and (branch is None or p.action.branch == branch)
        ]

    def _bring(self, x: Tensor, then: TokenTable, new: Any) -> Tensor:
        """Values over the rows of then, over those of now; inserted rows get `new`."""
        table = self.run.table
        if then.index is not table.index:
            x = along(x, locate(table.index, then.index, self.run.full.valid.shape[1]), 1)
        inserted = table.inserted.view(*table.inserted.shape, *[1] * (x.dim() - 2))
        return torch.where(inserted, new, x) if self.run.rows.inserted else x

    def injected(self, layer: int) -> list[Callable[[Tensor], Tensor]]:
        """What is added to the hidden states that enter a layer."""
        table, found = self.run.table, []
        for placed in self._of(Inject, layer):
            action = placed.action
            rows = self._bring(action.rows, placed.table, False) & table.valid
            rows = placed.where(rows, False)
            values = self._bring(action.values, placed.table, 0)
            values = values.masked_fill(~rows[..., None], 0)
            found.append(lambda hidden, values=values: hidden + values.to(hidden.dtype))
        return found

    def inside(self, layer: int, hidden: Tensor, kwargs: dict) -> Inside | None:
        """What a layer changes in its branches; None is nothing."""
        run, family = self.run, self.run.patched.family
        inside = Inside(layer, family.attention(layer), hidden.shape[1])
        takes: list[Tensor] = []
        inside.whole = self._whole(layer)
        for branch in ("attn", "mlp"):
            self._scale(inside, branch)
            keep = self._rows(layer, branch)
            if keep is None:
                continue
            valid = run.table.valid
            takes.append(keep)
            rows = choose_rows(keep, valid)
            self.counts[layer, branch] = keep.sum(1)
            inside.rows[branch] = rows
            if len(rows) > 1:  # a sample alone has no fillers
                # Padding rows keep what they would have, so that taking all rows changes nothing.
                inside.meant[branch] = (keep | ~valid).gather(1, rows)
            if branch == "attn":
                self._narrow(inside, keep, hidden, kwargs)
        if len(takes) == 2:
            self.passed[layer] = run.table.valid & ~(takes[0] | takes[1])
        self._heads(inside)
        inside.beside = [self._beside(p, inside) for p in self._of(Attend, layer)]
        inside.bias = [
            lambda q, k, p=p: p.where(p.action.fn(q, k), 0) for p in self._of(LogitBias, layer)
        ]
        inside.turns = [
            lambda t, p=p: p.where(p.action.fn(t), 0.0) for p in self._of(Turn, layer)
        ]
        inside.rotary = functools.partial(family.rotary, kind=family.kind(layer))
        if inside.bias or inside.turns:
            inside.queries = inside.keys = run.attention_table.logical
            inside.there = run.attention_table.valid
            nobody = "past_key_values" in inside.given
            if run.cache is not None and run.past[layer] and not nobody:
                if run.held[layer].headwise:
                    raise PlanError(
                        f"heads of layer {layer} hold different tokens, which a bias cannot tell",
                        argument="heads",
                        given="Evict with heads, and LogitBias or Turn",
                        expected="one of them at a layer",
                    )
                inside.keys = torch.cat([run.held[layer].logical, inside.queries], 1)
                inside.there = torch.cat([run.held[layer].valid, inside.there], 1)
        gates = inside.scale or inside.heads is not None or inside.whole is not None
        changed = inside.rows or inside.bias or inside.turns or inside.beside or gates
        return inside if changed else None

    def _whole(self, layer: int) -> Tensor | None:
        """What both branches of a layer are multiplied with: `[batch, rows, 1]`."""
        found = None
        for placed in self._of(LayerGate, layer):
            scale = placed.where(self._bring(placed.action.scale, placed.table, 1)[..., None], 1)
            found = scale if found is None else found * scale
        return found

    def _scale(self, inside: Inside, branch: str) -> None:
        for placed in self._of(BranchGate, inside.layer, branch):
            scale = placed.action.scale
            if isinstance(scale, Tensor):
                if scale.dim() == 2:
                    scale = self._bring(scale, placed.table, 1)
                scale = placed.where(scale.view(*scale.shape, *[1] * (3 - scale.dim())), 1)
            elif placed.on is not None:
                scale = torch.where(placed.on[:, None, None], scale, 1.0)
            inside.scale[branch] = inside.scale.get(branch, 1.0) * scale

    def _rows(self, layer: int, branch: str) -> Tensor | None:
        """Rows that take part in a branch: bool `[batch, rows]`; None is all of them."""
        table, keep = self.run.table, None
        for placed in self._of(BranchRows, layer, branch):
            rows = placed.where(self._bring(placed.action.rows, placed.table, True), True)
            keep = rows & (table.valid if keep is None else keep)
        for placed in self._of(BranchGate, layer, branch):
            if not isinstance(placed.action.scale, Tensor) and placed.action.scale == 0:
                rows = placed.where(torch.zeros_like(table.valid), True)
                keep = rows & (table.valid if keep is None else keep)
        return keep

    def _narrow(self, inside: Inside, keep: Tensor, hidden: Tensor, kwargs: dict) -> None:
        """Let the attention of a layer see the rows that take part, and store only these."""
        run, layer, rows = self.run, inside.layer, inside.rows["attn"]
        nobody = not rows.shape[1]
        if nobody:  # attention cannot run on no rows: one runs for nothing, and is not stored
            rows = inside.rows["attn"] = torch.zeros_like(run.table.index[:, :1])
            inside.meant["attn"] = torch.zeros_like(run.table.valid[:, :1])
        narrow = run.narrow(rows, keep.gather(1, rows), stored=not nobody)
        if run.cache is not None:
            self._note(layer, narrow, nobody)
            if nobody:
                _store_nothing(run.cache, layer, hidden, run.patched.family.text_config)
        inside.given = narrow.arguments(layer, hidden[:, : rows.shape[1]], kwargs)
        if nobody:
            inside.given |= {"attention_mask": None, "past_key_values": None}
        run.attention_table = narrow.table
        run.attention_rotary = inside.given["position_embeddings"]

    def _note(self, layer: int, narrow: DecoderRun, nobody: bool) -> None:
        """Tell a layer's cache that the rows of `narrow` come, or none of them."""
        run = self.run
        new = SlotTable.of(narrow.table, narrow.rows.place, narrow.rows.padded)
        new = new.first(0) if nobody else new
        held, seen = run.held[layer], run.past_logical + run.full.valid.shape[1]
        table = new if held is None else held.cat(new)
        dropped = narrow.rows.inserted or narrow.rows.lengths != run.counts.valid
        run.cache.layers[layer].note(table, run.full.valid.shape[1], seen, dropped)
        tell_compressed(run.cache)

    def set_aside(self, layer: int) -> None:
        """The attention of a layer has run: store what took no part, if an action says so."""
        run = self.run
        for placed in self._of(BranchRows, layer, "attn"):
            if placed.action.stored is None or run.cache is None:
                continue
            self._placed.remove(placed)  # what it holds is as large as the layer's cache
            table = run.table
            part = self._bring(placed.action.rows, placed.table, True)
            aside = placed.where(~part & table.valid & ~table.inserted, False)
            if (window := run.patched.windows[layer]) is not None:
                aside = aside & (table.logical > run.events.certain - window)
            rows = choose_rows(aside, table.valid)
            if not rows.shape[1]:
                continue
            narrow = run.narrow(rows, aside.gather(1, rows), stored=True)
            keys, values = (
                gather_rows(self._bring(x.transpose(1, 2), placed.table, 0), rows).transpose(1, 2)
                for x in placed.action.stored
            )
            new = SlotTable.of(narrow.table, narrow.rows.place, narrow.rows.padded)
            hidden = run.past_logical + run.full.valid.shape[1] - run.events.certain
            run.cache.layers[layer].set_aside(new, keys, values, hidden)

    def _heads(self, inside: Inside) -> None:
        for placed in self._of(HeadGate, inside.layer):
            g = placed.action.g
            if g.dim() == 3:
                g = self._bring(g, placed.table, 1)
                if "attn" in inside.rows:
                    g = gather_rows(g, inside.rows["attn"])
            else:
                g = g.view(-1, 1, g.shape[-1])
            g = placed.where(g, 1)
            inside.heads = g if inside.heads is None else inside.heads * g

    def _beside(self, placed: _Placed, inside: Inside) -> _Beside:
        run, action = self.run, placed.action
        rows = action.rows
        if rows is not None:
            rows = self._bring(rows, placed.table, False)
        if placed.on is not None:
            there = torch.ones_like(run.table.valid) if rows is None else rows
            rows = placed.where(there, False)
        if rows is not None and "attn" in inside.rows:
            rows = rows.gather(1, inside.rows["attn"])
        config = run.patched.family.text_config
        width = config.num_attention_heads * flops.head_dim(config)
        queries = run.attention_table.valid.shape[1]
        met = 2 * action.keys.shape[1] + (not action.blends)
        run.selection_flops += 2.0 * queries * width * met
        return _Beside(
            action.keys, action.values,
            action.valid | ~action.valid.any(1, keepdim=True),  # no softmax over nothing
            rows, functools.partial(route, run, placed.number, part=action.gate), action.blends,
        )  # fmt: skip

    # Stored tokens

    def finish(self) -> None:
        """The prefill ends: let go what its layers still needed, and remember what lasts."""
        for action, layer, table in self._pending:
            self._let_go(action, layer, table)
        if self.run.cache is not None:
            self.run.cache.mllm.lasting = {
                number: [p.later() for p in placed] for number, placed in self.lasting.items()
            }

    def _let_go(self, action: Evict, layer: int, table: TokenTable) -> None:
        run = self.run
        if run.cache is None:
            return
        gone = action.rows & table.valid & ~run.protected_of(table)
        if run.pictured is not None:
            gone = gone & run.pictured[:, None]
        cache = KVCache(run.cache, run.patched.family, run.reached, run.events.certain)
        drop = table.logical.masked_fill(~gone, -1)
        cache.evict(layer, drop=drop, heads=None if action.heads is None else list(action.heads))


def _lasts(action: Any) -> bool:
    """Whether an action holds for the conversation."""
    if isinstance(action, BranchGate):
        return not isinstance(action.scale, Tensor) or action.scale.dim() < 2
    if isinstance(action, HeadGate):
        return action.g.dim() < 3
    return isinstance(action, LogitBias | Turn | Attend)


def _store_nothing(cache: Any, layer: int, hidden: Tensor, config: Any) -> None:
    """Count a forward's tokens in a layer that stores none of them."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    none = hidden.new_zeros(hidden.shape[0], kv_heads, 0, head_dim)
    cache.update(none, none, layer)
