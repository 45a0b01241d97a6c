"""Quantised keys and values: against loops, never rounded twice, and as small as they say."""

from __future__ import annotations

import copy
import math

import families
import pytest
import torch
from cache_oracles import Oracle
from kv_oracles import Plain
from matrix import equal
from test_kv import FAMILIES, around, check_alone, few, generate, stored
from test_zoo_zipvl import important, probes

import mllm
from mllm import attention
from mllm.cache import Dense, KVCache, Quantised, cache_bytes, load_prefix, quantised, save_prefix
from mllm.cache.layer import SlotLayer
from mllm.changes import Changes
from mllm.compressors import KIVI, SnapKV, ZipVLCache, zipvl
from mllm.errors import PlanError
from mllm.examine import _as_if
from mllm.models import resolve
from mllm.plan import Plan

STEPS = 14


# A segment, in loops


def rounded(x: list[float], bits: int) -> list[float]:
    """What numbers of one group are stored as: the least, and steps up to the largest."""
    x = [torch.tensor(v, dtype=torch.float32) for v in x]
    low, high = min(x), max(x)
    step = (high - low) / (2**bits - 1) * (1 + torch.finfo(torch.float32).eps)
    if step == 0:
        return [low.item()] * len(x)
    codes = [min(2**bits - 1, round(((v - low) / step).item())) for v in x]
    return [(torch.tensor(float(code)) * step + low).item() for code in codes]


def slow(keys, values, key_bits, value_bits, group):
    """One head's tokens `[n, dim]`: keys by channel along tokens, values by token."""
    keys, values = keys.clone(), values.clone()
    for start in range(0, len(keys), group) if key_bits < 16 else ():
        for channel in range(keys.shape[1]):
            part = keys[start : start + group, channel]
            part.copy_(torch.tensor(rounded(part.tolist(), key_bits)))
    for token in range(len(values)) if value_bits < 16 else ():
        for start in range(0, values.shape[1], min(group, values.shape[1])):
            part = values[token, start : start + group]
            part.copy_(torch.tensor(rounded(part.tolist(), value_bits)))
    return keys, values


def cells(ragged: bool, slots: int = 22, dim: int = 8, seed: int = 0):
    """Keys, values and which cells are there; some heads of one sample hold few."""
    g = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(2, 3, slots, dim, generator=g) * 3 + 5 for _ in range(2))
    kept = torch.ones(2, 3, slots, dtype=torch.bool)
    if ragged:
        kept = torch.rand(2, 3, slots, generator=g) < 0.7
        kept[1, 2] = False
        kept[1, 2, 5:8] = True
    return keys, values, kept


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(
    "key_bits, value_bits, group",
    [(2, 2, 4), (4, 4, 8), (8, 8, 2), (2, 8, 4), (16, 4, 4), (4, 16, 32)],
)
def test_a_segment_is_what_loops_make(key_bits, value_bits, group, ragged):
    check_segment(key_bits, value_bits, group, ragged)


def check_segment(key_bits, value_bits, group, ragged):
    keys, values, kept = cells(ragged)
    segment = Quantised.of(keys, values, kept, key_bits, value_bits, group)
    for b in range(2):
        for h in range(3):
            own = kept[b, h]
            want = slow(keys[b, h, own], values[b, h, own], key_bits, value_bits, group)
            # In fp32 a product and a sum may be rounded once or twice.
            for got, wanted in zip((segment.keys(), segment.values()), want, strict=True):
                torch.testing.assert_close(got[b, h, own], wanted, rtol=1e-6, atol=2e-6)


