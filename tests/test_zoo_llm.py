"""Methods inside the decoder on real classes: what stays is what a plain reading of the card says.

The reference runs one unpadded sample by hand, cut by cut, and decides by loops.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import tiny
import torch
import zoo_oracles as cards
from acting import acting
from families import KITS, LAYERS, Sample, collate, model, samples
from family_oracles import features
from layer_oracle import Edits, Seen, run
from matrix import equal
from oracles import rotate
from torch import Tensor

import mllm
from mllm.compressors import BTP, PACT, VTW, Feather, PyramidDrop, SparseVLM
from mllm.compressors.sparsevlm import density_peaks
from mllm.errors import PlanError
from mllm.plan import keep_for_average

FAMILIES = ["llava", "llava_next", "gemma3", "qwen2_5_vl", "qwen2_vl_video"]


@dataclass
class Here:
    """What a reference may look at before a layer, of one sample.

    Attributes:
        seen: a run with the cuts of earlier layers.
        layer: the layer.
        rows: rows of the visual tokens that arrive, without separators.
        entered: visual tokens that entered the decoder.
        sample: the sample.
        embeds: `[n, width]`, what enters the decoder.
        family: its name.
    """

    seen: Seen
    layer: int
    rows: list[int]
    entered: int
    sample: Sample
    embeds: Tensor
    family: str

    @property
    def last(self) -> int:
        return len(self.sample.ids) - 1

    @property
    def text(self) -> list[int]:
        """Text behind the first visual token."""
        visual = self.sample.visual
        return [i for i in range(int(visual.int().argmax()), len(visual)) if not visual[i]]

    def share(self, keep: int | float) -> int:
        return cards.share(keep, self.entered, len(self.sample.pictures))


#: Rows that stay, and new vectors by row.
Reference = Callable[[Here], tuple[Sequence[int], dict[int, Tensor]]]


def pyramiddrop(here: Here) -> tuple:
    row = here.seen.weights[here.layer][:, here.last].mean(0)
    keep = {1: 0.5, 2: 3, 3: 0.125}[here.layer]
    return cards.best({i: float(row[i]) for i in here.rows}, here.share(keep)), {}


def sparsevlm(gravity: bool, **options) -> Reference:
    def choose(here: Here) -> tuple:
        visual = cells(here.family, here.sample)
        rating = cards.raters(here.embeds, visual, here.text)
        keep = {1: 9, 2: 5, 3: 0.125}[here.layer]
        ones, before = None, here.layer - 1
        if gravity:
            cos, sin = here.seen.rotary[before].chunk(2, -1)
            ones = rotate(torch.ones_like(cos), cos, sin)
        return cards.sparsevlm(
            here.seen.weights[before], here.seen.hidden[here.layer], here.rows, rating,
            min(len(here.rows), here.share(keep)), ones=ones, **options,
        )[:2]  # fmt: skip

    return choose


def vscan_llm(here: Here) -> tuple:
    row = here.seen.bare[here.layer].softmax(-1)[:, here.last].mean(0)
    return cards.best({i: float(row[i]) for i in here.rows}, here.share(5)), {}


def vtw(here: Here) -> tuple:
    return [], {}


def feather(here: Here) -> tuple:
    row = here.seen.bare[here.layer - 1].softmax(-1)[:, here.last].mean(0)
    score = {i: float(row[i]) for i in here.rows}
    if here.layer == 1:
        everything = cells(here.family, here.sample)
        for i, (r, c) in zip(everything, places(here.family, here.sample), strict=True):
            if i in score and r % 2 == c % 2 == 1:
                score[i] += 10
    return cards.best(score, here.share({1: 0.4, 3: 2}[here.layer])), {}


def fitprune(here: Here) -> tuple:
    keep = here.share({1: 0.6, 2: 3, 3: 0.125}[here.layer])
    return cards.fitprune(here.seen.weights[here.layer - 1], here.rows, here.text, keep), {}


#: Two cuts of BTP, and none behind them.
BTP_SHARES = {
    "spatial": (0.4, 0.0), "attention": (0.4, 0.5), "diversity": (0.3, 0.4), "over": (2.0, 1.5)
}  # fmt: skip


def btp(here: Here) -> tuple:
    if here.layer == 3:
        return [], {}
    row = here.seen.raw[here.layer - 1][:, here.last].mean(0)
    score = {i: float(row[i]) for i in here.rows}
    visual = cells(here.family, here.sample)
    where = dict(zip(visual, grids(here.family, here.sample), strict=True))
    return cards.btp(
        here.rows, score, here.seen.hidden[here.layer], where,
        min(len(here.rows), here.share({1: 0.6, 2: 5}[here.layer])),
        **{name: of[here.layer - 1] for name, of in BTP_SHARES.items()},
    ), {}  # fmt: skip


def grids(family: str, sample: Sample) -> list[tuple]:
    """Picture, view or frame, row and column of every cell of a sample."""
    found, place = [], places(family, sample)
    for number, picture in enumerate(sample.pictures):
        for i in range(len(KITS[family].cells(picture))):
            rows, cols = picture.grid
            part = int(i >= 16) if family == "llava_next" else i // (rows * cols)
            found.append((number, part, *place[len(found)]))
    return found


def places(family: str, sample: Sample) -> list[tuple[int, int]]:
    """Row and column of every cell of a sample."""
    found = []
    for picture in sample.pictures:
        n, (rows, cols) = len(KITS[family].cells(picture)), picture.grid
        if family == "llava_next":
            found += [divmod(i, 4) for i in range(16)]
            n -= 16
        found += [divmod(i % (rows * cols), cols) for i in range(n)]
    return found


#: Spec, layers of its cuts, reference.
METHODS: dict[str, tuple[str, Sequence[int], Reference]] = {
    "pyramiddrop": (
        "pyramiddrop:keep=0.5/3/0.125:positions=original", (1, 2, 3), pyramiddrop
    ),
    "sparsevlm": (
        "sparsevlm:keep=9/5/0.125:cluster=2:recycle=0.5:positions=original", (1, 2, 3),
        sparsevlm(False, recycle=0.5, per_cluster=2),
    ),
    "vtw": ("vtw:layer=2", (2,), vtw),
    "feather": ("feather:layers=1/3:keep=0.4/2:stride=2", (1, 3), feather),
    "fitprune": (
        "fitprune:layers=1/2/3:keep=0.6/3/0.125", (1, 2, 3), fitprune
    ),
    "btp": (
        "btp:layers=1/2:keep=0.6/5:end=3:" + ":".join(
            f"{name}={'/'.join(map(str, of))}" for name, of in BTP_SHARES.items()
        ), (1, 2, 3), btp
    ),
    "vscan_llm": ("vscan_llm:keep=5:rope=false:positions=original", (2,), vscan_llm),
    "sparsevlm 2.0": (
        "sparsevlm:version=2.0:keep=9/5/0.125", (1, 2, 3),
        sparsevlm(True, recycle=0.0, per_cluster=10, heads=14 / 32),
    ),
}  # fmt: skip


def cells(family: str, sample: Sample) -> list[int]:
    """Rows of visual tokens that are no separators."""
    rows, found, at = sample.visual.nonzero()[:, 0].tolist(), [], 0
    for picture in sample.pictures:
        found += [rows[at + i] for i in KITS[family].cells(picture)]
        at += picture.tokens
    return found


def follow(family: str, sample: Sample, layers: Sequence[int], choose: Reference) -> tuple:
    """(ordinals of the visual tokens that enter each layer, logits)."""
    edits, visual = Edits(), sample.visual.nonzero()[:, 0].tolist()
    rows, entering = cells(family, sample), []
    entered, embeds = len(rows), reference_embeds(family, sample)
    left = list(visual)
    for layer in range(LAYERS):
        if layer in layers and rows:
            seen = run(family, sample, edits)
            stay, vectors = choose(Here(seen, layer, rows, entered, sample, embeds, family))
            rows = [r for r in rows if r in set(stay)]
            kept = [visual.index(r) for r in rows]
            lines = KITS[family].separators(sample, kept)
            left = sorted(rows + [visual[i] for i in lines])
            gone = torch.zeros(len(sample.ids), dtype=torch.bool)
            gone[[r for r in visual if r not in left]] = True
            edits.drop[layer] = gone
            if vectors:
                edits.write[layer] = lambda h, vectors=vectors: torch.stack(
                    [vectors.get(r, x) for r, x in enumerate(h)]
                )
        entering.append([visual.index(r) for r in left])
    return entering, run(family, sample, edits).logits


def reference_embeds(family: str, sample: Sample) -> Tensor:
    from families import reference

    embeds = reference(family).get_input_embeddings()(sample.ids)
    if sample.pictures:
        embeds[sample.visual] = torch.cat(features(family, sample)).to(embeds)
    return embeds


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(
    "family, attn",
    [("llava", "sdpa"), ("llava", "eager"), ("llava_next", "sdpa"), ("qwen2_5_vl", "eager")]
    + [pytest.param(f, a, marks=pytest.mark.slow) for f in FAMILIES for a in ("sdpa", "eager")],
)  # fmt: skip
@torch.no_grad()
def test_methods_on_real_classes(name, family, attn):
    """Images of several sizes in one padded batch: the same rows and logits as one by one."""
    spec, layers, choose = METHODS[name]
    batch = samples(family, seed=2)
    inputs, net = collate(family, batch), model(family, attn)
    with mllm.patch(net, spec) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        kept = [patched.ledger.kept(i) for i in range(LAYERS)]
    for b, sample in enumerate(batch):
        entering, want = follow(family, sample, layers, choose)
        assert [kept[i][b].tolist() for i in range(LAYERS)] == entering
        scale = max(1.0, float(want.std()))
        equal(logits[b][-1] / scale, want[-1] / scale, f"sample {b}", 2e-4)


@pytest.mark.parametrize("name", METHODS)
@torch.no_grad()
def test_equal_scores_go_to_the_earlier_token(name):
    """A decoder whose queries are zero looks at everything alike."""
    spec, _, _ = METHODS[name]
    net, batch = model("llava"), samples("llava")
    for layer in net.get_decoder().layers:
        layer.self_attn.q_proj.weight.zero_()
    with mllm.patch(net, spec) as patched:
        net(**collate("llava", batch))
        together = [k.tolist() for k in patched.ledger.kept(2)]
        net(**collate("llava", batch[::-1]))
        assert [k.tolist() for k in patched.ledger.kept(2)] == together[::-1]
        net(**collate("llava", batch[1:2]))
        assert patched.ledger.kept(2)[0].tolist() == together[1]
    # (A cluster of SparseVLM may stand anywhere, FEATHER's grid comes first, and BTP also looks
    # at hidden states.)
    few = 0 if name in ("feather", "btp") else len(together[0]) // 2
    assert together[0][:few] == list(range(few))


def counts(stage, tokens: int, depth: int = 32) -> list[int]:
    """Visual tokens that enter each layer, of one image."""
    from mllm.plan import resolve

    at = dict(zip(stage.layers, (resolve(k, tokens) for k in stage.budgets()), strict=True))
    seen = []
    for layer in range(depth):
        tokens = min(tokens, at.get(layer, tokens))
        seen.append(tokens)
    return seen


def test_pyramiddrop_has_the_published_schedule():
    stage = PyramidDrop().at_depth(32)
    assert counts(stage, 576) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert sum(counts(stage, 576)) / 32 == 270
    assert PyramidDrop().at_depth(40).layers == (10, 20, 30)
    assert PyramidDrop().at_depth(4).layers == (1, 2, 3)


@pytest.mark.parametrize(
    "tokens, average, layers, kept",
    [
        # Ratios of 0.253 on layers 8, 16 and 24, as the card works it out.
        (576, 192, None, (146, 37, 9)),
        (576, 128, (4, 8, 16), (204, 72, 25)),
        (576, 64, (2, 4, 8), None),
        (2880, 640, (4, 8, 16), None),
        (2880, 320, (2, 4, 8), None),
        (2880, 160, (1, 2, 4), None),
    ],
)
def test_pyramiddrop_at_published_budgets(tokens, average, layers, kept):
    """Schedules stay geometric; 128 and fewer of 576 need earlier layers than the paper's."""
    stage = PyramidDrop(layers=layers).for_average(average, tokens, 32)
    assert abs(sum(counts(stage, tokens)) / 32 - average) < 0.6
    one, two, three = stage.keep
    assert one / tokens == pytest.approx(two / one, rel=0.1)
    assert kept is None or stage.keep == pytest.approx(kept, abs=1)
    assert three >= 1


