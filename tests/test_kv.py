"""KV methods: what they keep, what the model then says, and what they refuse."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import cache_oracles
import families
import pytest
import torch
from acting import acting
from cache_oracles import Oracle
from kv_oracles import Plain, loops
from matrix import equal

import mllm
from mllm import attention
from mllm.cache import load_prefix, save_prefix
from mllm.compressors import (
    D2O,
    PLPHP,
    AdaKV,
    LookM,
    PrefixKV,
    PyramidKV,
    SkipVision,
    SnapKV,
    VLCache,
    kv_base,
)
from mllm.compressors.base import CacheCompressor, Protect
from mllm.compressors.kv_base import KVMethod
from mllm.errors import PlanError
from mllm.examine import _as_if
from mllm.models import resolve
from mllm.plan import MethodInfo, Plan

FAMILIES = ["llava", "qwen2_5_vl", "gemma3", "llava_next", "qwen3_vl", "internvl"]
STEPS = 8
#: Every method, with budgets that bite on prompts of 6 to 60 tokens.
PLANS = [
    "streamingllm:budget=10:sinks=2",
    "streamingllm:budget=0.4:sinks=0:tokens=visual",
    "h2o:budget=0.4",
    "h2o:budget=12:window=3:sinks=1:visible=true:heads=shared",
    "snapkv:budget=12:window=4",
    "snapkv:budget=0.4:window=4:pool=avg:kernel=5:gqa=max:hold=true",
    "snapkv:budget=0.5:window=4:tokens=visual",
    "pyramidkv:budget=0.4:window=3:beta=4",
    "adakv:budget=0.4:window=4:floor=0.2",
    "adakv:budget=12:window=3:hold=true",
    "prefixkv:budget=0.4:distance=-3",
    "prefixkv:budget=0.3:heads=each:distance=2",
    "prefixkv:budget=0.475:ratios=0.9/0.3/0.2/0.5:distance=-3",
    "vlcache:budget=0.4",
    "plphp:skip=1:attentive=0.8:indifferent=0.5",
    "lookm:budget=0.4:merge=none",
    "d2o:budget=0.4:merge=false:skip=1:sinks=1",
    "d2o:budget=12:merge=false:skip=0:skip_last=0:heads=shared:window=3",
    "skipvision:budget=0.3",
    "skipvision:budget=5:rule=top",
]


def few(plans, *axes):
    """All combinations; one of each plan is fast, another one for every plan."""
    rows, fast = [], {}
    rest = list(itertools.product(*axes))
    for n, plan in enumerate(plans):
        fast[plan] = rest[(5 * n) % len(rest)]
        rows += [(plan, *more) for more in rest]
    return [
        pytest.param(
            *row, id="-".join(map(str, row)),
            marks=[] if fast[row[0]] == row[1:] else [pytest.mark.slow],
        )
        for row in rows
    ]  # fmt: skip


def generate(model, inputs, steps=STEPS, **options):
    return model.generate(
        **inputs, max_new_tokens=steps, do_sample=False, return_dict_in_generate=True,
        output_logits=True, **options,
    )  # fmt: skip


@contextlib.contextmanager
def running(oracle: Oracle):
    """While open, the oracle's attention is its own; `generate` does so by itself."""
    cache_oracles._RUNNING.append(oracle)
    try:
        yield
    finally:
        cache_oracles._RUNNING.pop()


def stored(view, b: int, head: int) -> list[int]:
    return view.logical[b, head][view.valid[b, head]].tolist()


@pytest.mark.parametrize(
    "spec, family, kind, attn",
    few(PLANS, FAMILIES, ["alone", "padded"], ["sdpa", "eager"]),
)
def test_evicting_is_masking(spec, family, kind, attn):
    check_masking(spec, family, kind, attn)


@torch.no_grad()
def check_masking(spec, family, kind, attn):
    """Every sample of a batch, alone in a model that keeps all and masks what a loop lets go.

    A wrong choice, offset, position, mask or neighbour in the batch shows.
    """
    batch = families.samples(family, kind)
    inputs, model = families.collate(family, batch), families.model(family, attn)
    stage = Plan.from_spec(spec).stages[0]
    with mllm.patch(model, spec) as patched:
        out = generate(model, inputs)
    prompt = inputs["input_ids"].shape[1]
    for b, sample in enumerate(batch):
        oracle = Oracle(family, [loops(stage)])
        oracle.visual = sample.visual.tolist()
        want = oracle.generate(**families.collate(family, [sample]), max_new_tokens=STEPS)
        for i, layer in enumerate(out.past_key_values.layers):
            view = patched.kv(out.past_key_values).view(i)
            padding = prompt - len(sample.ids)
            for head in range(layer.heads):
                mine = [t - padding for t in stored(view, b, head)]
                mine = sorted(t for t in mine if t >= oracle.first(i))
                assert mine == oracle.alive(i, head), f"sample {b}, layer {i}, head {head}"
        logits = torch.stack(want.logits, 1)[0]
        near = 1e-5 * max(1.0, float(logits.std()))
        equal(torch.stack(out.logits, 1)[b], logits, f"sample {b}", near)
        assert torch.equal(out.sequences[b, prompt:], want.sequences[0, len(sample.ids) :])
    assert out.past_key_values.get_seq_length() == prompt + STEPS - 1