def test_many_rows_are_gone_through_in_blocks(monkeypatch):
    keys, values, kept = cells(True, slots=64)
    whole = Quantised.of(keys, values, kept, 4, 2, 4)
    monkeypatch.setattr(quantised, "BLOCK", 5 * keys.shape[-1])
    parts = Quantised.of(keys, values, kept, 4, 2, 4)
    for mine, other in ((whole._keys, parts._keys), (whole._values, parts._values)):
        assert len(mine.codes) > 5
        assert torch.equal(mine.codes, other.codes) and torch.equal(mine.rows(), other.rows())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_error_is_half_a_step(bits, dtype):
    """Also where a few bits of mantissa have to hold the bounds, and the last code is the end."""
    keys, values, kept = cells(True, slots=64)
    keys, values = (t.to(dtype) for t in (keys * 100, values))
    segment = Quantised.of(keys, values, kept, bits, bits, 4)
    for x, got, side in (
        (keys, segment.keys(), segment._keys), (values, segment.values(), segment._values)
    ):  # fmt: skip
        rows = side.number() if side is segment._keys else slice(None)
        step = side.step.float()[rows].repeat_interleave(x.shape[-1] // side.step.shape[1], 1)
        last = torch.finfo(dtype).eps * x.float().abs()  # the result's own rounding
        off = (got.float() - x.float()).abs()[kept]
        assert (off <= step / 2 * (1 + 1e-4) + last[kept]).all()
        assert off.max() > step.max() / 8, "something was rounded"


def test_equal_values_are_exact():
    keys = torch.full((1, 1, 8, 4), 3.14159)
    segment = Quantised.of(keys, -keys, torch.ones(1, 1, 8, dtype=torch.bool), 2, 2, 4)
    assert torch.equal(segment.keys(), keys) and torch.equal(segment.values(), -keys)


def chosen(segment, kept, g):
    """A choice of columns that differs from head to head, and which cells it keeps."""
    most = max(1, int(kept.shape[2] * 0.8))
    index = torch.stack([
        torch.randperm(kept.shape[2], generator=g)[:most].sort().values
        for _ in range(kept.shape[0] * kept.shape[1])
    ]).view(*kept.shape[:2], most)  # fmt: skip
    keep = kept.gather(2, index) & (torch.rand(index.shape, generator=g) < 0.9)
    return index, keep


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_no_cell_is_rounded_twice(seed, ragged):
    """Whatever columns, rows and joins do to a segment, a cell holds the same bits."""
    keys, values, kept = cells(ragged, slots=30, seed=seed)
    g = torch.Generator().manual_seed(seed)
    segment = Quantised.of(keys, values, kept, 2, 4, 4)
    want = [segment.keys(), segment.values()]

    def check():
        assert segment.shape == kept.shape and segment.slots == kept.shape[2]
        for got, w in zip((segment.keys(), segment.values()), want, strict=True):
            assert got.shape == w.shape and torch.equal(got[kept], w[kept])
        assert int((segment._places() >= 0).sum()) >= int(kept.sum())

    for step in range(12):
        before, bits = segment, [t.clone() for t in (*segment.tensors(), *segment.meta())]
        kind = torch.randint(6, (), generator=g).item() if kept.shape[2] > 4 else 5
        if kind == 0:
            segment, kept = segment.first(kept.shape[2] - 1), kept[..., :-1]
            want = [w[:, :, :-1] for w in want]
        elif kind == 1:
            segment, kept = segment.last(kept.shape[2] - 2), kept[..., 2:]
            want = [w[:, :, 2:] for w in want]
        elif kind == 2:
            order = torch.randint(len(kept), (len(kept),), generator=g)
            segment, kept = segment.rows(lambda t, o=order: t[o]), kept[order]
            want = [w[order] for w in want]
        elif kind in (3, 4):
            index, keep = chosen(segment, kept, g)
            segment, kept = segment.take(index, keep), keep
            want = [w.gather(2, index[..., None].expand(*index.shape, 8)) for w in want]
        else:
            more = cells(ragged, slots=6, seed=100 * seed + step)
            other = Quantised.of(*more, 2, 4, 4)
            segment, kept = segment.join(other), torch.cat([kept, more[2]], 2)
            want = [torch.cat(x, 2) for x in zip(want, (other.keys(), other.values()), strict=True)]
        check()
        assert all(torch.equal(a, b) for a, b in zip(
            bits, (*before.tensors(), *before.meta()), strict=True
        )), "a snapshot of it stays"  # fmt: skip
    assert segment.join(Quantised.of(*more_bits(kept), 4, 4, 4)) is None


def more_bits(kept):
    return torch.randn(*kept.shape[:2], 4, 8), torch.randn(*kept.shape[:2], 4, 8), torch.ones(
        *kept.shape[:2], 4, dtype=torch.bool
    )  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_a_segment_weighs(bits):
    """Codes are bits / 16 of plain halves; bounds are two numbers a group, and nothing else."""
    keys, values = (torch.randn(2, 2, 96, 64).half() for _ in range(2))
    every = torch.ones(2, 2, 96, dtype=torch.bool)
    segment = Quantised.of(keys, values, every, bits, bits, 32)
    plain = keys.nbytes + values.nbytes
    assert sum(t.nbytes for t in segment.tensors()) == plain * bits // 16
    number = 2 * 2 * 96 * 64 // 32  # groups of each side
    assert sum(t.nbytes for t in segment.meta()) == 2 * number * 2 * 2 + 4 * 2 * 2 * 96 // 32


def test_what_leaves_frees_memory():
    """Codes of a fourth weigh a fourth; bounds stay while one of their group does."""
    keys, values = (torch.randn(1, 2, 128, 32).half() for _ in range(2))
    every = torch.ones(1, 2, 128, dtype=torch.bool)
    segment = Quantised.of(keys, values, every, 4, 4, 32)
    for index in (torch.arange(0, 128, 4), torch.arange(96, 128)):
        index = index.expand(1, 2, -1)
        part = segment.take(index, torch.ones_like(index, dtype=torch.bool))
        assert sum(t.untyped_storage().nbytes() for t in part.tensors()) == keys.nbytes // 8
        groups = 4 if index[0, 0, 0] == 0 else 1
        assert part._keys.low.shape == (2 * groups, 32) and part._values.low.shape == (64, 1)


def key_and_value_swapped(mp):
    around(mp, Quantised, "of", lambda f, k, v, *a: f(v, k, *a))


def channels_for_tokens(mp):
    """Keys by token, as caches that know one axis do."""
    mp.setattr(
        quantised.ByChannel, "of",
        lambda x, number, bits: quantised.ByToken.of(x, bits, x.shape[1]),
    )  # fmt: skip


def groups_shifted(mp):
    around(mp, quantised.ByChannel, "of", lambda f, x, number, bits: f(x, _later(number), bits))


def _later(number):
    number = torch.cat([number[:1], number[:-1]])
    return number.unique_consecutive(return_inverse=True)[1]


def upper_half_first(mp):
    around(mp, quantised, "_unpack", lambda f, packed, *a: f(packed.flip(1), *a))


def padding_counted(mp):
    around(mp, Quantised, "of", lambda f, k, v, kept, *a: f(k, v, kept | True, *a))


@pytest.mark.parametrize(
    "mutate",
    [key_and_value_swapped, channels_for_tokens, groups_shifted, upper_half_first, padding_counted],
)
def test_a_broken_segment_is_caught(monkeypatch, mutate):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_segment(4, 4, 4, True)


# KIVI in a model


class Bits:
    """For an :class:`Oracle`: what is stored in few bits, decided and rounded in loops.

    `frozen` holds what a token of a head is stored as.
    """

    def __init__(self, stage: KIVI) -> None:
        self.stage, self.frozen = stage, {}

    def decide(self, o: Rounding) -> None:
        stage = self.stage
        for layer, (keys, values) in o.raw.items():
            start = o.length - keys.shape[1]
            for head in range(keys.shape[0]):
                own = self.frozen.setdefault((layer, head), {})
                plain = [t for t in o.alive(layer, head) if t not in own]
                many = len(plain) // stage.residual * stage.residual
                at = [t - start for t in plain[:many]]
                bits = stage.key_bits or stage.bits, stage.value_bits or stage.bits
                stored = slow(keys[head, at], values[head, at], *bits, stage.group_size)
                own.update(zip(plain[:many], zip(*stored, strict=True), strict=True))


class Rounding(Oracle):
    """The unpatched model that attends to what `bits` has stored."""

    def __init__(self, family: str, methods: list, bits: Bits) -> None:
        super().__init__(family, [*methods, bits])
        self.bits, self.raw = bits, {}

    def attend(self, module, query, key, value, mask, scaling):
        layer, new = module.layer_idx, query.shape[2]
        self.raw[layer] = key[0], value[0]
        length = self.length + (new if layer == 0 else 0)
        start, key, value = length - key.shape[2], key.clone(), value.clone()
        for head in range(key.shape[1]):
            for t, (k, v) in self.bits.frozen.get((layer, head), {}).items():
                if t >= start:
                    key[0, head, t - start], value[0, head, t - start] = k, v
        return super().attend(module, query, key, value, mask, scaling)


PLANS = [
    "kivi:bits=2:group_size=4:residual=4",
    "kivi:bits=4:group_size=6:residual=12",
    "kivi:bits=8:group_size=3:residual=6",
    "kivi:key_bits=2:value_bits=16:group_size=4:residual=4",
    "snapkv:budget=0.6:window=4+kivi:bits=4:group_size=4:residual=8",
    "snapkv:budget=20:window=4:hold=true+kivi:bits=2:group_size=4:residual=4",
    "adakv:budget=0.6:window=4:floor=0.2+kivi:bits=4:group_size=4:residual=4",
]

ZIPPED = [
    "zipvl:tau=0.8:recent=3:spread=4:every=5:group_size=4",
    "zipvl:tau=0.6:recent=2:spread=6:every=4:group_size=3:high=8:low=4",
    "zipvl:tau=0.8:recent=3:spread=4:every=5:high=16:low=2:group_size=6",
    "zipvl:tau=0.8:recent=3:spread=4:every=5:evict=true",
]


@pytest.mark.parametrize(
    "spec, family, kind, attn",
    few(PLANS, FAMILIES, ["alone", "padded"], ["sdpa", "eager"]),
)
def test_stored_in_few_bits_is_attended_to_so(spec, family, kind, attn):
    check_rounding(spec, family, kind, attn)


@torch.no_grad()
def check_rounding(spec, family, kind, attn):
    """Every sample of a batch, alone in a model whose attention rounds in loops.

    A wrong group, offset, residual, axis or neighbour in the batch shows, and a second rounding.
    """
    batch = families.samples(family, kind)
    inputs, model = families.collate(family, batch), families.model(family, attn)
    *evicting, stage = Plan.from_spec(spec).stages
    with mllm.patch(model, spec) as patched:
        out = generate(model, inputs, STEPS)
    many = 0
    for b, sample in enumerate(batch):
        oracle = Rounding(family, [Plain(s) for s in evicting], Bits(stage))
        oracle.visual = sample.visual.tolist()
        many += check_sample(b, sample, family, oracle, out, patched)
    assert many > 60


def check_sample(b, sample, family, oracle, out, patched):
    """What is stored of one sample, and what the model says; returns how many keys have few bits.

    Models that differ in their last digit may round a number to different sides, rarely. That moves
    a little what is computed behind the prompt.
    """
    want = oracle.generate(**families.collate(family, [sample]), max_new_tokens=STEPS)
    padding, many = out.sequences.shape[1] - want.sequences.shape[1], 0
    apart = {False: [], True: []}  # behind the prompt or not
    for i, layer in enumerate(out.past_key_values.layers):
        view = patched.kv(out.past_key_values).view(i)
        for head in range(layer.heads):
            alive, there = oracle.alive(i, head), view.valid[b, head]
            mine = [t - padding for t in stored(view, b, head)]
            assert sorted(t for t in mine if t >= oracle.first(i)) == alive
            own = oracle.bits.frozen[i, head]
            rows = zip(mine, view.keys[b, head, there], view.values[b, head, there], strict=True)
            for t, *kv in rows:
                if t in own and t in alive:
                    apart[t >= len(sample.ids)] += [
                        (x - y).abs() for x, y in zip(kv, own[t], strict=True)
                    ]
                    many += 1
    flipped = sum(int((x > 1e-4).sum()) for x in apart[False])
    flipped += sum(int((x > (1e-2 if flipped else 1e-4)).sum()) for x in apart[True])
    assert flipped <= 3
    logits = torch.stack(want.logits, 1)[0]
    near = (1e-2 if flipped else 2e-5) * max(1.0, float(logits.std()))
    equal(torch.stack(out.logits, 1)[b], logits, f"sample {b}, {flipped} flipped", near)
    assert torch.equal(out.sequences[b, -STEPS:], want.sequences[0, -STEPS:])
    return many


def residual_rounded(mp):
    around(mp, KVCache, "_which", lambda f, self, layer, *a: layer.table.valid)


def residual_old(mp):
    """The newest tokens are quantised, and the oldest stay."""
    around(mp, KVCache, "_which", lambda f, *a: f(*a).flip(-1))


def rounded_again(mp):
    def change(f, self, event):
        for layer in event.cache.cache.layers:
            layer.segments = [Dense.of(layer.keys.clone(), layer.values.clone())]
        return f(self, event)

    around(mp, KIVI, "decode_step", change)


def columns_mixed_up(mp):
    around(mp, Quantised, "take", lambda f, self, index, kept: f(self, index.flip(-1), kept))


@pytest.mark.parametrize(
    "mutate",
    [key_and_value_swapped, groups_shifted, residual_rounded, residual_old, rounded_again,
     columns_mixed_up, padding_counted],
)  # fmt: skip
def test_a_broken_method_is_caught(monkeypatch, mutate):
    """Groups move where tokens leave, so a second rounding shows there."""
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_rounding(PLANS[5], "llava", "padded", "sdpa")


@torch.no_grad()
def test_sixteen_bits_store_plainly():
    model = families.model("llava")
    inputs = families.collate("llava", families.samples("llava"))
    with mllm.patch(model, "kivi:bits=16") as patched:
        out = generate(model, inputs)
        assert not any(
            isinstance(s, Quantised) for x in out.past_key_values.layers for s in x.segments
        )
        data = patched.ledger.as_dict()
    assert data["kv_bytes"] == data["baseline_kv_bytes"]


@pytest.mark.parametrize("bits, share", [(8, 4), (4, 8), (2, 16)])
@torch.no_grad()
def test_the_ledger_has_real_bytes(bits, share):
    """Codes and the plain rest of a prompt; bounds apart; storages, each counted once."""
    (sample,) = families.samples("llava", (((0,), 87),))
    model = families.model("llava")
    with mllm.patch(model, f"kivi:bits={bits}:group_size=4:residual=16") as patched:
        cache = model(**families.collate("llava", [sample]), use_cache=True).past_key_values
        data, kv = patched.ledger.as_dict(), patched.kv(cache)
    tokens, slot = len(sample.ids), 4 * 2 * 2 * 12 * 4  # layers, heads, key and value, fp32
    rest = tokens % 16
    assert rest and data["baseline_kv_bytes"] == tokens * slot
    assert data["kv_bytes"] == (tokens - rest) * slot // share + rest * slot
    tensors = {t.data_ptr(): t.untyped_storage().nbytes()
               for x in cache.layers for s in x.segments for t in s.tensors()}  # fmt: skip
    assert kv.nbytes == cache_bytes(cache) and kv.nbytes[0] == sum(tensors.values())
    groups = (tokens - rest) // 4
    bounds = 4 * 2 * (groups * 12 + (tokens - rest) * 3) * 2 * 4 + 4 * 2 * groups * 4
    columns = sum(t.nbytes for t in cache.layers[0].table.columns.values())
    assert data["kv_meta_bytes"] == bounds + columns, "layers share what their slots stand for"


@torch.no_grad()
def test_evicting_from_what_is_stored_changes_nothing_else():
    """Heads apart, in two goes; a crop and a rollback besides."""
    model = families.model("llava")
    inputs = families.collate("llava", families.samples("llava", "padded"))
    with mllm.patch(model, "kivi:bits=2:group_size=4:residual=4") as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        kv = patched.kv(cache)
        before = named(kv)
        start = kv.snapshot()
        g = torch.Generator().manual_seed(0)
        for _ in range(2):
            kv.evict([1, 2], drop=torch.rand(3, 2, kv.length, generator=g) < 0.4)
            kv.evict(3, drop=torch.rand(3, kv.length, generator=g) < 0.4)
        after = named(kv)
        assert len(after) < 0.8 * len(before)
        assert all(same(after[x], before[x]) for x in after)
        assert all(isinstance(x.segments[0], Quantised) for x in cache.layers)
        kv.crop(kv.length - 9)
        short = named(kv)
        assert short and all(same(short[x], before[x]) for x in short)
        assert max(x[-1] for x in short) == kv.length - 1
        kv.rollback(start)
        again = named(kv)
    assert again.keys() == before.keys() and all(same(again[x], before[x]) for x in again)


def same(a, b):
    return all(map(torch.equal, a, b))


def named(kv):
    """Key and value by layer, sample, head and token."""
    found = {}
    for i in range(kv.depth):
        view = kv.view(i)
        for b, h, s in view.valid.nonzero().tolist():
            name = i, b, h, int(view.logical[b, h, s])
            assert name not in found
            found[name] = view.keys[b, h, s], view.values[b, h, s]
    return found


@pytest.mark.parametrize(
    "plan",
    [
        "visionzip:keep=6+kivi:bits=4:group_size=4:residual=4",
        "fastv:layer=2:keep=0.5+kivi:bits=4:group_size=4:residual=8",
        "prefixkv:budget=0.6+kivi:bits=4:group_size=4:residual=4",
        "h2o:budget=0.5+kivi:bits=4:group_size=4:residual=4",
        "lookm:budget=0.5+kivi:bits=8:group_size=4:residual=4",
        "streamingllm:budget=12+kivi:bits=2:group_size=4:residual=4",
    ],
)
@torch.no_grad()
def test_methods_stack(plan):
    check_alone("llava", plan, STEPS)


@pytest.mark.parametrize("spec", [PLANS[1], PLANS[4]])
@torch.no_grad()
def test_a_prompt_in_chunks_is_stored_in_few_bits_as_it_comes(spec):
    """Alone as in a batch, and in the same groups."""
    check_alone("llava", spec, STEPS, prefill_chunk_size=9)


WAYS = [PLANS[0], PLANS[4], PLANS[6], ZIPPED[0], ZIPPED[3]]


@pytest.mark.parametrize("spec", WAYS)
@torch.no_grad()
def test_beams_of_a_batch_are_beams_alone(spec):
    batch, model = families.samples("llava", "padded"), families.model("llava")
    options = dict(max_new_tokens=12, do_sample=False, num_beams=3)
    with mllm.patch(model, spec):
        out = model.generate(**families.collate("llava", batch), **options)
        for b, sample in enumerate(batch):
            alone = model.generate(**families.collate("llava", [sample]), **options)
            assert torch.equal(alone[0, -12:], out[b, -12:])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
@pytest.mark.parametrize("spec", WAYS)
@torch.no_grad()
def test_a_second_turn_in_a_batch_is_one_alone(spec, family):
    """Several rows at once see what is stored and no later one; the batch is another."""
    batch, model = families.samples(family, "padded"), families.model(family)
    question = torch.tensor([11, 23, 31, 42])

    def second(first, mask, rows):
        ids = torch.cat([first.sequences, question.expand(len(first.sequences), -1)], 1)[rows]
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)[rows]
        return generate(
            model, dict(input_ids=ids, attention_mask=mask), 6,
            past_key_values=first.past_key_values,
        )  # fmt: skip

    with mllm.patch(model, spec) as patched:
        inputs = families.collate(family, batch)
        first = generate(model, inputs, 5)
        order = [2, 0] if family == "llava" else [0, 1, 2]
        if family == "llava":
            patched.kv(first.past_key_values).select(torch.tensor(order))
        together = second(first, inputs["attention_mask"], order)
        for b, i in enumerate(order):
            inputs = families.collate(family, [batch[i]])
            first = generate(model, inputs, 5)
            alone = second(first, inputs["attention_mask"], [0])
            assert torch.equal(together.sequences[b, -6:], alone.sequences[0, -6:])
            equal(torch.stack(together.logits, 1)[b], torch.stack(alone.logits, 1)[0], spec, 1e-5)


