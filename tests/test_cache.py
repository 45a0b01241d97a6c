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
from cache_oracles import Heavy, Norms, Oracle, Retro, Sinks, Snap
from matrix import equal
from torch import Tensor
from transformers import DynamicCache

import mllm
from mllm import masks
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
from mllm.in_llm import DecoderRun
from mllm.plan import MethodInfo

METHODS = {
    "norms": [Norms()],
    "snap": [Snap()],
    "sinks": [Sinks()],
    "retro": [Retro()],
    "retro+snap": [Retro(), Snap()],
    "heavy": [Heavy()],
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
    check_masking(family, name, attn, kind)


@torch.no_grad()
def check_masking(family, name, attn, kind):
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
                seen = sorted(t for t in stored.tolist() if t >= oracle.first(i))
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
    mllm.cache.adopt(cache, [None, None], mllm.cache.CacheMark("model", "plan"))
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
                there = view.valid[b, h].nonzero()[:, 0]
                there = there[view.logical[b, h, there].argsort()]
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


# Storage


def test_a_uniform_layer_is_one_view_and_grows_in_place():
    """The prompt is stored once and seen as it lies; new tokens seldom move old ones."""
    cache, kv = toy(2)
    keys, values = torch.randn(2, 2, HEADS, 40, DIM)
    feed(cache, keys, values, torch.ones(2, 40, dtype=torch.bool))
    layer = cache.layers[0]
    assert layer.keys.is_contiguous() and torch.equal(layer.keys, keys)
    assert cache_bytes(cache)[0] == 2 * 2 * keys.nbytes, "no room is kept behind a prompt"
    assert layer.keys.data_ptr() == layer.segments[0].buffer.keys.data_ptr()
    moved, at = 0, layer.keys.data_ptr()
    for _ in range(100):
        step = torch.randn(2, HEADS, 1, DIM)
        feed(cache, step, step, torch.ones(2, 1, dtype=torch.bool))
        moved += layer.keys.data_ptr() != at
        at = layer.keys.data_ptr()
    assert moved <= 5 and layer.keys.shape[2] == 140
    assert torch.equal(layer.keys[:, :, :40], keys) and torch.equal(layer.keys[:, :, 139:], step)
    room = cache_bytes(cache)[0] / (2 * 2 * 2 * HEADS * 140 * DIM * 4)
    assert 1 <= room < 1.3


def test_unequal_heads_free_memory():
    cache, kv = toy(1)
    keys, values = torch.randn(2, 1, HEADS, 64, DIM)
    feed(cache, keys, values, torch.ones(1, 64, dtype=torch.bool))
    full = cache_bytes(cache)[0]
    kv.evict(drop=torch.arange(60)[None], heads=[0])
    assert cache_bytes(cache)[0] == full * 68 // 128, "head 0 holds 4 of 64 tokens"
    assert isinstance(cache.layers[0].segments[0], Packed)
    kv.evict(drop=torch.arange(60)[None], heads=[1])
    assert isinstance(cache.layers[0].segments[0], Dense), "equal again: a view again"
    assert cache_bytes(cache)[0] == full * 4 // 64


def test_one_choice_for_all_heads_where_they_differ():
    """Samples are not taken for heads, of which there are as many."""
    cache, kv = toy(2)
    feed(cache, *torch.randn(2, 2, HEADS, 6, DIM), torch.ones(2, 6, dtype=torch.bool))
    kv.evict(drop=torch.tensor([[[0], [1]], [[2], [3]]]))
    keep = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]).bool()
    cache.layers[0].retain(keep)
    table = cache.layers[0].table
    assert table.logical[table.valid].tolist() == [1, 2, 3, 0, 2, 3, 3, 4, 5, 2, 4, 5]


def test_dropping_one_token_a_step_seldom_copies():
    """A flat buffer lets idle rows lie until they are worth a copy."""
    cache, kv = toy(1)
    step = torch.randn(1, HEADS, 1, DIM)
    feed(cache, *torch.randn(2, 1, HEADS, 80, DIM), torch.ones(1, 80, dtype=torch.bool))
    kv.evict(drop=torch.arange(40)[None], heads=[0])
    moved, at = 0, None
    for i in range(40):
        feed(cache, step, step, torch.ones(1, 1, dtype=torch.bool))
        kv.evict(drop=torch.tensor([[[i + 40], [i]]]))
        now = cache.layers[0].segments[0].buffer.keys.data_ptr()
        moved, at = moved + (now != at), now
    assert moved <= 15
    rows = cache.layers[0].segments[0].buffer.keys.shape[0]
    assert rows <= 2 * 120, "idle rows do not pile up"


