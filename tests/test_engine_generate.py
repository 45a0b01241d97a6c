"""Every way of calling the model: sampling, beams, assisted decoding, later turns, no cache."""

from __future__ import annotations

import oracles
import pytest
import tiny
import torch
from matrix import (
    CASES,
    FEW,
    PRECOMPUTED,
    REPEATABLE,
    SIDE,
    check_generate,
    covering,
    equal,
    expected,
    follow,
    fresh,
    reference,
)
from transformers import DynamicCache, LlamaForCausalLM

import mllm

few = pytest.mark.parametrize("spec", FEW)
#: Plans that renumber: later tokens are moved by another distance in every part of the decoder.
COMPACT = [
    "fastv:layer=1:keep=9:positions=compact+fastv:layer=3:keep=0.5:positions=compact",
    "visionzip:keep=10+fastv:layer=2:keep=3:positions=compact",
    "divprune:keep=9:positions=original+fastv:layer=2:keep=2:positions=compact",
]


@covering(spec=FEW)
def test_sampling(spec, attn):
    one = check_generate(CASES[spec], attn, "padded", do_sample=True)
    two = check_generate(CASES[spec], attn, "padded", do_sample=True)
    assert torch.equal(one, two), "the seed fixes the answer"


@few
def test_several_answers_per_prompt(spec):
    check_generate(CASES[spec], "sdpa", REPEATABLE, do_sample=True, num_return_sequences=3)


@few
def test_without_cache(spec):
    cached = check_generate(CASES[spec], "sdpa", "padded", steps=8)
    assert torch.equal(check_generate(CASES[spec], "sdpa", "padded", 8, use_cache=False), cached)


@covering(spec=[*FEW, *COMPACT])
@torch.no_grad()
def test_beams(spec, attn):
    """The score of the beam that wins is the oracle's score of that text."""
    batch = tiny.samples(REPEATABLE, side=SIDE)
    inputs = tiny.collate(batch)
    options = dict(max_new_tokens=8, num_beams=3, do_sample=False, length_penalty=0.0)
    model = fresh(attn)
    with mllm.patch(model, spec) as patched:
        out = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
        step = len(patched.ledger.kept("llm")) // len(batch)
        kept = patched.ledger.kept("llm")[::step]
        prompt = inputs["input_ids"].shape[1]
        for b, sample in enumerate(batch):
            new = out.sequences[b, prompt:]
            rows, want = expected(CASES[spec], sample, kept[b], new)
            logprob = want.logits[len(rows.source) - 1 : -1].log_softmax(-1)
            score = logprob.gather(1, new[:, None]).sum()
            equal(out.sequences_scores[b], score, f"beam of sample {b}", 1e-3)
            alone = model.generate(**tiny.collate([sample]), **options)
            assert torch.equal(alone[0, -8:], new)


@pytest.mark.parametrize("spec", [*FEW, *COMPACT])
@torch.no_grad()
def test_prompt_lookup(spec):
    """Assisted decoding is greedy decoding, also where the first step has a candidate."""
    sample = tiny.samples("alone", side=SIDE)[0]
    ids = torch.cat([sample.ids, sample.ids[-4:], sample.ids[-4:], sample.ids[-4:-2]])
    inputs = tiny.collate([tiny.Sample(ids, sample.pixels)])
    model = fresh()
    with mllm.patch(model, spec):
        options = dict(max_new_tokens=16, do_sample=False)
        greedy = model.generate(**inputs, **options)
        assert torch.equal(model.generate(**inputs, **options, prompt_lookup_num_tokens=3), greedy)


@few
@torch.no_grad()
def test_assistant_model(spec):
    if not PRECOMPUTED:
        pytest.skip("this transformers gives the pixels to a draft model that is text only")
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    model = fresh()
    torch.manual_seed(0)
    draft = LlamaForCausalLM(tiny.config(layers=2).text_config).eval()
    draft.generation_config.eos_token_id = None
    draft.generation_config.pad_token_id = tiny.PAD
    with mllm.patch(model, spec):
        greedy = model.generate(**inputs, max_new_tokens=12, do_sample=False)
        drafted = model.generate(
            **inputs, max_new_tokens=12, do_sample=False, assistant_model=draft
        )
    assert torch.equal(drafted, greedy)


