"""Conversations: turns in every form, and all that a cache knows beside what it stores."""

from __future__ import annotations

import copy

import families
import pytest
import torch
from acting import acting
from test_cache import DIM, HEADS, feed, stub, toy
from test_kv import generate
from torch import Tensor
from transformers import DynamicCache

import mllm
from mllm.cache import Dense, KVCache, Quantised, load_prefix, save_prefix
from mllm.compressors.base import BranchRows, Evict, Insert, Keep
from mllm.errors import CacheMismatchError, PlanError

ALL = "snapkv:budget=900:window=4"  # more than there is
NOTHING = "fastv:layer=2:keep=1.0"  # leaves


def inputs_of(family: str, kind: str = "alone") -> dict:
    return families.collate(family, families.samples(family, kind))


def logits(out) -> Tensor:
    return torch.stack(out.logits, 1)


def toy_of(batch: int, tokens: int, valid: Tensor | None = None):
    cache, kv = toy(batch)
    valid = torch.ones(batch, tokens, dtype=torch.bool) if valid is None else valid
    feed(cache, *torch.randn(2, batch, HEADS, tokens, DIM), valid)
    return cache, kv


def stopped(model, call) -> None:
    """A forward that breaks off before anything is stored."""

    def stop(*_):
        raise KeyError("stop")

    hook = model.get_decoder().layers[0].register_forward_pre_hook(stop)
    try:
        with pytest.raises(KeyError, match="stop"):
            call()
    finally:
        hook.remove()


# Later turns


@pytest.mark.parametrize(
    "plan", ["snapkv:budget=12:window=4", "fastv:layer=2:keep=0.5", "divprune:keep=6"]
)
@pytest.mark.parametrize("brings", ["text", "a picture"])
@torch.no_grad()
def test_a_later_turn_may_come_alone(plan, brings):
    """transformers takes its tokens without those before, under a mask of the whole conversation.

    It is the prompt of a turn all the same: its pictures are reduced, its padding is not seen, and
    the cache is cut behind it.
    """
    model = families.model("llava")
    batch = families.samples("llava", [((0,), 6), ((1,), 6)])
    later = families.samples("llava", [((0,), 5), ((2,), 8)] if brings == "a picture" else
                             [((), 5), ((), 8)], seed=5)  # fmt: skip
    inputs, more = (families.collate("llava", x) for x in (batch, later))
    with mllm.patch(model, plan) as patched:
        first = generate(model, inputs, 4)
        grown = first.sequences.shape[1] - inputs["input_ids"].shape[1]
        mask = torch.cat(
            [inputs["attention_mask"], torch.ones(2, grown).long(), more["attention_mask"]], 1
        )
        found = []
        for alone in (False, True):
            # The last token of the answer is not stored yet.
            new = torch.cat([first.sequences[:, -1:], more["input_ids"]], 1)
            ids = new if alone else torch.cat([first.sequences[:, :-1], new], 1)
            out = generate(
                model, {**more, "input_ids": ids, "attention_mask": mask}, 5,
                past_key_values=copy.deepcopy(first.past_key_values),
            )  # fmt: skip
            told = patched.ledger.as_dict()
            slots = [layer.slots for layer in out.past_key_values.layers]
            found.append((out, slots, told["visual_tokens"], told["kept_llm"]))
    (whole, *account), (part, *same) = found
    assert torch.equal(whole.sequences[:, -5:], part.sequences[:, -5:])
    assert torch.equal(logits(whole), logits(part))
    assert account == same
    if brings == "a picture":
        assert min(account[1]) > 0


@pytest.mark.parametrize("family, plan", [("qwen2_5_vl", ALL), ("llava", "cmai:share=0.5")])
@torch.no_grad()
def test_what_a_turn_has_brought_is_rolled_back(family, plan):
    """Text, then a picture, which moves positions or leaves a bias behind, then neither."""
    model, (sample,) = families.model(family), families.samples(family, "alone")
    text, question = torch.tensor([[1, 11, 23, 31, 42]]), torch.tensor([[17, 9, 60]])

    def ask(cache, before):
        ids = torch.cat([before, question], 1)
        return generate(
            model, dict(input_ids=ids, attention_mask=torch.ones_like(ids)), 4,
            past_key_values=cache,
        )  # fmt: skip

    with mllm.patch(model, plan) as patched:
        inputs = dict(input_ids=text, attention_mask=torch.ones_like(text))
        first = generate(model, inputs, 3)
        cache = first.past_key_values
        start = patched.kv(cache).snapshot()
        want = ask(copy.deepcopy(cache), first.sequences)
        longer = families.Sample(torch.cat([first.sequences[0], sample.ids]), sample.pictures)
        generate(model, families.collate(family, [longer]), 3, past_key_values=cache)
        patched.kv(cache).rollback(start)
        assert torch.equal(logits(ask(cache, first.sequences)), logits(want))


