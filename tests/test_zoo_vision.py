"""Methods before the decoder on real classes: what stays is what a plain reading of the card says.

The reference looks at one picture at a time, with attention written out, and decides by loops.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import tiny
import torch
import zoo_oracles as cards
from families import KITS, Sample, collate, model, samples
from family_oracles import as_tokens, base_name, dense, features, reference, seen
from matrix import equal
from torch import Tensor
from zoo import context

import mllm
from mllm.compressors import FasterVLM, HiRED, VScan, VScanVision
from mllm.compressors.base import Context, Grid
from mllm.errors import PlanError
from mllm.plan import get_method
from mllm.tokens import Layout, Tiling

FAMILIES = ["llava", "llava_next", "llava_onevision", "qwen2_5_vl", "gemma3", "qwen2_vl_video"]


def parts(family: str, sample: Sample, ordinal: int) -> list[int]:
    """The picture of the tower that each cell comes from, by transformers' own packing."""
    picture = sample.pictures[ordinal]
    n = len(KITS[family].cells(picture))
    if picture.frames:
        return [i * picture.frames // n for i in range(n)]
    if not family.startswith("llava_") or picture.end:
        return [0] * n
    tiles = sum(1 for tile in picture.fields["pixel_values"][0] if tile.any())
    marks = torch.arange(tiles).float().view(-1, 1, 1).expand(-1, 16, 1)
    found = as_tokens(family, reference(family), marks, picture)[:, 0]
    return found.round().long().tolist()


#: Cells that stay of a picture, and features instead of the model's.
Reference = Callable[[str, Sample, int], tuple[list[int], Tensor | None]]


def fastervlm(family: str, sample: Sample, ordinal: int) -> tuple:
    score = dict(enumerate(seen(family, sample, ordinal).score.tolist()))
    return cards.by_tile(score, parts(family, sample, ordinal), 5), None


def prumerge(keep, **options) -> Reference:
    def choose(family: str, sample: Sample, ordinal: int) -> tuple:
        block = {"qwen2_5_vl": 1}.get(base_name(family), -1)
        told = seen(family, sample, ordinal, block, joint=True)
        x = features(family, sample)[ordinal][KITS[family].cells(sample.pictures[ordinal])]
        if family == "llava":  # before the projector
            net, pixels = reference(family).model, sample.pictures[ordinal].fields["pixel_values"]
            x = net.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
        out, kept = cards.prumerge(
            x, told.score.tolist(), told.keys, parts(family, sample, ordinal), keep, **options
        )
        out = torch.stack(out)
        if family == "llava":
            out = net.multi_modal_projector(out)
        full = features(family, sample)[ordinal]
        full = full[KITS[family].cells(sample.pictures[ordinal])].clone()
        full[kept] = out.to(full)
        return sorted(kept), full

    return choose


def places(family: str, sample: Sample, ordinal: int) -> tuple[list, list]:
    """Row and column of every cell in its grid, and the size of that grid."""
    picture = sample.pictures[ordinal]
    n, (rows, cols) = len(KITS[family].cells(picture)), picture.grid
    if family.startswith("llava_") and not picture.end:
        at = [(i // 4, i % 4) for i in range(16)]
        at += [(i // cols, i % cols) for i in range(n - 16)]
        return at, [(4, 4)] * 16 + [(rows, cols)] * (n - 16)
    at = [(i % (rows * cols) // cols, i % cols) for i in range(n)]
    return at, [(rows, cols)] * n


def vscan_vision(family: str, sample: Sample, ordinal: int) -> tuple:
    first = 1 if base_name(family) == "qwen2_5_vl" else 0  # the only block that sees everything
    local = seen(family, sample, ordinal, first).score.tolist()
    deep = seen(family, sample, ordinal).score.tolist()
    x = features(family, sample)[ordinal][KITS[family].cells(sample.pictures[ordinal])].clone()
    kept, means, _ = cards.vscan(
        x, local, deep, parts(family, sample, ordinal), *places(family, sample, ordinal), 7, 2
    )
    for i, mean in means.items():
        x[i] = mean
    return kept, x


def hired(family: str, sample: Sample, ordinal: int) -> tuple:
    picture, part = sample.pictures[ordinal], parts(family, sample, ordinal)
    if not family.startswith("llava_") or picture.end:
        part = [0] * len(part)
    early = seen(family, sample, ordinal, 0).score.tolist()
    tiles = (2, 2) if max(part) > 1 else (1, 1)
    return cards.hired(early, seen(family, sample, ordinal).score.tolist(), part, tiles, 7), None


def vispruner(family: str, sample: Sample, ordinal: int) -> tuple:
    picture = sample.pictures[ordinal]
    x = features(family, sample)[ordinal][KITS[family].cells(picture)]
    if family == "llava":  # before the projector
        net, pixels = reference(family).model, picture.fields["pixel_values"]
        x = net.vision_tower(pixels, output_hidden_states=True).hidden_states[-2][0, 1:]
    score = seen(family, sample, ordinal).score.tolist()
    return cards.vispruner(score, x, parts(family, sample, ordinal), 7, 2), None


METHODS: dict[str, tuple[str, Reference]] = {
    "fastervlm": ("fastervlm:keep=5:positions=original", fastervlm),
    "prumerge": (
        "prumerge:neighbours=3:positions=original", prumerge(None, neighbours=3)
    ),
    "prumergeplus": (
        "prumergeplus:keep=7:neighbours=3:positions=original",
        prumerge(7, neighbours=3, plus=True),
    ),
    "vscan_vision": (
        "vscan_vision:keep=7:window=2:local=0.0:positions=original", vscan_vision
    ),
    "vispruner": ("vispruner:keep=7:step=2:positions=original", vispruner),
    "hired": ("hired:keep=7:positions=original", hired),
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "family, attn",
    [("llava", "sdpa"), ("llava_next", "eager"), ("qwen2_5_vl", "sdpa"), ("gemma3", "sdpa")]
    + [pytest.param(f, a, marks=pytest.mark.slow) for f in FAMILIES for a in ("sdpa", "eager")],
)  # fmt: skip
@torch.no_grad()
def test_methods_on_real_classes(name, family, attn):
    """Images of several sizes in one padded batch: the same rows and logits as one by one."""
    spec, choose = METHODS[name]
    if family == "llava_onevision":
        if "tiles" not in {f.name for f in dataclasses.fields(get_method(name))}:
            pytest.skip("its tiles are made smaller: a cell may show two of them")
        spec = spec.replace(":positions", ":tiles=false:positions")
    batch = samples(family, seed=2)
    inputs, net = collate(family, batch), model(family, attn)
    with mllm.patch(net, spec) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        kept = patched.ledger.kept(0)
    for b, sample in enumerate(batch):
        stay, vectors, at = [], features(family, sample) if sample.pictures else [], 0
        for i, picture in enumerate(sample.pictures):
            cells = KITS[family].cells(picture)
            chosen, own = choose(family, sample, i)
            stay += [at + cells[t] for t in chosen]
            if own is not None:
                vectors[i][cells] = own
            at += picture.tokens
        stay = sorted(stay + KITS[family].separators(sample, stay))
        assert kept[b].tolist() == stay, f"sample {b}"
        want = dense(
            family, sample, None, kept=torch.tensor(stay).long() if stay else None,
            vectors=torch.cat(vectors) if stay else None,
        ).logits  # fmt: skip
        scale = max(1.0, float(want.std()))
        equal(logits[b][-1] / scale, want[-1] / scale, f"sample {b}", 2e-4)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl_video", "llava"])
def test_tokens_know_their_tile(family):
    """`part` of every cell against the packing of transformers."""
    kit = KITS[family]
    net = mllm.patch(model(family), "stride:keep=3")
    for size in (0, 1, 2):
        sample = samples(family, (((size,), 6),))[0]
        fields = kit.join([sample.pictures])
        own = net.kinds["video" if sample.pictures[0].frames else "image"]
        (layout,) = own.layouts(fields)
        places = layout.places.cells()
        assert places.part.tolist() == parts(family, sample, 0)
        assert places.parts == max(places.part.tolist()) + 1
    net.remove()


@torch.no_grad()
def test_equal_scores_go_to_the_earlier_token():
    """Queries of zero look at everything alike: the same choice in any batch and order."""
    for name, (spec, _) in METHODS.items():
        net, batch = model("llava_next"), samples("llava_next")
        for module in net.model.vision_tower.modules():
            if hasattr(module, "q_proj"):
                module.q_proj.weight.zero_()
                module.q_proj.bias.zero_()
        with mllm.patch(net, spec) as patched:
            net(**collate("llava_next", batch))
            together = [k.tolist() for k in patched.ledger.kept(0)]
            net(**collate("llava_next", batch[::-1]))
            assert [k.tolist() for k in patched.ledger.kept(0)] == together[::-1], name
            net(**collate("llava_next", batch[1:2]))
            assert patched.ledger.kept(0)[0].tolist() == together[1], name


def reduce(stage, tiles: int, side: int, seed: int = 0, **signals):
    """Run a method on made-up signals of one picture of `tiles` tiles."""
    grid = (side, side)
    if tiles == 1:
        layout = Layout((grid,))
    else:
        rows = math.isqrt(tiles - 1)
        cols = (tiles - 1) // rows
        view = (rows * side, cols * side)
        layout = Layout((grid, view), "rows", Tiling(rows, cols, *view))
    n = layout.cells
    g = torch.Generator().manual_seed(seed)
    given = {}
    for name, signal in stage.reads().items():
        if isinstance(signal, Grid):
            given[name] = layout.places.cells()
        else:
            given[name] = signals.get(name, torch.rand(1, n, generator=g))
    ctx = Context(
        stage, given, grid=grid if tiles == 1 else None,
        valid=torch.ones(1, n, dtype=torch.bool), counts=[n],
    )  # fmt: skip
    return stage.reduce(ctx), layout


@pytest.mark.parametrize("tiles, keep", [(1, 192), (1, 128), (1, 64), (5, 640), (5, 320), (5, 160)])
def test_fastervlm_at_published_budgets(tiles, keep):
    """All of 576; of LLaVA-NeXT's five tiles 128, 64 and 32 each."""
    (keeping,), layout = reduce(FasterVLM(keep=keep), tiles, 24)
    assert int(keeping.mask.sum()) == keep == keeping.counts[0]
    part = layout.places.cells().part
    assert part[keeping.mask[0]].bincount().tolist() == [keep // tiles] * tiles


@pytest.mark.parametrize("average, first, second", [(192, 288, 96), (128, 192, 64), (64, 96, 32)])
@torch.no_grad()
def test_vscan_has_the_published_budgets(average, first, second):
    """1.5 times the budget enters, a third of it stays for the second half; half is local."""
    vision, llm = VScan(keep=average).expand()
    assert (vision.keep, llm.keep) == (first, second)
    assert llm.at_depth(32).layer == 16 and llm.at_depth(28).layer == 14
    assert first * 16 + second * 16 == average * 32
    share = VScan(keep=average / 576).expand()
    assert round(share[0].keep * 576) == first and round(share[1].keep * first) == second
    x = torch.randn(1, 576, 8, generator=torch.Generator().manual_seed(0))
    one_way = dict(local=torch.arange(576.0)[None], features=x)
    one_way["global"] = torch.arange(576.0).flip(0)[None]
    (keep, merge, write), _ = reduce(vision, 1, 24, **one_way)
    assert int(keep.mask.sum()) == first == keep.counts[0]
    grid = keep.mask.view(24, 24)
    low = grid.view(4, 6, 4, 6).sum((1, 3))
    assert int(low.min()) >= first // 32, "every window has its share"
    assert int(merge.into.unique().numel()) <= first
    # Means conserve mass: weighted by their members they add up to the picture.
    size = torch.zeros(576).index_add(0, merge.into[0], torch.ones(576))
    assert float(size.sum()) == 576
    total = (write.values[0] * size[:, None]).sum(0)
    assert torch.allclose(total, x[0].sum(0), atol=1e-3)


@pytest.mark.parametrize("keep", [640, 320, 160])
@torch.no_grad()
def test_vscan_on_tiles(keep):
    """LLaVA-NeXT: each of five tiles keeps its share, and merges within itself."""
    x = torch.randn(1, 2880, 8, generator=torch.Generator().manual_seed(0))
    (keeping, merge, _), layout = reduce(VScanVision(keep=keep), 5, 24, features=x)
    part = layout.places.cells().part
    assert part[keeping.mask[0]].bincount().tolist() == [keep // 5] * 5
    assert torch.equal(part[merge.into[0]], part)


def test_a_panorama_has_few_windows_behind_the_base_view():
    """Three flat tiles: each tile shares out its own part, so that the budget is met."""
    layout = Layout(((24, 24), (7, 72)), "rows", Tiling(1, 3, 7, 72))
    places, n = layout.places.cells(), layout.cells
    g, stage = torch.Generator().manual_seed(0), VScanVision(keep=640)
    ctx = Context(
        stage,
        {"features": torch.randn(1, n, 8, generator=g), "local": torch.rand(1, n, generator=g),
         "global": torch.rand(1, n, generator=g), "grid": places},
        valid=torch.ones(1, n, dtype=torch.bool), counts=[n],
    )  # fmt: skip
    keep = stage.reduce(ctx)[0]
    assert int(keep.mask.sum()) == 640 == keep.counts[0]
    assert places.part[keep.mask[0]].bincount().tolist() == [160] * 4


def test_the_local_block_is_a_share_of_the_depth():
    """A whole number too: 1 is the last block, not the second."""
    (stage,) = mllm.Plan.from_spec("vscan_vision:local=1").stages
    assert isinstance(stage.reads()["local"].block, float)


@pytest.mark.parametrize("spec", [
    "visionzip:keep=8:cls=false", "prumerge:neighbours=3", "prumerge:keep=8:merge=mean",
    "prumergeplus:keep=8", "vscan_vision:keep=8:window=2", "vmtc:keep=8:primary=0.5",
])  # fmt: skip
def test_merged_tokens_have_a_gradient(spec):
    """What goes into another token is trained through it, as VisionZip does it."""
    (stage,) = mllm.Plan.from_spec(spec).stages
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, 36, 8, generator=g, requires_grad=True)
    keys = torch.randn(1, 36, 8, generator=g)
    (keep, merge, write), _ = reduce(stage, 1, 6, features=x, keys=keys)
    write.values[keep.mask].sum().backward()
    goes = (merge.into != torch.arange(36)) & (merge.into >= 0)
    assert goes.any() and (x.grad.abs().sum(2)[goes] > 0).all()


@pytest.mark.parametrize("method, bad", [
    ("vispruner", dict(step=0)), ("vispruner", dict(important=1.5)), ("hired", dict(alpha=1.5)),
    ("hired", dict(alpha=-0.5)), ("prumerge", dict(neighbours=-1)),
    ("prumergeplus", dict(important=1.5)), ("vscan_vision", dict(window=0)),
    ("vscan_vision", dict(local=1.5)), ("vscan", dict(window=0)),
], ids=str)  # fmt: skip
def test_bad_values(method, bad):
    """Refused when the plan is written: the loop of VisPruner would not end."""
    with pytest.raises(PlanError) as caught:
        get_method(method)(**bad)
    assert caught.value.argument == next(iter(bad))


@pytest.mark.parametrize("tiles, keep", [(1, 128), (1, 64), (1, 32), (5, 640), (5, 160)])
@torch.no_grad()
def test_vispruner_at_published_budgets(tiles, keep):
    """Exactly the budget, half of it by attention: of five tiles each has its share of those."""
    x = torch.randn(1, 576 * tiles, 8, generator=torch.Generator().manual_seed(0))
    stage = get_method("vispruner")(keep=keep)
    g = torch.Generator().manual_seed(1)
    attention = torch.rand(1, 576 * tiles, generator=g)
    (keeping,), layout = reduce(stage, tiles, 24, features=x, attention=attention)
    assert int(keeping.mask.sum()) == keep == keeping.counts[0]
    part = layout.places.cells().part
    for p in range(tiles):
        own = (part == p).nonzero()[:, 0]
        best = own[attention[0, own].argsort(descending=True)[: keep // 2 // tiles]]
        assert keeping.mask[0, best].all()


@pytest.mark.parametrize("keep, full", [(640, 320), (320, 160), (160, 80), (0.2, 288)])
def test_hired_has_the_published_split(keep, full):
    """Half for the base view, the other by what it marks in each quarter; nothing is left over."""
    early = torch.zeros(1, 2880)
    base = torch.arange(576).view(24, 24)
    early[0, base[:12, 12:].flatten()] = 2.0  # the whole second tile is marked
    early[0, base[12:, :12].flatten()] = torch.arange(144.0) / 1e3 + 1  # and the third
    (keeping,), layout = reduce(HiRED(keep=keep), 5, 24, early=early)
    counts = layout.places.cells().part[keeping.mask[0]].bincount(minlength=5).tolist()
    total = 576 if keep == 0.2 else keep
    assert sum(counts) == total == keeping.counts[0]
    rest = total - full
    assert counts == [full, 0, rest / 2, rest / 2, 0]


@torch.no_grad()
def test_prumerge_adapts_to_the_picture():
    """Of 576 tokens the outliers stay, or four times as many, and one for the rest."""
    g = torch.Generator().manual_seed(0)
    attention = torch.rand(1, 576, generator=g) * 1e-4
    attention[0, torch.randperm(576, generator=g)[:36]] = 0.01
    keys, x = torch.randn(1, 576, 8, generator=g), torch.randn(1, 576, 8, generator=g)
    for name, want in (("prumerge", 36 + 1), ("prumergeplus", None)):
        (keep, merge, write), _ = reduce(
            get_method(name)(), 1, 24, attention=attention, keys=keys, features=x
        )
        kept = int(keep.mask.sum())
        assert keep.counts == [kept]
        if want is None:  # int(int(576 / 36) / 3) = 5: 115 places, some of them taken
            assert 36 + 115 - 36 < kept <= 36 + 115 + 1
        else:
            assert kept == want
        # Everything is accounted for: what goes is in the token for the rest.
        into = merge.into[0]
        assert into[keep.mask[0]].tolist() == keep.mask[0].nonzero()[:, 0].tolist()
        (seat,) = set(into[~keep.mask[0]].tolist())
        gone = (~keep.mask[0]).clone()
        gone[seat] = True
        assert torch.allclose(write.values[0, seat], attention[0, gone] @ x[0, gone], atol=1e-6)
        assert int(write.order[0, seat]) == kept - 1, "it stands last"


@pytest.mark.parametrize("name", ["prumerge", "prumergeplus"])
@pytest.mark.parametrize("tiles, keep", [(1, 192), (1, 128), (1, 64), (5, 640), (5, 320), (5, 160)])
@torch.no_grad()
def test_prumerge_at_published_budgets(name, tiles, keep):
    n = 576 * tiles
    g = torch.Generator().manual_seed(0)
    keys, x = torch.randn(1, n, 8, generator=g), torch.randn(1, n, 8, generator=g)
    (keeping, *_), _ = reduce(get_method(name)(keep=keep), tiles, 24, keys=keys, features=x)
    assert int(keeping.mask.sum()) == keep == keeping.counts[0]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [1, 16])
@torch.no_grad()
def test_budgets_of_one_and_of_all(name, keep):
    """Exactly the budget per image, whatever the sizes of its tiles."""
    for family in ("llava", "llava_next"):
        net, batch = model(family), samples(family)
        stage = mllm.Plan.from_spec(METHODS[name][0]).stages[0].replace(keep=keep)
        with mllm.patch(net, stage) as patched:
            net(**collate(family, batch))
            kept = patched.ledger.kept(0)
        for b, sample in enumerate(batch):
            at, cells = 0, []
            for picture in sample.pictures:
                cells += [at + i for i in KITS[family].cells(picture)]
                at += picture.tokens
            assert len(set(kept[b].tolist()) & set(cells)) == keep * len(sample.pictures)


@pytest.mark.parametrize("merge, want", [("sum", 150.0), ("mean", 300.0 * 287 / 575)])
@torch.no_grad()
def test_visionzip_merges_many_tokens_in_half_precision(merge, want):
    """The sum of 574 members is more than fp16 can hold, their mean is not."""
    x = torch.zeros(1, 576, 4, dtype=torch.float16)
    x[:, 289:] = 300.0
    stage = get_method("visionzip")(keep=2, dominant=0.5, cls=False, merge=merge)
    keep, _, write = stage.reduce(
        context(stage, features=x, keys=torch.ones_like(x), attention=-torch.arange(576.0)[None])
    )
    assert keep.mask.nonzero()[:, 1].tolist() == [0, 1]
    assert torch.allclose(write.values[0, 1].float(), torch.full((4,), want), rtol=0.01)


@torch.no_grad()
def test_vscan_above_two_thirds_of_a_picture():
    """The first stage leaves everything, and the second what the average asks for at most."""
    net = model("llava")
    with mllm.patch(net, "vscan:keep=12:window=2:layer=2") as patched:
        net(**collate("llava", samples("llava", "alone")))
        assert [len(patched.ledger.kept(i)[0]) for i in range(4)] == [16, 16, 6, 6]
    with pytest.raises(PlanError, match="vscan: keep=17 is more than the 16 visual tokens"):
        mllm.patch(net, "vscan:keep=17")
