"""A decoder written out by hand, row by row of one sample, with edits in its layers.

Nothing is shared with the engine: no cache, no padding, no batch. Rows that leave stay where they
are and are masked; a branch that a row does not take part in is computed and thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from families import Sample, reference
from family_oracles import _pattern, deepstack, features, positions
from oracles import rotate
from torch import Tensor


@dataclass
class Edits:
    """What to do to the prompt's rows, by layer; tokens behind it are left alone unless said.

    Attributes:
        drop: bool `[n]`, rows that are gone from this layer on.
        take: by (layer, branch), bool `[n]`, rows that take part.
        scale: by (layer, branch), a number for every token, or `[n]` for the prompt.
        heads: `[heads]` for every token, or `[n, heads]` for the prompt.
        bias: a function of the number of tokens: `[heads or 1, tokens, tokens]`.
        show: a function of the number of tokens: bool `[tokens, tokens]`, seen in any order.
        turn: a function of the number of tokens: `[tokens]`, added to positions.
        whole: `[n]`, a factor of all that a layer adds.
        add: `[n, width]`, added to what enters the layer.
        write: a function of what enters the layer: what stands there instead.
        forget: bool `[n]`, rows that tokens behind the prompt do not see.
        insert: (row that they stand behind, `[m, width]`).
        compact: layers from which positions run on without gaps.
        beside: a function of rotated queries and of what heads give, `[heads, tokens, dim]` each:
            what they give instead.
    """

    drop: dict[int, Tensor] = field(default_factory=dict)
    take: dict[tuple[int, str], Tensor] = field(default_factory=dict)
    scale: dict[tuple[int, str], Any] = field(default_factory=dict)
    show: dict[int, Callable[[int], Tensor]] = field(default_factory=dict)
    turn: dict[int, Callable[[int], Tensor]] = field(default_factory=dict)
    whole: dict[int, Tensor] = field(default_factory=dict)
    heads: dict[int, Tensor] = field(default_factory=dict)
    bias: dict[int, Callable[[int], Tensor]] = field(default_factory=dict)
    add: dict[int, Tensor] = field(default_factory=dict)
    write: dict[int, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    forget: dict[int, Tensor] = field(default_factory=dict)
    insert: dict[int, tuple[int, Tensor]] = field(default_factory=dict)
    compact: set[int] = field(default_factory=set)
    beside: dict[int, Callable[[Tensor, Tensor], Tensor]] = field(default_factory=dict)


@dataclass
class Seen:
    """What the loop saw, by layer, over the tokens of the sample.

    Attributes:
        logits: `[tokens, vocabulary]`.
        alive: bool `[tokens]`, rows that are there at the end.
        hidden: what enters each layer; `normed` is that through the last norm; `attn` and `mlp`
            are the normalised inputs of branches.
        weights: attention `[heads, tokens, tokens]`; `raw` its logits.
        bare: logits without rotary positions.
        rotary: `[tokens, 2 * dim]`, cosines and sines.
        keys, plain_keys, values: `[kv_heads, tokens, dim]`, rotated, not rotated.
        queries, plain_queries: `[heads, tokens, dim]`.
    """

    logits: Tensor
    alive: Tensor
    hidden: list[Tensor] = field(default_factory=list)
    normed: list[Tensor] = field(default_factory=list)
    attn: list[Tensor] = field(default_factory=list)
    mlp: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    raw: list[Tensor] = field(default_factory=list)
    bare: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    plain_keys: list[Tensor] = field(default_factory=list)
    queries: list[Tensor] = field(default_factory=list)
    plain_queries: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    rotary: list[Tensor] = field(default_factory=list)


def _whole(x: Any, n: int, neutral: float | bool) -> Any:
    """A value of the prompt for all tokens."""
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    more = x.new_full((n - len(x), *x.shape[1:]), neutral)
    return torch.cat([x, more])


def run(
    family: str, sample: Sample, edits: Edits | None = None, more: Tensor | None = None
) -> Seen:
    """One sample and the tokens behind it, int64 `[m]`, through the layers."""
    with torch.no_grad():
        return run_with_gradients(family, sample, edits, more)


def run_with_gradients(
    family: str, sample: Sample, edits: Edits | None = None, more: Tensor | None = None
) -> Seen:
    """:func:`run`, so that what the edits are made of may be differentiated."""
    edits, net = edits or Edits(), reference(family)
    lm = net.get_decoder()
    ids = sample.ids if more is None else torch.cat([sample.ids, more])
    prompt, n = len(sample.ids), len(ids)
    h = net.get_input_embeddings()(ids)
    visual = torch.zeros(n, dtype=torch.bool)
    visual[:prompt] = sample.visual
    if sample.pictures:
        h[visual] = torch.cat(features(family, sample)).to(h)
    alive, position = torch.ones(n, dtype=torch.bool), positions(family, sample, n)
    added, seen = deepstack(family, sample), Seen(h, alive)
    own = torch.arange(n)  # the token of each row; inserted rows have that of their neighbour
    inserted = torch.zeros(n, dtype=torch.bool)
    place = position

    def there(x: Any, neutral: float | bool) -> Any:
        """A value by token, for the rows."""
        x = _whole(x, n, neutral)
        if not isinstance(x, Tensor) or x.dim() == 0:
            return x
        x = x[own].clone()
        x[inserted] = neutral
        return x

    for i, layer in enumerate(lm.layers):
        if i in edits.drop:
            alive = alive & ~there(edits.drop[i], False)
        if i in edits.write:
            h = edits.write[i](h)
        if i in edits.insert:
            after, vectors = edits.insert[i]
            order = torch.cat([own, torch.full((len(vectors),), after)])
            new = torch.cat([inserted, torch.ones(len(vectors), dtype=torch.bool)])
            at = (order * 2 + new).argsort(stable=True)
            h, alive = torch.cat([h, vectors])[at], torch.cat([alive, new[inserted.numel() :]])[at]
            own, inserted = order[at], new[at]
            place = position[..., own]
        if i in edits.compact:
            place = alive.long().cumsum(0) - 1
        if i in edits.add:
            h = h + there(edits.add[i], 0)
        rows = len(own)
        order = torch.ones(rows, rows, dtype=torch.bool).tril()
        see = _pattern(family, i, sample, n)[own][:, own] & (order | ~inserted[None])
        if i in edits.show:
            see = see | edits.show[i](n)[own][:, own]
        see = see & alive[None]
        if i in edits.forget:
            gone = there(edits.forget[i], False)
            see &= ~(gone[None] & (own >= prompt)[:, None])
        take = there(edits.take.get((i, "attn"), torch.ones(n, dtype=torch.bool)), True)
        see = (see & take[None]) | torch.eye(rows, dtype=torch.bool)
        kind = (lm.config.layer_types[i],) if family == "gemma3" else ()
        at = place + edits.turn[i](n)[own] if i in edits.turn else place
        cos, sin = lm.rotary_emb(h[None], at[:, None] if at.dim() == 2 else at[None], *kind)
        seen.rotary.append(torch.cat([cos[0], sin[0]], -1))
        x = layer.input_layernorm(h)
        seen.hidden.append(h)
        seen.normed.append(lm.norm(h))
        seen.attn.append(x)
        out = _attend(layer.self_attn, x, cos[0], sin[0], see, i, edits, there, rows, seen)
        if family == "gemma3":
            out = layer.post_attention_layernorm(out)
        out = out * take[:, None]
        scale = there(edits.scale.get((i, "attn"), 1.0), 1.0)
        h = h + out * (scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale)
        if family == "gemma3":
            x = layer.pre_feedforward_layernorm(h)
            out = layer.post_feedforward_layernorm(layer.mlp(x))
        else:
            x = layer.post_attention_layernorm(h)
            out = layer.mlp(x)
        seen.mlp.append(x)
        take = there(edits.take.get((i, "mlp"), torch.ones(n, dtype=torch.bool)), True)
        out = out * take[:, None]
        scale = there(edits.scale.get((i, "mlp"), 1.0), 1.0)
        h = h + out * (scale[:, None] if isinstance(scale, Tensor) and scale.dim() else scale)
        if i in edits.whole:
            h = seen.hidden[i] + there(edits.whole[i], 1.0)[:, None] * (h - seen.hidden[i])
        if i < len(added):
            h[visual[own] & ~inserted] += added[i]
    h, seen.alive = h[~inserted], alive[~inserted]
    seen.hidden.append(h)
    seen.logits = net.lm_head(lm.norm(h))
    return seen


def _attend(a, x, cos, sin, see, i, edits, there, rows, seen) -> Tensor:
    def split(p: Any, norm: Any = None) -> Tensor:
        y = p(x).view(rows, -1, a.head_dim)
        return (y if norm is None else norm(y)).transpose(0, 1)

    q = split(a.q_proj, getattr(a, "q_norm", None))
    k = split(a.k_proj, getattr(a, "k_norm", None))
    v = split(a.v_proj)
    seen.plain_keys.append(k)
    seen.plain_queries.append(q)
    seen.values.append(v)
    group = len(q) // len(k)
    bare = q @ k.repeat_interleave(group, 0).transpose(-1, -2) * a.scaling
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    seen.keys.append(k)
    seen.queries.append(q)
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    logits = q @ k.transpose(-1, -2) * a.scaling
    if i in edits.bias:
        logits = logits + edits.bias[i](rows)
    hidden = float("-inf")
    seen.raw.append(logits.masked_fill(~see, hidden))
    seen.bare.append(bare.masked_fill(~see, hidden))
    weights = logits.masked_fill(~see, hidden).softmax(-1)
    seen.weights.append(weights)
    out = weights @ v
    if i in edits.beside:
        out = edits.beside[i](q, out)
    if i in edits.heads:
        g = edits.heads[i]
        g = g[:, None] if g.dim() == 1 else there(g, 1.0).T
        out = out * g[..., None]
    return a.o_proj(out.transpose(0, 1).flatten(1))