def test_gradients_flow_through_a_cache():
    """Buffers are not written in place while autograd looks."""
    cache, kv = toy(1)
    keys = torch.randn(1, HEADS, 4, DIM, requires_grad=True)
    feed(cache, keys, keys, torch.ones(1, 4, dtype=torch.bool))
    feed(cache, keys[:, :, :1], keys[:, :, :1], torch.ones(1, 1, dtype=torch.bool))
    cache.layers[0].keys.square().sum().backward()
    want = 2 * keys.detach()
    want[:, :, 0] *= 2
    assert torch.equal(keys.grad, want)


def test_a_cache_leaves_inference_mode():
    """Buffers made inside of it are not written outside."""
    cache, kv = toy(1)
    step, one = torch.randn(1, HEADS, 1, DIM), torch.ones(1, 1, dtype=torch.bool)
    with torch.inference_mode():
        for _ in range(4):
            feed(cache, step.clone(), step.clone(), one)
        kv.repeat(2)
        kv.select(torch.tensor([1]))
    feed(cache, step, step, one)
    assert torch.equal(cache.layers[0].keys, step.expand(-1, -1, 5, -1))


def test_a_segment_of_another_form():
    """The protocol is enough: half precision stands for any lossy form, newest tokens stay."""

    @dataclass
    class Half(Offloaded):
        def __init__(self, keys, values, device=None):
            super().__init__(keys.half(), values.half(), device)

        def keys(self):
            return self._keys.float()

        def values(self):
            return self._values.float()

        def _map(self, change):
            return Half(change(self._keys), change(self._values))

    cache, kv = toy(2)
    keys, values = torch.randn(2, 2, HEADS, 20, DIM)
    feed(cache, keys, values, torch.ones(2, 20, dtype=torch.bool))
    kv.convert(0, lambda k, v, valid: Half(k, v), leave=4)
    half, plain = cache.layers[0].segments
    assert (half.slots, plain.slots) == (16, 4)
    feed(cache, keys[:, :, :1], values[:, :, :1], torch.ones(2, 1, dtype=torch.bool))
    kv.convert(0, lambda k, v, valid: Half(k, v), leave=4)
    assert [s.slots for s in cache.layers[0].segments] == [16, 1, 4]
    assert cache.layers[0].segments[0] is half, "what was converted stays as it is"
    kv.evict(0, drop=torch.arange(0, 20, 2)[None].expand(2, -1))
    view = kv.view(0)
    want = torch.cat([keys[:, :, 1:17:2].half().float(), keys[:, :, 17::2], keys[:, :, :1]], 2)
    assert view.logical[0, 0].tolist() == [*range(1, 20, 2), 20]
    assert torch.equal(view.keys, want)


@torch.no_grad()
def test_the_ledger_counts_the_tensors_that_are_held():
    batch, inputs = batch_of("llava", "padded")
    model = families.model("llava")
    with mllm.patch(model, [FastV(layer=2, keep=0.5), Norms(budget=4, more=8)]) as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        data = patched.ledger.as_dict()
    held, meta = {}, {}
    for layer in cache.layers:
        for segment in layer.segments:
            held |= {t.untyped_storage().data_ptr(): t for t in segment.tensors()}
            meta |= {t.untyped_storage().data_ptr(): t for t in segment.meta()}
        meta |= {t.untyped_storage().data_ptr(): t for t in layer.table.columns.values()}
    assert data["kv_bytes"] == sum(t.untyped_storage().nbytes() for t in held.values())
    assert data["kv_meta_bytes"] == sum(t.untyped_storage().nbytes() for t in meta.values())
    slots = 2 * (4 + 12) + 4 + 6  # the sample without a picture has 6 tokens
    assert data["kv_bytes"] == 4 * slots * 2 * 12 * 4
    assert data["kv_bytes"] < data["baseline_kv_bytes"] / 2


# Operations


