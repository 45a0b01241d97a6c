"""Pooling: means of cells in loops, seats, and sizes."""

from __future__ import annotations

import itertools
import math

import pytest
import tiny
import torch
from families import KITS, samples
from zoo import FAMILIES, check_family, context

import mllm
from mllm.compressors import AdaptivePool, GGeM, PLLaVA, Pyramid
from mllm.compressors.pooling import seats, shares, stacks
from mllm.compressors.sanity import grid_within
from mllm.errors import PlanError
from mllm.tokens import Layout

PLAIN = Layout(((6, 8),))
TILED = Layout(((4, 4), (4, 7)), "rows")
VIDEO = Layout(((4, 6),) * 5, "end", video=True)


def window(i, n, m):
    """Rows of cell i of m over n rows."""
    return range(i * n // m, math.ceil((i + 1) * n / m))


def by_hand(x, size, to):
    """`[frames, rows, cols, width]` to `[cells, width]`, in loops."""
    return torch.stack([
        torch.stack([x[a, b, c] for a, b, c in itertools.product(
            *(window(i, n, m) for i, n, m in zip(cell, size, to, strict=True)))]).mean(0)
        for cell in itertools.product(*map(range, to))
    ])  # fmt: skip


def run(stage, layout, images=2, seed=0):
    x = torch.randn(images, layout.cells, 6, generator=torch.Generator().manual_seed(seed))
    keep, merge, write = stage.reduce(context(stage, features=x, grid=layout.places.cells()))
    order = write.order[0].masked_fill(~keep.mask[0], layout.cells)
    rows = order.argsort(stable=True)[: keep.counts[0]]
    return x, keep, merge.into, write.values[:, rows]


CASES = [
    (AdaptivePool(grid=(2, 3)), PLAIN, [(0, (1, 6, 8), (1, 2, 3))]),
    (AdaptivePool(grid=(12, 4)), PLAIN, [(0, (1, 6, 8), (1, 6, 4))]),
    (AdaptivePool(grid=(2, 2)), TILED, [(0, (1, 4, 4), (1, 2, 2)), (16, (1, 4, 7), (1, 2, 2))]),
    (AdaptivePool(grid=(2, 2)), VIDEO, [(0, (5, 4, 6), (5, 2, 2))]),
    (PLLaVA(frames=2, grid=(2, 3)), VIDEO, [(0, (5, 4, 6), (2, 2, 3))]),
    (PLLaVA(), VIDEO, [(0, (5, 4, 6), (5, 4, 6))]),
    (Pyramid(grids=("4x5", "2", "1")), PLAIN, [(0, (1, 6, 8), (1, 4, 5)),
                                               (0, (1, 6, 8), (1, 2, 2)),
                                               (0, (1, 6, 8), (1, 1, 1))]),
    (Pyramid(keep=20), PLAIN, [(0, (1, 6, 8), (1, 3, 5)), (0, (1, 6, 8), (1, 1, 2)),
                               (0, (1, 6, 8), (1, 1, 1))]),
    (Pyramid(keep=16, count=2), TILED, [(0, (1, 4, 4), (1, 2, 2)), (0, (1, 4, 4), (1, 1, 1)),
                                        (16, (1, 4, 7), (1, 2, 4)), (16, (1, 4, 7), (1, 1, 2))]),
    (GGeM(keep=12, p=(1.0,)), PLAIN, [(0, (1, 6, 8), (1, 3, 4))]),
]  # fmt: skip


@pytest.mark.parametrize("stage, layout, cells", CASES, ids=lambda x: getattr(x, "grids", None))
def test_pooled_tokens_are_means_of_cells(stage, layout, cells):
    x, keep, into, pooled = run(stage, layout)
    for i in range(2):
        want = torch.cat([
            by_hand(x[i, at : at + math.prod(size)].view(*size, 6), size, to)
            for at, size, to in cells
        ])  # fmt: skip
        assert keep.counts == [len(want)] * 2
        assert torch.allclose(pooled[i], want, atol=1e-6)
    seat = keep.mask[0].nonzero()[:, 0]
    assert len(seat) == len(want) and torch.equal(into[0, seat], seat)
    there = into[0] >= 0
    assert there.all() and keep.mask[0][into[0]].all(), "sizes sum to the number of sources"


def test_equal_cells_conserve_the_mean():
    for stage in (AdaptivePool(grid=(3, 4)), PLLaVA(grid=(2, 2)), GGeM(keep=12, p=(1.0,))):
        x, *_, pooled = run(stage, PLAIN)
        assert torch.allclose(pooled.mean(1), x.mean(1), atol=1e-6)


def test_generalised_means():
    """Between the average and the largest magnitude; signs survive."""
    x = torch.tensor([[[1.0, -1.0], [3.0, -3.0], [2.0, -2.0], [2.0, -2.0]]])
    got = []
    for p in (1.0, 3.0, 40.0):
        stage = GGeM(keep=1, p=(p,))
        grid = Layout(((2, 2),)).places.cells()
        write = stage.reduce(context(stage, features=x, grid=grid))[2]
        got.append(write.values[0, 3])
    assert torch.allclose(got[0], torch.tensor([2.0, -2.0]))
    cubes = ((1 + 27 + 8 + 8) / 4) ** (1 / 3)
    assert torch.allclose(got[1], torch.tensor([cubes, -cubes]))
    assert 2.8 < got[2][0] < 3 and -3 < got[2][1] < -2.8


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_powers_neither_overflow_nor_vanish(scale):
    """Towards the largest, however large or small features are; an empty channel has a gradient."""
    x = scale * torch.tensor([[[1.0, -1.0, 0.0], [3.0, -3.0, 0.0]] * 2])
    x.requires_grad_()
    grid = Layout(((2, 2),)).places.cells()
    write = GGeM(keep=1, p=(40.0,)).reduce(context(GGeM(), features=x, grid=grid))[2]
    pooled = write.values[0, 3]
    assert torch.allclose(pooled.detach() / scale, torch.tensor([2.95, -2.95, 0.0]), atol=0.01)
    pooled.sum().backward()
    assert x.grad.isfinite().all()


def test_seats_are_apart_and_in_the_middle():
    at, into = seats((1, 8, 8), ((1, 4, 4), (1, 2, 2), (1, 1, 1)))
    assert len(set(at.tolist())) == len(at) == 21
    for n, (size, first) in enumerate([((4, 4), 0), ((2, 2), 16), ((1, 1), 20)]):
        for cell in range(size[0] * size[1]):
            r, c = divmod(int(at[first + cell]), 8)
            inside = (r * size[0] // 8, c * size[1] // 8)
            assert inside == divmod(cell, size[1]), n
    assert sorted(set(into.tolist())) == sorted(at.tolist())


def test_shares():
    assert shares(10, [16, 32]) == [3, 7]
    assert shares(2, [4] * 5) == [1, 1, 0, 0, 0]
    assert shares(48, [16, 32]) == [16, 32]


def test_less_than_a_token_for_each_frame():
    *_, pooled = run(Pyramid(keep=3, count=1), VIDEO)
    assert pooled.shape[1] == 3
    *_, pooled = run(GGeM(keep=3), VIDEO)
    assert pooled.shape[1] == 3


@pytest.mark.parametrize("keep, sizes, total", [
    (192, [(12, 12), (6, 6), (3, 3), (1, 1)], 190),
    (128, [(9, 11), (4, 5), (2, 2), (1, 1)], 124),
    (64, [(7, 7), (3, 3), (1, 1)], 59),
    (1, [(1, 1)], 1),
    (576, [(21, 21), (10, 10), (5, 5), (2, 2)], 570),
])  # fmt: skip
def test_pyramids_at_the_published_budgets(keep, sizes, total):
    grids = stacks(Layout(((24, 24),)).places.cells())
    (levels,) = Pyramid(keep=keep).levels(grids)
    assert [level[1:] for level in levels] == sizes
    assert sum(r * c for r, c in sizes) == total <= keep


def test_tiled_budgets():
    """LLaVA-NeXT: 2880 tokens in five equal shares, 640, 320 and 160 at most."""
    grids = stacks(Layout(((24, 24), (48, 48)), "rows").places.cells())
    for keep in (640, 320, 160):
        for stage in (Pyramid(keep=keep), GGeM(keep=keep)):
            counts = [sum(math.prod(x) for x in levels) for levels in stage.levels(grids)]
            assert counts[0] <= keep / 5 and keep * 0.8 < sum(counts) <= keep


@pytest.mark.parametrize("family", [*FAMILIES, "qwen2_5_vl_video", pytest.param(
    "llava_onevision_video", marks=pytest.mark.slow)])  # fmt: skip
@pytest.mark.parametrize("stage", [
    Pyramid(keep=7), PLLaVA(frames=1, grid=(2, 2)),
    pytest.param(GGeM(keep=7), marks=pytest.mark.slow),
    pytest.param(AdaptivePool(grid=(2, 2)), marks=pytest.mark.slow),
], ids=lambda s: s.info.name)  # fmt: skip
def test_families(family, stage):
    counts = check_family(family, stage)
    batch = samples(family)
    for sample, own in zip(batch, counts, strict=True):
        most = sum(7 if hasattr(stage, "keep") else 4 * max(1, p.tokens // 16 + p.frames)
                   for p in sample.pictures)  # fmt: skip
        assert len(set(own)) == 1 and bool(sample.pictures) <= own[0] <= most
    assert KITS[family]


@torch.no_grad()
def test_the_sequence_of_a_pyramid():
    """190 tokens of 576 in every layer, the levels one after another."""
    net = tiny.llava(layers=1, side=24)
    with mllm.patch(net, "pyramid:keep=192") as patched:
        net(**tiny.collate(tiny.samples("alone", side=24)), logits_to_keep=1)
        assert len(patched.ledger.kept(0)[0]) == 190


@pytest.mark.parametrize("make", [
    lambda: AdaptivePool(grid=(12,)), lambda: AdaptivePool(grid=(0, 3)), lambda: GGeM(p=(0.0,)),
    lambda: Pyramid(count=0), lambda: Pyramid(grids=("3y4",)), lambda: PLLaVA(frames=0),
    lambda: run(Pyramid(grids=("6x8", "1")), PLAIN),
])  # fmt: skip
def test_bad_sizes(make):
    with pytest.raises(PlanError):
        make()


@pytest.mark.parametrize("grid", [(6, 8), (40, 3), (3, 40), (9, 1), (1, 9)], ids=str)
def test_a_grid_is_within_its_budget(grid):
    """Of a tall picture too, at a budget of a few tokens."""
    for budget in range(1, grid[0] * grid[1] + 1):
        rows, cols = grid_within(budget, grid)
        assert 1 <= rows <= grid[0] and 1 <= cols <= grid[1] and rows * cols <= budget
    assert grid_within(grid[0] * grid[1], grid) == grid