@pytest.mark.parametrize("spec", WAYS)
@torch.no_grad()
def test_a_saved_prefix_has_the_same_bits(spec, tmp_path):
    """Codes, bounds and places are in the file; nothing is rounded on the way."""
    inputs = families.collate("llava", families.samples("llava", "padded"))
    tail = torch.tensor([[11, 23, 31]]).expand(3, -1)
    more = dict(
        input_ids=torch.cat([inputs["input_ids"], tail], 1),
        attention_mask=torch.cat([inputs["attention_mask"], torch.ones_like(tail)], 1),
    )
    model = families.model("llava")
    with mllm.patch(model, spec) as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        save_prefix(cache, tmp_path)
        loaded = load_prefix(tmp_path, patched)
        for a, b in zip(cache.layers, loaded.layers, strict=True):
            assert [type(s) for s in a.segments] == [type(s) for s in b.segments]
            for x, y in zip(a.segments, b.segments, strict=True):
                if isinstance(x, Quantised):
                    pairs = zip((*x.tensors(), *x.meta()), (*y.tensors(), *y.meta()), strict=True)
                    assert all(torch.equal(*pair) for pair in pairs)
        assert patched.kv(loaded).nbytes[0] == patched.kv(cache).nbytes[0]
        answers = [
            generate(model, more, 8, past_key_values=c) for c in (copy.deepcopy(cache), loaded)
        ]
    assert torch.equal(answers[0].sequences, answers[1].sequences)
    assert all(map(torch.equal, answers[0].logits, answers[1].logits))


