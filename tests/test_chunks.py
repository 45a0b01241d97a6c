"""Prompts that are read in chunks: exact where nothing leaves, bounded, and refused elsewhere."""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field
from typing import ClassVar

import families
import pytest
import torch
from cache_oracles import Oracle
from kv_oracles import Plain
from matrix import anatomy, equal
from test_flops import counted
from test_kv import check_alone, few, generate, running, stored

import mllm
from mllm.compressors import VLCache
from mllm.compressors.base import CacheCompressor
from mllm.compressors.kv_base import KVMethod
from mllm.errors import PlanError
from mllm.plan import MethodInfo, Plan

FAMILIES = ["llava", "qwen2_5_vl", "llava_next", "qwen3_vl", "internvl"]
STEPS = 6
EXACT = [
    "h2o:budget=1.0",
    "snapkv:budget=900",
    "prefixkv:budget=1.0",
    "divprune:keep=3",
    "stride:keep=3:positions=original",
    "keytokens+h2o:budget=1.0",
]


@pytest.mark.parametrize(
    "spec, family, size, kind, attn",
    few(EXACT, FAMILIES, [1, 7, 16], ["alone", "padded", "text"], ["sdpa", "eager"]),
)
@torch.no_grad()
def test_nothing_leaves_between_chunks(spec, family, size, kind, attn):
    """Answers, logits and kept tokens are those of a prompt that is read at once.

    A wrong position, mask, picture feature or deepstack feature of a chunk shows.
    """
    model = families.model(family, attn)
    inputs = families.collate(family, families.samples(family, kind))
    with mllm.patch(model, spec) as patched:
        want, kept = generate(model, inputs, STEPS), patched.ledger.kept("llm")
        mine = generate(model, inputs, STEPS, prefill_chunk_size=size)
        assert all(map(torch.equal, patched.ledger.kept("llm"), kept))
    assert torch.equal(mine.sequences, want.sequences)
    for a, b in zip(mine.logits, want.logits, strict=True):
        equal(a, b, spec, 1e-5 * max(1.0, float(b.std())))
    for a, b in zip(mine.past_key_values.layers, want.past_key_values.layers, strict=True):
        assert a.seen == b.seen


EVICTING = [
    "streamingllm:budget=10:sinks=2",
    "h2o:budget=0.4",
    "h2o:budget=12:window=3:visible=true:heads=shared:hold=false",
    "snapkv:budget=12:window=4",
    "snapkv:budget=0.5:window=4:tokens=visual",
    "pyramidkv:budget=0.4:window=3:beta=4",
    "adakv:budget=12:window=3:hold=true",
    "prefixkv:budget=0.4:distance=-3",
    "prefixkv:budget=0.475:ratios=0.9/0.3/0.2/0.5:distance=-3",
    "vlcache:budget=0.4",
    "plphp:skip=1:attentive=0.8:indifferent=0.5",
    "lookm:budget=0.4:merge=none",
    "d2o:budget=0.4:merge=false:skip=1:sinks=1",
]


class _Stop(Exception):
    pass


@torch.no_grad()
def reading(oracle: Oracle, inputs: dict, size: int) -> tuple[torch.Tensor, object]:
    """The oracle's model over a prompt in chunks: the last row's logits, and the cache."""
    decoder, given = oracle.model.get_decoder(), {}

    def stop(module, args, kwargs):
        given.update(kwargs)
        raise _Stop

    handle = decoder.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(_Stop):
        oracle.model(**inputs, use_cache=True)
    handle.remove()
    embeds, position = given["inputs_embeds"], given.get("position_ids")
    rows, cache = embeds.shape[1], None
    ends = list(range(rows % size or size, rows + 1, size))
    oracle.chunks = [end != rows for end in ends]
    for start, stop in itertools.pairwise([0, *ends]):
        more = {}
        if (there := given.get("visual_pos_masks")) is not None:
            before, here = int(there[:, :start].sum()), int(there[:, start:stop].sum())
            deep = given["deepstack_visual_embeds"]
            more = dict(
                visual_pos_masks=there[:, start:stop],
                deepstack_visual_embeds=[x[before : before + here] for x in deep],
            )
        if position is not None:
            more["position_ids"] = position[..., start:stop]
        out = decoder(inputs_embeds=embeds[:, start:stop], past_key_values=cache, use_cache=True,
                      attention_mask=torch.ones(1, stop, dtype=torch.long), **more)  # fmt: skip
        cache = out.past_key_values
    return oracle.model.lm_head(out.last_hidden_state[:, -1:]), cache


