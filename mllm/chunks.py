"""Prompts that are read in chunks: each runs over what the cache has kept of those before it.

The base model is called once, so pictures are encoded once and every row has its own position.
Its decoder is called chunk by chunk: beside the rows' embeddings and outputs, and one layer's
signals, memory holds what cache methods leave of every layer and one chunk. Chunks are counted from
the end of the prompt and the first one is the shortest, so that those of a sample do not depend on
padding at its left.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mllm import compat
from mllm.calls import Brought
from mllm.compressors.base import TokenReducer, TowerReducer
from mllm.errors import PlanError
from mllm.in_llm import DecoderRun, known_tokens
from mllm.tokens import Counts, TokenTable, moved_left, renumber

if TYPE_CHECKING:
    from mllm.patcher import Patched

__all__ = ["Chunks", "check_chunks"]


class Chunks:
    """One forward of the base model, whose rows go through the decoder in several calls.

    Args:
        run: the forward, not started.
        kwargs: the decoder's arguments.
        size: rows of a chunk.
        prompt_length: logical length of the prompt, where generate() told it.
        labels: `[batch, rows]`, where the caller gave them.

    Attributes:
        whole: the forward, for the account.
        rows: rows per sample, and slots per layer before, of each chunk so far.
        costs: what reading and choosing has cost, in FLOPs per sample.

    Raises:
        PlanError: there is no cache, or padding at the right.
    """

    def __init__(
        self, run: DecoderRun, kwargs: dict[str, Any], size: int, prompt_length: int | None,
        labels: Tensor | None,
    ) -> None:  # fmt: skip
        self.whole, self.kwargs, self.size, self.length = run, kwargs, size, prompt_length
        decoder, embeds = run.patched.family.decoder, kwargs["inputs_embeds"]
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        if cache is None and compat.uses_cache(decoder, kwargs.get("use_cache")):
            cache = kwargs["past_key_values"] = compat.dynamic_cache(decoder)
        if cache is None:
            raise _refused(size, "without a cache nothing is known of earlier chunks", "use_cache")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise _refused(size, "a prepared attention mask cannot be read in chunks", "a 2-D mask")
        self.past = run.past_logical = cache.get_seq_length()
        self.known = known_tokens(embeds, self.past, mask)
        valid, rows = self.known[:, self.past :], embeds.shape[1]
        if mask is not None and not bool(valid[:, -1].all()):
            raise _refused(
                size, "they are counted from its end, and the padding is there", "padding left"
            )
        run.cache, run.itemsize = cache, embeds.element_size()
        run.name_rows(valid, mask, prompt_length, labels)
        self.stay: Tensor | None = None
        self.shift: Tensor | None = None
        self._drop()
        run.tables = [(0, run.table)]
        first = rows % size or size
        self.ends = list(range(first, rows + 1, size))
        ends = torch.tensor([0, *self.ends], device=valid.device)
        sums = torch.nn.functional.pad(valid.long().cumsum(1), (1, 0))[:, ends]
        self.counts = sums.diff(dim=1).T.tolist()
        self.costs: list[float] = []
        self.rows: list[tuple[list[int], list[int]]] = []
        self.hidden: list[Tensor] = []
        self.states: list[tuple[Tensor, ...]] = []

    def _drop(self) -> None:
        """Find the rows that pre-LLM stages leave, and their positions."""
        run = self.whole
        if not run.patched.before or run.visual is None:
            return
        self.stay, order = run.seats.kept(run.table)
        if run.reduction.protected is not None:
            run.protected = run.seats.spread(run.reduction.protected, run.full.valid)
        table, position = run.full, self.kwargs.get("position_ids")
        if run.compact:
            if order is not None:
                raise _refused(self.size, "merged tokens change places", "None")
            if position is None:
                position = table.index[:1] + self.past
            position = position.expand(*position.shape[:-2], *table.valid.shape)
            layers = run.cache.layers
            before = getattr(layers[0], "shifts", {}).get("llm", 0) if layers else 0
            moved = renumber(position - before, self.stay, table.valid)
            self.shift = moved_left(position, moved, table.valid)  # from the next turn on
            self.kwargs["position_ids"] = moved + before  # which every chunk takes off
        run.rows, _ = run.rows.staying(self.stay, self.stay.sum(1).tolist(), run.rows.seen)

    def __iter__(self) -> Iterator[tuple[DecoderRun, dict[str, Any]]]:
        """Every chunk, started, and the decoder's arguments for it; see :meth:`add`."""
        whole, start = self.whole, 0
        for number, stop in enumerate(self.ends):
            kwargs = self._arguments(start, stop)
            mask = kwargs.get("attention_mask")
            counts = Counts({}, self.counts[number], [0] * len(self.counts[number]))
            run = DecoderRun(
                whole.patched, Brought(mask, whole.brought.call, counts),
                full=_columns(whole.full, start, stop), prompt=whole.prompt[:, start:stop],
                images=[[] for _ in whole.images], begins=number == 0,
                ends=stop == self.ends[-1], stay=_part(self.stay, start, stop),
                protected=_part(whole.protected, start, stop),
            )  # fmt: skip
            run.start(kwargs, self.length, None)
            self.rows.append((run.rows.lengths, run.past))
            yield run, kwargs
            start = stop

    def _arguments(self, start: int, stop: int) -> dict[str, Any]:
        """The decoder's arguments for rows `start` to `stop`."""
        kwargs, family = dict(self.kwargs), self.whole.patched.family
        kwargs["inputs_embeds"] = kwargs["inputs_embeds"][:, start:stop]
        if (position := kwargs.get("position_ids")) is not None:
            kwargs["position_ids"] = position[..., start:stop]
        if kwargs.get("attention_mask") is not None:
            kwargs["attention_mask"] = self.known[:, : self.past + stop].long()
        valid = self.known[:, self.past + start : self.past + stop]
        rows = torch.arange(start, stop, device=valid.device).expand(len(valid), -1)
        family.take_rows(kwargs, rows, valid)
        return kwargs

    def add(self, run: DecoderRun, output: Any) -> None:
        """What the decoder made of a chunk; methods are told, and the chunk can be forgotten."""
        self.hidden.append(run.restore(output.last_hidden_state))
        if states := getattr(output, "hidden_states", None):
            self.states.append(run.restore_states(states))
        run.events.forward_end()
        run.replaced, run.given = {}, {}  # or masks would lie about until cycles are collected
        self.costs += run.events.costs
        self.whole.ran |= run.ran
        self.whole.notes += [note for note in run.notes if note not in self.whole.notes]

    def close(self, run: DecoderRun, output: Any) -> None:
        """Turn the output for the last chunk into that for all rows; complete the account."""
        self.add(run, output)
        output.last_hidden_state = torch.cat(self.hidden, 1)
        if self.states:
            output.hidden_states = tuple(torch.cat(x, 1) for x in zip(*self.states, strict=True))
        whole = self.whole
        if self.shift is not None:
            whole.cache.layers[0].shifts["llm"] = self.shift
        whole.past, whole.changes, whole.events = self.rows[0][1], run.changes, run.events
        whole.events.costs = self.costs


