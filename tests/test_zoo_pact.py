"""PACT: importance, and clusters by a plain scan in order of density."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
import zoo_oracles as cards
from families import LAYERS, collate, model, samples
from layer_oracle import Edits, run
from matrix import equal
from zoo import FAMILIES, check_family, layer_context

import mllm
from mllm.compressors import PACT
from mllm.compressors.base import LogitBias
from mllm.errors import PlanError
from mllm.eval.plans import plan_for_budget


def example(seed=0, rows=30):
    """Keys around a few directions, so that there are clusters."""
    g = torch.Generator().manual_seed(seed)
    visual = torch.zeros(2, rows, dtype=torch.bool)
    visual[0, 3:24], visual[1, 1:29] = True, True
    middle = torch.randn(5, 2, 4, generator=g)
    which = torch.randint(5, (2, rows), generator=g)
    keys = middle[which].transpose(1, 2) + 0.35 * torch.randn(2, 2, rows, 4, generator=g)
    return visual, dict(
        queries=torch.randn(2, 4, rows, 4, generator=g), keys=keys,
        plain=torch.randn(2, 2, rows, 4, generator=g),
        hidden=torch.randn(2, rows, 8, generator=g),
    )  # fmt: skip


@pytest.mark.parametrize("keep, distance, retrieve", [
    (0.55, 0.21, 1.5), (1.0, 0.1, 1.0), (6, 0.4, 0.0), (1, 0.21, 1.5), (1.0, 2.0, 1.5),
    (0.8, 0.02, 3.0),
])  # fmt: skip
def test_pact_equals_its_description(keep, distance, retrieve):
    visual, signals = example()
    stage = PACT(layer=2, keep=keep, distance=distance, retrieve=retrieve)
    kept, merge, write, *biases = stage.act(layer_context(stage, visual, **signals))
    for b in range(2):
        rows = visual[b].nonzero()[:, 0].tolist()
        count = keep if isinstance(keep, int) else max(1, round(keep * len(rows)))
        of = [signals[n][b] for n in ("queries", "plain", "keys", "hidden")]
        want = cards.pact(rows, *of, count, distance, retrieve)
        assert {j: int(merge.into[b, j]) for j in rows} == want
        centres = [j for j in rows if want[j] == j]
        assert kept.mask[b].nonzero()[:, 0].tolist() == centres
        assert 1 <= len(centres) <= count
        for c in centres:
            members = [j for j in rows if want[j] == c]
            equal(write.values[b, c], signals["hidden"][b, members].mean(0), f"cluster {c}", 1e-5)
            for action in biases:
                here = torch.arange(30).expand(2, -1)
                log = action.fn(here[:, :2], here)[b, 0, 1, c]
                assert log.item() == pytest.approx(math.log(len(members)), abs=1e-5)
    assert [a.layer for a in biases] == [2, 3]


@pytest.mark.parametrize("prefix, queries", [(True, "each"), (False, "each"), (False, "mean")])
def test_who_asks(prefix, queries):
    """The authors ask with all up to the last visual token, and could ask one by one."""
    differs = 0
    for seed in range(4):
        visual, signals = example(seed)
        signals["plain"][:, :, :3] *= 4  # so that what stands before the pictures takes its share
        stage = PACT(layer=2, keep=9, prefix=prefix, queries=queries)
        _, merge, *_ = stage.act(layer_context(stage, visual, **signals))
        for b in range(2):
            rows = visual[b].nonzero()[:, 0].tolist()
            of = [signals[n][b] for n in ("queries", "plain", "keys", "hidden")]
            want, other = (
                cards.pact(rows, *of, 9, 0.21, 1.5, None if given else rows, queries == "each")
                for given in (prefix, not prefix)
            )
            assert {j: int(merge.into[b, j]) for j in rows} == want
            differs += want != other
    assert differs


@pytest.mark.parametrize("most", [1, 4, 9, 0.5])
def test_number_of_clusters(most):
    """The distance is the smallest that leaves no more; a sample does not depend on the others."""
    visual, signals = example(seed=2)
    stage = PACT(layer=2, keep=0.9, clusters=most, retrieve=0.0)
    kept, merge, *_ = stage.act(layer_context(stage, visual, **signals))
    for b in range(2):
        rows = visual[b].nonzero()[:, 0].tolist()
        of = [signals[n][b] for n in ("queries", "plain", "keys", "hidden")]
        count = most if isinstance(most, int) else round(most * len(rows))
        assert int(kept.mask[b].sum()) == count
        into = {j: int(merge.into[b, j]) for j in rows}
        steps = [2 * step / 4096 for step in range(1, 4096, 7)]
        found = (cards.pact(rows, *of, round(0.9 * len(rows)), d, 0.0) for d in steps)
        assert into in found
        alone = {name: x[b : b + 1] for name, x in signals.items()}
        kept_alone, *_ = stage.act(layer_context(stage, visual[b : b + 1], **alone))
        assert torch.equal(kept_alone.mask[0], kept.mask[b])


def test_a_budget_is_what_stays():
    """A sweep's budget is met by clusters: the candidates stay the paper's where they suffice."""
    for budget, want in (
        (192, dict(layer=1, clusters=137, keep=0.55)), (64, dict(layer=0, clusters=64, keep=0.55)),
        (400, dict(layer=1, clusters=375, keep=375)),
    ):
        (stage,) = plan_for_budget("pact", budget, tokens=576, num_layers=8).stages
        assert {name: getattr(stage, name) for name in want} == want


def test_members_are_near_and_centres_apart():
    visual, signals = example(seed=3)
    stage = PACT(layer=2, keep=1.0, proportional=False)
    kept, merge, _ = stage.act(layer_context(stage, visual, **signals))
    keys = torch.nn.functional.normalize(signals["keys"].transpose(1, 2).flatten(2), dim=2)
    apart = 1 - keys @ keys.transpose(1, 2)
    for b in range(2):
        centres = kept.mask[b].nonzero()[:, 0]
        between = apart[b][centres][:, centres] + torch.eye(len(centres))
        assert between.min() > 0.21 - 1e-6
        for j in visual[b].nonzero()[:, 0]:
            assert apart[b, j, merge.into[b, j]] <= 0.21 + 1e-6


def test_ties_and_protected_rows():
    """All alike: the first candidate is the only centre; protected rows are centres too."""
    visual, signals = example()
    signals = {n: torch.ones_like(x) for n, x in signals.items()}
    protected = torch.zeros_like(visual)
    protected[0, [9, 20]] = True
    stage = PACT(layer=2)
    kept, merge, *_ = stage.act(layer_context(stage, visual, protected=protected, **signals))
    assert kept.mask[0].nonzero()[:, 0].tolist() == [9, 20]
    assert kept.mask[1].nonzero()[:, 0].tolist() == [1]
    assert (merge.into[1][visual[1]] == 1).all()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_5_vl"])
@torch.no_grad()
def test_pact_in_the_decoder(family, attn):
    """Clusters, means, sizes and answers against a decoder by hand."""
    batch, net, options = samples(family), model(family, attn), dict(keep=0.8, distance=0.9)
    inputs = collate(family, batch)
    with mllm.patch(net, PACT(layer=2, **options)) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        kept = patched.ledger.kept(LAYERS - 1)
    for b, sample in enumerate(batch):
        text = ~sample.visual
        edits = Edits()
        if sample.pictures:
            seen = run(family, sample)
            rows = sample.visual.nonzero()[:, 0].tolist()
            into = cards.pact(
                rows, seen.plain_queries[2], seen.plain_keys[2], seen.keys[2], seen.hidden[2],
                max(1, round(0.8 * len(rows))), 0.9, 1.5,
            )  # fmt: skip
            sizes, values = torch.ones(len(sample.ids)), seen.hidden[2].clone()
            for c in (j for j in rows if into[j] == j):
                members = [j for j in rows if into[j] == c]
                sizes[c], values[c] = len(members), seen.hidden[2][members].mean(0)
            gone = torch.tensor([into.get(j, j) != j for j in range(len(sample.ids))])
            assert kept[b].tolist() == [i for i, j in enumerate(rows) if into[j] == j]
            assert len(kept[b]) < len(rows)
            edits = Edits(drop={2: gone}, write={2: lambda h, v=values: v},
                          bias={i: lambda n, s=sizes: s.log()[None, None].expand(1, n, -1)
                                for i in (2, 3)})  # fmt: skip
        want = run(family, sample, edits).logits
        equal(logits[b][text], want[text], f"sample {b}", 2e-4 * max(1.0, float(want.std())))


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    counts = check_family(family, PACT(layer=2, keep=0.6, distance=0.5))
    batch = samples(family)
    for sample, own in zip(batch, counts, strict=True):
        assert bool(sample.pictures) <= own[2] == own[3] <= round(0.6 * own[0])


def test_flash_and_bad_values():
    """Without weights it needs no mask."""
    assert "LogitBias" not in PACT(proportional=False).actions
    assert LogitBias.__name__ in PACT().actions
    for bad in (dict(distance=-1.0), dict(retrieve=-1.0), dict(clusters=0), dict(clusters=1.5)):
        with pytest.raises(PlanError):
            PACT(**bad)
    assert PACT().at_depth(28).layer == 4
