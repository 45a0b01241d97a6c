"""Low-rank caches: factors, the segments that hold them, and the methods that make them."""

from __future__ import annotations

import copy
import dataclasses
import json
import weakref
from types import SimpleNamespace

import families
import pytest
import torch
from lowrank_oracles import PlainShadow, PlainXKV
from matrix import equal
from test_cache import DIM, HEADS, feed, stub, toy
from test_kv import FAMILIES, around, check_alone, few, generate, running
from torch import Tensor

import mllm
from mllm.cache import (
    KVCache,
    LowRank,
    SlotLayer,
    landmarks,
    load_prefix,
    lowrank,
    rotary,
    save_prefix,
)
from mllm.cache.lowrank import Shared, best_factors
from mllm.errors import CacheMismatchError, PlanError
from mllm.plan import Plan

STEPS = 6
XKV = [
    "xkv:rank_keys=6:rank_values=9",
    "xkv:group=2:rank_keys=5:rank_values=1.0",
    "xkv:group=3:rank_keys=1.0:rank_values=0.3",
    "xkv:group=1:rank_keys=0.5:rank_values=0.5",
]
SHADOW = [
    "shadowkv:budget=6:rank_keys=7:chunk=2:local=1:outliers=2",
    "shadowkv:budget=0.3:rank_keys=0.4:chunk=3:local=0:outliers=0",
    "shadowkv:budget=4:rank_keys=1.0:chunk=4:local=1:outliers=1",
    "shadowkv:budget=1.0:rank_keys=6:chunk=2:local=2:outliers=1",
    "shadowkv:budget=1:rank_keys=9:chunk=1:local=3:outliers=0",
]


# Factors


@pytest.mark.parametrize("rows, columns", [(30, 12), (12, 30), (16, 16)])
def test_factors_are_the_truncated_svd(rows, columns):
    """Of every matrix of a batch with its own rank; rows of padding are zero and stay so."""
    x = torch.randn(4, rows, columns, generator=torch.Generator().manual_seed(0)).cumsum(1)
    x[1, :7], x[3] = 0, 0
    ranks = [3, 5, 8, 0]
    left, right = best_factors(x, ranks)
    assert left.shape == (4, rows, 8) and right.shape == (4, 8, columns)
    for b, rank in enumerate(ranks):
        u, s, v = torch.linalg.svd(x[b].double(), full_matrices=False)
        want = u[:, :rank] @ s[:rank].diag() @ v[:rank]
        equal(left[b] @ right[b], want, f"matrix {b}", 1e-9 * float(x.abs().max()))
        assert not left[b, :, rank:].any() and not right[b, rank:].any()
    assert left[1, :7].abs().max() < 1e-12
    again = best_factors(x, ranks)
    assert torch.equal(again[0], left) and torch.equal(again[1], right)


# A segment against plain storage


def turning(batch_free: bool = False) -> SimpleNamespace:
    """A family whose rotary tables turn half of the channels, every layer otherwise."""

    def tables(x: Tensor, position: Tensor, kind: str):
        angle = position[..., None].float() * torch.tensor([0.7]) * (1 + len(kind))
        return torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()

    return stub(mrope=False, neighbours=False, kind=lambda layer: "x" * layer, rotary=tables)


def both(batch: int, tokens: int, seed: int, rank=3):
    """Two caches that hold the same: one in factors, the other what these give, plainly."""
    g = torch.Generator().manual_seed(seed)
    valid = torch.rand(batch, tokens, generator=g) < 0.8
    valid[:, -2:] = True
    keys, values = torch.randn(2, batch, HEADS, tokens, DIM, generator=g)
    out = []
    for plain in (False, True):
        cache, _ = toy(batch)
        kv = KVCache(cache, turning())
        feed(cache, keys, values, valid)
        (fit,) = kv.lowrank(None, rank, rank)
        assert fit.layers == (0, 1) and fit.tokens == valid.sum(1).tolist()
        if plain:
            for layer in cache.layers:
                layer.segments = [mllm.cache.Dense.of(layer.keys, layer.values.contiguous())]
        out.append((cache, kv))
    return out