@pytest.mark.parametrize(
    "spec, family, size, attn", few(EVICTING, FAMILIES, [5, 16], ["sdpa", "eager"])
)
@torch.no_grad()
def test_every_chunk_sees_what_the_last_one_left(spec, family, size, attn):
    """The unpatched model in chunks, which masks what a loop lets go of after each of them."""
    (sample,) = families.samples(family, "alone")
    stage, inputs = Plan.from_spec(spec).stages[0], families.collate(family, [sample])
    model = families.model(family, attn)
    with mllm.patch(model, stage) as patched:
        patched.prefill_chunk_size = size
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        cache, mine = out.past_key_values, [out.logits]
        oracle = Oracle(family, [Plain(stage)])
        oracle.visual = sample.visual.tolist()
        with running(oracle):
            logits, theirs = reading(oracle, inputs, size)
            want = [logits]
            for _ in range(STEPS):
                token = want[-1][:, -1:].argmax(-1)
                mine.append(model(input_ids=token, past_key_values=cache).logits)
                want.append(oracle.model(input_ids=token, past_key_values=theirs).logits)
        for i, layer in enumerate(cache.layers):
            view = patched.kv(cache).view(i)
            for head in range(layer.heads):
                held = sorted(stored(view, 0, head))
                assert held == oracle.alive(i, head), f"layer {i}, head {head}"
    for step, (a, b) in enumerate(zip(mine, want, strict=True)):
        equal(a, b, f"step {step}", 1e-5 * max(1.0, float(b.std())))


ALONE = ["h2o:budget=0.4", "adakv:budget=12:window=4", "vlcache:budget=0.4", "lookm:budget=0.4",
         "d2o:budget=0.4:skip=0", "divprune:keep=5+snapkv:budget=0.4:window=4"]  # fmt: skip


@pytest.mark.parametrize("spec, family", few(ALONE, FAMILIES))
def test_chunks_in_a_batch_are_chunks_alone(spec, family):
    """Padding at the left moves no boundary, and a chunk of nothing but padding does nothing."""
    check_alone(family, spec, prefill_chunk_size=6)


@dataclass
class Watch(CacheCompressor):
    """Writes down slots at the end of every layer, before methods behind it in the plan."""

    seen: list = field(default_factory=list, compare=False)
    ends: list = field(default_factory=list, compare=False)
    info: ClassVar = MethodInfo(name="watch", stage="cache")
    chunks: ClassVar[bool] = True

    def layer_end(self, event):
        view = event.cache.view(event.layer, contents=False)
        self.seen.append(view.valid.shape[-1])

    def chunk_end(self, event):
        self.ends.append((event.begins, event.ends, event.cache.length))

    prefill_end = chunk_end


@pytest.mark.parametrize("spec", ["snapkv:budget=24:window=4", "h2o:budget=24", "adakv:budget=24"
                                  ":window=4", "prefixkv:budget=24"])  # fmt: skip
@torch.no_grad()
def test_memory_is_bounded(spec):
    """By chunk and budget: rows that a layer is given, and slots that it holds at any time."""
    (sample,) = families.samples("llava", (((0,), 180),))
    model, watch, rows = families.model("llava"), Watch(), []
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    tokens, size = len(sample.ids), 16
    with mllm.patch(model, [watch, Plan.from_spec(spec).stages[0]]):
        out = generate(model, families.collate("llava", [sample]), 1, prefill_chunk_size=size)
    ragged = 24 * 2 if spec.startswith(("adakv", "prefixkv")) else 24  # mean of heads or layers
    assert max(rows) == size and max(watch.seen) <= ragged + size + 1 < tokens / 2
    ends = list(range(tokens % size or size, tokens + 1, size))
    assert watch.ends == [(i == 0, n == tokens, n) for i, n in enumerate(ends)]
    assert out.past_key_values.get_seq_length() == tokens


@torch.no_grad()
def test_a_call_by_hand():
    """Logits of all rows and hidden states of all layers come together again."""
    model = families.model("qwen2_5_vl")
    inputs = families.collate("qwen2_5_vl", families.samples("qwen2_5_vl", "padded"))
    plain, real = model(**inputs, output_hidden_states=True), inputs["attention_mask"].bool()
    before = anatomy(model)
    with mllm.patch(model, "h2o:budget=1.0") as patched:
        patched.prefill_chunk_size = 7
        mine = model(**inputs, output_hidden_states=True)
        with pytest.raises(PlanError) as caught:
            model(**inputs, use_cache=False)
        assert caught.value.argument == "prefill_chunk_size"
        patched.prefill_chunk_size = None
        assert patched.ledger.as_dict()["prompt_tokens"] == real.sum(1).tolist()
    assert anatomy(model) == before
    equal(mine.logits[real], plain.logits[real], "logits", 1e-5)
    assert len(mine.hidden_states) == len(plain.hidden_states)
    for a, b in zip(mine.hidden_states, plain.hidden_states, strict=True):
        equal(a[real], b[real], "hidden states", 1e-4)


