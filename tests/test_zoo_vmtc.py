"""VMTC and CMAI: clusters and focus, in loops."""

from __future__ import annotations

import math

import oracles
import pytest
import tiny
import torch
from families import LAYERS, collate, model, samples
from layer_oracle import Edits, run
from matrix import equal
from zoo import FAMILIES, check_family, context

import mllm
from mllm.compressors import CMAI, VMTC
from mllm.errors import PlanError


def example(images=2, tokens=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(images, tokens, 6, generator=g), torch.rand(images, tokens, generator=g)


def reduce(stage, x, importance):
    keep, merge, write = stage.reduce(context(stage, features=x, importance=importance))
    assert keep.counts == keep.mask.sum(1).tolist()
    return keep.mask, merge.into, write.values


@pytest.mark.parametrize("options", [{}, {"primary": 0.0}, {"primary": 0.3, "rounds": 0}], ids=str)
@pytest.mark.parametrize("keep", [1, 2, 7, 13, 19])
def test_vmtc_equals_its_description(keep, options):
    x, importance = example()
    mask, into, values = reduce(VMTC(keep=keep, **options), x, importance)
    for i in range(2):
        features, want = oracles.vmtc(x[i], importance[i], keep, **options)
        assert into[i].tolist() == want
        seats = [t for t, to in enumerate(want) if t == to]
        assert mask[i].nonzero()[:, 0].tolist() == seats and len(seats) == keep
        equal(values[i, seats], features[seats], f"image {i}")


def test_vmtc_conserves_what_it_merges():
    """Weighted by importance, what is not primary sums to what it was; sizes to all tokens."""
    x, importance = example()
    _, into, values = reduce(VMTC(keep=8, primary=0.25), x, importance)
    assert (into >= 0).all() and torch.equal(into.gather(1, into), into)
    for i in range(2):
        weight = torch.zeros(20).index_add(0, into[i], importance[i])
        total = (weight[:, None] * values[i])[into[i].unique()].sum(0)
        equal(total, (importance[i][:, None] * x[i]).sum(0), "weighted sum", 1e-5)


def test_vmtc_equal_tokens():
    """One cluster has all members: the seats of the others go to the next important tokens."""
    x, importance = torch.ones(3, 10, 4), torch.ones(3, 10)
    mask, into, _ = reduce(VMTC(keep=5, primary=0.4), x, importance)
    assert into.tolist() == [[0, 1, 2, 3, 4, 2, 2, 2, 2, 2]] * 3
    assert mask[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("family", FAMILIES)
def test_vmtc_families(family):
    assert check_family(family, VMTC(keep=5)) == [[5] * 4, [10] * 4, [0] * 4]


@torch.no_grad()
def test_vmtc_published_budgets():
    net = tiny.llava(layers=1, side=24)
    inputs = tiny.collate(tiny.samples("alone", side=24))
    for keep in (192, 64):
        with mllm.patch(net, f"vmtc:keep={keep}") as patched:
            net(**inputs, logits_to_keep=1)
            assert len(patched.ledger.kept(0)[0]) == keep


def inhibited(weights, sample, share, answers=True):
    """What a layer's text must not see, in loops: a function of the number of tokens."""
    visual = [int(r) for r in sample.visual.nonzero()[:, 0]]
    text = [r for r in range(len(sample.ids)) if not sample.visual[r] and visual and r > visual[0]]
    mean, hidden = weights.mean(0), {}
    for i in text:
        seen = [j for j in visual if j < i]
        focus = {j: sum(float(mean[i, k] * mean[k, j]) for k in text if k <= i) for j in seen}
        hidden[i] = sorted(seen, key=lambda j: focus[j])[: math.floor(share * len(seen))]

    def bias(n):
        out = torch.zeros(1, n, n)
        for i in range(n):
            own = hidden.get(i, hidden[text[-1]] if text and answers and i > text[-1] else [])
            out[0, i, own] = float("-inf")
        return out

    return bias


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
@torch.no_grad()
def test_cmai_equals_its_description(family, attn):
    """Two layers, the second by what the first has left; then tokens of an answer."""
    batch, net = samples(family), model(family, attn)
    inputs = collate(family, batch)
    options = dict(max_new_tokens=3, do_sample=False, output_logits=True,
                   return_dict_in_generate=True)  # fmt: skip
    with mllm.patch(net, CMAI(share=0.4, layers=(1, 2))) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        kept = patched.ledger.kept(LAYERS - 1)
        out = net.generate(**inputs, **options)
    steps = torch.stack(out.logits, 1)
    for b, sample in enumerate(batch):
        edits = Edits()
        for layer in (1, 2) if sample.pictures else ():
            weights = run(family, sample, edits).weights[layer]
            edits.bias[layer] = inhibited(weights, sample, 0.4)
        want = run(family, sample, edits, out.sequences[b, -3:]).logits
        size = max(1.0, float(want.std()))
        equal(logits[b], want[: len(sample.ids)], f"sample {b}", 2e-4 * size)
        equal(steps[b], want[len(sample.ids) - 1 : -1], f"answer of sample {b}", 2e-4 * size)
        assert len(kept[b]) == int(sample.visual.sum()), "no token leaves"


@torch.no_grad()
def test_cmai_behind_a_stage_and_without_answers():
    """It runs on what a reordering stage leaves; answers may see everything."""
    net, sample = tiny.llava(), tiny.samples("alone")[0]
    inputs, logits = tiny.collate([sample]), []
    for answers in (True, False):
        plan = ["visionzip:keep=10", f"cmai:share=0.5:answers={str(answers).lower()}"]
        with mllm.patch(net, "+".join(plan)):
            out = net.generate(**inputs, max_new_tokens=3, do_sample=False, output_logits=True,
                               return_dict_in_generate=True)  # fmt: skip
        logits.append(torch.stack(out.logits, 1))
    assert torch.equal(logits[0][:, 0], logits[1][:, 0])
    assert not torch.equal(logits[0][:, 1], logits[1][:, 1])


@torch.no_grad()
def test_the_whole_paper():
    """`vmtc+cmai`: the clusters of the one, and the inhibition of the other among them."""
    net, batch = tiny.llava(layers=4), tiny.samples()
    inputs, logits, kept = tiny.collate(batch), [], []
    for plan in ("vmtc:keep=8", "vmtc:keep=8+cmai:share=0.0", "vmtc:keep=8+cmai"):
        with mllm.patch(net, plan) as patched:
            logits.append(tiny.per_sample(net(**inputs).logits, inputs["attention_mask"]))
            kept.append([k.tolist() for k in patched.ledger.kept(3)])
    assert kept[0] == kept[1] == kept[2] and [len(k) for k in kept[0]] == [8, 16, 0]
    for b, sample in enumerate(batch):
        assert torch.equal(logits[0][b], logits[1][b])
        assert torch.equal(logits[0][b], logits[2][b]) is not bool(len(sample.pixels))


@pytest.mark.parametrize("make", [lambda: VMTC(primary=1.5), lambda: VMTC(rounds=-1),
                                  lambda: CMAI(share=1.0)])  # fmt: skip
def test_bad_values(make):
    with pytest.raises(PlanError):
        make()
