"""Random eviction: how much stays, what that depends on, and that evicting is masking."""

from __future__ import annotations

import families
import pytest
import torch
from cache_oracles import Oracle
from matrix import equal

import mllm
from mllm.plan import Plan

SPEC = "randomkv:budget=12:window=4"


def prefilled(family, batch, spec=SPEC):
    model = families.model(family)
    with mllm.patch(model, spec) as patched, torch.no_grad():
        cache = model(**families.collate(family, batch), use_cache=True).past_key_values
        kv = patched.kv(cache)
        views = [kv.view(i, contents=False) for i in range(kv.depth)]
    return views


def kept(views, b, padding=0):
    """By layer and head: tokens of a sample, counted without padding."""
    return [
        [
            (row[there] - padding).tolist()
            for row, there in zip(v.logical[b], v.valid[b], strict=True)
        ]
        for v in views
    ]


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_every_head_keeps_the_budget_and_the_newest(family):
    batch = families.samples(family, "padded")
    views = prefilled(family, batch)
    longest = max(len(s.ids) for s in batch)
    for b, sample in enumerate(batch):
        length = len(sample.ids)
        for layer in kept(views, b, longest - length):
            for head in layer:
                assert len(head) == min(12, length)
                assert set(range(length - min(4, length), length)) <= set(head)


def test_draws_depend_on_the_picture_and_the_seed_but_not_on_the_batch():
    batch = families.samples("llava", "padded")
    longest = max(len(s.ids) for s in batch)
    together = prefilled("llava", batch)
    found = []
    for b, sample in enumerate(batch):
        own = kept(together, b, longest - len(sample.ids))
        assert own == kept(prefilled("llava", [sample]), 0)
        found.append(own)
    long = [own for own, sample in zip(found, batch, strict=True) if len(sample.ids) > 20]
    assert all(layer[0] != layer[1] for own in long for layer in own), "heads draw for themselves"
    assert all(own[0] != own[1] for own in long), "layers draw for themselves"
    with_picture = next(s for s in batch if len(s.ids) > 20)
    for other in (SPEC + ":seed=1", Plan(Plan.from_spec(SPEC).stages, 1)):
        assert kept(prefilled("llava", [with_picture], other), 0) != long[0]


class Kept:
    """For the oracle: a prompt of which given tokens stay."""

    def __init__(self, tokens):
        self.tokens, self.decided = tokens, False

    def decide(self, oracle):
        if self.decided:
            return
        self.decided = True
        for layer in sorted(oracle.keys):
            for head, stay in enumerate(self.tokens[layer]):
                oracle.drop(layer, head, [t for t in range(oracle.length) if t not in stay])


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_evicting_is_masking(family):
    batch = families.samples(family, "padded")
    model, inputs = families.model(family), families.collate(family, batch)
    with mllm.patch(model, SPEC):
        out = model.generate(
            **inputs, max_new_tokens=6, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    prompt = inputs["input_ids"].shape[1]
    views = prefilled(family, batch)
    for b, sample in enumerate(batch):
        own = kept(views, b, prompt - len(sample.ids))
        want = Oracle(family, [Kept(own)]).generate(
            **families.collate(family, [sample]), max_new_tokens=6
        )
        logits = torch.stack(want.logits, 1)[0]
        near = 1e-5 * max(1.0, float(logits.std()))
        equal(torch.stack(out.logits, 1)[b], logits, f"sample {b}", near)


@torch.no_grad()
def test_holding_and_a_second_turn_keep_the_budget():
    model = families.model("llava")
    inputs = families.collate("llava", families.samples("llava", "alone"))
    with mllm.patch(model, SPEC + ":hold=true") as patched:
        out = model.generate(
            **inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True
        )
        kv = patched.kv(out.past_key_values)
        assert {kv.view(i).valid.sum(-1).max().item() for i in range(kv.depth)} == {12}
        model(input_ids=torch.full((1, 3), 7), past_key_values=out.past_key_values)
        assert {kv.view(i).valid.sum(-1).max().item() for i in range(kv.depth)} == {12}