def test_merging_against_loops():
    g = torch.Generator().manual_seed(0)
    cache, kv = toy(2)
    keys, values = torch.randn(2, 2, HEADS, 12, DIM, generator=g)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :3] = False
    feed(cache, keys, values, valid)
    kv.evict(drop=torch.tensor([[5], [6]]))
    into = torch.arange(12).expand(2, HEADS, 12).clone()
    into[0, 0, [2, 3, 5]] = 4  # 5 is not stored any more
    into[0, 1, 7] = 5  # its receiver is not stored
    into[1, :, 8] = -1
    into[1, 1, [4, 10]] = 11
    weight = torch.rand(2, HEADS, 12, generator=g) + 0.1
    kv.merge(1, into, weight, part="values")
    view = kv.view(1)
    for b in range(2):
        for h in range(HEADS):
            stored = [t for t in range(12) if valid[b, t] and t != (5, 6)[b]]
            stays = [t for t in stored if into[b, h, t] == t]
            there = view.valid[b, h]
            assert view.logical[b, h][there].tolist() == stays
            assert torch.equal(view.keys[b, h][there], keys[b, h, stays] + 1)
            for at, t in enumerate(stays):
                own = [s for s in stored if into[b, h, s] == t]
                share = weight[b, h, own]
                mean = (share[:, None] * (values[b, h, own] + 1)).sum(0) / share.sum()
                assert torch.allclose(view.values[b, h][there][at], mean, atol=1e-6)
    assert kv.view(0).valid.sum() == 2 * HEADS * 12 - 3 * HEADS - 2 * HEADS


def test_columns_of_a_method_follow():
    cache, kv = toy(2)
    feed(cache, *torch.randn(2, 2, HEADS, 6, DIM), torch.ones(2, 6, dtype=torch.bool))
    kv.annotate(0, score=torch.arange(12.0).view(2, 6))
    kv.evict(drop=torch.tensor([[0], [3]]))
    feed(cache, *torch.randn(2, 2, HEADS, 1, DIM), torch.ones(2, 1, dtype=torch.bool))
    kv.select(torch.tensor([1]))
    assert kv.view(0).columns["score"][0].tolist() == [[6.0, 7, 8, 10, 11, 0]] * HEADS
    kv.annotate(0, score=torch.ones(1, HEADS, 6), more=torch.zeros(1, 6))
    kv.evict(0, drop=torch.tensor([[0]]), heads=[1])
    assert kv.view(0).columns["score"].shape == (1, HEADS, 6)
    for bad in ({"valid": torch.ones(1, 6)}, {"x": torch.ones(1, 5)}, {"x": torch.ones(1, 3, 6)}):
        with pytest.raises(CacheMismatchError):
            kv.annotate(0, **bad)


def test_values_of_samples_follow():
    cache, kv = toy(2)
    feed(cache, *torch.randn(2, 2, HEADS, 6, DIM), torch.ones(2, 6, dtype=torch.bool))
    before = kv.nbytes
    kv.samples(0)["n"] = torch.tensor([3, 5])
    assert kv.nbytes == (before[0], before[1] + 16)
    start = kv.snapshot()
    kv.reorder(torch.tensor([1, 0]))
    kv.repeat(2)
    assert kv.samples(0)["n"].tolist() == [5, 5, 3, 3] and not kv.samples(1)
    kv.select(torch.tensor([3]))
    kv.samples(0)["n"] += 1
    assert kv.samples(0)["n"].tolist() == [4]
    kv.rollback(start)
    assert kv.samples(0)["n"].tolist() == [3, 5]
    cache.reset()
    assert not kv.samples(0)


def test_evictions_on_the_strength_of_rejected_tokens_come_back():
    """Journalled as in assisted decoding; a decision that looked at the prompt alone stays."""
    cache, kv = toy(1)
    feed(cache, *torch.randn(2, 1, HEADS, 10, DIM), torch.ones(1, 10, dtype=torch.bool))
    for layer in cache.layers:
        layer.journals = True
    feed(cache, *torch.randn(2, 1, HEADS, 4, DIM), torch.ones(1, 4, dtype=torch.bool))
    KVCache(cache, stub(), length=10).evict(drop=torch.tensor([[1]]))
    kv.evict(0, drop=torch.tensor([[2, 12]]))
    cache.crop(-3)
    assert kv.view(0).logical[0, 0].tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    kv.evict(0, drop=torch.tensor([[2]]))
    cache.crop(0)
    assert kv.view(0).logical[0, 0].tolist() == [0, 3, 4, 5, 6, 7, 8, 9, 10]
    assert kv.view(1).logical[0, 0].tolist() == [0, *range(2, 11)]