def lefts(cache) -> list[set[int]]:
    """Storages of the left factors, of keys and of values."""
    own = [s for layer in cache.layers for s in layer.segments if isinstance(s, LowRank)]
    sides = [[s._keys for s in own], [s._values for s in own]]
    return [{x.left.tensor.data_ptr() for x in side if hasattr(x, "left")} for side in sides]


def scenario(seed: int) -> int:
    """Random operations on both; returns how often factors were looked at."""
    g = torch.Generator().manual_seed(seed)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=g))

    caches = both(1 + draw(3), 8 + draw(12), seed)
    saved: list = []
    looked, apart = 0, False
    for _ in range(10):
        (one, first), (two, second) = caches
        batch, length, what = one.layers[0].table.valid.shape[0], first.length, draw(10)
        if what <= 1:
            new = 1 + draw(3)
            keys, values = torch.randn(2, batch, HEADS, new, DIM, generator=g)
            valid = torch.rand(batch, new, generator=g) < 0.8
            for cache, _ in caches:
                feed(cache, keys, values, valid)
        elif what == 2:
            keep = torch.rand(batch, length, generator=g) < 0.8
            for _, kv in caches:
                kv.evict(keep=keep)
        elif what == 3 and draw(3) == 0:
            drop, apart = torch.rand(batch, HEADS, length, generator=g) < 0.2, True
            for _, kv in caches:
                kv.evict(drop=drop)
        elif what == 4 and length > 4:
            cut = length - draw(3)
            for _, kv in caches:
                kv.crop(cut)
        elif what == 5:
            index = torch.randint(0, batch, (batch,), generator=g)
            for _, kv in caches:
                kv.reorder(index)
        elif what == 6 and batch < 5:
            for _, kv in caches:
                kv.repeat(2)
        elif what == 7:
            index = torch.randint(0, batch, (1 + draw(batch),), generator=g)
            for _, kv in caches:
                kv.select(index)
        elif what == 8:
            if saved:
                for (_, kv), old in zip(caches, saved, strict=True):
                    kv.rollback(old)
                saved, apart = [], apart and any(x.table.headwise for x in one.layers)
            else:
                saved = [kv.snapshot() for _, kv in caches]
        elif what == 9:
            saved = []
            caches = [(c := copy.deepcopy(cache), KVCache(c, turning())) for cache, _ in caches]
        (one, first), (two, second) = caches
        for i in range(first.depth):
            if not two.layers[i].segments:
                assert not one.layers[i].segments
                continue
            mine, want = first.view(i), second.view(i)
            # Empty cells may stand elsewhere: one of the caches has more segments.
            assert torch.equal(mine.valid.sum(-1), want.valid.sum(-1))
            for x in ("visual", "logical"):
                pair = (getattr(v, x)[v.valid] for v in (mine, want))
                assert torch.equal(*pair), x
            assert torch.equal(mine.position[0][mine.valid], want.position[0][want.valid])
            equal(mine.keys[mine.valid], want.keys[want.valid], f"keys {i}", 1e-5)
            equal(mine.values[mine.valid], want.values[want.valid], f"values {i}", 1e-5)
        factors = lefts(one)
        assert all(len(side) <= 1 for side in factors), "one left factor for all layers"
        looked += bool(factors[0])
        assert apart or factors[0] or not any(x.segments for x in one.layers)
    return looked


@pytest.mark.parametrize("seed", range(12))
def test_operations_against_plain_storage(seed):
    scenario(seed)


def test_operations_do_look_at_factors():
    """Or the test above would say nothing."""
    assert sum(scenario(seed) for seed in range(20, 28)) > 40


