"""What rows of a forward see at a decoder layer: of each other, and of what the layer stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mllm import compat
from mllm.cache import SlotTable, refuse_flash
from mllm.errors import DataError

if TYPE_CHECKING:
    from mllm.in_llm import DecoderRun


def of_layer(run: DecoderRun, layer: int, hidden: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask of a layer for the current rows.

    Args:
        run: the forward.
        layer: the layer.
        hidden: its input, for shape, type and device.
        mask: what its parent passes to layers of its kind, for all rows that the decoder was given.
    """
    if run.patched.family.kind(layer):
        return of_kind(run, layer, mask)
    if run.patched.inserts or _crowded(run, layer):
        return _in_order(run, layer, mask)
    valid = slot_valid(run, layer)
    if valid is not None and valid.dim() == 3:
        return _in_order(run, layer, mask)
    return compat.causal_mask(run.patched.family.text_config, hidden, valid, run.cache, layer)


def refuse_packed(position: Tensor | None) -> None:
    """Refuse several sequences in one row, told apart by positions that begin anew.

    Without a mask and a cache transformers keeps them apart; the masks behind a cut would not.

    Args:
        position: ids that the decoder was given without a mask: `[batch, rows]`, or several axes of
            them, of which the first of four is that of text.

    Raises:
        DataError: they begin anew.
    """
    if position is None or (position.dim() == 3 and len(position) != 4):
        return
    text = position if position.dim() == 2 else position[0]
    if bool((text.diff(dim=-1) < 0).any()):
        raise DataError(
            "positions begin anew within a row: a plan takes a row for one sequence",
            argument="position_ids",
            given="packed sequences",
            expected="a row and an attention mask for each sequence",
        )


def slot_valid(run: DecoderRun, layer: int) -> Tensor | None:
    """Validity of a layer's slots with this forward's rows; None if nothing is padded.

    bool `[batch, slots]`, or `[batch, kv_heads, slots]` where heads hold different tokens.
    """
    valid, held = run.table.valid, _held(run, layer)
    if not (run.rows.padded or (held is not None and held.padded)):
        return None
    if held is None:
        return valid
    if held.headwise:
        valid = valid[:, None].expand(-1, held.valid.shape[1], -1)
    return torch.cat([held.valid, valid], -1)


def of_kind(run: DecoderRun, layer: int, mask: Tensor | None) -> Tensor | None:
    """The mask of a layer in a decoder whose layers see differently.

    Among the new rows it is the model's own pattern; stored slots are seen if they are valid
    and, in logical distance, within the layer's window.

    Args:
        run: the forward.
        layer: the layer.
        mask: the model's own mask `[batch or 1, 1, rows, slots]`, before rows left; None is
            causal.
    """
    table, window = run.table, run.patched.windows[layer]
    seen = run.past_logical + run.full.valid.shape[1]
    if mask is None and (window is None or seen < window) and slot_valid(run, layer) is None:
        return None
    if mask is None:
        own = table.logical[:, :, None] >= table.logical[:, None]
    else:
        own = mask[:, 0, :, -mask.shape[2] :]
        own = own if own.dtype == torch.bool else own == 0
        own = own.expand(len(table.valid), -1, -1)
        if (source := run.rows.source) is not None:
            own = own.gather(1, source[:, :, None].expand(-1, -1, own.shape[2]))
            own = own.gather(2, source[:, None].expand(-1, own.shape[1], -1))
    own = own & table.valid[:, None]
    if run.rows.inserted:  # rows that stand behind others are not seen by these
        order = torch.ones_like(own[0]).tril()
        own = own & (order | ~table.inserted[:, None])
    return compat.mask_like(_with_stored(run, own, _held(run, layer), window), mask)


def _held(run: DecoderRun, layer: int) -> SlotTable | None:
    """What a layer stored before this forward; None is nothing."""
    held = run.held[layer] if run.cache is not None else None
    return held if held is not None and held.slots else None


def _crowded(run: DecoderRun, layer: int) -> bool:
    """Whether a layer has more slots than tokens, and a backend that can be given any mask."""
    held = _held(run, layer)
    if held is None or held.slots <= run.past_logical:
        return False
    return "flash" not in compat.attention_name(run.patched.family.attention(layer))


def _in_order(run: DecoderRun, layer: int, mask: Tensor | None) -> Tensor | None:
    """A causal mask by the order of rows, some of which have no place of their own.

    Args:
        run: the forward.
        layer: the layer.
        mask: the decoder's own mask, for its format.
    """
    held, rows = _held(run, layer), run.table.valid.shape[1]
    padded = slot_valid(run, layer) is not None
    if mask is None and not padded and (held is None or rows == 1):
        return None
    own = torch.ones(rows, rows, dtype=torch.bool, device=run.table.valid.device).tril()
    own = _with_stored(run, own & run.table.valid[:, None], held, None)
    return compat.mask_like(own, mask)


def _with_stored(
    run: DecoderRun, own: Tensor, held: SlotTable | None, window: int | None
) -> Tensor:
    """What the rows see of each other, and what they see of stored slots.

    Args:
        run: the forward.
        own: bool `[batch, rows, rows]`.
        held: stored slots; None is none.
        window: see :attr:`SlotLayer.window`.

    Returns:
        bool `[batch, 1 or heads, rows, slots + rows]`.
    """
    own = own[:, None]
    if held is None:
        return own
    valid, logical = (t if held.headwise else t[:, None] for t in (held.valid, held.logical))
    there = valid[:, :, None].expand(-1, -1, own.shape[2], -1)
    if window is not None:
        far = run.table.logical[:, None, :, None] - logical[:, :, None]
        there = there & (far < window)
    if held.headwise:
        refuse_flash(run.patched.family)
        heads = run.patched.family.text_config.num_attention_heads
        there = there.repeat_interleave(heads // there.shape[1], 1)
    return torch.cat([there, own.expand(-1, there.shape[1], -1, -1)], 3)
