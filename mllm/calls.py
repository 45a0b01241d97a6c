"""The calls of a patched model that are open in this thread, from the outside in.

Who opens one closes it in `finally`, so that neither an exception nor a KeyboardInterrupt leaves
anything behind; they are context variables, so that threads do not meet.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mllm.compressors.base import TokenReducer
from mllm.routers.account import Routing

if TYPE_CHECKING:
    from mllm.bound import Bound
    from mllm.chunks import Chunks
    from mllm.in_llm import DecoderRun
    from mllm.ledger import Reduction
    from mllm.tokens import Counts, Layout
    from mllm.vision_signals import Prompts


@dataclass
class Prompt:
    """What generate() knows: the length of the prompt, and whether it drafts for assisted decoding.

    transformers gives no pictures to a model that drafts.
    """

    patched: Bound
    length: int | None
    drafts: bool
    given: dict[str, Any] | None = None  # arguments, with the ids
    chunk: int | None = None  # rows of the prompt that the decoder reads at a time
    views: dict[str, Any] = field(default_factory=dict)  # tiles of its pictures


@dataclass
class Call:
    """What the top-level call knows and the base model is not told."""

    patched: Bound
    labels: Tensor | None
    logits_to_keep: Any
    routing: Routing | None = None
    stages: dict[int, TokenReducer] = field(default_factory=dict)  # in training, by number
    views: dict[str, Any] = field(default_factory=dict)  # tiles of its pictures


@dataclass
class Brought:
    """What a call of the base model brings to its decoder, complete when that starts.

    Attributes:
        mask: the attention mask that the base model was given.
        call: the call of the model around this one, if there was one.
        counts: rows of every sample; None where nobody has counted them.
        marks: placeholders by kind, `image` or `video`: bool `[batch, rows]`.
        layouts: by kind, of the pixels that the base model was given.
        prompts: by kind, the text that pre-LLM stages read; empty if none does.
        reductions: by kind, what the pre-LLM stages decided.
        answering: whether all rows are tokens that generate() has appended.
    """

    mask: Any
    call: Call | None
    counts: Counts | None
    marks: dict[str, Tensor] = field(default_factory=dict)
    layouts: dict[str, list[Layout]] = field(default_factory=dict)
    prompts: dict[str, Prompts] = field(default_factory=dict)
    reductions: dict[str, Reduction] = field(default_factory=dict)
    answering: bool = False


PROMPT: ContextVar[Prompt | None] = ContextVar("mllm_prompt", default=None)
CALL: ContextVar[Call | None] = ContextVar("mllm_call", default=None)
FORWARD: ContextVar[DecoderRun | None] = ContextVar("mllm_forward", default=None)
CHUNKS: ContextVar[Chunks | None] = ContextVar("mllm_chunks", default=None)


def prompt_of(patched: Bound) -> Prompt:
    """The call of this model's generate(), or one that knows nothing."""
    return _own(PROMPT, patched) or Prompt(patched, None, False)


def call_of(patched: Bound) -> Call | None:
    """The call of this model."""
    return _own(CALL, patched)


def run_of(patched: Bound) -> DecoderRun | None:
    """The forward pass of this model's base model."""
    return _own(FORWARD, patched)


def _own(variable: ContextVar, patched: Bound) -> Any:
    open_now = variable.get()
    return open_now if open_now is not None and open_now.patched is patched else None


def unread(ids: Tensor, mask: Tensor | None, cache: Any) -> tuple[Tensor, int]:
    """Of what generate() is given the ids that are not stored, and the prompt's logical length.

    A later turn may come with the whole conversation, or alone: transformers tells by the mask,
    which is always of the whole.

    Args:
        ids: int64 `[batch, tokens]`.
        mask: `[batch, tokens]`; None is as many as the ids.
        cache: `past_key_values`, or None.
    """
    past, rows = 0 if cache is None else cache.get_seq_length(), ids.shape[1]
    if past and mask is not None and mask.shape[1] != rows:
        return ids, past + rows
    return ids[:, past if past < rows else 0 :], rows