def worst_first(mp):
    around(mp, kv_base, "best", lambda f, score, *a: f(-score, *a))


def nothing_guarded(mp):
    around(mp, KVMethod, "_guarded", lambda f, *a: f(*a) & False)


def padding_counted(mp):
    around(mp, KVMethod, "_many", lambda f, self, event, i: f(self, event, i) * 0 + 60)


def not_pooled(mp):
    mp.setattr(SnapKV, "score", KVMethod.score)


def heads_alike(mp):
    mp.setattr(AdaKV, "allocate", KVMethod.allocate)


def layers_alike(mp):
    for method in (PyramidKV, PrefixKV, VLCache, PLPHP, D2O):
        mp.setattr(method, "allocate", KVMethod.allocate)


def heads_crossed(mp):
    around(mp, KVMethod, "_per_head", lambda f, *a: f(*a).flip(1))


def all_stay(mp):
    mp.setattr(SkipVision, "_stay", lambda self, event: event.visual)


def steps_forgotten(mp):
    around(mp, KVMethod, "step", lambda f, *a: f(*a) * 0)


def around(mp, owner, name, change):
    original = getattr(owner, name)
    mp.setattr(owner, name, lambda *a, **k: change(original, *a, **k))


@pytest.mark.parametrize(
    "mutate, spec",
    [
        (worst_first, "snapkv:budget=12:window=4"),
        (nothing_guarded, "h2o:budget=0.4"),
        (padding_counted, "h2o:budget=0.4"),
        (not_pooled, "snapkv:budget=12:window=4"),
        (heads_alike, "adakv:budget=0.4:window=4:floor=0.2"),
        (layers_alike, "pyramidkv:budget=0.4:window=3:beta=4"),
        (layers_alike, "prefixkv:budget=0.4:distance=-3"),
        (layers_alike, "plphp:skip=1:attentive=0.8:indifferent=0.5"),
        (layers_alike, "d2o:budget=0.4:merge=false:skip=0:skip_last=0"),
        (all_stay, "skipvision:budget=0.3"),
        (heads_crossed, "h2o:budget=0.4"),
        (steps_forgotten, "snapkv:budget=0.4:window=4:pool=avg:kernel=5:gqa=max:hold=true"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_broken_method_is_caught(monkeypatch, mutate, spec):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check_masking(spec, "llava", LONG if spec.startswith("d2o") else "padded", "sdpa")


#: Layers of a random model are much alike; shares of a longer prompt still differ.
LONG = (((0,), 180),)


def test_d2o_shares_out_a_long_prompt():
    check_masking("d2o:budget=0.4:merge=false:skip=0:skip_last=0", "llava", LONG, "sdpa")


# Nothing leaves


IDENTITY = {
    "randomkv": ["randomkv:budget=1.0"],
    "streamingllm": ["streamingllm:budget=1.0", "streamingllm:budget=900"],
    "h2o": ["h2o:budget=1.0", "h2o:budget=900"],
    "snapkv": ["snapkv:budget=1.0", "snapkv", "snapkv:budget=1.0:heads=shared:hold=true"],
    "pyramidkv": ["pyramidkv:budget=1.0"],
    "adakv": ["adakv:budget=1.0"],
    "prefixkv": ["prefixkv:budget=1.0", "prefixkv:ratios=1.0/1.0/1.0/1.0"],
    "vlcache": ["vlcache:budget=1.0"],
    "plphp": ["plphp:budget=1.0"],
    "lookm": ["lookm:budget=1.0", "lookm:budget=900:merge=mean"],
    "d2o": ["d2o:budget=1.0", "d2o:budget=900:skip=0"],
    "outputaware": ["outputaware"],
    "skipvision": ["skipvision:budget=1.0", "skipvision:budget=900:rule=top"],
    "kivi": ["kivi:bits=16", "snapkv:budget=1.0+kivi:bits=16:group_size=4:residual=4"],
    "zipvl_cache": ["zipvl_cache:high=16:low=16", "zipvl_cache:tau=1.0:evict=true"],
    "xkv": ["xkv:rank_keys=1.0:rank_values=1.0", "xkv", "xkv:group=3:rank_keys=0.999"],
    "shadowkv": ["shadowkv:budget=1.0:rank_keys=1.0", "shadowkv",
                 "shadowkv:budget=1.0:rank_keys=1.0:chunk=2:local=1:outliers=1",
                 "shadowkv:budget=900:rank_keys=900:chunk=2:local=0:outliers=0"],
}
#: Methods that store tokens in another form, and where they are tested.
ELSEWHERE = {
    "kivi": "test_kv_quant.py", "zipvl_cache": "test_kv_quant.py",
    "xkv": "test_kv_lowrank.py", "shadowkv": "test_kv_lowrank.py", "randomkv": "test_randomkv.py",
}  # fmt: skip


@pytest.mark.parametrize(
    "spec, kind, attn",
    few([s for specs in IDENTITY.values() for s in specs], ["alone", "padded", "text"],
        ["sdpa", "eager"]),
)  # fmt: skip
@torch.no_grad()
def test_keeping_everything_changes_no_bit(spec, kind, attn):
    """The first is what the method declares; a budget above the prompt is another."""
    stage = Plan.from_spec(spec).stages[-1]
    declared = IDENTITY[stage.info.name][0] == spec
    assert not declared or all(getattr(stage, k) == v for k, v in stage.identity.items())
    model = families.model("llava", attn)
    inputs = families.collate("llava", families.samples("llava", kind))
    plain, answer = model(**inputs).logits, generate(model, inputs)
    with mllm.patch(model, spec) as patched:
        mine, said = model(**inputs).logits, generate(model, inputs)
        reads = any(stage.reads() for stage in patched.plan.stages)
        assert (max(patched.ledger.as_dict()["selection_flops"], default=0) > 0) == reads
    assert torch.equal(mine, plain) and torch.equal(said.sequences, answer.sequences)
    assert all(torch.equal(a, b) for a, b in zip(said.logits, answer.logits, strict=True))


# Budgets


@dataclass
class Watch(CacheCompressor):
    """Writes down what is stored at the end of every forward: `[layers, batch, heads]`."""

    seen: list = field(default_factory=list, compare=False)
    info: ClassVar = MethodInfo(name="watch", stage="cache")

    def prefill_end(self, event):
        views = [event.cache.view(i) for i in range(event.cache.depth)]
        self.seen.append(torch.stack([v.valid.sum(-1) for v in views]))

    decode_step = prefill_end


@pytest.mark.parametrize("family", ["llava", "gemma3"])
@pytest.mark.parametrize(
    "spec",
    [
        "streamingllm:budget=10",
        "h2o:budget=0.4",
        "h2o:budget=40",
        "snapkv:budget=12:window=4:hold=true",
        "adakv:budget=12:window=4:floor=0.1:hold=true",
        "pyramidkv:budget=0.4:window=4:hold=true",
        "vlcache:budget=0.4:hold=true",
        "lookm:budget=0.4:hold=true",
        "d2o:budget=0.4:skip=0:skip_last=0",
    ],
)
@torch.no_grad()
def test_budgets_hold_in_long_answers(spec, family):
    """At every step all heads of all layers together hold the budget, no more, and no less."""
    batch = families.samples(family, "padded")
    inputs, model, watch = families.collate(family, batch), families.model(family), Watch()
    stage = Plan.from_spec(spec).stages[0]
    with mllm.patch(model, [stage, watch]):
        generate(model, inputs, steps=24)
    assert len(watch.seen) == 24
    for step, held in enumerate(watch.seen):
        for b, sample in enumerate(batch):
            tokens, budget = len(sample.ids), stage.budget
            limit = budget if isinstance(budget, int) else max(1, round(budget * tokens))
            mean = held[:, b].float().mean().item()
            # VL-Cache gives every layer at least 1 % of the prompt: one token of these.
            more = 1 if stage.info.name == "vlcache" else 0
            assert mean <= limit + more, f"step {step}, sample {b}"
            if family == "llava" and not more:
                assert mean == min(limit, tokens + step), f"step {step}, sample {b}"


@pytest.mark.parametrize("spec", PLANS)
@torch.no_grad()
def test_payload_is_the_budget(spec):
    """Bytes of keys and values are those of the tokens that stay, ragged heads included."""
    (sample,) = families.samples("llava", (((0,), 180),))
    model = families.model("llava")
    with mllm.patch(model, spec) as patched:
        cache = model(**families.collate("llava", [sample]), use_cache=True).past_key_values
        data, kv = patched.ledger.as_dict(), patched.kv(cache)
    cells = sum(int(kv.view(i).valid.sum()) for i in range(kv.depth))
    slot = 2 * 12 * 4  # key and value, fp32
    ragged = spec.startswith("adakv") or "prefixkv:budget=0.3:heads=each" in spec
    slack = 8 / 7 if ragged else 1.0  # unequal heads may leave 1/8 empty
    assert cells * slot <= data["kv_bytes"] <= slack * cells * slot
    assert data["baseline_kv_bytes"] == len(sample.ids) * kv.depth * 2 * slot
    stage, tokens = Plan.from_spec(spec).stages[0], len(sample.ids)
    if getattr(stage, "tokens", "visual") == "prompt":
        limit = stage.budget if isinstance(stage.budget, int) else round(stage.budget * tokens)
        whole = (getattr(stage, "skip", 0) + getattr(stage, "skip_last", 0)) / kv.depth
        limit = whole * tokens + (1 - whole) * limit
        assert abs(cells / (kv.depth * 2) - limit) <= 0.02 * limit


# Merging


@dataclass
class Before(CacheCompressor):
    """Keeps what every layer stores when it has run."""

    views: dict = field(default_factory=dict, compare=False)
    info: ClassVar = MethodInfo(name="before", stage="cache")

    def layer_end(self, event):
        self.views[event.layer] = event.cache.view(event.layer)


@pytest.mark.parametrize(
    "family, merge, heads",
    [
        ("llava", "pivot", "each"),
        ("qwen2_5_vl", "mean", "each"),
        ("gemma3", "weighted", "each"),
        ("llava", "pivot", "shared"),
        ("llava_next", "weighted", "shared"),
        ("llava_next", "mean", "each"),
    ],
)
@torch.no_grad()
def test_merging_against_loops(family, merge, heads):
    """Every stored key and value is the mean that the paper writes down; means lose nothing."""
    batch = families.samples(family, "padded")
    model, before = families.model(family), Before()
    stage = LookM(budget=0.4, merge=merge, heads=heads)
    with mllm.patch(model, [before, stage]) as patched:
        cache = model(**families.collate(family, batch), use_cache=True).past_key_values
        kv = patched.kv(cache)
    merged = 0
    for i, old in before.views.items():
        view = kv.view(i)
        for b, h in itertools.product(range(len(batch)), range(2)):
            there = old.valid[b, h]
            if (window := kv.window(i)) is not None:
                there = there & (old.logical[b, h] > kv.length - window)
            names = old.logical[b, h][there].tolist()
            keys, values = (dict(zip(names, x[b, h][there], strict=True))
                            for x in (old.keys, old.values))  # fmt: skip
            joint = {
                t: old.keys[b, :, s].flatten() if heads == "shared" else old.keys[b, h, s]
                for s, t in enumerate(old.logical[b, h].tolist())
            }
            kept = stored(view, b, h)
            gone = [t for t in names if t not in kept]
            cosine = {
                t: [float(torch.cosine_similarity(joint[t], joint[k], dim=0)) for k in kept]
                for t in gone
            }
            into = {t: kept[max(range(len(kept)), key=x.__getitem__)] for t, x in cosine.items()}
            like = {t: max(x) for t, x in cosine.items()}
            mean = sum(like.values()) / max(1, len(like))
            mine = view.valid[b, h]
            for got, x in ((view.keys, keys), (view.values, values)):
                for k, row in zip(kept, got[b, h][mine], strict=True):
                    parts, shares = [x[k]], [1.0]
                    for t in gone:
                        if into[t] != k or (merge == "weighted" and like[t] < mean):
                            continue
                        parts.append((x[t] + x[k]) / 2 if merge == "pivot" else x[t])
                        shares.append(like[t] if merge == "weighted" else 1.0)
                        merged += 1
                    total = sum(s * p for s, p in zip(shares, parts, strict=True))
                    equal(row, total / sum(shares), f"layer {i}, sample {b}, token {k}", 1e-5)
                if merge == "mean":
                    many = [1 + sum(into[t] == k for t in gone) for k in kept]
                    mass = (torch.tensor(many)[:, None] * got[b, h][mine]).sum(0)
                    equal(mass, sum(x.values()), f"layer {i}, sample {b}: mass", 1e-4)
    assert merged > 20


@dataclass
class Camera(CacheCompressor):
    """Keeps what all layers store at the end of every forward."""

    shots: list = field(default_factory=list, compare=False)
    info: ClassVar = MethodInfo(name="camera", stage="cache")

    def prefill_end(self, event):
        views = [event.cache.view(i) for i in range(event.cache.depth)]
        self.shots.append(
            [replace(v, keys=v.keys.clone(), values=v.values.clone()) for v in views]
        )

    decode_step = prefill_end


@pytest.mark.parametrize(
    "family, stage",
    [
        ("llava", D2O(budget=0.4, skip=1, sinks=1)),
        ("gemma3", D2O(budget=0.4, skip=0, skip_last=0, sinks=1, weights="cosine", decay=0.3)),
        ("qwen2_5_vl", D2O(budget=12, skip=0, sinks=2, decay=0.8)),
    ],
    ids=lambda x: getattr(x, "weights", x),
)
@torch.no_grad()
def test_d2o_merges_what_is_alike(family, stage):
    """The prompt and every step against loops: threshold, receiver, means; no weight is lost."""
    batch, before, after = families.samples(family, "padded"), Camera(), Camera()
    model, threshold, merged, dropped = families.model(family), {}, 0, 0
    with mllm.patch(model, [before, stage, after]) as patched:
        out = generate(model, families.collate(family, batch))
        kv = patched.kv(out.past_key_values)
    own = math.e if stage.weights == "exp" else 1.0
    prompt = len(before.shots[0][0].logical[0, 0])
    places = itertools.product(range(STEPS), range(kv.depth), range(len(batch)), range(2))
    for step, i, b, h in places:
        old, new = before.shots[step][i], after.shots[step][i]
        if i < stage.skip or i >= kv.depth - stage.skip_last:
            assert stored(old, b, h) == stored(new, b, h)
            continue
        there = old.valid[b, h]
        if (window := kv.window(i)) is not None:
            there = there & (old.logical[b, h] > prompt + step - window)
        names, kept = old.logical[b, h][there].tolist(), stored(new, b, h)
        keys, values = (dict(zip(names, x[b, h][there], strict=True))
                        for x in (old.keys, old.values))  # fmt: skip
        into, like = {}, {}
        for t in set(names) - set(kept):
            cosine = {k: float(torch.cosine_similarity(keys[t], keys[k], dim=0)) for k in kept}
            into[t] = max(cosine, key=cosine.__getitem__)
            like[t] = cosine[into[t]]
        if like:
            mean, place = sum(like.values()) / len(like), (i, b, h)
            threshold[place] = (
                stage.decay * threshold[place] + (1 - stage.decay) * mean
                if place in threshold
                else mean
            )
            into = {t: k for t, k in into.items() if like[t] >= threshold[place] - 1e-6}
            merged, dropped = merged + len(into), dropped + len(like) - len(into)
        weight = {t: math.exp(m) if stage.weights == "exp" else max(0.0, m)
                  for t, m in like.items()}  # fmt: skip
        for got, x in ((new.keys, keys), (new.values, values)):
            total, mine = 0.0, got[b, h][new.valid[b, h]]
            for k, row in zip(kept, mine, strict=True):
                parts = [(own, x[k]), *((weight[t], x[t]) for t in into if into[t] == k)]
                held = sum(w for w, _ in parts)
                equal(row, sum(w * v for w, v in parts) / held, f"{step}, {i}, {b}, {k}", 1e-5)
                total = total + held * row
            mass = sum(own * x[k] for k in kept) + sum(weight[t] * x[t] for t in into)
            equal(total, mass, f"step {step}, layer {i}, sample {b}: mass", 1e-4)
    assert merged > 20 and dropped > 20


MERGING = ["d2o:budget=0.4:skip=1", "d2o:budget=0.4:skip=0:weights=cosine:heads=shared",
           "lookm:budget=0.4", "lookm:budget=0.4:merge=weighted:hold=true"]  # fmt: skip


@pytest.mark.parametrize("spec, family", few(MERGING, FAMILIES))
@torch.no_grad()
def test_merging_in_a_batch_is_merging_alone(spec, family):
    check_alone(family, spec)


@torch.no_grad()
def check_alone(family, plan, steps=STEPS, **options):
    """Logits and answers of a padded batch are those of its samples alone."""
    batch, model = families.samples(family, "padded"), families.model(family)
    inputs = families.collate(family, batch)
    prompt = inputs["input_ids"].shape[1]
    with mllm.patch(model, plan):
        together = generate(model, inputs, steps, **options)
        for b, sample in enumerate(batch):
            alone = generate(model, families.collate(family, [sample]), steps, **options)
            want = torch.stack(alone.logits, 1)[0]
            near = 1e-5 * max(1.0, float(want.std()))
            equal(torch.stack(together.logits, 1)[b], want, f"sample {b}", near)
            assert torch.equal(
                together.sequences[b, prompt:], alone.sequences[0, len(sample.ids) :]
            )


# Ways of running

WAYS = ["h2o:budget=0.4", "adakv:budget=0.4:window=4:hold=true", "prefixkv:budget=0.4:distance=-3",
        "streamingllm:budget=9", "lookm:budget=0.4", "vlcache:budget=0.4",
        "d2o:budget=0.4:skip=0:skip_last=0"]  # fmt: skip


@pytest.mark.parametrize("spec, family", few(WAYS, ["llava", "qwen2_5_vl"]))
@torch.no_grad()
def test_several_new_tokens_see_what_is_stored_and_no_later_one(spec, family):
    """A question of four tokens at once, against the model that keeps all and masks."""
    (sample,) = families.samples(family, "alone")
    stage, question = Plan.from_spec(spec).stages[0], torch.tensor([[11, 23, 31, 42]])
    inputs, model = families.collate(family, [sample]), families.model(family)
    if stage.info.name in ("lookm", "d2o"):
        stage = stage.replace(merge="none" if stage.info.name == "lookm" else False)
    with mllm.patch(model, stage):
        cache = model(**inputs, use_cache=True).past_key_values
        mine = model(input_ids=question, past_key_values=cache).logits
    oracle = Oracle(family, [Plain(stage.replace(hold=False))])
    oracle.visual = sample.visual.tolist()
    with running(oracle):
        cache = oracle.model(**inputs, use_cache=True).past_key_values
        want = oracle.model(input_ids=question, past_key_values=cache).logits
    equal(mine, want, "four rows", 1e-5 * max(1.0, float(want.std())))
    assert sum(int(gone.sum()) for gone in oracle.gone.values()) > 20


@pytest.mark.parametrize("spec", WAYS)
@torch.no_grad()
def test_beams_of_a_batch_are_beams_alone(spec):
    batch, model = families.samples("llava", "padded"), families.model("llava")
    batch = [batch[0], batch[2]]
    options = dict(max_new_tokens=8, do_sample=False, num_beams=3)
    with mllm.patch(model, spec):
        out = model.generate(**families.collate("llava", batch), **options)
        for b, sample in enumerate(batch):
            alone = model.generate(**families.collate("llava", [sample]), **options)
            assert torch.equal(alone[0, -8:], out[b, -8:])


@pytest.mark.parametrize("spec", ["snapkv:budget=12:window=4", *WAYS])
@torch.no_grad()
def test_a_second_turn_in_a_batch_is_one_alone(spec):
    """What is known of a sample follows it into another batch, and the budget is of all tokens."""
    batch, model = families.samples("llava", "padded"), families.model("llava")
    question = torch.tensor([11, 23, 31, 42])
    stage = Plan.from_spec(spec).stages[0]

    def second(first, mask, rows):
        ids = torch.cat([first.sequences, question.expand(len(first.sequences), -1)], 1)[rows]
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)[rows]
        return generate(
            model, dict(input_ids=ids, attention_mask=mask), 5,
            past_key_values=first.past_key_values,
        )  # fmt: skip

    with mllm.patch(model, stage) as patched:
        inputs = families.collate("llava", batch)
        first = generate(model, inputs, 4)
        patched.kv(first.past_key_values).select(torch.tensor([2, 0]))
        together = second(first, inputs["attention_mask"], [2, 0])
        for b, sample in enumerate([batch[2], batch[0]]):
            inputs = families.collate("llava", [sample])
            first = generate(model, inputs, 4)
            alone = second(first, inputs["attention_mask"], [0])
            assert torch.equal(together.sequences[b, -5:], alone.sequences[0, -5:])
            equal(torch.stack(together.logits, 1)[b], torch.stack(alone.logits, 1)[0], spec, 1e-5)
            kv, tokens = patched.kv(alone.past_key_values), len(sample.ids) + 8
            held = sum(int(kv.view(i).valid.sum()) for i in range(kv.depth)) / kv.depth / 2
            share = stage.budget
            limit = share if isinstance(share, int) else round(share * tokens)
            assert held <= limit + (0 if stage.hold else 4) + (stage.info.name == "prefixkv") * 2


@pytest.mark.parametrize(
    "spec",
    ["snapkv:budget=12:window=4", "vlcache:budget=0.4", "adakv:budget=12:window=4", "lookm"],
)
@torch.no_grad()
def test_assisted_decoding_is_greedy_decoding(spec):
    """Candidates come with the prompt, and no method looks at them or makes room for them."""
    (sample,) = families.samples("llava", "alone")
    ids = torch.cat([sample.ids, sample.ids[-3:], sample.ids[-3:], sample.ids[-3:-1]])
    inputs = families.collate("llava", [families.Sample(ids, sample.pictures)])
    model = families.model("llava")
    with mllm.patch(model, spec):
        greedy = generate(model, inputs, 20)
        assisted = generate(model, inputs, 20, prompt_lookup_num_tokens=4)
    assert torch.equal(greedy.sequences, assisted.sequences)


@torch.no_grad()
def test_budgets_hold_in_assisted_decoding():
    (sample,) = families.samples("llava", "alone")
    ids = torch.cat([sample.ids, sample.ids[-3:], sample.ids[-3:], sample.ids[-3:-1]])
    inputs = families.collate("llava", [families.Sample(ids, sample.pictures)])
    model = families.model("llava")
    for spec in ("streamingllm:budget=10", "h2o:budget=0.4"):
        with mllm.patch(model, spec):
            out = generate(model, inputs, 20, prompt_lookup_num_tokens=4)
        limit = 10 if spec[0] == "s" else round(0.4 * len(ids))
        slots = {layer.slots for layer in out.past_key_values.layers}
        assert max(slots) <= limit + 5, "the candidates of the last forward at most"


@pytest.mark.parametrize("spec", WAYS)
@torch.no_grad()
def test_a_saved_prefix_goes_on_as_if_it_had_not_been_saved(spec, tmp_path):
    """Scores and budgets that a method needs while decoding are in the file."""
    inputs = families.collate("llava", families.samples("llava", "alone"))
    more = torch.cat([inputs["input_ids"], torch.tensor([[11, 23, 31]])], 1)
    model = families.model("llava")

    def answer(cache):
        given = dict(input_ids=more, attention_mask=torch.ones_like(more))
        return generate(model, given, 6, past_key_values=cache)

    with mllm.patch(model, spec) as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[9]]), past_key_values=cache)
        patched.kv(cache).crop(inputs["input_ids"].shape[1])
        save_prefix(cache, tmp_path)
        want = answer(cache)
        mine = answer(load_prefix(tmp_path, patched))
    assert torch.equal(mine.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(mine.logits, want.logits, strict=True))