@torch.no_grad()
def test_a_second_turn_in_chunks():
    """With and without a picture, over a cache that was renumbered; budgets are of all tokens."""
    model = families.model("llava")
    first = families.collate("llava", families.samples("llava", "alone"))
    more = torch.randint(10, 50, (1, 23), generator=torch.Generator().manual_seed(3))

    def both(plan, **options):
        with mllm.patch(model, plan):
            out = generate(model, first, 3, **options)
            ids = torch.cat([out.sequences, more], 1)
            given = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
            return generate(model, given, 4, past_key_values=out.past_key_values, **options)

    for plan in ("divprune:keep=3", "snapkv:budget=1.0", "divprune:keep=3+h2o:budget=900"):
        want, mine = both(plan), both(plan, prefill_chunk_size=9)
        for a, b in zip(mine.logits, want.logits, strict=True):
            equal(a, b, plan, 1e-5)
    held = both("streamingllm:budget=12", prefill_chunk_size=9).past_key_values
    assert {layer.slots for layer in held.layers} == {12}


@torch.no_grad()
def test_a_configuration_says_it_too():
    """It stays as it is, and transformers does not split the prompt a second time."""
    model = families.model("llava")
    inputs = families.collate("llava", families.samples("llava", "alone"))
    want, watch = generate(model, inputs, 3), Watch()
    config = copy.deepcopy(model.generation_config)
    config.prefill_chunk_size = 8
    with mllm.patch(model, [watch]):
        mine = generate(model, inputs, 3, generation_config=config)
    assert torch.equal(mine.sequences, want.sequences) and config.prefill_chunk_size == 8
    assert len(watch.ends) == -(-inputs["input_ids"].shape[1] // 8)


@pytest.mark.parametrize("spec", ["streamingllm:budget=1.0", "streamingllm:budget=12",
                                  "stride:keep=3"])  # fmt: skip
def test_flops_are_those_of_the_chunks(spec):
    (sample,) = families.samples("llava", "alone")
    inputs, model = families.collate("llava", [sample]), families.model("llava", "eager")
    with mllm.patch(model, spec) as patched:
        patched.prefill_chunk_size = 8
        measured = counted(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
        data = patched.ledger.as_dict()
        patched.prefill_chunk_size = None
        whole = counted(lambda: model(**inputs, use_cache=True, logits_to_keep=1))
    assert data["prefill_flops"] == [pytest.approx(measured, rel=1e-9)] and measured < whole


# What is refused


@pytest.mark.parametrize(
    "family, plan, options, word",
    [
        ("llava", "fastv:layer=2:keep=0.5", {}, "fastv decides by the whole prompt"),
        ("llava", "skipvision", {}, "skipvision decides by the whole prompt"),
        ("llava", "mustdrop", {}, "decides by the whole prompt"),
        ("gemma3", "h2o", {}, "see each other"),
        ("llava", "visionzip:keep=6", {}, "change places"),
        ("llava", "h2o", dict(prompt_lookup_num_tokens=3), "without candidates"),
        ("llava", "h2o", dict(use_cache=False), "over a cache"),
        ("llava", "h2o", dict(prefill_chunk_size=0), "no number of rows"),
        ("llava", "h2o", dict(prefill_chunk_size=2.5), "no number of rows"),
    ],
)
def test_what_is_refused(family, plan, options, word):
    model = families.model(family)
    inputs = families.collate(family, families.samples(family, "alone"))
    options = {"prefill_chunk_size": 8, **options}
    with mllm.patch(model, plan), pytest.raises(PlanError, match=word) as caught:
        model.generate(**inputs, max_new_tokens=2, do_sample=False, **options)
    assert caught.value.argument == "prefill_chunk_size" and caught.value.expected


def test_padding_at_the_right_is_refused():
    model = families.model("llava")
    inputs = families.collate("llava", families.samples("llava"), "right")
    with (
        mllm.patch(model, "h2o") as patched,
        pytest.raises(PlanError, match="counted from its end"),
    ):
        patched.prefill_chunk_size = 8
        model(**inputs, use_cache=True)


# Mutations


def not_told(mp):
    mp.setattr(KVMethod, "chunk_end", CacheCompressor.chunk_end)


def forgotten(mp):
    mp.setattr(KVMethod, "sums", False)
    for method in ("LookM", "PrefixKV"):
        mp.setattr(getattr(mllm.compressors, method), "sums", False)


def not_asked(mp):
    mp.setattr(VLCache, "_behind", lambda self, prompt, visual: prompt)


@pytest.mark.parametrize(
    "mutate, spec, size",
    [
        (not_told, "vlcache:budget=0.4", 16),
        (forgotten, "lookm:budget=0.4:merge=none", 16),
        (forgotten, "prefixkv:budget=0.4:distance=-3", 5),
        (not_asked, "vlcache:budget=0.4", 16),
    ],
)
def test_a_broken_chunk_is_caught(monkeypatch, mutate, spec, size):
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        test_every_chunk_sees_what_the_last_one_left(spec, "llava", size, "sdpa")