# Samples


@pytest.mark.parametrize("index", [[2, 0, 1], [1]])
@torch.no_grad()
def test_a_rope_offset_follows_its_sample(index):
    model, inputs = families.model("qwen2_5_vl"), inputs_of("qwen2_5_vl", "padded")
    tokens = torch.tensor([[11], [23], [31]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1).long()], 1)
    with mllm.patch(model, ALL) as patched:
        cache = model(**inputs, use_cache=True).past_key_values

        def step(cache, rows):
            return model(
                input_ids=tokens[rows], attention_mask=mask[rows], past_key_values=cache
            ).logits

        assert len(set(model.model.rope_deltas.flatten().tolist())) > 1
        want = step(copy.deepcopy(cache), [0, 1, 2])[index]
        twice = copy.deepcopy(cache)
        kv = patched.kv(cache)
        (kv.reorder if len(index) == 3 else kv.select)(torch.tensor(index))
        assert torch.allclose(step(cache, index), want, atol=1e-5)
        patched.kv(twice).repeat(2)
        rows = [0, 0, 1, 1, 2, 2]
        assert torch.allclose(step(twice, rows)[::2][index], want, atol=1e-5)


@torch.no_grad()
def test_lasting_actions_know_their_samples():
    model, inputs = families.model("llava"), inputs_of("llava", "padded")
    with mllm.patch(model, "cmai:share=0.25") as patched:
        kv = patched.kv(model(**inputs, use_cache=True).past_key_values)
        before = kv.view(0).logical
        for call in (
            lambda: kv.reorder(torch.tensor([2, 0, 1])),
            lambda: kv.select(torch.tensor([1])),
            lambda: kv.repeat(2),
        ):
            with pytest.raises(CacheMismatchError, match="last"):
                call()
        assert torch.equal(kv.view(0).logical, before)


def test_values_of_samples_can_be_changed_in_place():
    cache, kv = toy_of(2, 4)
    kv.samples(0)["n"] = torch.tensor([3, 5])
    start = kv.snapshot()
    for _ in range(2):
        kv.samples(0)["n"] += 1
        kv.rollback(start)
        assert kv.samples(0)["n"].tolist() == [3, 5]


def test_an_index_is_read_once():
    """The caller may write to it, and use it again."""
    valid = torch.tensor([[True, True, True], [False, True, True]])
    cache, kv = toy_of(2, 3, valid)
    start, index = kv.snapshot(), torch.tensor([1, 0])
    kv.reorder(index)
    held = kv.snapshot()
    kv.rollback(start)
    index.copy_(torch.tensor([0, 1]))
    kv.reorder(index)
    assert torch.equal(kv.view(0).valid[:, 0], valid)
    kv.rollback(held)
    assert torch.equal(kv.view(0).valid[:, 0], valid.flip(0))


# What was not seen, and what broke off


def test_cropping_names_what_stays():
    cache, kv = toy_of(1, 6)
    for length in (6, 8, 40):
        kv.crop(length)
        assert kv.length == 6 and kv.view(0).logical[0, 0].tolist() == [*range(6)]
    with pytest.raises(CacheMismatchError, match="less than nothing"):
        kv.crop(-2)
    KVCache(cache, stub(), length=4).crop(3)
    assert kv.length == 3 and kv.view(1).logical[0, 0].tolist() == [0, 1, 2]


def test_tokens_that_nobody_has_seen_are_not_stored():
    _, kv = toy_of(2, 6)
    kv.evict(drop=torch.tensor([[2, 6, 40], [7, 0, -1]]))
    assert kv.view(0).logical[:, 0].tolist() == [[0, 1, 3, 4, 5], [1, 2, 3, 4, 5]]


@torch.no_grad()
def test_a_forward_that_stored_nothing_leaves_nothing():
    """Positions are compact: what is to move later tokens holds when the rows are stored."""
    model, inputs = families.model("llava"), inputs_of("llava")
    second = families.collate("llava", families.samples("llava", "alone", 7))
    second.pop("attention_mask")
    with mllm.patch(model, "divprune:keep=6"):
        cache, good = DynamicCache(), DynamicCache()
        for given in (inputs, second):
            stopped(model, lambda given=given: model(**given, past_key_values=cache))
            mine = model(**given, past_key_values=cache).logits
            assert torch.equal(mine, model(**given, past_key_values=good).logits)
        token = torch.tensor([[7]])
        mine = model(input_ids=token, past_key_values=cache).logits
        assert torch.equal(mine, model(input_ids=token, past_key_values=good).logits)