@pytest.mark.parametrize(
    "plan",
    [
        "visionzip:keep=6+snapkv:budget=0.4:window=4",
        "fastv:layer=2:keep=0.5+adakv:budget=0.4:window=4:hold=true",
        "fastv:layer=1:keep=0.5+vlcache:budget=0.5",
        "divprune:keep=5+h2o:budget=0.5",
        "plphp:skip=0+streamingllm:budget=12",
        "fastv:layer=2:keep=0.5+skipvision:budget=0.3:rule=top",
        "skipvision:budget=0.3+d2o:budget=0.4:skip=0",
        "snapkv:budget=0.6:window=4+lookm:budget=0.4",
        "prefixkv:budget=0.6+h2o:budget=0.4:heads=shared",
    ],
)
@torch.no_grad()
def test_methods_stack(plan):
    check_alone("llava", plan)


@torch.no_grad()
def test_protected_tokens_stay():
    """Also in later turns, and beyond a budget."""
    sample = families.samples("llava", "alone")[0]
    inputs, model = families.collate("llava", [sample]), families.model("llava")
    some = [5, 9, 13]

    def act(ctx):
        return [Protect(torch.isin(ctx.logical, torch.tensor(some)))]

    for spec in ("streamingllm:budget=6", "h2o:budget=6", "prefixkv:budget=0.2"):
        stage = Plan.from_spec(spec).stages[0]
        with mllm.patch(model, [acting([0], act, "Protect"), stage]) as patched:
            out = generate(model, inputs, 12)
            view = patched.kv(out.past_key_values).view(1)
        assert set(some) <= set(stored(view, 0, 0)) and view.valid.sum(-1).max() < 20, spec


