"""Actions: what a method may return. The engine applies them; a method never touches the model.

Masks and values `[batch, rows]` speak of the rows that were there when the method acted; the
engine carries them to later layers, where some of these rows may have left.

Actions speak of the samples that have images; the others of a batch run as in the unpatched model.

Values per row hold for the forward in which they were given: later tokens run as in the unpatched
model. Values per sample (a number, `[batch]`, `[heads]`), `LogitBias`, `Turn` and `Attend` hold for
the conversation: they live on its KV cache until their method acts again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Branch = Literal["attn", "mlp"]


@dataclass(frozen=True)
class Keep:
    """Keep the visual rows where `mask` is true: bool `[images, tokens]` or `[batch, rows]`.

    Several of them intersect. Text rows always stay.

    `counts` are the tokens that stay of each image or sample, where the method knows them, as it
    does under a fixed budget: then nobody has to wait for the device to say.
    """

    mask: Tensor
    counts: Sequence[int] | None = None


@dataclass(frozen=True)
class Merge:
    """Fold tokens into others: `into` int64 `[images, tokens]` or `[batch, rows]`.

    `into[i, t]` is the token that receives `t` (itself if it stays), or -1 if `t` is dropped; at
    text rows it is not read. It describes, and adds up `size`; the rows leave by :class:`Keep` and
    the new features come with :class:`Write`. A merged token has the row and the position of the
    token that receives.
    """

    into: Tensor


@dataclass(frozen=True)
class Write:
    """New features: `values` `[images, tokens, width]` or `[batch, rows, width]`.

    `order`, int64 `[images, tokens]`, is the place of each kept token within its image in the
    sequence; None keeps the order of the grid. It is honoured under ``positions="compact"``,
    before the LLM. `rows`, bool `[batch, rows]`, are the rows that are written, in the LLM; None
    are the visual rows that stay.
    """

    values: Tensor
    order: Tensor | None = None
    rows: Tensor | None = None


@dataclass(frozen=True)
class Pool:
    """Average-pool the grid of every image to `grid` = (rows, cols)."""

    grid: tuple[int, int]


@dataclass(frozen=True)
class Resize:
    """Shrink the picture itself so that the tower yields `grid` = (rows, cols) tokens."""

    grid: tuple[int, int]


@dataclass(frozen=True)
class Protect:
    """Rows that no stage may drop or evict from now on: bool `[images, tokens]`/`[batch, rows]`.

    They count towards the budget of later stages in the LLM, and may exceed it; before the LLM they
    come on top of it.
    """

    rows: Tensor


@dataclass(frozen=True)
class Insert:
    """New rows without a source, from this layer on: `rows` `[n, width]` or `[batch, n, width]`.

    They stand behind row `after`, int64 `[batch]` (-1: none in this sample), at its position, and
    later tokens see them. They have no logical index: positions, lengths and the decoder's output
    are as if they were not there. Under ``positions="compact"`` they are numbered like others.
    """

    rows: Tensor
    after: Tensor


@dataclass(frozen=True)
class BranchGate:
    """Multiply what a branch adds to the residual by `scale`, at layer `layer`.

    `scale` is a number, `[batch]`, or `[batch, rows]`. The number 0.0 leaves the branch out: it is
    not computed, and an attention that is left out stores no keys.
    """

    layer: int
    branch: Branch
    scale: Tensor | float


@dataclass(frozen=True)
class LayerGate:
    """Multiply all that layer `layer` adds to the residual, attention and MLP, by `scale`.

    `scale` is `[batch, rows]`. The MLP still reads the residual with the whole attention.
    """

    layer: int
    scale: Tensor


@dataclass(frozen=True)
class BranchRows:
    """Only `rows`, bool `[batch, rows]`, take part in a branch of layer `layer`.

    The others pass by on the residual. In `"attn"` they are neither queries nor keys, and the
    layer stores nothing for them; later tokens take part.

    `stored`, keys and values `[batch, kv_heads, rows, head_dim]` of all rows, is what the layer
    stores for the others after all: later tokens see them. Their slots have the column `aside`.
    """

    layer: int
    branch: Branch
    rows: Tensor
    stored: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class HeadGate:
    """Multiply the output of each attention head by `g` before the output projection.

    `g` is `[heads]`, `[batch, heads]` or `[batch, rows, heads]`.
    """

    layer: int
    g: Tensor


@dataclass(frozen=True)
class LogitBias:
    """Add to the attention logits of layer `layer`; -inf hides. Not with flash attention.

    inf shows a token that the causal mask hides, and is 0 otherwise; what another bias hides stays
    hidden.

    `fn(queries, keys)` is given logical indices, int64 `[batch, queries]` and `[batch, keys]`
    (`ctx.logical` has those of the rows), and returns `[batch, 1 or heads, queries, keys]`. It is
    called in every forward of the conversation, stored tokens included. Costs O(queries x keys)
    memory.
    """

    layer: int
    fn: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Turn:
    """Rotate queries and keys of layer `layer` further than by their positions.

    `fn(tokens)` is given logical indices, int64 `[batch, n]`, and returns by how many positions:
    fp32 `[batch, n]`, not only whole numbers. It is called in every forward of the conversation,
    stored tokens included: keys are stored as they would be without it. Not with rotary positions
    that have rows and columns, and not in later turns with pictures of their own.
    """

    layer: int
    fn: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inject:
    """Add `values` `[batch, rows, width]` to what enters layer `layer`.

    `rows`, bool `[batch, rows]`, tells where.
    """

    layer: int
    rows: Tensor
    values: Tensor


@dataclass(frozen=True)
class Attend:
    """Rows of layer `layer` attend to keys and values beside the sequence too.

    With the queries that they have, to all that are `valid`, whatever the order. What this gives is
    multiplied by a gate and added to what the heads give, before the output projection. Tokens
    behind this forward attend as well.

    Where it `blends`, it is what the two differ by that is multiplied and added, and the gate is
    given both side by side: `[batch, rows, 2 * heads * head_dim]`. It may then also make a number
    for each of the `heads * head_dim`, and says its cost in a method `flops`.

    Attributes:
        layer: decoder layer.
        rows: bool `[batch, rows]`; None is all.
        keys, values: `[batch, n, kv_heads * head_dim]`.
        valid: bool `[batch, n]`.
        gate: the trained part of the stage that makes `[batch, rows, 1]` of what the heads give,
            `[batch, rows, heads * head_dim]`.
        blends: see above.
    """

    layer: int
    rows: Tensor | None
    keys: Tensor
    values: Tensor
    valid: Tensor
    gate: str
    blends: bool = False


@dataclass(frozen=True)
class Evict:
    """Let stored tokens go from the caches of `layers`, earlier ones too.

    `rows` is bool `[batch, rows]`. A layer that is yet to run attends to them once more: it lets
    go when the prefill ends. `heads` are KV heads, None is all of them.
    """

    layers: Sequence[int]
    rows: Tensor
    heads: Sequence[int] | None = None


#: Actions that change which rows later layers are given.
MOVES_ROWS = {"Keep", "Merge", "Insert"}
#: Actions after which the layers of one stage may hold different slots.
SETS_APART = {"BranchGate", "BranchRows", "Evict", "Insert"}
#: Actions that work inside the attention function.
IN_ATTENTION = {"Attend", "HeadGate", "LogitBias", "Turn"}
