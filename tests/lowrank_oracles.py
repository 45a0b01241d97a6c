"""Low-rank caches once more: a full cache whose prompt is exchanged for what an SVD leaves of it.

Runs on one sample without padding in the unpatched model. Keys before rotary embedding come from
the model's own projections, not from turning stored keys back.
"""

from __future__ import annotations

import math

import torch
from cache_oracles import Oracle
from torch import Tensor


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`[tokens, dim]` by tables `[tokens, dim]`, a token and a pair of channels at a time."""
    half, out = x.shape[1] // 2, x.clone()
    for t in range(len(x)):
        for i in range(half):
            a, b = float(x[t, i]), float(x[t, i + half])
            out[t, i] = a * float(cos[t, i]) - b * float(sin[t, i])
            out[t, i + half] = b * float(cos[t, i + half]) + a * float(sin[t, i + half])
    return out


def truncated(rows: Tensor, rank: int | float) -> Tensor:
    """`[tokens, width]` with its smallest singular values gone."""
    full = min(rows.shape)
    rank = min(full, rank if isinstance(rank, int) else max(1, round(rank * full)))
    u, s, v = torch.linalg.svd(rows.double(), full_matrices=False)
    return sum(s[i] * torch.outer(u[:, i], v[i]) for i in range(rank)).float()


class Exchanged(Oracle):
    """The unpatched model; `exchange` says what replaces the prompt in its cache.

    Attributes:
        raw: per layer `[kv_heads, tokens, dim]`, keys of the prompt before rotary embedding.
        tables: per layer cosines and sines `[tokens, dim]`.
        full, values: per layer, keys after it and values.
        stored: per layer {token: (keys, values)}, `[kv_heads, dim]` each.
    """

    def __init__(self, family: str, stage) -> None:
        super().__init__(family, [])
        self.stage, self.prompt = stage, 0
        self.raw, self.tables, self.full, self.values, self.stored = {}, {}, {}, {}, {}
        for i, layer in enumerate(self.model.get_decoder().layers):
            own = layer.self_attn
            own.register_forward_pre_hook(self._keep_tables(i), with_kwargs=True)
            getattr(own, "k_norm", own.k_proj).register_forward_hook(self._keep_raw(i, own))

    def _keep_tables(self, i: int):
        def hook(module, args, kwargs):
            if not self.stored:
                self.tables[i] = tuple(t[0] for t in kwargs["position_embeddings"])

        return hook

    def _keep_raw(self, i: int, own):
        def hook(module, args, out):
            if not self.stored:
                out = out[0]
                if out.dim() == 2:
                    out = out.view(len(out), -1, own.head_dim)
                tokens = len(self.tables[i][0])
                self.raw[i] = out if out.shape[1] == tokens else out.transpose(0, 1)

        return hook

    def attend(self, module, query, key, value, mask, scaling):
        layer = module.layer_idx
        if not self.stored:
            self.full[layer], self.values[layer] = key[0], value[0]
        else:
            if layer == 0:
                self.length += query.shape[2]
            start = self.length - key.shape[2]
            key, value = key.clone(), value.clone()
            for t, (k, v) in self.stored.get(layer, {}).items():
                if t >= start:
                    key[0, :, t - start], value[0, :, t - start] = k, v
            mask = self.choose(layer, query, start, key, mask, scaling)
            self.length -= query.shape[2] * (layer == 0)
        return super().attend(module, query, key, value, mask, scaling)

    def choose(self, layer, query, start, key, mask, scaling):
        """The mask of a step."""
        return mask

    def _after(self, module, args, output):
        if not self.stored:
            self.prompt = self.length
            self.exchange()

    def rows_of(self, layer: int, parts: dict[int, Tensor]) -> list[Tensor]:
        """What a later token sees, all heads side by side."""
        return [parts[layer][:, t].flatten() for t in range(self.first(layer), self.prompt)]


class PlainXKV(Exchanged):
    """xKV by `torch.linalg.svd`."""

    def exchange(self) -> None:
        depth, groups = len(self.full), {}
        kinds = getattr(self.model.config.get_text_config(), "layer_types", None) or [""] * depth
        for layer in range(depth):
            groups.setdefault((layer // self.stage.group, kinds[layer]), []).append(layer)
        for layers in groups.values():
            sides = []
            for parts, rank in (
                (self.raw, self.stage.rank_keys),
                (self.values, self.stage.rank_values),
            ):
                rows = [self.rows_of(layer, parts) for layer in layers]
                joined = torch.stack([torch.cat(row) for row in zip(*rows, strict=True)])
                sides.append(truncated(joined, rank).chunk(len(layers), 1))
            for layer, keys, values in zip(layers, *sides, strict=True):
                first, heads = self.first(layer), len(self.full[layer])
                cos, sin = (t[first:] for t in self.tables[layer])
                keys = [rotated(k, cos, sin) for k in keys.chunk(heads, 1)]
                values = values.chunk(heads, 1)
                self.stored[layer] = {
                    first + t: (
                        torch.stack([k[t] for k in keys]),
                        torch.stack([v[t] for v in values]),
                    )
                    for t in range(self.prompt - first)
                }


class PlainShadow(Exchanged):
    """ShadowKV in loops: what a step may see is all else masked.

    Attributes:
        exact: by layer and KV head, tokens that are kept as they are.
        marks: by layer and KV head, {first token of a chunk: its landmark}.
        seen: how many tokens of the prompt every step saw of a head.
    """

    def exchange(self) -> None:
        self.exact, self.marks, self.seen = {}, {}, []
        size, local = self.stage.chunk, self.stage.local
        kinds = getattr(self.model.config.get_text_config(), "layer_types", None)
        for layer, full in self.full.items():
            if kinds and kinds[layer] == "sliding_attention":
                continue
            heads = len(full)
            joined = torch.stack(self.rows_of(layer, self.raw))
            thin = truncated(joined, self.stage.rank_keys).chunk(heads, 1)
            thin = [rotated(k, *self.tables[layer]) for k in thin]
            body = max(0, self.prompt // size - local)
            keys = full.clone()
            for head in range(heads):
                marks, worst = {}, {}
                for start in range(0, body * size, size):
                    own = [full[head, t] for t in range(start, start + size)]
                    mark = sum(own) / size
                    marks[start] = mark
                    worst[start] = min(float(torch.cosine_similarity(mark, k, 0)) for k in own)
                odd = sorted(marks, key=worst.get)[: self.stage.outliers]
                exact = [t for start in odd for t in range(start, start + size)]
                exact += range(body * size, self.prompt)
                self.exact[layer, head] = set(exact)
                self.marks[layer, head] = {s: m for s, m in marks.items() if s not in odd}
                for t in range(self.prompt):
                    if t not in exact:
                        keys[head, t] = thin[head][t]
            self.stored[layer] = {
                t: (keys[:, t], self.values[layer][:, t]) for t in range(self.prompt)
            }

    def choose(self, layer, query, start, key, mask, scaling):
        if query.shape[2] > 1 or layer not in self.stored:
            return mask
        size, budget = self.stage.chunk, self.stage.budget
        if isinstance(budget, float):
            budget = max(size, round(budget * self.prompt))
        heads, tokens = key.shape[1:3]
        group = query.shape[1] // heads
        hidden = torch.zeros(1, query.shape[1], 1, tokens)
        for head in range(heads):
            marks, score = self.marks[layer, head], {}
            for h in range(head * group, (head + 1) * group):
                logits = {s: float(query[0, h, 0] @ m) * scaling for s, m in marks.items()}
                top = max(logits.values(), default=0.0)
                total = sum(math.exp(x - top) for x in logits.values())
                for s, x in logits.items():
                    score[s] = max(score.get(s, 0.0), math.exp(x - top) / total)
            best = sorted(score, key=lambda s: -score[s])[: budget // size]
            seen = self.exact[layer, head] | {t for s in best for t in range(s, s + size)}
            gone = [t - start for t in range(start, self.prompt) if t not in seen]
            hidden[0, head * group : (head + 1) * group, 0, gone] = float("-inf")
            self.seen.append(len(seen))
        return hidden if mask is None else mask[..., :tokens] + hidden