# The account, and what is refused


@torch.no_grad()
def test_the_ledger_says_what_does_not_fit():
    """A window above the prompt is cut, a budget without room for sinks and window too."""
    model = families.model("llava")
    inputs = families.collate("llava", families.samples("llava", "text"))

    def notes(spec):
        with mllm.patch(model, spec) as patched:
            out = generate(model, inputs, 3)
            return patched.ledger.notes, out.past_key_values.layers[0].slots

    told, slots = notes("snapkv:budget=64:window=32")
    assert slots == 10 + 2 and len(told) == 2
    assert told[0] == "snapkv: window=32 is cut to the 7 tokens that there are"
    told, slots = notes("snapkv:budget=0.5:window=6:sinks=2")
    assert slots == 5 + 2 and all("no room" in note for note in told) and len(told) == 2
    assert notes("snapkv:budget=0.5:window=2") == ([], 5 + 2)


@pytest.mark.parametrize(
    "spec, argument",
    [
        ("snapkv:budget=20:window=32", "budget"),
        ("snapkv:budget=33:window=32:sinks=4", "budget"),
        ("streamingllm:budget=4", "budget"),
        ("h2o:budget=0", "budget"),
        ("h2o:budget=1.5", "budget"),
        ("h2o:budget=0.0", "budget"),
        ("h2o:budget=many", "budget"),
        ("h2o:window=1.5", "window"),
        ("h2o:window=-1", "window"),
        ("h2o:sinks=-1", "sinks"),
        ("h2o:tokens=text", "tokens"),
        ("h2o:heads=all", "heads"),
        ("h2o:hold=2", "hold"),
        ("snapkv:kernel=4", "kernel"),
        ("snapkv:window=0", "window"),
        ("snapkv:pool=min", "pool"),
        ("snapkv:keep=4", "keep"),
        ("pyramidkv:beta=0", "beta"),
        ("adakv:floor=2.0", "floor"),
        ("adakv:heads=shared", "heads"),
        ("vlcache:threshold=-0.1", "threshold"),
        ("vlcache:queries=0", "queries"),
        ("vlcache:least=2.0", "least"),
        ("plphp:spread=-0.5", "spread"),
        ("plphp:skip=-1", "skip"),
        ("lookm:merge=sum", "merge"),
        ("prefixkv:ratios=0.5/0.0", "ratios"),
        ("prefixkv:ratios=0.5/many", "ratios"),
        ("skipvision:budget=0", "budget"),
        ("skipvision:rule=last", "rule"),
        ("d2o:skip=-1", "skip"),
        ("d2o:skip_last=-1", "skip_last"),
        ("d2o:decay=2.0", "decay"),
        ("d2o:weights=mean", "weights"),
    ],
)
def test_bad_input(spec, argument):
    with pytest.raises(PlanError) as caught:
        Plan.from_spec(spec)
    assert caught.value.argument == argument and caught.value.expected