@pytest.mark.parametrize(
    "family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "paligemma", "glm4v"]
)
@torch.no_grad()
def test_unrotated_keys_are_the_projection(family):
    """Every layer's own rotary module: 1-D, M-RoPE, and Gemma 3's two bases."""
    batch, inputs = batch_of(family, "padded")
    model = families.model(family)
    before: dict[int, Tensor] = {}

    def keep(layer):
        def hook(module, args, out):
            shape = (*inputs["input_ids"].shape, 2, 12)
            before[layer] = out.view(shape).transpose(1, 2) if out.dim() == 3 else (
                out if out.shape[1] == 2 else out.transpose(1, 2)
            )

        return hook

    for i, layer in enumerate(model.get_decoder().layers):
        own = layer.self_attn
        getattr(own, "k_norm", own.k_proj).register_forward_hook(keep(i))
    with mllm.patch(model, "stride:keep=1.0:positions=original") as patched:
        kv = patched.kv(model(**inputs, use_cache=True).past_key_values)
        for i in range(kv.depth):
            view = kv.view(i)
            plain = kv.unrotate(i, view.keys, view.position)
            there = view.valid
            want = before[i][:, :, -view.keys.shape[2] :]
            assert (plain[there] - want[there]).abs().max() < 1e-4, f"layer {i}"
            assert (plain - view.keys)[there].abs().max() > 0.1
            again = kv.rotate(i, plain, view.position[:, :, 0])
            assert (again - view.keys)[there].abs().max() < 1e-5


def test_partial_rotary_with_scaled_tables():
    """Channels behind the rotary ones stay; tables that are scaled (yarn) are undone too."""
    angle = torch.randn(1, 5, 2)
    cos, sin = (1.3 * f(torch.cat([angle, angle], -1)) for f in (torch.cos, torch.sin))
    family = stub(
        mrope=False, neighbours=False, kind=lambda layer: "", rotary=lambda x, p, kind: (cos, sin)
    )
    cache, _ = toy(1)
    feed(cache, *torch.randn(2, 1, HEADS, 5, 6), torch.ones(1, 5, dtype=torch.bool))
    kv, k, at = KVCache(cache, family), torch.randn(1, HEADS, 5, 6), torch.zeros(1, 1, 5).long()
    turned = kv.rotate(0, k, at)
    a, b = k[..., :2], k[..., 2:4]
    assert torch.equal(turned[..., 4:], k[..., 4:])
    assert torch.allclose(turned[..., :2], a * cos[..., :2] - b * sin[..., :2], atol=1e-6)
    assert torch.allclose(kv.unrotate(0, turned, at), k, atol=1e-6)


# Ways of running