def check_chunks(patched: Patched, size: Any) -> None:
    """Refuse to read prompts in chunks under a plan that decides by the whole prompt.

    Raises:
        PlanError: says why.
    """
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise PlanError(
            f"prefill_chunk_size={size!r} is no number of rows", argument="prefill_chunk_size",
            given=size, expected="a whole number from 1, or None",
        )  # fmt: skip
    for stage in patched.plan.stages:
        before = isinstance(stage, TokenReducer | TowerReducer)
        if not before and not getattr(stage, "chunks", False):
            raise _refused(
                size,
                f"{stage.info.name} decides by the whole prompt, whose last row is not there until "
                "the end",
                "None, or pre-LLM stages and methods that score and evict stored tokens",
            )
    if patched.family.hybrid:
        raise _refused(
            size,
            f"in {type(patched.family.model).__name__} tokens of a picture see each other, and a "
            "chunk may end within one",
            "None",
        )


def _refused(size: int, why: str, expected: str) -> PlanError:
    return PlanError(
        f"the prompt cannot be read in chunks: {why}",
        argument="prefill_chunk_size",
        given=size,
        expected=expected,
    )


def _part(rows: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if rows is None else rows[:, start:stop]


def _columns(table: TokenTable, start: int, stop: int) -> TokenTable:
    """Rows `start` to `stop` of a table as those of a forward of their own."""
    columns = {
        field.name: getattr(table, field.name)[:, start:stop]
        for field in dataclasses.fields(TokenTable)
    }
    columns["index"] = columns["index"] - start
    return TokenTable(**columns)