@torch.no_grad()
def test_an_empty_cache_begins_anew():
    """Cropped to nothing, or of a model with other windows."""
    inputs, model = inputs_of("llava"), families.model("llava")
    spec = "snapkv:tokens=visual:budget=0.5:window=4"
    with mllm.patch(model, spec) as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        slots = [layer.slots for layer in cache.layers]
        patched.kv(cache).crop(0)
        model(**inputs, past_key_values=cache)
        assert [layer.slots for layer in cache.layers] == slots
    cache.reset()
    inputs, model = inputs_of("gemma3"), families.model("gemma3")
    with mllm.patch(model, spec) as patched:
        model(**inputs, past_key_values=cache)
        assert [layer.window for layer in cache.layers] == patched.windows


@torch.no_grad()
def test_a_prefix_is_whole(tmp_path):
    """No file of a cache in which a forward broke off, or to which another model added."""
    model, inputs = families.model("llava"), inputs_of("llava")
    token = torch.tensor([[7]])
    with mllm.patch(model, NOTHING) as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        foreign = copy.deepcopy(cache)
        hook = model.get_decoder().layers[2].register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(KeyError("stop"))
        )
        with pytest.raises(KeyError):
            model(input_ids=token, past_key_values=cache)
        hook.remove()
        with pytest.raises(CacheMismatchError, match="broke off"):
            save_prefix(cache, tmp_path)
    model(input_ids=token, past_key_values=foreign)
    with pytest.raises(CacheMismatchError, match="without a plan"):
        save_prefix(foreign, tmp_path)
    assert not list(tmp_path.iterdir())
    with mllm.patch(model, NOTHING) as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        save_prefix(cache, tmp_path)
        assert load_prefix(tmp_path, patched).get_seq_length() == cache.get_seq_length()


# Storage


@torch.no_grad()
def test_what_was_set_aside_takes_its_place():
    """Few bits are for the oldest tokens, whether they took part in attention or not."""
    model, inputs = families.model("llava"), inputs_of("llava")
    plan = "zipvl_prefill:tau=0.5:store=true+kivi:bits=4:group_size=4:residual=4"
    with mllm.patch(model, plan) as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        kv, apart = patched.kv(cache), 0
        for i, layer in enumerate(cache.layers):
            few, plain = layer.segments
            assert isinstance(few, Quantised)
            view = kv.view(i)
            assert view.logical[..., : few.slots].max() < view.logical[..., few.slots :].min()
            apart += int(view.columns["aside"].sum())
    assert apart > 8


@torch.no_grad()
def test_a_row_that_comes_for_one_that_leaves():
    """As many rows as tokens, and yet not one for each."""

    def act(ctx):
        first = ctx.visual & (ctx.visual.long().cumsum(1) == 1)
        return [Keep(~first), Insert(torch.zeros(1, 48), torch.full((1,), ctx.prompt.shape[1] - 1))]

    model, inputs = families.model("llava"), inputs_of("llava")
    with mllm.patch(model, [acting([2], act, "Keep", "Insert")]) as patched:
        cache = model(**inputs, use_cache=True).past_key_values
        kv = patched.kv(cache)
        tokens = kv.length
        assert cache.layers[2].slots == tokens and cache.layers[2].compressed
        kv.crop(tokens - 1)
        for i in range(kv.depth):
            assert kv.view(i).logical.max() == tokens - 2


def test_values_alone_may_need_gradients():
    """As where only the projections of values are trained."""
    keys, values = torch.randn(4, 1, 1, 1, 2), torch.randn(4, 1, 1, 1, 2, requires_grad=True)
    part, losses = Dense.of(keys[0], values[0]), []
    for i in (1, 2, 3):
        part.append(keys[i], values[i])
        losses.append(part.values().square().sum())  # keeps them for its backward
    sum(losses).backward()
    weight = torch.tensor([3.0, 3, 2, 1]).view(4, 1, 1, 1, 1)
    assert torch.allclose(values.grad, 2 * weight * values.detach())


# Rows that pass an attention by


def passing(layer: int):
    """A stage by which no token behind the prompt takes part in the attention of a layer."""

    def act(ctx):
        there = torch.zeros_like if ctx.decoding else torch.ones_like
        return [BranchRows(layer, "attn", there(ctx.visual))]

    stage = acting([layer], act, "BranchRows")
    type(stage).decodes = True
    return stage


@pytest.mark.parametrize(
    "spec",
    ["h2o:budget=0.5", "snapkv:budget=12:window=4:hold=true", "zipvl_cache:every=2:group_size=4"],
)
@torch.no_grad()
def test_a_token_that_passes_an_attention_by_rates_nothing(spec):
    model, inputs = families.model("llava"), inputs_of("llava")
    with mllm.patch(model, [passing(1), *mllm.Plan.from_spec(spec).stages]) as patched:
        names = []
        for steps in (1, 6):
            kv = patched.kv(generate(model, inputs, steps).past_key_values)
            names.append([kv.view(i).logical[kv.view(i).valid].tolist() for i in range(2)])
    (before, first), (after, later) = names
    assert later == first and max(later) < max(after)