@torch.no_grad()
def test_assisted_decoding_looks_at_no_candidate():
    """What is quantised is certain; blocks are whole, whenever they are made."""
    (sample,) = families.samples("llava", "alone")
    ids = torch.cat([sample.ids, sample.ids[-3:], sample.ids[-3:], sample.ids[-3:-1]])
    inputs = families.collate("llava", [families.Sample(ids, sample.pictures)])
    model = families.model("llava")
    with mllm.patch(model, "kivi:bits=8:group_size=4:residual=4") as patched:
        out = generate(model, inputs, 20, prompt_lookup_num_tokens=4)
        segments = out.past_key_values.layers[0].segments
        assert isinstance(segments[0], Quantised) and segments[0].slots % 4 == 0
        assert segments[0].slots > len(ids), "answers too"
        logical = patched.kv(out.past_key_values).view(0).logical[0, 0]
        assert torch.equal(logical, torch.arange(len(logical)))


# ZipVL


class Mixed(Bits):
    """ZipVL's storage for a :class:`Zip`: what is important in `high` bits, the rest in `low`."""

    def decide(self, o: Zip) -> None:
        stage = self.stage
        first = not self.frozen
        block = range(o.length - stage.every, o.length)
        o.due = getattr(o, "due", o.length + stage.every) if not first else o.length + stage.every
        if not first and o.length < o.due:
            return
        if not first:
            o.due += stage.every
        for layer, (keys, values) in o.raw.items():
            start = o.length - keys.shape[1]
            if first:
                there = o.important[layer]
            else:
                row = o.rows[layer].mean(0)[-1]
                shift = o.length - len(row)
                mass = {t: float(row[t - shift]) for t in block if t in o.alive(layer, 0)}
                there, total = set(), 0.0
                for t in sorted(mass, key=lambda t: -mass[t]):
                    if total >= stage.tau * sum(mass.values()):
                        break
                    total += mass[t]
                    there.add(t)
            for head in range(keys.shape[0]):
                own = self.frozen.setdefault((layer, head), {})
                plain = [t for t in o.alive(layer, head) if t not in own]
                if stage.evict:
                    gone = plain if first else [t for t in plain if t in block]
                    o.drop(layer, head, [t for t in gone if t not in there])
                    self.frozen[layer, head] = {}
                    continue
                for bits, part in (
                    (stage.low, [t for t in plain if t not in there]),
                    (stage.high, [t for t in plain if t in there]),
                ):
                    at = [t - start for t in part]
                    stored = slow(keys[head, at], values[head, at], bits, bits, stage.group_size)
                    own.update(zip(part, zip(*stored, strict=True), strict=True))


