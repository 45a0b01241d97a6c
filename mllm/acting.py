"""What the stages of one decoder layer decide, and what that does to the rows that enter it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mllm.actions import Insert, Keep, Merge, Protect, Write
from mllm.ask import ask
from mllm.compressors.base import LayerMethod
from mllm.rows import Rows
from mllm.tokens import gather_rows

if TYPE_CHECKING:
    from mllm.in_llm import DecoderRun

#: A change of hidden states `[batch, rows, width]`.
Move = Callable[[Tensor], Tensor]


def act(
    run: DecoderRun, layer: int, stages: list[tuple[int, LayerMethod]]
) -> tuple[Tensor, list[int] | None, list[Move], list[Insert]]:
    """Ask the stages of a layer.

    Returns:
        Rows that stay, how many of them are visual (where that is known), changes of hidden
        states, and new rows.
    """
    table = run.table
    counts = None if run.visual is None or run.seats.spaced else run.rows.seen
    keep, writes, inserts = table.valid.clone(), [], []
    for number, stage in stages:
        for action in ask(run, number, stage, layer, keep, counts):
            if isinstance(action, Keep):
                counts = None if run.seats.spaced else action.counts
                keep &= ~table.visual | table.newline | action.mask
            elif isinstance(action, Merge):
                _merge(run, action.into)
            elif isinstance(action, Write):
                writes.append(action)
            elif isinstance(action, Insert):
                inserts.append(action)
            elif isinstance(action, Protect):
                _protect(run, action.rows)
            else:
                run.changes.add(number, action, table)
    if run.protected is not None:
        keep, counts = keep | run.protected_of(table), None
    visual = table.visual & ~table.newline & keep
    return keep, counts, [_written(run, write, visual) for write in writes], inserts


def _written(run: DecoderRun, write: Write, visual: Tensor) -> Move:
    """New hidden states at the rows that an action names, or at the visual ones that stay."""
    rows = visual if write.rows is None else write.rows & run.table.valid
    if run.pictured is not None:
        rows = rows & run.pictured[:, None]
    return lambda x: torch.where(rows[..., None], write.values.to(x.dtype), x)


def _merge(run: DecoderRun, into: Tensor) -> None:
    """Book what tokens stand for when others go into them."""
    table = run.table
    own = torch.arange(into.shape[1], device=into.device)
    goes = table.visual & table.valid & (into >= 0) & (into != own)
    size = table.size.masked_fill(goes, 0)
    size = size.scatter_add(1, into.clamp(min=0), table.size.masked_fill(~goes, 0))
    run.rows = replace(run.rows, table=replace(table, size=size))


def _protect(run: DecoderRun, rows: Tensor) -> None:
    """Protect rows of the current table."""
    full = torch.zeros_like(run.full.valid)
    rows = (rows & run.table.valid & ~run.table.inserted).long()
    full = full.long().scatter_add(1, run.table.index, rows) > 0
    run.protected = full if run.protected is None else run.protected | full


def inserted(
    run: DecoderRun, insert: Insert, hidden: Tensor, before: Rows
) -> tuple[Rows, Move]:
    """The rows of a run with new ones behind others, and what puts these into hidden states.

    Args:
        run: the forward; some rows have left.
        insert: the action.
        hidden: `[batch, rows, width]`, for shape, type and device.
        before: the rows as the action saw them.
    """
    values = insert.rows.to(hidden)
    values = values.expand(len(hidden), *values.shape[-2:])
    after = insert.after if run.pictured is None else insert.after.where(run.pictured, -1)
    after = after[:, None].expand(-1, values.shape[1])
    rows, order = run.rows.insert(before, after, run.full.valid.shape[1])
    return rows, lambda x: gather_rows(torch.cat([x, values.to(x)], 1), order)
