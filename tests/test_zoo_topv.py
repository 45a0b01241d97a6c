"""TopV: a long plain transport, and what it says."""

from __future__ import annotations

import math

import pytest
import torch
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


def by_hand(visual, place, source, target, stage):
    """The scores of one sample, in double precision and loops."""
    rows = [r for r in range(len(visual)) if visual[r]]
    at = {r: (float(place["row"][r]), float(place["col"][r])) for r in rows}
    image = {r: int(place["image"][r]) for r in rows}
    pairs = [(i, j) for i in rows for j in rows if image[i] == image[j]]
    middle = {}
    for m in set(image.values()):
        own = [at[r] for r in rows if image[r] == m]
        middle[m] = tuple(max(p[axis] for p in own) / 2 for axis in (0, 1))
    source, target = source.double(), target.double()
    terms = [
        {(i, j): float((source[i] - target[j]).square().sum()) for i, j in pairs},
        {(i, j): 1 - math.exp(-math.dist(at[i], at[j]) ** 2 / (2 * stage.sigma**2))
         for i, j in pairs},
        {(i, j): math.dist(at[i], middle[image[i]]) for i, j in pairs},
    ]  # fmt: skip
    cost = dict.fromkeys(pairs, 0.0)
    for weight, term in zip((stage.alpha, stage.beta, stage.gamma), terms, strict=True):
        low, high = min(term.values()), max(term.values())
        for pair in pairs:
            cost[pair] += weight * (term[pair] - low) / (high - low)
    kernel = {pair: math.exp(-c / stage.epsilon) for pair, c in cost.items()}
    mass = {i: 1 / sum(image[j] == image[i] for j in rows) for i in rows}
    u, v = dict.fromkeys(rows, 1.0), dict.fromkeys(rows, 1.0)
    for _ in range(stage.iterations):
        u = {i: mass[i] / sum(kernel[i, j] * v[j] for j in rows if (i, j) in kernel) for i in rows}
        v = {j: mass[j] / sum(kernel[i, j] * u[i] for i in rows if (i, j) in kernel) for j in rows}
    return {i: u[i] * sum(kernel[i, j] * v[j] for j in rows if (i, j) in kernel) / mass[i]
            for i in rows}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"gamma": 1.0, "sigma": 2.0, "iterations": 1}], ids=str)
def test_topv_equals_its_description(options):
    visual, *rest = example()
    stage = TopV(layer=3, keep=5, **options)
    score, kept = run(stage, visual, *rest)
    assert kept.counts == [5, 10]
    for b in range(2):
        one = [x[b] if isinstance(x, torch.Tensor) else {k: v[b] for k, v in x.items()}
               for x in rest]  # fmt: skip
        want = by_hand(visual[b], *one, stage)
        for i, s in want.items():
            assert score[b, i].item() == pytest.approx(s, rel=1e-3)
        assert max(want.values()) > 1.01 * min(want.values()), "the scores say something"
        count, recovered = kept.counts[b], round(0.2 * kept.counts[b])
        best = sorted(want, key=lambda i: -want[i])[: count - recovered]
        others = [i for i in want if i not in best]
        best += [others[i] for i in range(len(others))
                 if (i + 1) * recovered // len(others) > i * recovered // len(others)]  # fmt: skip
        assert kept.mask[b].nonzero()[:, 0].tolist() == sorted(best)


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