@torch.no_grad()
def test_a_token_that_passes_an_attention_by_is_not_biased_there():
    model, inputs = families.model("llava"), inputs_of("llava")
    biased = mllm.Plan.from_spec("cmai:share=0.5").stages
    with mllm.patch(model, [passing(1), *biased]):
        cache = generate(model, inputs, 4).past_key_values
    prompt = inputs["input_ids"].shape[1]
    assert [layer.slots for layer in cache.layers] == [prompt + 3, prompt, prompt + 3, prompt + 3]


@torch.no_grad()
def test_one_sample_that_passes_rows_by_is_enough():
    """The rectangle is as wide as it would be without, and the cache is not what it would be."""

    def act(ctx):
        rows = torch.ones_like(ctx.visual)
        rows[1, 2] = False
        return [BranchRows(1, "attn", rows)]

    model = families.model("llava")
    inputs = families.collate("llava", families.samples("llava", [((0,), 6), ((0,), 6)]))
    with mllm.patch(model, [acting([1], act, "BranchRows")]):
        cache = model(**inputs, use_cache=True).past_key_values
    assert {layer.slots for layer in cache.layers} == {inputs["input_ids"].shape[1]}
    with pytest.raises(CacheMismatchError, match="compressed by a plan"):
        model(input_ids=torch.tensor([[7], [7]]), past_key_values=cache)
    assert len({layer.seen for layer in cache.layers}) == 1


@pytest.mark.parametrize(
    "plan", ["vlcache:budget=0.6+vlcache:budget=0.2", "h2o:budget=0.6+h2o:budget=0.3"]
)
def test_a_method_that_remembers_is_there_once(plan):
    model = families.model("llava")
    with pytest.raises(PlanError) as caught:
        mllm.patch(model, plan)
    assert caught.value.argument == "plan" and "once" in caught.value.expected
    mllm.patch(model, "snapkv:budget=0.9:window=4+snapkv:budget=12:window=4").remove()


@pytest.mark.parametrize("rule", ["uniform", "top"])
@torch.no_grad()
def test_what_has_left_before_takes_no_room(rule):
    """`skipvision` behind a stage before the LLM leaves its budget of what that has left."""
    plan = f"divprune:keep=9:positions=original+skipvision:budget=4:rule={rule}"
    with mllm.patch(families.model("llava"), plan) as patched:
        kv = patched.kv(patched.model(**inputs_of("llava"), use_cache=True).past_key_values)
        for i in range(kv.depth):
            assert kv.view(i).visual.sum(-1).unique().tolist() == [4]


@torch.no_grad()
def test_an_unpatched_model_does_not_go_on_from_what_was_converted_by_hand():
    model, inputs = families.model("llava"), inputs_of("llava")
    token = torch.tensor([[7]])
    with mllm.patch(model, NOTHING) as patched:
        moved = model(**inputs, use_cache=True).past_key_values
        want = model(input_ids=token, past_key_values=copy.deepcopy(moved)).logits
        rounded = copy.deepcopy(moved)
        patched.kv(moved).offload(leave=2)
        patched.kv(rounded).convert(1, lambda *own: Quantised.of(*own, 4, 4, 4), leave=2)
    assert isinstance(rounded.layers[1].segments[0], Quantised)
    assert torch.allclose(model(input_ids=token, past_key_values=moved).logits, want, atol=1e-5)
    with pytest.raises(CacheMismatchError, match="compressed by a plan"):
        model(input_ids=token, past_key_values=rounded)
    assert len({layer.seen for layer in rounded.layers}) == 1


@pytest.mark.parametrize("spec", ["vlcache:budget=0.3:least=0.0", "prefixkv:budget=0.3", "d2o"])
@torch.no_grad()
def test_heads_that_differ_in_one_layer(spec):
    """Heads share a choice; in all layers each is looked at, for budgets are of all layers."""
    first, inputs = acting([3], _first_half, "Evict"), inputs_of("llava")
    stage = mllm.Plan.from_spec(spec).stages[0].replace(heads="shared")
    with mllm.patch(families.model("llava"), [first, stage]) as patched:
        kv = patched.kv(patched.model(**inputs, use_cache=True).past_key_values)
    if spec != "d2o":
        held = sum(int(kv.view(i).valid.sum()) for i in range(kv.depth)) / kv.depth / HEADS
        assert 0.2 * kv.length < held <= round(0.3 * kv.length)


def _first_half(ctx):
    half = ctx.visual & (ctx.visual.long().cumsum(1) <= 8)
    return [Evict((2,), half, heads=(1,))]