class Zip(Rounding):
    """The unpatched model whose prompt attends among important tokens alone."""

    def __init__(self, family: str, sample: families.Sample, stages: list) -> None:
        super().__init__(family, [], Mixed(stages[1]))
        self.prefill, self.sample, self.important = stages[0], sample, {}
        self.visual = sample.visual.tolist()

    def attend(self, module, query, key, value, mask, scaling):
        layer, n = module.layer_idx, len(self.sample.ids)
        if layer in self.important or self.length > n:
            return super().attend(module, query, key, value, mask, scaling)
        _, weights = super().attend(module, query, key, value, mask, scaling)
        there = set(range(n))
        if self.sample.pictures and self.prefill.tau < 1:
            asked = probes(n, self.prefill.recent, self.prefill.spread)
            there = important(weights[0], asked, self.prefill.tau)
        self.important[layer] = there
        out = torch.tensor([t not in there for t in range(n)])
        least = torch.finfo(query.dtype).min
        if mask is None:
            mask = torch.full((n, n), least).triu(1)[None, None]
        only = torch.zeros_like(mask[..., :n]).masked_fill(out, least)
        self.length -= n if layer == 0 else 0
        x, weights = super().attend(module, query, key, value, mask[..., :n] + only, scaling)
        return x.masked_fill(out[None, :, None, None], 0), weights