@pytest.mark.parametrize("tokens, average", [(576, 128), (576, 64), (2880, 640), (2880, 160)])
def test_averages_below_the_first_layers_are_refused(tokens, average):
    with pytest.raises(PlanError, match="the least is") as caught:
        PyramidDrop().for_average(average, tokens, 32)
    assert caught.value.argument == "tokens_avg"


def test_one_cut_is_a_schedule():
    """The two ways to meet an average agree where there is one cut."""
    from mllm.plan import schedule_for_average

    for average in (192, 128, 64):
        assert schedule_for_average(average, 576, (2,), 32, (0.5,)) == (
            keep_for_average(average, 576, 2, 32),
        )


@pytest.mark.parametrize("name", [name for name in METHODS if name != "vtw"])
@pytest.mark.parametrize("keep", [1, 16, 1.0])
@torch.no_grad()
def test_budgets_of_one_and_of_all(name, keep):
    """One token per image, and everything: then bit-equal to the unpatched model."""
    net, batch = model("llava"), samples("llava")
    inputs = collate("llava", batch)
    plain = net(**inputs).logits
    stage = mllm.Plan.from_spec(METHODS[name][0]).stages[0]
    budgets = (keep,) * len(stage.budgets()) if hasattr(stage, "layers") else keep
    whole = {"end": 0} if name == "btp" else {}
    with mllm.patch(net, stage.replace(keep=budgets, **whole)) as patched:
        logits = net(**inputs).logits
        kept = [len(k) for k in patched.ledger.kept(LAYERS - 1)]
    if isinstance(keep, int) and keep == 1:
        # SparseVLM's clusters come on top.
        assert kept[2] == 0 and 1 <= kept[0] <= 8 and 2 <= kept[1] <= 10
        assert name == "sparsevlm" or kept == [1, 2, 0]
    else:
        assert kept == [16, 32, 0]
        real = inputs["attention_mask"].bool()
        assert torch.equal(logits[real], plain[real])


