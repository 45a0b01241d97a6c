"""KV methods: what they keep, what the model then says, and what they refuse."""

from __future__ import annotations

import itertools

import families
import pytest
import torch
from cache_oracles import Oracle
from kv_oracles import Plain
from matrix import equal

import mllm
from mllm.plan import Plan

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
    "vlcache:budget=0.4",
    "plphp:skip=1:attentive=0.8:indifferent=0.5",
    "lookm:budget=0.4:merge=none",
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


def stored(view, b: int, head: int) -> list[int]:
    return view.logical[b, head][view.valid[b, head]].tolist()


@pytest.mark.parametrize(
    "spec, family, kind, attn",
    few(PLANS, FAMILIES, ["alone", "padded"], ["sdpa", "eager"]),
)
@torch.no_grad()
def test_evicting_is_masking(spec, family, kind, attn):
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
        oracle = Oracle(family, [Plain(stage)])
        oracle.visual = sample.visual.tolist()
        want = oracle.generate(**families.collate(family, [sample]), max_new_tokens=STEPS)
        for i, layer in enumerate(out.past_key_values.layers):
            view = patched.kv(out.past_key_values).view(i)
            padding = prompt - len(sample.ids)
            for head in range(layer.heads):
                mine = [t - padding for t in stored(view, b, head)]
                mine = [t for t in mine if t >= oracle.first(i)]
                assert mine == oracle.alive(i, head), f"sample {b}, layer {i}, head {head}"
        logits = torch.stack(want.logits, 1)[0]
        near = 1e-5 * max(1.0, float(logits.std()))
        equal(torch.stack(out.logits, 1)[b], logits, f"sample {b}", near)
        assert torch.equal(out.sequences[b, prompt:], want.sequences[0, len(sample.ids) :])
    assert out.past_key_values.get_seq_length() == prompt + STEPS - 1
