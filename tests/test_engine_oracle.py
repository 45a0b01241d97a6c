"""Dropping equals masking, merging equals rebuilding, batched equals alone."""

from __future__ import annotations

import pytest
import tiny
import torch
from matrix import (
    CASES,
    FEW,
    LAYERS,
    LAYOUTS,
    SIDE,
    check_generate,
    check_logits,
    covering,
    equal,
    fresh,
    reference,
)

import mllm

ALL = list(CASES)


@covering(spec=ALL, layout=LAYOUTS)
def test_prompt(spec, layout, attn):
    check_logits(CASES[spec], attn, *layout.split("-"))


@covering(
    spec=[
        "avgpool:keep=4",
        "downsample:keep=0.25",
        "visionzip:keep=10",
        "visionzip:keep=8:positions=original",
        "divprune:keep=6",
        "visionzip:keep=10+fastv:layer=2:keep=0.5",
        "fastervlm:keep=5",
        "prumerge:neighbours=3",
    ]
)
def test_a_tower_without_cls(spec, attn):
    """SigLIP: tokens are scored by the attention they receive, and no [CLS] is kept."""
    check_logits(CASES[spec], attn, "padded", tower="siglip")


@covering(spec=ALL, kind=["alone", "padded"])
def test_twenty_steps(spec, kind, attn):
    check_generate(CASES[spec], attn, kind)


@covering(spec=ALL)
@torch.no_grad()
def test_batched_equals_alone(spec, attn):
    batch = tiny.samples(side=SIDE)
    inputs = tiny.collate(batch)
    model = fresh(attn)
    with mllm.patch(model, spec) as patched:
        together = tiny.per_sample(model(**inputs).logits, inputs["attention_mask"])
        kept = patched.ledger.kept("llm")
        answers = model.generate(**inputs, max_new_tokens=12, do_sample=False)[:, -12:]
        for b, sample in enumerate(batch):
            single = tiny.collate([sample])
            equal(together[b], model(**single).logits[0], f"sample {b}")
            if sample.n_visual:
                assert patched.ledger.kept("llm")[0].tolist() == kept[b].tolist()
            out = model.generate(
                **single,
                max_new_tokens=12,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            best = torch.stack(out.logits, 1)[0].topk(2, -1).values
            clear = (best[:, 0] - best[:, 1] > 1e-3).int().cumprod(0).bool()
            assert torch.equal(out.sequences[0, -12:][clear], answers[b][clear])


@pytest.mark.parametrize("spec", CASES)
@torch.no_grad()
def test_order_of_the_batch_does_not_matter(spec):
    batch = tiny.samples(side=SIDE)
    model = fresh()
    with mllm.patch(model, spec) as patched:
        model(**tiny.collate(batch))
        forward = [patched.ledger.kept(LAYERS - 1)[b].tolist() for b in (0, 1, 2)]
        model(**tiny.collate(batch[::-1]))
        backward = [patched.ledger.kept(LAYERS - 1)[b].tolist() for b in (2, 1, 0)]
    assert forward == backward


@covering(spec=FEW)
@torch.no_grad()
def test_text_only_is_untouched_and_noted(spec, attn):
    inputs = tiny.collate(tiny.samples("text"))
    model = fresh(attn)
    plain = model(**inputs).logits
    with mllm.patch(model, spec) as patched:
        assert torch.equal(model(**inputs).logits, plain)
        assert patched.ledger.as_dict()["visual_tokens"] == [0, 0]
        assert patched.ledger.as_dict()["notes"]


@pytest.mark.parametrize("spec", CASES)
@torch.no_grad()
def test_the_choice_shows(spec):
    """The comparison with the oracles means something: the plan moves the logits."""
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    model = fresh()
    plain = model(**inputs).logits[:, -1]
    with mllm.patch(model, spec):
        assert (model(**inputs).logits[:, -1] - plain).abs().max() > 0.01


@torch.no_grad()
def test_the_oracle_is_the_model():
    """Without a plan the hand-written loops are the model itself."""
    import oracles

    batch = tiny.samples(side=SIDE)
    inputs = tiny.collate(batch)
    logits = tiny.per_sample(reference()(**inputs).logits, inputs["attention_mask"])
    for mine, sample in zip(logits, batch, strict=True):
        theirs = oracles.dense(reference(), oracles.plain(reference(), sample)).logits
        equal(mine, theirs, "unpatched", 1e-5)


@pytest.mark.parametrize("method", ["divprune", "random", "visionzip"])
def test_gaps_in_positions_are_no_packed_sequences(method):
    model = fresh()
    inputs = tiny.collate(tiny.samples("alone", side=SIDE), "left")
    with mllm.patch(model, f"{method}:keep=6:positions=original"), torch.no_grad():
        cached = model(**inputs, use_cache=True).logits
        plain = model(**inputs, use_cache=False).logits
    equal(plain[:, -1], cached[:, -1], "logits without a cache")