#: Tokens that enter the layers behind each cut with the recycled ones, and their average, as the
#: card works them out from the authors' schedules.
RECYCLED = {
    192: ((309, 204, 113), 206.5), 128: ((312, 117, 39), 145.4), 96: ((249, 55, 27), 114.1),
    64: ((82, 32, 18), 82.3),
}  # fmt: skip


@pytest.mark.parametrize("budget", RECYCLED)
@torch.no_grad()
def test_sparsevlm_has_the_published_schedules(budget):
    """576 tokens and 32 layers; the layer whose attention decides runs in full."""
    from mllm.plan import resolve

    stage = SparseVLM(budget=budget).at_depth(32)
    assert stage.layers == (3, 7, 16)
    there, seen = 576, []
    for layer in range(32):
        if layer in stage.layers:
            keep = resolve(stage.budgets()[stage.layers.index(layer)], 576)
            gone = there - keep
            taken = int(0.3 * gone) + 1
            there = keep + taken // 10 + 1
        seen.append(there)
    counts, average = RECYCLED[budget]
    assert (seen[3], seen[7], seen[16]) == counts
    assert sum(seen) / 32 == pytest.approx(average, abs=0.06)
    published = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
    new = SparseVLM(version="2.0", budget=budget).at_depth(32)
    assert [resolve(k, 576) for k in new.budgets()] == list(published[budget])
    assert new.share == 0 and new.bias and new.head_share == 14 / 32
    assert new.paper_positions == "original" and stage.paper_positions == "compact"


