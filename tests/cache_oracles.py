"""What a patched model with an evicting method must equal, and the methods to test with.

The oracle is the unpatched model of transformers with its own full cache: its attention is written
out here and puts -inf where a token has been evicted, per layer and KV head. It runs one sample
at a time without padding and decides with loops of its own; nothing is shared with the engine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import families
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from mllm.compressors.base import AttentionRows, CacheCompressor, CacheEvent, ColumnMass
from mllm.plan import MethodInfo

_RUNNING: list[Oracle] = []


def _attention(module, query, key, value, mask, scaling=None, **kwargs):
    return _RUNNING[-1].attend(module, query, key, value, mask, scaling)


AttentionInterface.register("cache_oracle", _attention)
AttentionMaskInterface.register("cache_oracle", AttentionMaskInterface()["eager"])


class Oracle:
    """The unpatched model; `method.decide` says what to mask from the next forward on.

    Attributes:
        gone: per layer, bool `[kv_heads, tokens]`.
        rows: per layer, `[heads, queries, tokens]`, attention in the newest forward.
        mass: per layer, `[heads, tokens]`, what every token received in it.
        keys, last: per layer, keys `[kv_heads, tokens, dim]` and the newest row of attention
            `[heads, tokens]`.
    """

    def __init__(self, family: str, methods: list) -> None:
        self.model = families.model(family, "eager")
        self.model.set_attn_implementation({"text_config": "cache_oracle"})
        self.methods = methods
        self.length, self.gone, self.keys, self.last, self.done = 0, {}, {}, {}, set()
        self.mass, self.heavy, self.rows = {}, {}, {}
        self.model.get_decoder().register_forward_hook(self._after)

    def attend(self, module, query, key, value, mask, scaling):
        layer, heads, n = module.layer_idx, key.shape[1], key.shape[2]
        if layer == 0:
            self.length += query.shape[2]
        group = query.shape[1] // heads
        logits = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
        if mask is not None:
            logits = logits + mask[..., :n]
        if layer in self.gone:
            gone = F.pad(self.gone[layer], (0, self.length - self.gone[layer].shape[1]))
            gone = gone[:, self.length - n :].repeat_interleave(group, 0)
            logits = logits.masked_fill(gone[None, :, None], float("-inf"))
        weights = logits.softmax(-1)
        self.keys[layer], self.last[layer] = key[0], weights[0, :, -1]
        self.mass[layer], self.rows[layer] = weights[0].sum(1), weights[0]
        out = weights @ value.repeat_interleave(group, 1)
        return out.transpose(1, 2).contiguous(), weights

    def _after(self, module, args, output):
        for method in self.methods:
            method.decide(self)

    def drop(self, layer: int, head: int, tokens: list[int]) -> None:
        """Mask tokens from now on."""
        heads = self.keys[layer].shape[0]
        old = self.gone.get(layer, torch.zeros(heads, 0, dtype=torch.bool))
        self.gone[layer] = F.pad(old, (0, self.length - old.shape[1]))
        self.gone[layer][head, tokens] = True

    def first(self, layer: int) -> int:
        """The oldest token that a later one sees."""
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        sliding = kinds and kinds[layer] == "sliding_attention"
        return max(0, self.length - config.sliding_window + 1) if sliding else 0

    def alive(self, layer: int, head: int) -> list[int]:
        every = range(self.first(layer), self.length)
        if layer not in self.gone:
            return list(every)
        gone = F.pad(self.gone[layer], (0, self.length - self.gone[layer].shape[1]))
        return [t for t in every if not gone[head, t]]

    @torch.no_grad()
    def generate(self, **inputs):
        _RUNNING.append(self)
        try:
            return self.model.generate(
                **inputs, do_sample=False, return_dict_in_generate=True, output_logits=True
            )
        finally:
            _RUNNING.pop()


def _only(mask: Tensor, logical: Tensor, length: int) -> Tensor:
    """A mask over slots as one over logical indices: bool `[batch, heads, length]`."""
    marks = torch.zeros(*mask.shape[:-1], length + 1, dtype=torch.bool)
    return marks.scatter(-1, torch.where(mask, logical, length), True)[..., :length]


@dataclass(frozen=True)
class Norms(CacheCompressor):
    """Every KV head keeps the keys of least norm, head h `more * h` more than head 0."""

    budget: int = 8
    more: int = 4
    info: ClassVar = MethodInfo(name="norms", stage="cache")

    def prefill_end(self, event: CacheEvent) -> None:
        for layer in range(event.cache.depth):
            view = event.cache.view(layer)
            score = -view.keys.norm(dim=-1).masked_fill(~view.valid, float("inf"))
            rank = score.argsort(-1, descending=True).argsort(-1)
            count = self.budget + self.more * torch.arange(score.shape[1])
            keep = (rank < count[:, None]) & view.valid
            event.cache.evict(layer, keep=_only(keep, view.logical, event.cache.length))

    def decide(self, oracle: Oracle) -> None:
        if self in oracle.done:
            return
        oracle.done.add(self)
        for layer, keys in oracle.keys.items():
            for head, own in enumerate(keys):
                start = oracle.length - len(own)
                norms = {t: own[t - start].norm().item() for t in oracle.alive(layer, head)}
                best = sorted(norms, key=norms.get)[: self.budget + self.more * head]
                oracle.drop(layer, head, [t for t in norms if t not in best])


@dataclass(frozen=True)
class Snap(CacheCompressor):
    """Every layer keeps what the last prompt token attends to, pooled; deeper layers less."""

    budget: int = 14
    less: int = 2
    info: ClassVar = MethodInfo(name="snap", stage="cache")

    def reads(self):
        return {f"rows{i}": AttentionRows(layer=i) for i in range(families.LAYERS)}

    def prefill_end(self, event: CacheEvent) -> None:
        for layer in range(event.cache.depth):
            view = event.cache.view(layer)
            stored = _only(view.valid, view.logical, event.cache.length).any(1)
            score = F.avg_pool1d(event[f"rows{layer}"], 3, 1, 1)[:, 0].masked_fill(~stored, -1)
            budget = min(self.budget - self.less * layer, score.shape[1])
            top = score.topk(budget, -1).indices
            named = top.masked_fill(~stored.gather(1, top), -1)
            event.cache.evict(layer, keep=named)

    def decide(self, oracle: Oracle) -> None:
        if self in oracle.done:
            return
        oracle.done.add(self)
        for layer, weights in oracle.last.items():
            start = oracle.length - weights.shape[1]
            mean = [w.item() for w in weights.mean(0)]
            heads = range(oracle.keys[layer].shape[0])
            stored = {t for head in heads for t in oracle.alive(layer, head)}
            score = {t: sum(mean[max(0, t - start - 1) : t - start + 2]) for t in sorted(stored)}
            best = sorted(score, key=lambda t: -score[t])[: self.budget - self.less * layer]
            for head in heads:
                oracle.drop(layer, head, [t for t in range(oracle.length) if t not in best])


@dataclass(frozen=True)
class Sinks(CacheCompressor):
    """StreamingLLM: the first tokens and the newest ones, after the prompt and at every step."""

    sinks: int = 2
    recent: int = 10
    info: ClassVar = MethodInfo(name="sinks", stage="cache")

    def prefill_end(self, event: CacheEvent) -> None:
        first = event.cache.state.setdefault("first", event.prompt.long().argmax(1))
        token = torch.arange(event.cache.length)
        keep = (token >= first[:, None]) & (token < first[:, None] + self.sinks)
        event.cache.evict(keep=keep | (token >= event.cache.length - self.recent))

    decode_step = prefill_end

    def decide(self, oracle: Oracle) -> None:
        for layer in oracle.keys:
            for head in range(oracle.keys[layer].shape[0]):
                alive = oracle.alive(layer, head)
                old = [t for t in alive if self.sinks <= t < oracle.length - self.recent]
                oracle.drop(layer, head, old)


@dataclass(frozen=True)
class Retro(CacheCompressor):
    """After layer 2, layers 0 and 1 forget the pictures; after layer 3 head 1 of layer 2 does."""

    info: ClassVar = MethodInfo(name="retro", stage="cache")

    def layer_end(self, event: CacheEvent) -> None:
        length = event.cache.length
        visual = torch.zeros(len(event.visual), length, dtype=torch.bool)
        visual[:, event.start :] = event.visual
        if event.layer == 2:
            event.cache.evict([0, 1], drop=visual)
        if event.layer == 3:
            event.cache.evict(2, drop=visual, heads=[1])

    def decide(self, oracle: Oracle) -> None:
        if self in oracle.done:
            return
        oracle.done.add(self)
        visual = [t for t in range(oracle.length) if oracle.visual[t]]
        for layer, heads in ((0, (0, 1)), (1, (0, 1)), (2, (1,))):
            for head in heads:
                oracle.drop(layer, head, visual)


@dataclass(frozen=True)
class Heavy(CacheCompressor):
    """H2O: every KV head adds up what its tokens receive, and lets the lightest go at every step.

    The newest `recent` tokens stay. Head h keeps `more * h` more than head 0.
    """

    budget: int = 9
    more: int = 3
    recent: int = 3
    info: ClassVar = MethodInfo(name="heavy", stage="cache")

    def reads(self):
        return {
            f"mass{i}": ColumnMass(layer=i, rows="prompt", heads="none")
            for i in range(families.LAYERS)
        }

    def prefill_end(self, event: CacheEvent) -> None:
        length = event.cache.length
        for layer in range(event.cache.depth):
            view = event.cache.view(layer)
            heads = view.keys.shape[1]
            received = event[f"mass{layer}"].unflatten(1, (heads, -1)).sum(2)
            mass = received.gather(-1, view.logical) + view.columns.get("mass", 0)
            event.cache.annotate(layer, mass=mass)
            score = mass.masked_fill(view.logical >= length - self.recent, float("inf"))
            score = score.masked_fill(~view.valid, -1)
            rank = score.argsort(-1, descending=True).argsort(-1)
            count = self.budget + self.more * torch.arange(heads)
            keep = (rank < count[:, None]) & view.valid
            event.cache.evict(layer, keep=_only(keep, view.logical, length))

    decode_step = prefill_end

    def decide(self, oracle: Oracle) -> None:
        for layer, mass in oracle.mass.items():
            heads, start = oracle.keys[layer].shape[0], oracle.length - mass.shape[1]
            received = mass.view(heads, -1, mass.shape[1]).sum(1)
            for head in range(heads):
                total = oracle.heavy.setdefault((layer, head), {})
                alive = oracle.alive(layer, head)
                for t in alive:
                    total[t] = total.get(t, 0.0) + received[head, t - start].item()
                new = [t for t in alive if t >= oracle.length - self.recent]
                old = [t for t in alive if t not in new]
                room = self.budget + self.more * head - len(new)
                best = sorted(old, key=lambda t: -total[t])[:room]
                oracle.drop(layer, head, [t for t in old if t not in best])