@pytest.mark.parametrize(
    "spec, family, kind, attn",
    few(ZIPPED, FAMILIES, ["alone", "padded"], ["sdpa", "eager"]),
)
def test_zipvl_stores_what_matters_in_more_bits(spec, family, kind, attn):
    check_zipvl(spec, family, kind, attn)


@torch.no_grad()
def check_zipvl(spec, family, kind, attn):
    batch = families.samples(family, kind)
    inputs, model = families.collate(family, batch), families.model(family, attn)
    stages = Plan.from_spec(spec).stages
    with mllm.patch(model, spec) as patched:
        out = generate(model, inputs, STEPS)
    few_bits = 0
    for b, sample in enumerate(batch):
        oracle = Zip(family, sample, stages)
        check_sample(b, sample, family, oracle, out, patched)
        few_bits += sum(len(sample.ids) - len(there) for there in oracle.important.values())
    assert few_bits > 8


def all_important(mp):
    around(mp, zipvl, "_needed", lambda f, mass, tau: f(mass, 1.0))


def bits_swapped(mp):
    around(
        mp, ZipVLCache, "_put",
        lambda f, self, event, layer, tokens, bits: f(self, event, layer, tokens, 12 - bits),
    )  # fmt: skip


def aside_forgotten(mp):
    mp.setattr(Changes, "set_aside", lambda self, layer: None)