def test_ratios_are_of_every_layer():
    with pytest.raises(PlanError) as caught:
        mllm.patch(families.model("llava"), "prefixkv:ratios=0.5/0.5/0.5")
    assert caught.value.argument == "ratios" and "4" in caught.value.expected


def test_flash_attention_has_no_mask_per_head():
    model = families.model("llava")
    with _as_if(resolve(model), "flash_attention_2"):
        for spec in ("snapkv", "h2o", "lookm", "vlcache", "plphp", "adakv"):
            with pytest.raises(PlanError) as caught:
                mllm.patch(model, spec, unvalidated=True)
            assert caught.value.argument == "heads" and "shared" in caught.value.expected
        mllm.patch(model, "snapkv:heads=shared", unvalidated=True).remove()
        for spec in ("streamingllm", "outputaware", "skipvision"):
            mllm.patch(model, spec).remove()


@pytest.mark.parametrize("spec", PLANS)
def test_plans_are_written_as_they_are_read(spec, tmp_path):
    plan = Plan.from_spec(spec)
    plan.save_pretrained(tmp_path)
    assert Plan.from_pretrained(tmp_path) == plan == Plan.from_spec(plan.spec)
    assert mllm.patch(families.model("llava"), tmp_path).plan.sha256 == plan.sha256