@pytest.mark.parametrize("name", ["norms", "snap", "sinks"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@torch.no_grad()
def test_a_budget_above_the_prompt_changes_no_bit(attn, name):
    batch, inputs = batch_of("llava", "padded")
    model = families.model("llava", attn)
    options = dict(max_new_tokens=8, do_sample=False, return_dict_in_generate=True,
                   output_logits=True)  # fmt: skip
    plain = model.generate(**inputs, **options)
    large = {"norms": Norms(99, 0), "snap": Snap(28, 0), "sinks": Sinks(99, 99)}[name]
    if name == "snap":
        large = Snap(inputs["input_ids"].shape[1], 0)
    with mllm.patch(model, [large]):
        mine = model.generate(**inputs, **options)
    assert torch.equal(mine.sequences, plain.sequences)
    assert all(torch.equal(a, b) for a, b in zip(mine.logits, plain.logits, strict=True))


@pytest.mark.parametrize("name", ["norms", "snap", "sinks"])
@torch.no_grad()
def test_beams(name):
    """Beams of a batch are the beams of its samples alone."""
    batch, inputs = batch_of("llava", "padded")
    model = families.model("llava")
    options = dict(max_new_tokens=8, do_sample=False, num_beams=3)
    batch = [batch[0], batch[2]]
    inputs = families.collate("llava", batch)
    with mllm.patch(model, METHODS[name]):
        out = model.generate(**inputs, **options)
        for b, sample in enumerate(batch):
            alone = model.generate(**families.collate("llava", [sample]), **options)
            assert torch.equal(alone[0, -8:], out[b, -8:])
        several = model.generate(
            **inputs, max_new_tokens=4, do_sample=True, num_return_sequences=3
        )
    assert several.shape == (6, inputs["input_ids"].shape[1] + 4)


@dataclass(frozen=True)
class Recorder(CacheCompressor):
    """Writes down its events."""

    seen: list = field(default_factory=list, compare=False)
    info: ClassVar = MethodInfo(name="recorder", stage="cache")
    group: ClassVar[int] = 3

    def _note(name):
        def event(self, event):
            self.seen.append((name, event.phase, event.layer, event.cache.length, event.accepted))

        return event

    layer_end, group_end, prefill_end = _note("layer"), _note("group"), _note("prefill")
    decode_step, verify_end = _note("step"), _note("verify")


@torch.no_grad()
def test_events_come_in_order():
    recorder = Recorder()
    batch, inputs = batch_of("llava", "padded")
    prompt = inputs["input_ids"].shape[1]
    run("llava", "sdpa", [recorder], inputs, steps=3)
    layers = [("layer", "prefill", i, prompt, None) for i in range(4)]
    layers.insert(3, ("group", "prefill", 2, prompt, None))
    layers.append(("group", "prefill", 3, prompt, None))
    assert recorder.seen == [
        *layers,
        ("prefill", "prefill", None, prompt, None),
        ("step", "decode", None, prompt + 1, None),
        ("step", "decode", None, prompt + 2, None),
    ]


@pytest.mark.parametrize("name", ["norms", "snap", "retro+snap"])
@torch.no_grad()
def test_assisted_decoding_is_greedy_decoding(name):
    """Cut by the prompt alone, though its first forward holds candidates; crops after that."""
    sample = families.samples("llava", "alone")[0]
    ids = torch.cat([sample.ids, sample.ids[-3:], sample.ids[-3:], sample.ids[-3:-1]])
    inputs = families.collate("llava", [families.Sample(ids, sample.pictures)])
    recorder = Recorder()
    _, greedy = run("llava", "sdpa", METHODS[name], inputs, steps=20)
    patched, out = run(
        "llava", "sdpa", [*METHODS[name], recorder], inputs, steps=20, prompt_lookup_num_tokens=4
    )
    assert torch.equal(out.sequences, greedy.sequences)
    prompt, cache = len(ids), out.past_key_values
    verified = [e for e in recorder.seen if e[0] == "verify"]
    assert recorder.seen[6] == ("prefill", "prefill", None, prompt, None)
    assert verified and any(e[4] < 4 for e in verified), "some candidates were rejected"
    assert all(e[1] == "verify" for e in verified) and verified[0][3] == prompt + verified[0][4]
    assert cache.get_seq_length() == prompt + 19
    for i in range(4):
        mine, theirs = (patched.kv(c).view(i) for c in (cache, greedy.past_key_values))
        for h in range(2):
            a, b = (v.logical[0, h][v.valid[0, h]].tolist() for v in (mine, theirs))
            assert a == b


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
@pytest.mark.parametrize("spec", ["stride:keep=3:positions=original", "fastv:layer=2:keep=0.3"])
@torch.no_grad()
def test_rows_that_fill_the_rectangle_are_not_seen(family, spec):
    """The longest sample has no picture, so no column leaves; dropped rows of the other fill up."""
    batch, model = families.samples(family, (((), 60), ((0,), 20))), families.model(family)
    options = dict(max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
                   output_logits=True)  # fmt: skip
    with mllm.patch(model, spec):
        both = model.generate(**families.collate(family, batch), **options)
        alone = model.generate(**families.collate(family, batch[1:]), **options)
    for mine, want in zip(both.logits, alone.logits, strict=True):
        equal(mine[1], want[0], spec, 1e-5)


@torch.no_grad()
def test_a_second_turn_brings_a_picture():
    """The oracle keeps everything and masks what both turns evicted."""
    first, second = (families.samples("llava", "alone", seed)[0] for seed in (1, 9))
    options = dict(max_new_tokens=6)
    model, oracle = families.model("llava"), Oracle("llava", [Twice(8)])

    def turns(generate):
        one = generate(**families.collate("llava", [first]), **options)
        ids = torch.cat([one.sequences[0], second.ids])
        later = families.collate("llava", [families.Sample(ids, second.pictures)])
        return one, generate(**later, past_key_values=one.past_key_values, **options)

    def patched_generate(**inputs):
        return model.generate(
            **inputs, do_sample=False, return_dict_in_generate=True, output_logits=True
        )

    with mllm.patch(model, [Twice(8)]):
        mine = turns(patched_generate)
    want = turns(oracle.generate)
    for turn, (a, b) in enumerate(zip(mine, want, strict=True)):
        assert torch.equal(a.sequences, b.sequences)
        equal(torch.stack(a.logits, 1), torch.stack(b.logits, 1), f"turn {turn}")
    cache = mine[1].past_key_values
    assert cache.get_seq_length() == mine[1].sequences.shape[1] - 1
    assert cache.layers[0].slots == 8 + 5


@dataclass(frozen=True)
class Twice(Norms):
    """After each prompt, every head keeps as many of all tokens so far."""

    more: int = 0

    def decide(self, oracle: Oracle) -> None:
        fed = oracle.length - getattr(oracle, "before", 0)
        oracle.before = oracle.length
        if fed > 1:
            oracle.done.discard(self)
            super().decide(oracle)


@torch.no_grad()
def test_a_plan_without_a_cache_says_so():
    batch, inputs = batch_of("llava", "padded")
    model = families.model("llava")
    want = model(**inputs, use_cache=False).logits
    with mllm.patch(model, [Norms()]) as patched:
        assert torch.equal(model(**inputs, use_cache=False).logits, want)
        assert any("no cache" in note for note in patched.ledger.notes)


# Prefixes on disk


QUESTIONS = [[11, 23, 31], [42, 17, 9, 60]]


def _ask(model, prefix_ids, cache, question, **more):
    ids = torch.cat([prefix_ids, torch.tensor(question)[None]], 1)
    return model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache,
        max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True, **more,
    )  # fmt: skip


@pytest.mark.parametrize(
    "family, plan",
    [
        ("llava", "fastv:layer=2:keep=0.5"),
        ("llava", "divprune:keep=6"),
        ("llava", [Norms(4, 8)]),
        ("llava", [FastV(layer=1, keep=0.5), Retro()]),
        ("qwen2_5_vl", [Snap()]),
        ("gemma3", [Norms(4, 8)]),
    ],
    ids=str,
)
@torch.no_grad()
def test_many_questions_share_a_prefix(tmp_path, family, plan):
    """Bit for bit what the cache would have said had it never been on disk."""
    batch, inputs = batch_of(family, "alone")
    model = families.model(family)
    with mllm.patch(model, plan) as patched:
        prefix = model(**inputs, use_cache=True).past_key_values
        assert save_prefix(prefix, tmp_path / "a") == tmp_path / "a"
        want = [_ask(model, inputs["input_ids"], copy.deepcopy(prefix), q) for q in QUESTIONS]
        # Something else happens in between.
        model.generate(**batch_of(family, "padded")[1], max_new_tokens=2)
    model = families.model(family)
    with mllm.patch(model, plan) as patched:
        for question, answer in zip(QUESTIONS, want, strict=True):
            cache = load_prefix(tmp_path / "a", patched)
            assert cache_bytes(cache)[0] <= cache_bytes(prefix)[0]
            mine = _ask(model, inputs["input_ids"], cache, question)
            assert torch.equal(mine.sequences, answer.sequences)
            for a, b in zip(mine.logits, answer.logits, strict=True):
                assert torch.equal(a, b)
        # One loaded prefix serves several questions by rolling back.
        cache = load_prefix(tmp_path / "a", patched)
        kv = patched.kv(cache)
        start = kv.snapshot()
        for question, answer in zip(QUESTIONS, want, strict=True):
            kv.rollback(start)
            mine = _ask(model, inputs["input_ids"], cache, question)
            assert torch.equal(mine.sequences, answer.sequences)
        # Saving what was loaded changes nothing.
        kv.rollback(start)
        save_prefix(cache, tmp_path / "b")
    assert (tmp_path / "a/prefix.json").read_text() == (tmp_path / "b/prefix.json").read_text()
    header = json.loads((tmp_path / "a/prefix.json").read_text())
    assert set(header) == {"config_sha256", "plan_sha256", "dtype", "logical_length", "layers"}
    assert header["logical_length"] == inputs["input_ids"].shape[1] and len(header["layers"]) == 4
    assert header["plan_sha256"] == patched.plan.sha256
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        "prefix.json", "prefix.safetensors",
    ]  # fmt: skip