def aside_crossed(mp):
    around(
        mp, SlotLayer, "set_aside",
        lambda f, self, new, keys, values, hidden: f(self, new, keys.flip(2), values, hidden),
    )  # fmt: skip


def answer_left(mp):
    mp.setattr(ZipVLCache, "decode_step", lambda self, event: None)


@pytest.mark.parametrize(
    "mutate", [all_important, bits_swapped, aside_forgotten, aside_crossed, answer_left]
)
def test_a_broken_zipvl_is_caught(monkeypatch, mutate):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_zipvl(ZIPPED[1], "llava", "padded", "sdpa")


@torch.no_grad()
def test_mixed_bits_weigh_what_they_say():
    """Of a layer's tokens those that attended have 4 bits, the rest 2: no token is missing."""
    (sample,) = families.samples("llava", (((0, 1), 60),))
    model = families.model("llava")
    with mllm.patch(model, "zipvl:tau=0.8:recent=3:spread=4:group_size=4") as patched:
        cache = model(**families.collate("llava", [sample]), use_cache=True).past_key_values
        data, kv = patched.ledger.as_dict(), patched.kv(cache)
    want = 0
    for i in range(kv.depth):
        view = kv.view(i)
        assert sorted(stored(view, 0, 0)) == list(range(len(sample.ids)))
        aside = int(view.columns["aside"][0, 0].sum())
        assert 0 < aside < len(sample.ids)
        want += 2 * 2 * (3 * aside + 6 * (len(sample.ids) - aside))  # bytes of 12 channels
    assert data["kv_bytes"] == want