@pytest.mark.parametrize("count", [1, 3, 5])
def test_density_peaks_are_those_of_the_description(count):
    """Unequal samples in one batch, equal vectors among them."""
    g = torch.Generator().manual_seed(count)
    x = torch.randn(3, 9, 4, generator=g)
    x[0, 5] = x[0, 2]
    x[1] = x[1, :1]
    sizes = [9, 6, 1]
    valid = torch.arange(9) < torch.tensor(sizes)[:, None]
    counts = torch.tensor([min(count, n) for n in sizes])
    mine = density_peaks(x, valid, counts)
    for b, n in enumerate(sizes):
        assert mine[b, :n].tolist() == cards.density_peaks(list(x[b, :n]), int(counts[b]))


@torch.no_grad()
def test_recycled_tokens_are_accounted_for():
    """Sizes add up to the tokens that stayed or were recycled; nothing counts twice."""
    net, batch = model("llava"), samples("llava", "alone")
    found = []
    reader = acting([2], lambda ctx: found.append((ctx.size * ctx.visual).clone()) or [])
    for recycle, total in ((1.0, 16), (0.5, 6 + 6), (0.0, 6)):
        stage = SparseVLM(layers=(1, 2, 3), keep=(6, 4, 2), recycle=recycle, cluster=4)
        with mllm.patch(net, [reader, stage]) as patched:
            net(**collate("llava", batch))
            entering = patched.ledger.as_dict()["layers"][1]["visual"][0]
        clusters = (int(recycle * 10) + 1) // 4 + 1 if recycle else 0
        assert entering == 6 + clusters
        assert float(found[-1].sum()) == total