@torch.no_grad()
def test_a_prefix_of_something_else_is_refused(tmp_path):
    batch, inputs = batch_of("llava", "alone")
    model = families.model("llava")
    with mllm.patch(model, "fastv:layer=2:keep=0.5"):
        cache = model(**inputs, use_cache=True).past_key_values
        save_prefix(cache, tmp_path)
    other = families.model("internvl")
    for net, plan, argument in (
        (model, "fastv:layer=2:keep=0.25", "plan_sha256"),
        (model, "visionzip:keep=10", "plan_sha256"),
        (other, "fastv:layer=2:keep=0.5", "config_sha256"),
        (families.model("llava").bfloat16(), "fastv:layer=2:keep=0.5", "dtype"),
    ):
        with mllm.patch(net, plan) as patched:
            with pytest.raises(CacheMismatchError) as caught:
                load_prefix(tmp_path, patched)
            assert caught.value.argument == argument and caught.value.expected
    with pytest.raises(CacheMismatchError):
        save_prefix(DynamicCache(), tmp_path / "none")
    assert not (tmp_path / "none").exists()


@torch.no_grad()
def test_a_damaged_prefix_is_no_prefix(tmp_path, monkeypatch):
    batch, inputs = batch_of("llava", "alone")
    model = families.model("llava")
    with mllm.patch(model, [Norms(6)]) as patched:
        one, two = (model(**inputs, use_cache=True).past_key_values for _ in range(2))
        _ask(model, inputs["input_ids"], two, QUESTIONS[0])

        def refused():
            with pytest.raises(DataError) as caught:
                load_prefix(tmp_path, patched)
            assert caught.value.argument == "folder"

        refused()
        save_prefix(one, tmp_path)
        # Power goes off between the two files of a second call.
        with monkeypatch.context() as broken:
            broken.setattr("pathlib.Path.write_text", lambda *a, **k: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                save_prefix(two, tmp_path)
        refused()
        save_prefix(two, tmp_path)
        assert load_prefix(tmp_path, patched).get_seq_length() == two.get_seq_length()
        whole = (tmp_path / "prefix.safetensors").read_bytes()
        (tmp_path / "prefix.safetensors").write_bytes(whole[:-100])
        refused()
        (tmp_path / "prefix.safetensors").write_bytes(whole)
        (tmp_path / "prefix.json").write_text("{")
        refused()


# What cannot work


@torch.no_grad()
def test_a_cache_belongs_to_its_plan_and_model():
    batch, inputs = batch_of("llava", "alone")
    model = families.model("llava")
    token = torch.tensor([[7]])
    plain = model(**inputs, use_cache=True).past_key_values
    with mllm.patch(model, "fastv:layer=2:keep=0.5") as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        want = model(input_ids=token, past_key_values=copy.deepcopy(cache)).logits
        with pytest.raises(CacheMismatchError, match="used can be worked on"):
            patched.kv(plain)
    before = cache_bytes(cache), cache.layers[0].slots
    with pytest.raises(CacheMismatchError):
        model(input_ids=token, past_key_values=cache)
    assert (cache_bytes(cache), cache.layers[0].slots) == before, "nothing was appended"
    with mllm.patch(model, "fastv:layer=2:keep=0.25"):
        with pytest.raises(CacheMismatchError) as caught:
            model(input_ids=token, past_key_values=cache)
        assert caught.value.argument == "past_key_values"
        model(**inputs)
    with mllm.patch(model, "fastv:layer=2:keep=0.5"):
        assert torch.equal(model(input_ids=token, past_key_values=cache).logits, want)
    assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 26


@torch.no_grad()
def test_what_an_unpatched_model_appends_is_foreign():
    """Nothing was compressed, so the unpatched model may go on; the plan may not after that."""
    batch, inputs = batch_of("llava", "text")
    model = families.model("llava")
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1).long()], 1)
    more = dict(input_ids=torch.tensor([[7], [9]]), attention_mask=mask)
    want = model(
        **more, past_key_values=model(**inputs, use_cache=True).past_key_values
    ).logits
    with mllm.patch(model, "fastv:layer=2:keep=0.5"):
        cache = model(**inputs, use_cache=True).past_key_values
    assert torch.equal(model(**more, past_key_values=cache).logits, want)
    with mllm.patch(model, "fastv:layer=2:keep=0.5"):
        with pytest.raises(CacheMismatchError, match="without a plan"):
            model(input_ids=more["input_ids"], past_key_values=cache)