def _turn(model, inputs, cache=None, steps=6):
    return model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=steps,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


def _second_ids(batch, out, prompt):
    """The conversation so far and a new question, per sample without padding."""
    grown = []
    for b, sample in enumerate(batch):
        question = torch.tensor([11 + b, 23, 31, 42])
        grown.append(torch.cat([sample.ids, out.sequences[b, prompt:], question]))
    return grown


@covering(spec=[*FEW, *COMPACT], kind=["alone", "padded"])
@torch.no_grad()
def test_second_turn(spec, kind, attn):
    """A later turn on the returned cache is the same conversation written out in one go."""
    case = CASES[spec]
    batch = tiny.samples(kind, side=SIDE)
    inputs = tiny.collate(batch)
    prompt = inputs["input_ids"].shape[1]
    model = fresh(attn)
    with mllm.patch(model, spec) as patched:
        first = _turn(model, inputs)
        kept = patched.ledger.kept("llm")
        grown = [tiny.Sample(ids, batch[0].pixels[:0]) for ids in _second_ids(batch, first, prompt)]
        later = tiny.collate(grown)
        second = _turn(model, later, first.past_key_values)
        history = len(patched.ledger.history)
    assert history >= 1
    for b, sample in enumerate(batch):
        more = torch.cat([grown[b].ids[len(sample.ids) :], second.sequences[b, -6:]])
        rows, want = expected(case, sample, kept[b], more)
        equal(torch.stack(second.logits, 1)[b], want.logits[-7:-1], f"sample {b}, second turn")


@pytest.mark.parametrize("spec", ["fastv:layer=2:keep=0.5", "divprune:keep=6:positions=original"])
@torch.no_grad()
def test_second_turn_brings_a_picture(spec):
    """The new picture is reduced by the new question; the old one stays as it was."""
    model = fresh()
    batch = tiny.samples("alone", side=SIDE)
    new = tiny.samples("alone", side=SIDE, seed=9)[0]
    inputs = tiny.collate(batch)
    with mllm.patch(model, spec) as patched:
        first = _turn(model, inputs)
        old = patched.ledger.kept(3)[0].tolist()
        ids = torch.cat([first.sequences[0], new.ids[1:]])
        later = {
            "input_ids": ids[None],
            "attention_mask": torch.ones_like(ids)[None],
            "pixel_values": new.pixels,
        }
        second = _turn(model, later, first.past_key_values)
        now = patched.ledger.as_dict()
    assert now["visual_tokens"] == [16]
    turns = [(0, len(batch[0].ids)), (len(first.sequences[0]) - 1, len(ids))]
    want = _dense_turns(spec, batch[0], new, ids, turns, second.sequences[0, -6:])
    equal(torch.stack(second.logits, 1)[0], want, "second turn")
    assert len(old) in (6, 8)


def _dense_turns(spec, first, second, ids, turns, answer):
    """The dense oracle with one decision per turn, each by that turn's own last row."""
    both = tiny.Sample(ids, torch.cat([first.pixels, second.pixels]))
    model = reference()
    if spec.startswith("divprune"):
        kept = []
        for i, picture in enumerate(both.pixels):
            features = oracles.project(model, oracles.tower(model, picture).patches)
            kept += [16 * i + t for t in oracles.divprune(features, 6)]
        rows = oracles.dropped(model, both, torch.tensor(kept), "original")
        return oracles.dense(model, rows, answer).logits[-7:-1]
    # FastV before layer 2: layers 0 and 1 see every row, so the scores need no masking.
    rows = oracles.plain(model, both)
    attention = oracles.dense(model, rows).weights[1].mean(0)
    alive = torch.ones(len(ids) + len(answer), dtype=torch.bool)
    for start, end in turns:
        here = [r for r in range(start, end) if rows.visual[r]]
        alive[sorted(here, key=lambda r: -attention[end - 1, r].item())[8:]] = False
    lm = model.model.language_model
    h = torch.cat([rows.embeds, lm.embed_tokens(answer)])
    h = _layers(model, h, 0, 2, torch.ones_like(alive))
    h = _layers(model, h, 2, len(lm.layers), alive)
    return model.lm_head(lm.norm(h))[-7:-1]