@pytest.mark.parametrize("recycle, cluster", [(0.3, 1), (1.0, 1)])
@torch.no_grad()
def test_there_are_not_more_clusters_than_recycled_tokens(recycle, cluster):
    """A cluster of one token is that token: with all recycled nothing changes."""
    net, batch = model("llava"), samples("llava", "alone")
    inputs, found = collate("llava", batch), []
    plain = net(**inputs).logits

    class Watched(SparseVLM):
        def act(self, ctx):
            actions = super().act(ctx)
            found.append((int(actions[0].mask.sum()), sum(actions[0].counts)))
            return actions

    stage = Watched(layers=(1,), keep=(6,), recycle=recycle, cluster=cluster, positions="original")
    with mllm.patch(net, stage):
        logits = net(**inputs).logits
    assert found == [(10 if recycle < 1 else 16,) * 2]
    if recycle == 1:
        equal(logits[0], plain[0], "all are recycled", 1e-5)


@pytest.mark.parametrize("stage", [
    SparseVLM(layers=(2,), keep=(6,), recycle=0.6, cluster=3),
    PACT(layer=2, keep=0.6, distance=0.9, retrieve=0.5),
], ids=lambda stage: stage.info.name)  # fmt: skip
def test_members_have_a_gradient(monkeypatch, stage):
    """They are in the sequence no more, and what they were reaches the answer through the mean."""
    net, batch = model("llava"), samples("llava", "alone")
    inputs, seen, act = collate("llava", batch), {}, type(stage).act

    def watch(module, args, out):
        seen["out"] = out[0] if isinstance(out, tuple) else out
        seen["out"].retain_grad()

    def watched(self, ctx):
        actions = act(self, ctx)
        if ctx.layer == 2:
            seen.update(keep=actions[0].mask[0], into=actions[1].into[0])
        return actions

    monkeypatch.setattr(type(stage), "act", watched)
    handle = net.model.language_model.layers[1].register_forward_hook(watch)
    with mllm.patch(net, stage):
        net(**inputs).logits[0, -1].square().sum().backward()
    handle.remove()
    moved = seen["out"].grad[0].abs().sum(1) > 0
    members = (seen["into"] >= 0) & ~seen["keep"] & batch[0].visual
    gone = (seen["into"] < 0) & batch[0].visual
    assert members.any() and gone.any()
    assert moved[members].all() and not moved[gone].any()


