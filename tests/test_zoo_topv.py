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


@pytest.mark.parametrize("options", [
    {}, {"gamma": 1.0, "sigma": 2.0, "iterations": 1}, {"features": "raw"},
], ids=str)  # fmt: skip
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
            assert score[b, i].item() == pytest.approx(s, rel=1e-3, abs=1e-5)
        assert max(want.values()) > 0.01 + min(want.values()), "the scores say something"
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


def scene(side=12, seed=0):
    """A grid of one background with four tokens of a thing in its middle, as a decoder holds it.

    Rows of the stream differ in length, and what the MLP reads has been through a norm.
    """
    g = torch.Generator().manual_seed(seed)
    visual = torch.ones(1, side * side, dtype=torch.bool)
    at = torch.arange(side * side)
    place = {"image": torch.zeros_like(at)[None], "row": (at // side)[None].float(),
             "col": (at % side)[None].float()}  # fmt: skip
    thing = (at // side // 2 == 2) & (at % side // 2 == 3)
    directions = torch.eye(16)[thing.long()] + 0.05 * torch.randn(len(at), 16, generator=g)
    source = directions * (5 + 15 * torch.rand(len(at), 1, generator=g))
    return thing, visual, place, source[None], torch.nn.functional.normalize(source)[None]


def test_a_thing_stays_and_not_the_border():
    """Of streams as they are the plan takes up little but their lengths, which cancel."""
    thing, visual, *rest = scene()
    _, kept = run(TopV(layer=3, keep=20, recover=0.0), visual, *rest)
    assert kept.mask[0][thing].all()
    raw, _ = run(TopV(layer=3, keep=20, features="raw"), visual, *rest)
    place = torch.stack([rest[0]["row"], rest[0]["col"]], 2)[0]
    far = (place - place.mean(0)).norm(dim=1)
    assert torch.corrcoef(torch.stack([far, raw[0]]))[0, 1] > 0.7


def test_what_depends_on_the_source_alone_says_nothing():
    _, visual, *rest = scene()
    near, far = (run(TopV(layer=3, gamma=gamma), visual, *rest)[0] for gamma in (0.0, 0.5))
    assert torch.allclose(near, far, atol=1e-5) and near.std() > 1e-3


def test_a_plan_that_is_nearly_settled_is_not_lost_in_rounding():
    """Row sums are then next to one: in single precision, one itself would hide them."""
    _, visual, *rest = scene()
    options = {"epsilon": 3.0, "beta": 0.1}
    score, _ = run(TopV(layer=3, **options), visual, *rest)
    place, *hidden = rest
    one = [{name: value[0] for name, value in place.items()}, *(x[0] for x in hidden)]
    want = cards.topv(visual[0], *one, **options)
    assert 0 < max(want.values()) < 1e-8
    both = torch.stack([torch.tensor([want[i] for i in sorted(want)]), score[0].double()])
    assert torch.corrcoef(both)[0, 1] > 0.9


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