@torch.no_grad()
def test_a_forward_that_broke_off_spoils_its_cache():
    batch, inputs = batch_of("llava", "alone")
    model = families.model("llava")
    with mllm.patch(model, [Norms()]):
        cache = model(**inputs, use_cache=True).past_key_values
        want = model(input_ids=torch.tensor([[7]]), past_key_values=copy.deepcopy(cache)).logits
        good = copy.deepcopy(cache)
        broken = model.get_decoder().layers[2].mlp.register_forward_pre_hook(
            lambda *a: (_ for _ in ()).throw(KeyError("stop"))
        )
        with pytest.raises(KeyError):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        broken.remove()
        with pytest.raises(CacheMismatchError, match="broke off"):
            model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        assert torch.equal(
            model(input_ids=torch.tensor([[7]]), past_key_values=good).logits, want
        )


def test_misuse_says_what_would_work():
    cache, kv = toy(2)
    feed(cache, *torch.randn(2, 2, HEADS, 6, DIM), torch.ones(2, 6, dtype=torch.bool))
    some = torch.ones(2, 6, dtype=torch.bool)
    mid = KVCache(cache, stub(), ran=1)
    for call in (
        lambda: kv.evict(keep=some, drop=some),
        lambda: kv.evict(),
        lambda: kv.evict(7, keep=some),
        lambda: mid.evict(1, keep=some),
        lambda: kv.evict(keep=some[:1]),
        lambda: kv.evict(keep=some[:, None].expand(-1, 3, -1)),
        lambda: kv.merge(0, torch.zeros(2, 5).long()),
    ):
        with pytest.raises(CacheMismatchError) as caught:
            call()
        assert caught.value.argument and caught.value.expected
    flash = KVCache(cache, stub("flash_attention_2"))
    with pytest.raises(PlanError) as caught:
        flash.evict(drop=some[:, None], heads=[0])
    assert caught.value.argument == "attn_implementation"
    with pytest.raises(PlanError):
        flash.merge(0, torch.zeros(2, HEADS, 6).long())
    assert cache.layers[0].slots == 6 and cache.layers[0].table.valid.all()
    flash.evict(drop=torch.tensor([[2], [3]]))
    assert cache.layers[0].slots == 5