def test_recycled_tokens_have_their_gradient_when_layers_are_recomputed():
    """Checkpointing does not change it; where there would be none, the plan is refused."""
    stage, batch = SparseVLM(layers=(1, 2), keep=(9, 4), recycle=0.6, cluster=3), samples("llava")
    inputs, found = collate("llava", batch), []
    for reentrant in (None, False, True):
        net = model("llava").train()
        if reentrant is not None:
            net.gradient_checkpointing_enable({"use_reentrant": reentrant})
        with mllm.patch(net, stage):
            if reentrant:
                with pytest.raises(PlanError, match="reentrant"):
                    net(**inputs)
                continue
            net(**inputs).logits[:, -1].square().sum().backward()
        parts = net.model.multi_modal_projector, net.model.language_model.layers[0].mlp
        found.append([w.grad for part in parts for w in part.parameters()])
    for one, two in zip(*found, strict=True):
        equal(one, two, "gradient", 1e-4 * max(1.0, float(one.abs().max())))


@pytest.mark.parametrize("spec", ["dart:layer=2:keep=5", "sparsevlm:version=2.0:layers=1/2/3"])
def test_what_is_read_is_no_business_of_a_recompute(spec):
    """Hidden states through the last norm, and those of earlier layers, are read with gradient."""
    inputs, found = collate("llava", samples("llava")), []
    for checkpointing in (False, True):
        net = model("llava").train()
        if checkpointing:
            net.gradient_checkpointing_enable({"use_reentrant": False})
        with mllm.patch(net, spec):
            net(**inputs).logits[:, -1].square().sum().backward()
        found.append(net.model.multi_modal_projector.linear_1.weight.grad)
    equal(found[1], found[0], "gradient", 1e-4 * max(1.0, float(found[0].abs().max())))


@pytest.mark.parametrize("bad", [
    dict(recycle=-0.1), dict(recycle=1.5), dict(cluster=0), dict(heads=0.0), dict(heads=1.5),
], ids=str)  # fmt: skip
def test_bad_shares_of_sparsevlm(bad):
    with pytest.raises(PlanError) as caught:
        SparseVLM(**bad)
    assert caught.value.argument == next(iter(bad))


def test_an_unpublished_budget_is_refused():
    with pytest.raises(PlanError, match="no schedule") as caught:
        SparseVLM(budget=100)
    assert caught.value.argument == "budget" and "192" in caught.value.expected


@pytest.mark.parametrize("tokens, average", [(576, 192), (576, 180), (2880, 1000)])
def test_feather_at_averages(tokens, average):
    stage = Feather().for_average(average, tokens, 32)
    assert stage.layers == (8, 16)
    assert abs(sum(counts(stage, tokens)) / 32 - average) < 1
    with pytest.raises(PlanError, match="the least is"):
        Feather().for_average(tokens / 9, tokens, 32)


def test_btp_for_qwen():
    """The spec that the description gives for Qwen2.5-VL is the authors' schedule: 27 %."""
    spec = "".join(re.findall(r"``(.*?)``", BTP.__doc__))
    stage = mllm.Plan.from_spec(spec).stages[0].at_depth(28)
    assert (stage.layers, stage.end) == ((3, 6, 15), 22)
    seen = [0 if layer >= stage.end else n for layer, n in enumerate(counts(stage, 1296, 28))]
    assert sum(seen) / 28 / 1296 == pytest.approx((3 + 1.5 + 2.25 + 0.875) / 28)


def test_a_grid_needs_a_stride():
    with pytest.raises(PlanError, match="stride"):
        Feather(stride=0)


def test_vtw_halves_the_layers_with_pictures():
    """16 of 32 layers see 576 tokens: 288 on average; 128 is layer 7 (126), 64 is layer 4 (72)."""
    stage = VTW().at_depth(32)
    assert stage.layer == 16 and VTW().at_depth(40).layer == 20
    assert [576 * layer / 32 for layer in (16, 7, 4)] == [288, 126, 72]