def test_every_method_is_tested():
    names = {row["name"] for row in mllm.methods() if row["stage"] == "cache"}
    assert names == set(IDENTITY)
    used = {spec.split(":")[0] for spec in PLANS}
    assert names - {"outputaware"} == used | set(ELSEWHERE)
    for name, file in ELSEWHERE.items():
        assert f'"{name}' in (Path(__file__).parent / file).read_text()


@pytest.mark.parametrize(
    "spec, calls",
    [("snapkv:budget=12:window=4", 0), ("snapkv:budget=12:window=4:hold=true", 3), ("h2o", 3),
     ("prefixkv", 0), ("streamingllm", 0)],
)  # fmt: skip
@torch.no_grad()
def test_steps_pay_for_what_they_use(monkeypatch, spec, calls):
    """Attention is read while decoding only if tokens leave by it."""
    seen = []
    for name in ("row_attention", "column_mass"):
        original = getattr(attention, name)

        def counted(query, *a, original=original, **k):
            seen.append(query.shape[2])
            return original(query, *a, **k)

        monkeypatch.setattr(attention, name, counted)
    model = families.model("llava")
    with mllm.patch(model, spec):
        generate(model, families.collate("llava", families.samples("llava", "alone")), 4)
    assert seen.count(1) == calls * 4, "layers x steps"