def test_a_window_forgets_memory():
    """The oldest slots of factors leave one by one, and are really let go."""
    (cache, kv), _ = both(2, 40, 0)
    before = kv.nbytes[0]
    for left in range(39, 9, -1):
        for layer in cache.layers:
            layer.segments = [layer.segments[0].last(left)]
            layer.table = layer.table.last(left)
        assert all(len(side) == 1 for side in lefts(cache))
    (segment,) = cache.layers[0].segments
    assert segment.slots == 10 and segment.keys().shape[2] == 10
    rank, right = 3, 2 * 2 * HEADS * DIM  # two layers, of both samples
    assert before == 2 * 4 * rank * (40 * 2 + right)
    assert kv.nbytes[0] <= 2 * 4 * rank * (10 * 9 / 8 * 2 + right)


# Decoding


@pytest.mark.parametrize(
    "spec, family, kind, attn",
    few(XKV, FAMILIES, ["alone", "padded"], ["sdpa", "eager"]),
)
def test_decoding_is_that_of_an_exchanged_prompt(spec, family, kind, attn):
    check_exchanged(PlainXKV, spec, family, kind, attn)


@pytest.mark.parametrize(
    "spec, family, kind, attn",
    few(SHADOW, FAMILIES, ["alone", "padded"], ["sdpa", "eager"]),
)
def test_a_step_is_one_that_masks_what_it_does_not_choose(spec, family, kind, attn):
    check_exchanged(PlainShadow, spec, family, kind, attn)


@torch.no_grad()
def check_exchanged(reference, spec, family, kind, attn, steps=STEPS):
    """Every sample of a batch, alone in a model whose cache holds what a plain SVD leaves."""
    batch = families.samples(family, kind)
    inputs, model = families.collate(family, batch), families.model(family, attn)
    stage = Plan.from_spec(spec).stages[0]
    plain = generate(model, inputs, steps)
    with mllm.patch(model, stage):
        out = generate(model, inputs, steps)
    prompt, changed = inputs["input_ids"].shape[1], 0.0
    for b, sample in enumerate(batch):
        want = reference(family, stage).generate(
            **families.collate(family, [sample]), max_new_tokens=steps
        )
        logits = torch.stack(want.logits, 1)[0]
        mine = torch.stack(out.logits, 1)[b]
        equal(mine, logits, f"sample {b}", 1e-5 * max(1.0, float(logits.std())))
        assert torch.equal(out.sequences[b, prompt:], want.sequences[0, len(sample.ids) :])
        changed = max(changed, float((mine - torch.stack(plain.logits, 1)[b])[1].abs().max()))
    assert changed > 1e-3, "the ranks do not bite"


def positions_shifted(mp):
    around(mp, rotary.Rotary, "rotate", lambda f, self, k, p: f(self, k, p + (p > 3)))


def positions_in_one_axis(mp):
    around(mp, rotary.Rotary, "rotate", lambda f, self, k, p: f(self, k, p[:1].expand(p.shape)))


def never_turned_back(mp):
    mp.setattr(rotary.Rotary, "unrotate", lambda self, k, position: k)


def factors_of_another_layer(mp):
    around(mp, lowrank, "factored", lambda f, *a: _crossed(*f(*a)))


def _crossed(segments, fit):
    sides = [s._keys for s in segments]
    for segment, side in zip(segments, [*sides[1:], sides[0]], strict=True):
        segment._keys = side
    return segments, fit


def rows_crossed(mp):
    around(mp, lowrank.Factors, "whole", lambda f, self: f(self).flip(1))


def padding_takes_part(mp):
    around(mp, lowrank, "factored", lambda f, k, v, valid, *a: f(k, v, valid | True, *a))