def test_a_compact_prompt_cannot_be_cut_in_two():
    cache, kv = toy(1)
    feed(cache, *torch.randn(2, 1, HEADS, 6, DIM), torch.ones(1, 6, dtype=torch.bool))
    kv.evict(drop=torch.tensor([[2]]))
    cache.layers[0].shifts["llm"] = torch.tensor([[1]])
    with pytest.raises(CacheMismatchError):
        kv.crop(3)
    assert kv.length == 6


# Break the cache in the ways that caches break


def heads_crossed(mp):
    """Query heads are masked by the wrong KV heads."""

    def mask(original, *a):
        made = original(*a)
        return made.flip(1)

    around(mp, masks, "_with_stored", mask)


def heads_alike(mp):
    """What one head holds is shown to all of them."""

    def mask(original, *a):
        made = original(*a)
        return made[:, :1]

    around(mp, masks, "_with_stored", mask)


def nothing_evicted(mp):
    mp.setattr(KVCache, "evict", lambda *a, **k: None)


def parent_mask(mp):
    """Every layer is masked as if it held what layer 0 holds."""
    mp.setattr(DecoderRun, "differs", lambda *a: False)


def empty_cells_seen(mp):
    def compact(original, self, keep):
        index, table = original(self, keep)
        return index, SlotTable(table.columns | {"valid": torch.ones_like(table.valid)}, False)

    around(mp, SlotTable, "compact", compact)


def table_left_behind(mp):
    """Keys move, and what is written about them does not."""

    def take(original, self, index, kept):
        return original(self, index.flip(-1), kept)

    around(mp, Dense, "take", take)


def physical_length(mp):
    """Later tokens get the positions of what is left."""
    mp.setattr(SlotLayer, "get_seq_length", lambda self, *a: self.slots)


def journal_forgotten(mp):
    mp.setattr(SlotLayer, "remember", lambda *a: None)


def values_not_moved(mp):
    def take(original, self, index, kept):
        made = original(self, index, kept)
        made.buffer.values = self.buffer.values[:, :, : made.slots].clone()
        return made

    around(mp, Dense, "take", take)


def around(mp, owner, name, change):
    original = getattr(owner, name)
    mp.setattr(owner, name, lambda *a, **k: change(original, *a, **k))


@pytest.mark.parametrize(
    "mutate, name, kind",
    [
        (heads_crossed, "norms", "alone"),
        (heads_alike, "norms", "padded"),
        (nothing_evicted, "norms", "alone"),
        (nothing_evicted, "sinks", "padded"),
        (parent_mask, "snap", "padded"),
        (empty_cells_seen, "norms", "padded"),
        (table_left_behind, "lists", ""),
        (journal_forgotten, "journal", ""),
        (physical_length, "sinks", "alone"),
        (values_not_moved, "snap", "alone"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_a_broken_cache_is_caught(monkeypatch, mutate, name, kind, attn):
    mutate(monkeypatch)
    # What has the wrong shape is caught by torch before anything is compared.
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        if name == "lists":
            for seed in range(10):
                scenario(seed)
        elif name == "journal":
            test_evictions_on_the_strength_of_rejected_tokens_come_back()
        else:
            check_masking("llava", name, attn, kind)
