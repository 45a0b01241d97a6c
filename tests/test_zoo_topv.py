"""TopV: a long plain transport, and what it says."""

from __future__ import annotations

import pytest
import torch
import zoo_oracles as cards
from matrix import LAYERS
from zoo import FAMILIES, check_family, layer_context

import mllm
from mllm.compressors import TopV
from mllm.errors import PlanError


def example(rows=24, seed=0):
    """Two samples: a 3 x 5 grid, and two images of 2 x 3."""
    g = torch.Generator().manual_seed(seed)
    visual = torch.zeros(2, rows, dtype=torch.bool)
    visual[0, 2:17], visual[1, 1:7], visual[1, 9:15] = True, True, True
    place = {"image": torch.full((2, rows), -1), "row": torch.full((2, rows), -1.0),
             "col": torch.full((2, rows), -1.0)}  # fmt: skip
    for b, first, image, (height, width) in [(0, 2, 0, (3, 5)), (1, 1, 0, (2, 3)),
                                             (1, 9, 1, (2, 3))]:  # fmt: skip
        for i in range(height * width):
            place["image"][b, first + i] = image
            place["row"][b, first + i], place["col"][b, first + i] = divmod(i, width)
    hidden = [torch.randn(2, rows, 8, generator=g) for _ in range(2)]
    return visual, place, *hidden


def run(stage, visual, place, source, target, **more):
    ctx = layer_context(stage, visual, place, source=source, target=target, **more)
    return stage.score(ctx), stage.act(ctx)[0]


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0, "sigma": 2.0, "iterations": 1}], ids=str)
def test_topv_equals_its_description(options):
    visual, *rest = example()
    stage = TopV(layer=3, keep=5, **options)
    score, kept = run(stage, visual, *rest)
    assert kept.counts == [5, 10]
    for b in range(2):
        one = [x[b] if isinstance(x, torch.Tensor) else {k: v[b] for k, v in x.items()}
               for x in rest]  # fmt: skip
        want = cards.topv(visual[b], *one, **options)
        for i, s in want.items():
            assert score[b, i].item() == pytest.approx(s, rel=1e-3)
        assert max(want.values()) > 1.01 * min(want.values()), "the scores say something"
        best = cards.topv_kept(want, kept.counts[b])
        assert kept.mask[b].nonzero()[:, 0].tolist() == best


def test_exact_marginals_say_nothing():
    """The more iterations, the nearer all row sums are to each other: three must be few."""
    spread = []
    for iterations in (1, 3, 200):
        visual, *rest = example()
        score, _ = run(TopV(layer=3, iterations=iterations), visual, *rest)
        own = score[0][visual[0]]
        spread.append(float(own.max() - own.min()))
    assert spread[0] > spread[1] > 100 * spread[2]


@pytest.mark.parametrize("keep", [1, 2, 15, 1.0])
def test_budgets(keep):
    visual, *rest = example()
    _, kept = run(TopV(layer=3, keep=keep), visual, *rest)
    assert kept.mask.sum(1).tolist() == kept.counts
    assert kept.counts == ([15, 12] if isinstance(keep, float) else [keep, min(12, 2 * keep)])
    assert not (kept.mask & ~visual).any()


def test_ties_and_protected_rows():
    visual, place, source, _ = example()
    source, protected = torch.ones_like(source), torch.zeros_like(visual)
    protected[:, 12] = visual[:, 12]
    stage = TopV(layer=3, keep=4, beta=0.0, gamma=0.0, recover=0.0)
    _, kept = run(stage, visual, place, source, source, protected=protected)
    assert kept.mask[0].nonzero()[:, 0].tolist() == [2, 3, 4, 12]


def test_protected_rows_take_the_place_of_the_subsample():
    """As many as the budget: nothing else stays, and the budget is not exceeded."""
    visual, *rest = example()
    protected = torch.zeros_like(visual)
    protected[0, 3:8] = True
    _, kept = run(TopV(layer=3, keep=5, recover=0.4), visual, *rest, protected=protected)
    assert kept.mask[0].nonzero()[:, 0].tolist() == [3, 4, 5, 6, 7]


def test_published_layers():
    """Layers 0 to 2 of 32 see everything."""
    assert TopV().at_depth(32).layer == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    counts = check_family(family, TopV(layer=2, keep=5))
    assert [c[2:] for c in counts] == [[5] * (LAYERS - 2), [10] * (LAYERS - 2), [0] * 2]


def test_bad_values():
    for bad in (dict(recover=2.0), dict(sigma=0.0), dict(iterations=0)):
        with pytest.raises(PlanError):
            TopV(**bad)
    assert "topv" in {row["name"] for row in mllm.methods()}
