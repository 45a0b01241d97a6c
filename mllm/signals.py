"""Signals: what a method may read. Declared in `reads()`, captured while they exist.

`rows` below are the rows of the current forward that are still there where a method acts, padding
included. Values at rows of no interest to a signal (padding, fillers) are zero. Layers and blocks
are 0-based.

A decoder signal whose `layer` is None reads where its method acts: the layer that has just run,
or with `when="before"`, and for :class:`Hidden`, the layer that is about to run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

Heads = Literal["mean", "sum", "max", "none"]
Rows = Literal["last", "text", "window"] | Callable[[Any], Tensor]


@dataclass(frozen=True)
class VisionAttention:
    """Attention inside the vision tower, one value per patch: fp32 `[images, patches]`.

    Attributes:
        block: tower block (0-based, negative from the end); None is the block whose output
            feeds the projector. A float is a share of the tower's depth, for example 5 / 24.
        query: `"cls"` is the row of [CLS]; `"received"` is the column sum over all rows, the
            substitute for towers without [CLS]; `"auto"` takes [CLS] where there is one.
        heads: `"sum"` or `"mean"` over heads, or `"joint"`: one softmax over the dot products of
            all heads together, scaled by the full width.
    """

    block: int | float | None = None
    query: Literal["auto", "cls", "received"] = "auto"
    heads: Literal["sum", "mean", "joint"] = "sum"


@dataclass(frozen=True)
class VisionKeys:
    """Keys of a tower block: `[images, patches, head_dim]` (for `block` see above).

    Attributes:
        block: tower block.
        heads: `"mean"` over heads, or `"joint"`: those of all heads side by side.
    """

    block: int | float | None = None
    heads: Literal["mean", "joint"] = "mean"


@dataclass(frozen=True)
class Features:
    """Visual tokens at the stage's own site: `[images, tokens, width]`.

    `cls` adds the [CLS] feature `[images, 1, width]` as ``ctx["cls"]`` where the tower has one.
    """

    cls: bool = False


@dataclass(frozen=True)
class Unprojected:
    """What the model's projector is given, before the LLM: `[images, tokens, width]`.

    One row per visual token, with its gradient. Where the projector joins patches by itself a
    row is the mean of its patches.
    """


@dataclass(frozen=True)
class BlockFeatures:
    """What tower blocks have made, side by side: `[images, tokens, blocks x width]`, as above.

    Attributes:
        blocks: tower blocks; a float is a share of the tower's depth.
    """

    blocks: tuple[int | float, ...]


@dataclass(frozen=True)
class Grid:
    """Where tokens are in their picture.

    Before the LLM: a :class:`mllm.tokens.Places` with fields `[tokens]`. In the LLM: the
    :class:`mllm.tokens.TokenTable` with fields `[batch, rows]`, -1 for text.
    """


@dataclass(frozen=True)
class TextEmbeds:
    """Input embeddings of text tokens of the prompt: a :class:`Text`, its width the LLM's.

    Before the LLM it has one row per image, the text of its sample.

    Attributes:
        which: `"question"` is the text behind a sample's first visual token, `"all"` all text.
    """

    which: Literal["question", "all"] = "question"


@dataclass
class Text:
    """Text tokens of every sample, in order, filled up to a rectangle.

    Attributes:
        embeds: `[batch or images, tokens, width]`, what enters the decoder.
        valid: bool `[batch or images, tokens]`, false for fillers.
        rows: int64, their rows where the method acts; before the LLM, in the prompt.
    """

    embeds: Tensor
    valid: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Joint:
    """Patches and the question in CLIP's joint space, before the LLM: a :class:`Compared`.

    Only where :func:`mllm.joint.attach` has given the model the text half of its tower's CLIP.
    The texts are decoded on the host, so the device is asked for them.
    """


@dataclass
class Compared:
    """What :class:`Joint` gives, not scaled to length one.

    Attributes:
        patches: `[images, tokens, dim]`.
        text: `[images, segments, dim]`, the text behind the first image of the sample.
        valid: bool `[images, segments]`, false for fillers.
    """

    patches: Tensor
    text: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Views:
    """What finer views of the pictures show at each token, in the LLM: `[batch, rows, n, width]`.

    The caller gives the tiles of every picture, rows by columns, as arguments that begin with
    `view_` (see :func:`mllm.views.tiled`); the tower and the projector make features of them. Put
    together they are a map in which every token of the picture has `n = rows * columns` tokens at
    its place, in reading order. Zero elsewhere; None where no tiles were given.

    Attributes:
        grid: rows and columns of tiles.
    """

    grid: tuple[int, int] = (2, 2)


@dataclass(frozen=True)
class Unreduced:
    """All visual tokens of each sample, before any stage took some away: a :class:`Beside`.

    In the LLM. Stages on pixels, in the tower or before the projector cannot stand beside it.
    """


@dataclass
class Beside:
    """Tokens beside the sequence, filled up to a rectangle.

    Attributes:
        embeds: `[batch, tokens, width]`, as they would enter the decoder, with their gradient.
        valid: bool `[batch, tokens]`, false for fillers.
    """

    embeds: Tensor
    valid: Tensor


class _AtLayer:
    """A signal of a decoder layer."""

    layer: int | None
    when = "after"

    def at(self, here: int) -> Any:
        """The signal with its layer fixed for a method that acts before layer `here`."""
        if self.layer is not None:
            return self
        return dataclasses.replace(self, layer=here if self.when == "before" else here - 1)


@dataclass(frozen=True)
class AttentionRows(_AtLayer):
    """Attention of chosen query rows: fp32 `[batch, queries, rows]`.

    With `heads="none"` it is `[batch, heads, queries, rows]`. Samples with fewer queries are
    filled up with zeros at the end; `ctx.queries(name)` tells which row each query is. Costs
    O(queries x rows) memory.

    Attributes:
        layer: decoder layer.
        rows: `"last"` is the last prompt token of each sample, `"text"` its text behind the first
            visual token, `"window"` its last `window` prompt tokens. A function is given the
            method's context at that layer and returns bool `[batch, rows]`.
        heads: `"mean"`, `"sum"` or `"max"` over heads, or `"none"`.
        when: `"after"` reads while the layer runs. `"before"` calls the layer's attention once
            more, before the method acts, with the rows of this forward only and without its
            cache; the ledger books what that costs.
        rope: False scores queries and keys without their rotary positions, among the rows of
            this forward only.
        softmax: False gives scaled logits; what is masked is -inf.
        window: queries of `rows="window"`.
    """

    layer: int | None = None
    rows: Rows = "last"
    heads: Heads = "mean"
    when: Literal["after", "before"] = "after"
    rope: bool = True
    softmax: bool = True
    window: int = 32


@dataclass(frozen=True)
class ColumnMass(_AtLayer):
    """Attention that each row receives, summed over query rows: fp32 `[batch, rows]`.

    With `heads="none"` it is `[batch, heads, rows]`. Computed in blocks of queries:
    O(block x rows) memory, and as many FLOPs as the layer's own scores.

    Attributes:
        layer: decoder layer.
        rows: queries that are summed over: `"prompt"` (all), `"visual"` or `"text"` (behind the
            first visual token).
        heads: reduction over heads, before the sum.
        visible: divide by the number of those queries that can see the row.
    """

    layer: int | None = None
    rows: Literal["prompt", "visual", "text"] = "prompt"
    heads: Heads = "mean"
    visible: bool = False


@dataclass(frozen=True)
class Keys(_AtLayer):
    """Keys of a decoder layer: `[batch, kv_heads, rows, head_dim]`.

    Attributes:
        layer: decoder layer.
        rope: whether they are rotated to their positions.
        when: see :class:`AttentionRows`.
    """

    layer: int | None = None
    rope: bool = True
    when: Literal["after", "before"] = "after"


@dataclass(frozen=True)
class Queries(Keys):
    """Queries of a decoder layer: `[batch, heads, rows, head_dim]`; else as :class:`Keys`."""


@dataclass(frozen=True)
class Values(_AtLayer):
    """Values of a decoder layer: `[batch, kv_heads, rows, head_dim]`.

    Attributes:
        layer: decoder layer.
        when: see :class:`AttentionRows`.
    """

    layer: int | None = None
    when: Literal["after", "before"] = "after"


@dataclass(frozen=True)
class Rotary(_AtLayer):
    """What rotates queries and keys of a decoder layer: `[batch, rows, 2 * rotary_dim]`.

    The cosines of every row's position, then the sines, as the layer is given them.
    """

    layer: int | None = None


@dataclass(frozen=True)
class Hidden(_AtLayer):
    """Hidden states at a decoder layer: `[batch, rows, width]`, with their gradient.

    Attributes:
        layer: decoder layer; None is the layer that is about to run (only with `of="layer"`).
        of: `"layer"` is what enters the layer; `"attn"` and `"mlp"` are the normalised inputs of
            its branches.
        norm: what enters the layer, through the norm behind the decoder's last layer; what has
            left the last layer has gone through it already. Only with `of="layer"`.
    """

    layer: int | None = None
    of: Literal["layer", "attn", "mlp"] = "layer"
    norm: bool = False

    def at(self, here: int) -> Hidden:
        if self.layer is not None:
            return self
        return dataclasses.replace(self, layer=here if self.of == "layer" else here - 1)
