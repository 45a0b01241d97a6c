"""DART: pivots, and what is least like them."""

from __future__ import annotations

import pytest
import tiny
import torch
from matrix import LAYERS, SIDE, fresh
from zoo import FAMILIES, check_family, layer_context

import mllm
from mllm.compressors import DART
from mllm.errors import PlanError


def moment(keys, hidden, visual, stage, protected=None):
    """A context of one layer: keys `[batch, heads, rows, dim]`, hidden `[batch, rows, width]`."""
    return layer_context(stage, visual, protected=protected, keys=keys, hidden=hidden)


def example(seed=0, batch=3, rows=40):
    g = torch.Generator().manual_seed(seed)
    visual = torch.zeros(batch, rows, dtype=torch.bool)
    visual[0, 5:30], visual[1, 2:38] = True, True  # little text behind the second, no third image
    keys = torch.randn(batch, 2, rows, 4, generator=g)
    return keys, torch.randn(batch, rows, 8, generator=g), visual


def by_hand(keys, hidden, visual, keep):
    """The description for one sample, in loops."""
    rows = [r for r in range(len(visual)) if visual[r]]
    text = [r for r in range(len(visual)) if rows and r > rows[0] and not visual[r]]
    loud = keys.abs().sum((0, 2)).tolist()
    own = sorted(rows, key=lambda r: -loud[r])[: min(4, keep)]
    pivots = own + sorted(text, key=lambda r: -loud[r])[:4]
    chosen = set(own)
    for n, p in enumerate(pivots):
        quota = (keep - len(own)) // len(pivots) + (n < (keep - len(own)) % len(pivots))
        for _ in range(quota):
            left = [r for r in rows if r not in chosen]
            chosen.add(min(left, key=lambda r: torch.cosine_similarity(hidden[r], hidden[p], 0)))
    return sorted(chosen)


@pytest.mark.parametrize("keep", [1, 3, 4, 5, 12, 24, 25, 36])
def test_dart_equals_its_description(keep):
    keys, hidden, visual = example()
    stage = DART(layer=2, keep=keep)
    mask = stage.act(moment(keys, hidden, visual, stage))[0].mask
    for b in range(3):
        there = int(visual[b].sum())
        want = by_hand(keys[b], hidden[b], visual[b], min(keep, there)) if there else []
        assert mask[b].nonzero()[:, 0].tolist() == want


def test_ties_go_to_the_earlier_token():
    """All alike: the first tokens stay, in any batch."""
    _, _, visual = example()
    keys, hidden = torch.ones(3, 2, 40, 4), torch.ones(3, 40, 8)
    stage = DART(layer=2, keep=7)
    mask = stage.act(moment(keys, hidden, visual, stage))[0].mask
    assert mask[0].nonzero()[:, 0].tolist() == list(range(5, 12))
    assert mask[1].nonzero()[:, 0].tolist() == list(range(2, 9))


def test_protected_rows_count_in_the_budget():
    keys, hidden, visual = example()
    protected = torch.zeros_like(visual)
    protected[0, [6, 9, 12, 15, 18, 21]] = True
    stage = DART(layer=2, keep=8)
    mask = stage.act(moment(keys, hidden, visual, stage, protected))[0].mask
    assert mask[0].sum() == 8 and mask[0][protected[0]].all()


def test_the_authors_count():
    """Visual pivots on top, equal shares rounded down: 132 for 128, 324 for 320."""
    g = torch.Generator().manual_seed(0)
    for tokens, keep, want in [(576, 192, 196), (576, 128, 132), (576, 64, 68), (2880, 320, 324)]:
        visual = torch.zeros(1, tokens + 20, dtype=torch.bool)
        visual[0, 5 : 5 + tokens] = True
        keys = torch.randn(1, 1, tokens + 20, 2, generator=g)
        hidden = torch.randn(1, tokens + 20, 4, generator=g)
        for extra, count in ((False, keep), (True, want)):
            stage = DART(layer=2, keep=keep, extra=extra)
            (kept,) = stage.act(moment(keys, hidden, visual, stage))
            assert int(kept.mask.sum()) == count
            assert kept.counts is None if extra else kept.counts == [count]


@torch.no_grad()
def test_published_budgets_per_layer():
    """Layers 0 and 1 of 32 see everything, the others the budget."""
    model = tiny.llava(layers=32, side=24, hidden=16)
    inputs = tiny.collate(tiny.samples("alone", side=24))
    for keep in (192, 128, 64):
        with mllm.patch(model, DART(keep=keep)) as patched:
            model(**inputs, logits_to_keep=1)
            visual = [row["visual"][0] for row in patched.ledger.as_dict()["layers"]]
        assert visual == [576] * 2 + [keep] * 30


@pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", [*FAMILIES, pytest.param("qwen3_vl", marks=pytest.mark.slow)])
def test_families(family, attn):
    counts = check_family(family, DART(layer=2, keep=5), attn)
    assert [c[2:] for c in counts] == [[5] * 2, [10] * 2, [0] * 2]


@torch.no_grad()
def test_duplicates_leave():
    """Of a picture of equal patches and one other, the other stays."""
    model, sample = fresh(), tiny.samples("alone", side=SIDE)[0]
    handle = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda _, args: (torch.ones_like(args[0]).index_fill(1, torch.tensor([9]), -1.0),)
    )
    with mllm.patch(model, DART(layer=1, keep=2, pivots=1)) as patched:
        model(**tiny.collate([sample]))
        assert 9 in patched.ledger.kept(LAYERS - 1)[0].tolist()
    handle.remove()


def test_no_pivots():
    with pytest.raises(PlanError, match="pivots=0"):
        DART(pivots=0)
