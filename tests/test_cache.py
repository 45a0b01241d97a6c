"""The cache interface: every operation against naive lists, every event against a masked model."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import ClassVar

import families
import pytest
import torch
from cache_oracles import Norms, Oracle, Retro, Sinks, Snap
from matrix import equal
from torch import Tensor
from transformers import DynamicCache

import mllm
from mllm.cache import (
    Dense,
    KVCache,
    Offloaded,
    Packed,
    SlotLayer,
    SlotTable,
    cache_bytes,
    load_prefix,
    save_prefix,
)
from mllm.compressors import FastV
from mllm.compressors.base import CacheCompressor
from mllm.errors import CacheMismatchError, DataError, PlanError
from mllm.plan import MethodInfo

METHODS = {
    "norms": [Norms()],
    "snap": [Snap()],
    "sinks": [Sinks()],
    "retro": [Retro()],
    "retro+snap": [Retro(), Snap()],
}
FAMILIES = ["llava", "qwen2_5_vl", "gemma3"]


def batch_of(family: str, kind: str):
    batch = families.samples(family, kind)
    return batch, families.collate(family, batch)


def run(family, attn, methods, inputs, steps=10, **options):
    model = families.model(family, attn)
    with mllm.patch(model, methods) as patched:
        out = model.generate(
            **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
            output_logits=True, **options,
        )
        return patched, out


@pytest.mark.parametrize("kind", ["alone", "padded"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_evicting_is_masking(family, name, attn, kind):
    """Each sample of a batch, alone in a model that keeps everything and masks what went."""
    batch, inputs = batch_of(family, kind)
    patched, out = run(family, attn, METHODS[name], inputs)
    prompt = inputs["input_ids"].shape[1]
    for b, sample in enumerate(batch):
        oracle = Oracle(family, METHODS[name])
        oracle.visual = sample.visual
        want = oracle.generate(**families.collate(family, [sample]), max_new_tokens=10)
        mine = torch.stack(out.logits, 1)[b]
        equal(mine, torch.stack(want.logits, 1)[0], f"sample {b}")
        assert torch.equal(out.sequences[b, prompt:], want.sequences[0, len(sample.ids) :])
        for i, layer in enumerate(out.past_key_values.layers):
            view = patched.kv(out.past_key_values).view(i)
            padding = prompt - len(sample.ids)
            for head in range(layer.heads):
                stored = view.logical[b, head][view.valid[b, head]] - padding
                seen = [t for t in stored.tolist() if t >= oracle.first(i)]
                assert seen == oracle.alive(i, head), f"layer {i}, head {head}"
    assert out.past_key_values.get_seq_length() == prompt + 9


# One layer against naive lists

HEADS, DIM = 2, 4


class Naive:
    """What a layer must hold: per sample and head, a list of (token, key, value)."""

    def __init__(self, batch: int) -> None:
        self.cells = [[[] for _ in range(HEADS)] for _ in range(batch)]
        self.seen = 0

    def append(self, keys: Tensor, values: Tensor, valid: Tensor) -> None:
        for b, sample in enumerate(self.cells):
            for h, cells in enumerate(sample):
                for t in range(keys.shape[2]):
                    if valid[b, t]:
                        cells.append((self.seen + t, keys[b, h, t], values[b, h, t]))
        self.seen += keys.shape[2]

    def take(self, samples: list[int]) -> None:
        self.cells = [[list(cells) for cells in self.cells[b]] for b in samples]

    def filter(self, stays) -> None:
        self.cells = [
            [[c for c in cells if stays(b, h, c[0])] for h, cells in enumerate(sample)]
            for b, sample in enumerate(self.cells)
        ]


def stub(attn: str = "sdpa", **more) -> SimpleNamespace:
    """A family that knows its attention."""
    module = SimpleNamespace(config=SimpleNamespace(_attn_implementation=attn))
    return SimpleNamespace(attention=lambda layer: module, **more)


def toy(batch: int = 2) -> tuple[DynamicCache, KVCache]:
    cache = DynamicCache()
    mllm.cache.adopt(cache, [None, None], None, mllm.cache.CacheMark("model", "plan"))
    return cache, KVCache(cache, stub())


def feed(cache: DynamicCache, keys: Tensor, values: Tensor, valid: Tensor) -> None:
    """What a forward does to every layer."""
    start = cache.get_seq_length()
    logical = torch.arange(start, start + valid.shape[1]).expand(valid.shape)
    columns = {"valid": valid, "visual": ~valid, "logical": logical, "position0": logical * 2}
    new = SlotTable(columns, not bool(valid.all()))
    for i, layer in enumerate(cache.layers):
        table = new if layer.table is None else layer.table.cat(new)
        layer.note(table, valid.shape[1], start)
        cache.update(keys + i, values + i, i)


def check(kv: KVCache, naive: Naive) -> None:
    assert kv.length == naive.seen
    for i in range(kv.depth):
        view = kv.view(i) if kv.cache.layers[i].segments else None
        for b, sample in enumerate(naive.cells):
            for h, cells in enumerate(sample):
                if view is None:
                    assert not cells
                    continue
                there = view.valid[b, h]
                order = view.logical[b, h][there]
                assert order.tolist() == [token for token, _, _ in cells], f"layer {i}"
                assert view.position[0, b, h][there].tolist() == [2 * t for t, _, _ in cells]
                for got, at in ((view.keys, 1), (view.values, 2)):
                    want = [cell[at] + i for cell in cells]
                    want = torch.stack(want) if want else torch.zeros(0, DIM)
                    assert torch.equal(got[b, h][there], want)


def scenario(seed: int) -> None:
    """Random operations, one after another."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=g))

    def coins(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g) < (0.3 + 0.6 * torch.rand(1, generator=g))

    batch = 1 + draw(3)
    (cache, kv), naive = toy(batch), Naive(batch)
    saved: list = []
    for _ in range(14):
        batch, length = len(naive.cells), naive.seen
        what = draw(11) if length else 0
        if what <= 3:
            new = 1 if draw(2) else 1 + draw(9)
            keys, values = torch.randn(2, batch, HEADS, new, DIM, generator=g)
            valid = torch.ones(batch, new, dtype=torch.bool) if draw(3) else coins(batch, new)
            feed(cache, keys, values, valid)
            naive.append(keys, values, valid)
        elif what == 4:
            keep = coins(batch, length)
            kv.evict(keep=keep)
            naive.filter(lambda b, h, t, keep=keep: keep[b, t])
        elif what == 5:
            drop = coins(batch, HEADS, length)
            kv.evict([0, 1], drop=drop)
            naive.filter(lambda b, h, t, drop=drop: not drop[b, h, t])
        elif what == 6:
            named = torch.randint(-1, length, (batch, 3), generator=g)
            kv.evict(drop=named, heads=[1])
            naive.filter(lambda b, h, t, named=named: h != 1 or t not in named[b].tolist())
        elif what == 7:
            left = max(0, length - draw(4))
            kv.crop(left)
            naive.filter(lambda b, h, t, left=left: t < left)
            naive.seen = left
        elif what == 8:
            index = torch.randint(0, batch, (1 + draw(3),), generator=g)
            [kv.select, kv.reorder][draw(2)](index)
            naive.take(index.tolist())
            saved = []
        elif what == 9:
            kv.offload(part=["both", "keys", "values"][draw(3)], leave=draw(3))
        elif saved and draw(2):
            at = draw(len(saved))
            kv.rollback(saved[at][0])
            naive = copy.deepcopy(saved[at][1])
        else:
            saved.append((kv.snapshot(), copy.deepcopy(naive)))
        check(kv, naive)
    if naive.seen and all(layer.segments for layer in cache.layers):
        kv.repeat(2)
        naive.take([b for b in range(len(naive.cells)) for _ in range(2)])
        check(kv, naive)


@pytest.mark.parametrize("seed", range(40))
def test_operations_against_lists(seed):
    scenario(seed)


@pytest.mark.slow
def test_many_operations_against_lists():
    for seed in range(40, 1500):
        scenario(seed)