@torch.no_grad()
def test_zipvl_under_assisted_decoding():
    """Candidates come with the prompt: they attend, and stay behind what was set aside."""
    (sample,) = families.samples("llava", "alone")
    ids = torch.cat([sample.ids, sample.ids[-3:], sample.ids[-3:], sample.ids[-3:-1]])
    inputs = families.collate("llava", [families.Sample(ids, sample.pictures)])
    model = families.model("llava")
    with mllm.patch(model, "zipvl:tau=0.8:recent=3:spread=4:high=16:low=16:every=90"):
        greedy = generate(model, inputs, 20)
        assisted = generate(model, inputs, 20, prompt_lookup_num_tokens=4)
    assert torch.equal(greedy.sequences, assisted.sequences)


@torch.no_grad()
def test_steps_read_a_row_when_it_is_needed(monkeypatch):
    seen = []
    around(monkeypatch, attention, "row_attention", lambda f, query, *a, **k: (
        seen.append(query.shape[2]), f(query, *a, **k)
    )[1])  # fmt: skip
    model = families.model("llava")
    with mllm.patch(model, "zipvl:tau=0.8:every=5"):
        generate(model, families.collate("llava", families.samples("llava", "alone")), 12)
    assert seen.count(1) == 2 * families.LAYERS, "11 steps are two blocks of five"


# What is refused


@pytest.mark.parametrize(
    "spec, argument",
    [
        ("kivi:bits=3", "bits"),
        ("kivi:bits=1", "bits"),
        ("kivi:bits=2.5", "bits"),
        ("kivi:key_bits=5", "key_bits"),
        ("kivi:value_bits=0", "value_bits"),
        ("kivi:group_size=0", "group_size"),
        ("kivi:residual=48", "residual"),
        ("kivi:residual=0", "residual"),
        ("zipvl_cache:high=5", "high"),
        ("zipvl_cache:low=1", "low"),
        ("zipvl_cache:tau=0.0", "tau"),
        ("zipvl_cache:every=0", "every"),
        ("zipvl:low=3", "low"),
        ("zipvl:tau=1.5", "tau"),
    ],
)
def test_bad_values(spec, argument):
    with pytest.raises(PlanError) as caught:
        Plan.from_spec(spec)
    assert caught.value.argument == argument and caught.value.expected
    assert str(caught.value.given) in str(caught.value)


def test_groups_that_do_not_divide():
    with pytest.raises(PlanError) as caught:
        mllm.patch(families.model("llava"), "kivi:group_size=5:residual=5")
    assert (caught.value.argument, caught.value.given) == ("group_size", 5)
    assert "12" in str(caught.value) and "12" in caught.value.expected
    mllm.patch(families.model("llava"), "kivi").remove()  # one group of 12


@pytest.mark.parametrize(
    "spec, expected",
    [
        ("kivi:bits=4+snapkv:budget=0.5:window=4", "snapkv:budget=0.5:window=4+kivi:bits=4"),
        ("visionzip:keep=6+kivi+h2o", "visionzip:keep=6+h2o+kivi"),
    ],
)
def test_what_chooses_comes_first(spec, expected):
    with pytest.raises(PlanError) as caught:
        mllm.patch(families.model("llava"), spec)
    assert caught.value.argument == "plan" and caught.value.expected == expected
    mllm.patch(families.model("llava"), expected).remove()


def test_one_form_at_a_time():
    with pytest.raises(PlanError) as caught:
        mllm.patch(families.model("llava"), "kivi+kivi:bits=4")
    assert caught.value.argument == "plan"


@torch.no_grad()
def test_an_unpatched_model_does_not_go_on():
    model = families.model("llava")
    inputs = families.collate("llava", families.samples("llava", "padded"))
    with mllm.patch(model, PLANS[0]):
        cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(mllm.errors.CacheMismatchError):
        model(input_ids=torch.tensor([[5]] * 3), past_key_values=cache)


def test_flash_attention_may_quantise():
    model = families.model("llava")
    with _as_if(resolve(model), "flash_attention_2"):
        mllm.patch(model, "kivi").remove()


def test_defaults_are_the_paper_s():
    stage = KIVI()
    assert (stage.bits, stage.group_size, stage.residual) == (2, 32, 32)
    assert math.isclose(SnapKV().budget, 2048) and KIVI.identity == {"bits": 16}