def _layers(model, h, start, stop, alive):
    lm = model.model.language_model
    n = len(h)
    allowed = torch.ones(n, n, dtype=torch.bool).tril() & (
        alive[None] | torch.eye(n, dtype=torch.bool)
    )
    mask = torch.zeros(n, n).masked_fill(~allowed, torch.finfo(torch.float32).min)
    rope = lm.rotary_emb(h[None], position_ids=torch.arange(n)[None])
    for layer in lm.layers[start:stop]:
        h = layer(h[None], attention_mask=mask[None, None], position_embeddings=rope)[0]
    return h


@pytest.mark.parametrize("spec", [*FEW, *COMPACT])
@torch.no_grad()
def test_manual_decoding(spec):
    """Prefill and steps by hand, without `generate`, with and without position ids."""
    case = CASES[spec]
    batch = tiny.samples("alone", side=SIDE)
    inputs = tiny.collate(batch)
    answer = torch.tensor([17, 29, 41, 53])
    for given in (True, False):
        model = fresh()
        with mllm.patch(model, spec) as patched:
            out = model(**inputs, use_cache=True)
            kept = patched.ledger.kept("llm")
            steps = [out.logits[0, -1]]
            cache, length = out.past_key_values, inputs["input_ids"].shape[1]
            for i, token in enumerate(answer[:-1]):
                position = {"position_ids": torch.tensor([[length + i]])} if given else {}
                out = model(
                    input_ids=token.view(1, 1),
                    attention_mask=torch.ones(1, length + i + 1, dtype=torch.long),
                    past_key_values=cache,
                    **position,
                )
                steps.append(out.logits[0, -1])
        follow(case, batch, kept, answer[None], torch.stack(steps)[None], 0, greedy=False)


@few
@torch.no_grad()
def test_features_computed_before(spec):
    """`mm_encoder_outputs`: the pictures went through the tower before the forward."""
    model = fresh()
    if not PRECOMPUTED:
        pytest.skip("this transformers computes features inside forward")
    inputs = tiny.collate(tiny.samples(side=SIDE))
    pixels = inputs.pop("pixel_values")
    with mllm.patch(model, spec):
        inside = model(**inputs, pixel_values=pixels).logits
        features = model.get_image_features(pixel_values=pixels, return_dict=True)
        assert sum(len(f) for f in features.pooler_output) == 3 * SIDE * SIDE
        before = model(**inputs, mm_encoder_outputs={"image": features}).logits
    assert torch.equal(inside, before)


@few
@torch.no_grad()
def test_a_caller_s_empty_cache_is_adopted(spec):
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    model = fresh()
    with mllm.patch(model, spec):
        usual = model.generate(**inputs, max_new_tokens=6, do_sample=False)
        cache = DynamicCache(config=model.config)
        out = model.generate(
            **inputs,
            max_new_tokens=6,
            do_sample=False,
            past_key_values=cache,
            return_dict_in_generate=True,
        )
    assert torch.equal(out.sequences, usual)
    assert out.past_key_values is cache
    # The logical length counts the whole conversation, as an unpatched cache would.
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 5


@few
@torch.no_grad()
def test_only_the_last_logits(spec):
    inputs = tiny.collate(tiny.samples(side=SIDE))
    model = fresh()
    with mllm.patch(model, spec):
        full = model(**inputs).logits
        last = model(**inputs, logits_to_keep=1).logits
    equal(last[:, 0], full[:, -1], "logits_to_keep", 1e-6)


@few
@torch.no_grad()
def test_tuple_outputs(spec):
    inputs = tiny.collate(tiny.samples(side=SIDE))
    model = fresh()
    with mllm.patch(model, spec):
        assert torch.equal(model(**inputs, return_dict=False)[0], model(**inputs).logits)
