"""ZipVL, in loops: `zipvl_prefill`. What is stored is in test_kv_quant.py."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from families import LAYERS, collate, model, samples
from layer_oracle import Edits, run
from matrix import equal
from zoo import FAMILIES, check_family, layer_context

import mllm
from mllm.compressors import ZipVLPrefill
from mllm.errors import PlanError


def probes(n, recent, spread):
    """Rows that are asked of a prompt of n."""
    golden = (math.sqrt(5) - 1) / 2
    return sorted({int(k * golden % 1 * n) for k in range(1, spread + 1)}
                  | set(range(max(0, n - recent), n)))  # fmt: skip


def important(weights, asked, tau):
    """Rows that attend, from a layer's attention `[heads, n, n]`."""
    rows, n = weights.mean(0)[asked], weights.shape[1]
    mass = rows.sum(0).tolist()
    total, needed = 0.0, 0
    for m in sorted(mass, reverse=True):
        if total >= tau * sum(mass):
            break
        total, needed = total + m, needed + 1
    seers = [sum(float(weights[:, i, j].max()) > 0 for i in asked) for j in range(n)]
    fair = [m / max(1, s) for m, s in zip(mass, seers, strict=True)]
    return set(sorted(range(n), key=lambda j: -fair[j])[:needed]) | {n - 1}


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
@torch.no_grad()
def test_zipvl_equals_its_description(family, attn):
    """Two layers; the first lacks what the second might have stored."""
    batch, net = samples(family), model(family, attn)
    inputs = collate(family, batch)
    stage = ZipVLPrefill(tau=0.8, recent=3, spread=4, layers=(1, 3))
    with mllm.patch(net, stage) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        assert patched.ledger.kept(LAYERS - 1)[0].tolist() == list(
            range(int(batch[0].visual.sum()))
        ), "rows stay in the sequence"
    for b, sample in enumerate(batch):
        edits, n = Edits(), len(sample.ids)
        for layer in (1, 3) if sample.pictures else ():
            weights = run(family, sample, edits).weights[layer]
            there = important(weights, probes(n, 3, 4), 0.8)
            assert len(there) < n
            edits.take[layer, "attn"] = torch.tensor([i in there for i in range(n)])
        want = run(family, sample, edits).logits
        equal(logits[b], want, f"sample {b}", 2e-4 * max(1.0, float(want.std())))


def test_more_mass_is_more_tokens():
    visual = torch.zeros(1, 30, dtype=torch.bool)
    visual[:, 3:25] = True
    rows = torch.rand(1, 4, 30, generator=torch.Generator().manual_seed(0)) ** 6
    counts = []
    for tau in (0.5, 0.9, 0.975):
        ctx = layer_context(ZipVLPrefill(tau=tau), visual, rows=rows)
        (action,) = ZipVLPrefill(tau=tau).act(ctx)
        counts.append(int(action.rows.sum()))
    assert counts[0] < counts[1] < counts[2] < 30


def test_what_few_probes_see_is_not_behind():
    """The last probe sees row 4 alone; per probe that is more than row 0 has of both."""
    visual = torch.tensor([[False, True, True, True, False]])
    rows = torch.tensor([[[0.5, 0.5, 0.0, 0.0, 0.0], [0.2, 0.1, 0.2, 0.1, 0.4]]])
    stage = ZipVLPrefill(tau=0.5)
    (action,) = stage.act(layer_context(stage, visual, rows=rows))
    assert action.rows.tolist() == [[True, False, False, False, True]]
    assert (rows.sum(1)[0] > 0.4).tolist()[:2] == [True, True], "by the sums it were rows 0 and 1"


def test_zipvl_probes_do_not_depend_on_the_batch():
    stage = ZipVLPrefill(recent=2, spread=5)
    visual = torch.zeros(2, 12, dtype=torch.bool)
    ctx = layer_context(stage, visual)
    ctx.prompt = torch.ones(2, 12, dtype=torch.bool)
    ctx.prompt[1, :5] = False
    asked = stage.probes(ctx)
    assert asked[0].nonzero()[:, 0].tolist() == probes(12, 2, 5)
    assert (asked[1].nonzero()[:, 0] - 5).tolist() == probes(7, 2, 5)


@pytest.mark.parametrize("family", FAMILIES)
def test_zipvl_families(family):
    counts = check_family(family, ZipVLPrefill(tau=0.9, recent=4, spread=4))
    assert all(len(set(c)) == 1 for c in counts)


@pytest.mark.parametrize("bad", [dict(tau=0.0), dict(tau=1.5), dict(recent=0), dict(spread=-1)])
def test_bad_values(bad):
    with pytest.raises(PlanError):
        ZipVLPrefill(**bad)