@pytest.mark.parametrize(
    "mutate, family",
    [
        (positions_shifted, "llava"),
        (positions_in_one_axis, "qwen2_5_vl"),
        (never_turned_back, "llava"),
        (factors_of_another_layer, "llava"),
        (rows_crossed, "llava"),
        (padding_takes_part, "qwen2_5_vl"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_broken_method_is_caught(monkeypatch, mutate, family):
    mutate(monkeypatch)
    monkeypatch.setattr(mllm.cache.ops, "factored", lowrank.factored)
    with pytest.raises((AssertionError, RuntimeError)):
        check_exchanged(PlainXKV, XKV[0], family, "padded", "sdpa")


@torch.no_grad()
def test_full_rank_is_the_identity_within_rounding():
    """Ranks between the samples' full ranks: the shortest one is in factors, and exact to 1e-5."""
    batch = families.samples("llava", "padded")
    model, inputs = families.model("llava"), families.collate("llava", batch)
    plain = generate(model, inputs, STEPS)
    short = min(range(3), key=lambda b: len(batch[b].ids))
    rank = len(batch[short].ids)
    with mllm.patch(model, f"xkv:rank_keys={rank}:rank_values={rank}"):
        out = generate(model, inputs, STEPS)
    assert len(lefts(out.past_key_values)[0]) == 1
    want = torch.stack(plain.logits, 1)[short]
    equal(torch.stack(out.logits, 1)[short], want, "full", 1e-5 * max(1.0, float(want.std())))


# Ways of running

WAYS = ["xkv:rank_keys=6:rank_values=9", "xkv:group=2:rank_keys=0.3:rank_values=0.3",
        *SHADOW[:2]]  # fmt: skip


@pytest.mark.parametrize("spec, family", few(WAYS, ["llava", "qwen2_5_vl", "gemma3"]))
def test_beams_of_a_batch_are_beams_alone(spec, family):
    with torch.no_grad():
        batch, model = families.samples(family, "padded"), families.model(family)
        batch = [batch[0], batch[2]]
        options = dict(max_new_tokens=8, do_sample=False, num_beams=3)
        with mllm.patch(model, spec):
            out = model.generate(**families.collate(family, batch), **options)
            for b, sample in enumerate(batch):
                alone = model.generate(**families.collate(family, [sample]), **options)
                assert torch.equal(alone[0, -8:], out[b, -8:])


@pytest.mark.parametrize("spec", WAYS)
@torch.no_grad()
def test_a_second_turn_in_a_batch_is_one_alone(spec):
    """The question is factored for itself, behind what the first turn left."""
    batch, model = families.samples("llava", "padded"), families.model("llava")
    question = torch.tensor([11, 23, 31, 42, 55, 13, 19, 17])

    def second(first, mask, rows):
        ids = torch.cat([first.sequences, question.expand(len(first.sequences), -1)], 1)[rows]
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)[rows]
        return generate(
            model, dict(input_ids=ids, attention_mask=mask), 5,
            past_key_values=first.past_key_values,
        )  # fmt: skip

    with mllm.patch(model, spec) as patched:
        inputs = families.collate("llava", batch)
        first = generate(model, inputs, 4)
        patched.kv(first.past_key_values).select(torch.tensor([2, 0]))
        together = second(first, inputs["attention_mask"], [2, 0])
        forms = [x.__class__.__name__ for x in together.past_key_values.layers[0].segments]
        assert len(forms) == 3 and forms[2] == "Dense" and "Dense" not in forms[:2]
        for b, sample in enumerate([batch[2], batch[0]]):
            inputs = families.collate("llava", [sample])
            alone = second(generate(model, inputs, 4), inputs["attention_mask"], [0])
            assert torch.equal(together.sequences[b, -5:], alone.sequences[0, -5:])
            want = torch.stack(alone.logits, 1)[0]
            near = 1e-5 * max(1.0, float(want.std()))
            equal(torch.stack(together.logits, 1)[b], want, spec, near)


@torch.no_grad()
def test_assisted_decoding_is_greedy_decoding():
    """Candidates are stored plainly, and taken back."""
    (sample,) = families.samples("llava", "alone")
    ids = torch.cat([sample.ids, sample.ids[-3:], sample.ids[-3:], sample.ids[-3:-1]])
    inputs = families.collate("llava", [families.Sample(ids, sample.pictures)])
    model = families.model("llava")
    with mllm.patch(model, XKV[0]):
        greedy = generate(model, inputs, 20)
        assisted = generate(model, inputs, 20, prompt_lookup_num_tokens=4)
    assert torch.equal(greedy.sequences, assisted.sequences)


@pytest.mark.parametrize(
    "plan",
    [
        "visionzip:keep=6+xkv:rank_keys=6:rank_values=9",
        "fastv:layer=2:keep=0.5+xkv:rank_keys=6:rank_values=9",
        "zipvl_prefill+xkv:rank_keys=4:rank_values=4",
        "visionzip:keep=6+shadowkv:budget=6:rank_keys=7:chunk=2:local=1:outliers=1",
        "fastv:layer=2:keep=0.5+shadowkv:budget=0.3:rank_keys=0.5:chunk=2:local=1:outliers=1",
    ],
)
@torch.no_grad()
def test_methods_stack(plan):
    """Layers behind a cut, and those that choose for themselves, have factors of their own."""
    check_alone("llava", plan)


@torch.no_grad()
def test_layers_behind_a_cut_share_among_themselves():
    inputs = families.collate("llava", families.samples("llava", "alone"))
    model = families.model("llava")
    with mllm.patch(model, "fastv:layer=1:keep=0.5+xkv:rank_keys=6:rank_values=9") as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        notes = patched.ledger.notes
    held = [x.segments[0]._keys.left.tensor.data_ptr() for x in cache.layers]
    assert held[0] != held[1] == held[2] == held[3]
    assert "xkv: layers 0 and 1/2/3 store different tokens and share no factors" in notes


# Memory and files


@pytest.mark.parametrize(
    "spec, groups, keys, values",
    [
        ("xkv:rank_keys=6:rank_values=9", [4], 6, 9),
        ("xkv:group=3:rank_keys=7:rank_values=5", [3, 1], 7, 5),
        ("xkv:group=9:rank_keys=0.25:rank_values=0.125", [4], 24, 12),
        ("xkv:group=2:rank_keys=1.0:rank_values=10", [2, 2], None, 10),
    ],
)
@torch.no_grad()
def test_payload_is_that_of_the_factors(spec, groups, keys, values):
    """A left factor of the group and right ones of its layers, counted once; by hand."""
    (sample,) = families.samples("llava", (((0,), 180),))
    model, tokens, width = families.model("llava"), len(sample.ids), 2 * 12
    with mllm.patch(model, spec) as patched:
        model(**families.collate("llava", [sample]), use_cache=True)
        data = patched.ledger.as_dict()
    floats = 0
    for layers in groups:
        for rank in (keys, values):
            whole = tokens * layers * width
            floats += whole if rank is None else rank * (tokens + layers * width)
    assert data["kv_bytes"] == 4 * floats
    assert data["baseline_kv_bytes"] == 4 * tokens * 4 * 2 * width
    flops = 0
    for layers in groups:
        for rank in (keys, values):
            if rank is not None:
                n, w = tokens, layers * width
                short = min(n, w)
                flops += 2 * n * w * short + 2 * n * w * rank + 9 * short**3
    assert data["selection_flops"] == [flops]


@pytest.mark.parametrize(
    "spec, family", few([*XKV[:3], *SHADOW[:3]], ["llava", "qwen2_5_vl", "gemma3"])
)
@torch.no_grad()
def test_a_saved_prefix_goes_on_as_if_it_had_not_been_saved(spec, family, tmp_path):
    """In factors, which the layers of a group still share: bit for bit, and byte for byte."""
    inputs = families.collate(family, families.samples(family, "padded"))
    more = torch.tensor([[11, 23, 31]]).expand(len(inputs["input_ids"]), -1)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    given = dict(input_ids=torch.cat([ids, more], 1), attention_mask=torch.cat([mask, more > 0], 1))
    model = families.model(family)

    def answer(cache):
        return generate(model, given, STEPS, past_key_values=cache)

    with mllm.patch(model, spec) as patched:
        cache = generate(model, inputs, 1).past_key_values
        save_prefix(cache, tmp_path)
        loaded = load_prefix(tmp_path, patched)
        assert patched.kv(loaded).nbytes[0] == patched.kv(cache).nbytes[0]
        mine, want = answer(loaded), answer(cache)
        assert torch.equal(mine.sequences, want.sequences)
        assert all(torch.equal(a, b) for a, b in zip(mine.logits, want.logits, strict=True))
        # What has grown since is written too.
        save_prefix(cache, tmp_path / "more")
        again = load_prefix(tmp_path / "more", patched)
        for a, b in zip(again.layers, cache.layers, strict=True):
            assert [type(x) for x in a.segments] == [type(x) for x in b.segments]
            assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
        assert patched.kv(again).nbytes[0] <= patched.kv(cache).nbytes[0]
    rows = json.loads((tmp_path / "prefix.json").read_text())["layers"]
    assert {part["form"] for row in rows for part in row["parts"]} & {"lowrank", "landmarks"}
    size = (tmp_path / "prefix.safetensors").stat().st_size
    assert size < sum(patched.kv(load_prefix(tmp_path, patched)).nbytes) + 20_000


def test_what_is_shared_stays_shared():
    """And only while somebody holds it."""
    x = Shared(torch.randn(2, 6, 3))
    index = torch.tensor([[0, 2], [1, 5]])
    dropped = weakref.ref(x.take(index))
    assert dropped() is None
    held = x.take(index)
    assert x.take(index) is held and x.take(index.clone()) is not held
    head = x.first(4)
    assert x.first(4) is head and head.tensor.data_ptr() == x.tensor.data_ptr()


# What is refused


@pytest.mark.parametrize(
    "spec, argument",
    [
        ("xkv:group=0", "group"),
        ("xkv:group=0.5", "group"),
        ("xkv:rank_keys=0", "rank_keys"),
        ("xkv:rank_keys=-3", "rank_keys"),
        ("xkv:rank_keys=1.5", "rank_keys"),
        ("xkv:rank_values=0.0", "rank_values"),
        ("xkv:rank_values=many", "rank_values"),
        ("xkv:budget=4", "budget"),
        ("shadowkv:budget=7", "budget"),
        ("shadowkv:budget=0", "budget"),
        ("shadowkv:budget=1.5", "budget"),
        ("shadowkv:rank_keys=0", "rank_keys"),
        ("shadowkv:rank_keys=1.1", "rank_keys"),
        ("shadowkv:chunk=0", "chunk"),
        ("shadowkv:chunk=-8", "chunk"),
        ("shadowkv:chunk=0.5", "chunk"),
        ("shadowkv:outliers=-1", "outliers"),
        ("shadowkv:chunk=1", "outliers"),
        ("shadowkv:local=-1", "local"),
        ("shadowkv:rank_values=4", "rank_values"),
    ],
)
def test_bad_input(spec, argument):
    with pytest.raises(PlanError) as caught:
        Plan.from_spec(spec)
    assert caught.value.argument == argument and caught.value.expected


@pytest.mark.parametrize(
    "plan",
    ["xkv+h2o", "h2o+xkv", "xkv+snapkv:budget=0.5", "prefixkv+xkv", "xkv+xkv:group=2",
     "shadowkv+streamingllm", "plphp+shadowkv", "shadowkv+xkv", "xkv+shadowkv", "cmai+shadowkv"],
)  # fmt: skip
def test_eviction_and_factors_do_not_go_together(plan):
    with pytest.raises(PlanError, match="same layers: .*(token|factors|stored)") as caught:
        mllm.patch(families.model("llava"), plan)
    assert caught.value.argument == "plan" and caught.value.expected


@torch.no_grad()
def test_the_ledger_says_what_does_not_fit():
    """Ranks above the full one are cut, and the last group is smaller."""
    model = families.model("llava")
    inputs = families.collate("llava", families.samples("llava", "text"))

    def notes(spec):
        with mllm.patch(model, spec) as patched:
            model(**inputs, use_cache=True)
            return patched.ledger.notes

    assert notes("xkv:group=3:rank_keys=8:rank_values=2") == [
        "xkv: rank_keys=8 is cut to the full rank, 7 in layers 0/1/2",
        "xkv: the last group has 1 of 3 layers",
        "xkv: rank_keys=8 is cut to the full rank, 7 in layers 3",
    ]
    assert notes("xkv:group=4:rank_keys=0.5:rank_values=2") == []
    assert "xkv: the last group has 4 of 9 layers" in notes("xkv:group=9")
    assert notes("shadowkv") == [
        f"shadowkv: {n} tokens are no more than local and outlier chunks, which are kept as they "
        "are"
        for n in (7, 10)
    ]
    assert notes("shadowkv:budget=2:rank_keys=9:chunk=2:local=1:outliers=1") == [
        "shadowkv: rank_keys=9 is cut to the full rank where that is less, to 7 for one"
    ]


@pytest.mark.parametrize("spec", XKV + SHADOW)
def test_plans_are_written_as_they_are_read(spec, tmp_path):
    plan = Plan.from_spec(spec)
    plan.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path) == plan == Plan.from_spec(plan.spec)


# Steps that look at some chunks

WITH_CHUNKS = ["shadowkv:budget=6:rank_keys=7:chunk=2:local=1:outliers=2",
               "shadowkv:budget=0.3:rank_keys=0.4:chunk=3:local=0:outliers=0"]  # fmt: skip


def landmarks_of_neighbours(mp):
    around(mp, landmarks.Landmarked, "attended", lambda f, self, q, s: f(rolled(self), q, s))


def rolled(segment):
    own = dataclasses.replace(segment._chunks, landmarks=segment._chunks.landmarks.roll(1, 2))
    return landmarks.Landmarked(segment._store, own, segment.most, segment.selects)


def first_head_of_a_group(mp):
    def crossed(f, self, query, scaling):
        return f(self, query[:, ::2].repeat_interleave(2, 1), scaling)

    around(mp, landmarks.Landmarked, "attended", crossed)


def another_scale(mp):
    """The authors' code has a head of 128 channels written in."""
    around(mp, landmarks.Landmarked, "attended", lambda f, self, q, s: f(self, q, 3 * 128**-0.5))


def outliers_in_factors(mp):
    around(mp, landmarks.Landmarked, "attended", lambda f, *a: _without_exact(*f(*a)))


def _without_exact(keys, values, index):
    return keys, values, index.where(torch.arange(index.shape[2]) < 6, -1)


def values_of_others(mp):
    around(mp, lowrank.LowRank, "picked_values", lambda f, self, index: f(self, index.flip(2)))


def chunks_with_padding(mp):
    def shifted(f, keys, values, valid, *a, **k):
        return f(keys, values, valid | (valid.cumsum(1) == 0), *a, **k)

    around(mp, landmarks, "landmarked", shifted)


def mask_dropped(mp):
    def bare(f, self, query, mask, scaling):
        keys, values, mask = f(self, query, mask, scaling)
        return keys, values, None

    around(mp, SlotLayer, "attended", bare)


def positions_of_others(mp):
    def shifted(f, self, k, position):
        return f(self, k, position + 1 if position.dim() == 4 else position)

    around(mp, rotary.Rotary, "rotate", shifted)


@pytest.mark.parametrize(
    "mutate",
    [
        landmarks_of_neighbours, first_head_of_a_group, another_scale, outliers_in_factors,
        values_of_others, chunks_with_padding, mask_dropped, positions_of_others,
    ],
    ids=lambda x: x.__name__,
)  # fmt: skip
def test_a_broken_choice_is_caught(monkeypatch, mutate):
    mutate(monkeypatch)
    monkeypatch.setattr(mllm.cache.ops, "landmarked", landmarks.landmarked)
    with pytest.raises((AssertionError, RuntimeError)):
        check_exchanged(PlainShadow, WITH_CHUNKS[0], "llava", "padded", "sdpa")


@torch.no_grad()
def test_steps_look_at_the_budget_and_make_nothing_else(monkeypatch):
    """Chosen chunks, what is kept as it is, and the answer; nobody makes all keys in a step."""
    (sample,) = families.samples("llava", (((0, 0), 60),))
    model, tokens, seen = families.model("llava"), len(sample.ids), []
    around(monkeypatch, SlotLayer, "attended", lambda f, *a: seen.append(f(*a)) or seen[-1])
    spec = "shadowkv:budget=12:rank_keys=8:chunk=4:local=2:outliers=3"
    with mllm.patch(model, spec):
        inputs = families.collate("llava", [sample])
        cache = generate(model, inputs, 1).past_key_values

        def refuse(self):
            raise AssertionError("a step has made all keys")

        monkeypatch.setattr(lowrank.Factors, "whole", refuse)
        for n in range(1, 4):
            model(input_ids=torch.tensor([[9]]), past_key_values=cache)
            assert len(seen) == 4 * n
            rest = (2 + 3) * 4 + tokens % 4
            assert seen[-1][0].shape[2] == seen[-1][1].shape[2] == 12 + rest + n
            assert bool((seen[-1][2] == 0).all())


@torch.no_grad()
def test_chunks_take_the_room_that_they_should():
    """Factors of one layer, values on the host, what is kept as it is twice: by hand."""
    (sample,) = families.samples("llava", (((0,), 180),))
    model, tokens, width = families.model("llava"), len(sample.ids), 2 * 12
    spec = "shadowkv:budget=12:rank_keys=8:chunk=4:local=2:outliers=3"
    with mllm.patch(model, spec) as patched:
        model(**families.collate("llava", [sample]), use_cache=True)
        data = patched.ledger.as_dict()
    body = tokens // 4 - 2
    exact = 3 * 4 + tokens - body * 4
    layer = 8 * (tokens + width) + tokens * width + 2 * exact * width
    assert data["kv_bytes"] == 4 * 4 * layer
    landmarks = body * width * 4 + body * 2 + 8  # and which of them may be chosen, how many
    slots = 4 * (tokens + body * 4 + 2 * exact)  # positions, members, what is exact
    table = tokens * (1 + 1 + 8 + 8)
    assert data["kv_meta_bytes"] == 4 * (landmarks + slots) + table


@pytest.mark.parametrize("spec", WITH_CHUNKS)
@torch.no_grad()
def test_several_tokens_at_once_attend_to_everything(spec):
    """And what is left of a prompt's factors is nothing for the model as it is."""
    (sample,) = families.samples("llava", "alone")
    inputs, model = families.collate("llava", [sample]), families.model("llava")
    stage, question = Plan.from_spec(spec).stages[0], torch.tensor([[11, 23, 31, 42]])
    with mllm.patch(model, spec):
        cache = model(**inputs, use_cache=True).past_key_values
        mine = model(input_ids=question, past_key_values=copy.deepcopy(cache)).logits
    with pytest.raises(CacheMismatchError, match="compressed by a plan"):
        model(input_ids=question[:, :1], past_key_values=cache)
    oracle = PlainShadow("llava", stage)
    oracle.choose = lambda layer, query, start, key, mask, scaling: mask
    with running(oracle):
        theirs = oracle.model(**inputs, use_cache=True).past_key_values
        want = oracle.model(input_ids=question, past_key_values=theirs).logits
    near = 1e-5 * max(1.0, float(want.std()))
    equal(mine, want, "four rows", near)
