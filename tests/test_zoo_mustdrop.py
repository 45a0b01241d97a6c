"""MustDrop's parts, in loops."""

from __future__ import annotations

import math

import oracles
import pytest
import tiny
import torch
import zoo_oracles as cards
from families import KITS, collate, samples
from matrix import equal, fresh, reference
from torch.utils.flop_counter import FlopCounterMode
from zoo import FAMILIES, check_family, layer_context, shared

import mllm
from mllm.compressors import DualFilter, FastV, KeyTokens, MustDrop, OutputAware, WindowMerge
from mllm.compressors.base import TowerContext
from mllm.errors import PlanError


@pytest.mark.parametrize("together, alone", [(0.05, 0.05), (0.05, 2.0), (2.0, 0.2), (2.0, 2.0)])
def test_dual_filter_equals_its_description(together, alone):
    visual = torch.zeros(2, 20, dtype=torch.bool)
    visual[0, 2:14], visual[1, 5:19] = True, True
    rows = torch.rand(2, 3, 20, generator=torch.Generator().manual_seed(1)) ** 4
    stage = DualFilter(together=together, alone=alone)
    (kept,) = stage.act(layer_context(stage, visual, rows=rows))
    for b in range(2):
        want = cards.dualfilter(rows[b], visual[b], together, alone)
        assert kept.mask[b].nonzero()[:, 0].tolist() == want
    assert kept.counts is None


def test_dual_filter_layers():
    """Behind layers 2, 6, 10 and 14 of 32."""
    assert DualFilter().at_depth(32).layers == (3, 7, 11, 15)
    assert DualFilter().at_depth(4).layers == (1, 2, 3)
    assert DualFilter().at_depth(16, first_cut=3).layers == (3, 4, 6, 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_dual_filter_families(family):
    """Key tokens are never dropped, whatever the threshold; nothing else is left."""
    compact = None if family != "qwen2_5_vl" else "original"
    plan = [KeyTokens(share=0.2, positions=compact),
            DualFilter(together=2.0, alone=2.0, layers=(1, 3))]  # fmt: skip
    counts = check_family(family, plan)
    batch = samples(family)
    for sample, own in zip(batch, counts, strict=True):
        cells = sum(math.ceil(0.2 * n) for n in cells_of(family, sample))
        assert own[1] == own[3] == cells


def cells_of(family, sample):
    return [len(KITS[family].cells(p)) for p in sample.pictures]


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("grid, window, share", [((4, 6), 2, 0.5), ((7, 9), 3, 0.4),
                                                 ((6, 6), 3, 1.0)])  # fmt: skip
def test_window_merge_equals_its_description(grid, window, share, prefix):
    n = grid[0] * grid[1]
    x = torch.randn(2, prefix + n, 6, generator=torch.Generator().manual_seed(0))
    stage = WindowMerge(share=share, window=window)
    ctx = TowerContext(stage, None, x, block=0, depth=3, grid=grid, prefix=prefix,
                       size=torch.ones(2, prefix + n))  # fmt: skip
    into = stage.merge(ctx).into
    for b in range(2):
        windows = cards.alike(x[b, prefix:], grid, window)
        windows.sort(key=lambda w: -w[0])
        want = list(range(n))
        for _, own in windows[: round(share * len(windows))]:
            for t in own:
                want[t] = own[-1]
        assert into[b].tolist() == [*range(prefix), *(prefix + t for t in want)]


def test_equal_windows_merge_in_order():
    """In any batch; patches that fill no window stay."""
    stage = WindowMerge(share=0.5)
    for images in (1, 3):
        ctx = TowerContext(stage, None, torch.ones(images, 50, 4), block=0, depth=3, grid=(7, 7),
                           prefix=1, size=torch.ones(images, 50))  # fmt: skip
        into = stage.merge(ctx).into
        rows = [[1 + 7 * r + c for r in range(3) for c in range(n, n + 3)] for n in (0, 3)]
        for own in into.tolist():
            assert [own[i] for i in rows[0]] == [17] * 9 and [own[i] for i in rows[1]] == [20] * 9
            assert all(own[i] == i for i in range(50) if i not in rows[0] + rows[1])


@pytest.mark.parametrize("proportional", [False, True])
@pytest.mark.parametrize("which", ["clip", "siglip"])
@torch.no_grad()
def test_window_merge_in_the_tower(which, proportional):
    """Features, seats, positions and answers against a tower by hand; means conserve mass."""
    batch = tiny.samples(side=4)
    inputs, net, plain = tiny.collate(batch), fresh(tower=which), reference(which)
    stage = WindowMerge(share=0.5, window=2, proportional=proportional)
    with mllm.patch(net, stage) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        kept, merged = patched.ledger.kept("llm"), patched.ledger.merged_into
    assert [len(k) for k in kept] == [10, 20, 0]
    for b, sample in enumerate(batch):
        found = [cards.windowmerge(plain, p, 0.5, 2, proportional) for p in sample.pixels]
        blocks = [oracles.Block(oracles.project(plain, m.features), m.seats, []) for m in found]
        assert merged[b].tolist() == [16 * i + t for i, m in enumerate(found) for t in m.into]
        rows = oracles.rebuilt(plain, sample, blocks, "compact")
        equal(logits[b][~sample.visual], oracles.dense(plain, rows).logits[rows.source < 0],
              f"sample {b}")  # fmt: skip


@torch.no_grad()
def test_the_tower_costs_what_is_booked():
    """The first block runs in full, the later ones on what is left."""
    net, inputs = fresh("eager"), tiny.collate(tiny.samples("alone", side=4))
    with mllm.patch(net, WindowMerge(share=0.5, window=2)) as patched:
        with FlopCounterMode(display=False) as counter:
            net(**inputs)
        booked = patched.ledger.as_dict()["prefill_flops"][0]
    assert abs(booked - counter.get_total_flops()) <= 0.01 * booked


@torch.no_grad()
def test_the_published_counts():
    """576 - 8 r; r is a quarter of 64 windows."""
    large = tiny.llava(layers=1, side=24)
    with mllm.patch(large, "windowmerge:share=0.25") as patched:
        large(**tiny.collate(tiny.samples("alone", side=24)), logits_to_keep=1)
        assert len(patched.ledger.kept("llm")[0]) == 576 - 8 * 16


@pytest.mark.parametrize("which", ["clip", "siglip"])
@torch.no_grad()
def test_the_three_parts_together(which):
    """Windows merge, key tokens are 8 % of what is left, and nothing else passes the filter."""
    batch, plain = tiny.samples(side=6), tiny.llava("eager", layers=4, side=6, tower=which)
    net = tiny.llava("sdpa", layers=4, side=6, tower=which)
    plan = [WindowMerge(share=0.5), KeyTokens(share=0.3),
            DualFilter(together=2.0, alone=2.0, layers=(1,))]  # fmt: skip
    with mllm.patch(net, plan) as patched:
        net(**tiny.collate(batch))
        kept = patched.ledger.kept(1)
    for b, sample in enumerate(batch):
        want = []
        for image, picture in enumerate(sample.pixels):
            found = cards.windowmerge(plain, picture, 0.5, 3)
            best = found.attention.topk(math.ceil(0.3 * len(found.seats))).indices.tolist()
            want += sorted(36 * image + found.seats[t] for t in best)
        assert kept[b].tolist() == want
        assert len(want) == 6 * len(sample.pixels)


@torch.no_grad()
def test_key_tokens_outlive_a_cut():
    """They count in the budget of the cut, and are those with the most attention of [CLS]."""
    net, sample = shared("llava", "sdpa"), samples("llava", "alone")[0]
    inputs = collate("llava", [sample])
    with mllm.patch(net, [KeyTokens(share=0.25), FastV(layer=1, keep=6)]) as patched:
        net(**inputs)
        kept = patched.ledger.kept(2)[0].tolist()
    with mllm.patch(net, FastV(layer=1, keep=6)) as patched:
        net(**inputs)
        plain = patched.ledger.kept(2)[0].tolist()
    seen = {}
    block = net.model.vision_tower
    block = getattr(block, "vision_model", block).encoder.layers[-1].self_attn
    handle = block.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(x=(args[0] if args else kwargs["hidden_states"])[0]),
        with_kwargs=True,
    )
    net(**inputs)
    handle.remove()
    q, k = (p(seen["x"]).unflatten(1, (4, 8)) for p in (block.q_proj, block.k_proj))
    weights = (torch.einsum("hd,nhd->hn", q[0], k) * 8**-0.5).softmax(1).mean(0)[1:]
    key = set(weights.topk(4).indices.tolist())
    assert key <= set(kept) and len(kept) == 6 and not key <= set(plain)


STEPS = 6


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl",
                                    "gemma3"])  # fmt: skip
@torch.no_grad()
def test_the_cache_forgets_what_filters_dropped(family, attn):
    """Against the same filters without it and evictions by hand; alone, and in a padded batch.

    Wrong layers, tokens of a neighbour, separators left behind, or rows instead of tokens show.
    """
    depth = 4
    cuts = (2, 3) if family == "qwen3_vl" else (1, 3)
    filters = [DualFilter(together=0.11, alone=2.0, layers=cuts[:1]),
               DualFilter(together=0.2, alone=2.0, layers=cuts[1:])]  # fmt: skip
    net, batch = shared(family, attn), samples(family)
    inputs = collate(family, batch)
    options = dict(do_sample=False, return_dict_in_generate=True, output_logits=True)
    with mllm.patch(net, [*filters, OutputAware()]) as patched:
        mine = net.generate(**inputs, max_new_tokens=STEPS, **options)
        kv = patched.kv(mine.past_key_values)
        views = [kv.view(i) for i in range(depth)]
    gone = 0
    for b, sample in enumerate(batch):
        padding = inputs["input_ids"].shape[1] - len(sample.ids)
        with mllm.patch(net, filters) as patched:
            own = collate(family, [sample])
            first = net.generate(**own, max_new_tokens=1, **options)
            cache, kept = first.past_key_values, patched.ledger.kept(depth - 1)[0].tolist()
            kv, seats = patched.kv(cache), sample.visual.nonzero()[:, 0].tolist()
            drop = [seat for n, seat in enumerate(seats) if n not in kept]
            for i in range(cuts[0] - 1, cuts[1]):
                before = kv.view(i)
                stored = before.logical[0, 0][before.valid[0, 0]].tolist()
                gone += len(set(stored) & set(drop))
                kv.evict(i, drop=torch.tensor([drop or [-1]]))
            ids = torch.cat([own["input_ids"], first.sequences[:, -1:]], 1)
            given = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
            if "mm_token_type_ids" in own:
                given["mm_token_type_ids"] = torch.cat([own["mm_token_type_ids"],
                                                        torch.zeros(1, 1, dtype=torch.long)], 1)
            want = net.generate(
                **given, max_new_tokens=STEPS - 1, past_key_values=cache, **options
            )
            for i, view in enumerate(views):
                theirs, last = kv.view(i), kv.length
                names = theirs.logical[0, 0][theirs.valid[0, 0]].tolist()
                held = [t - padding for t in view.logical[b, 0][view.valid[b, 0]].tolist()]
                assert held == names, f"layer {i}, sample {b}, {last} tokens"
        logits = torch.stack(want.logits, 1)[0]
        near = 1e-5 * max(1.0, float(logits.std()))
        equal(torch.stack(mine.logits, 1)[b, 1:], logits, f"sample {b}", near)
    assert gone > 5


@torch.no_grad()
def test_the_whole_paper():
    """The preset is its parts; layers between the cuts hold what the last layer does."""
    plan = mllm.Plan.from_spec("mustdrop:together=0.07:alone=2.0:layers=2/3:share=none:keys=0.1")
    assert [s.info.name for s in plan.stages] == ["keytokens", "dualfilter", "outputaware"]
    assert [s.info.name for s in MustDrop().expand()] == [
        "windowmerge", "keytokens", "dualfilter", "outputaware"
    ]  # fmt: skip
    net, inputs = shared("llava", "sdpa"), collate("llava", samples("llava", "alone"))
    with mllm.patch(net, plan) as patched:
        cache = net(**inputs, use_cache=True).past_key_values
        kv, kept = patched.kv(cache), [len(patched.ledger.kept(i)[0]) for i in range(4)]
    visual = [int(kv.view(i).visual[0, 0].sum()) for i in range(4)]
    assert kept[0] == kept[1] == 16 > kept[3] > 2
    assert visual == [kept[0], kept[3], kept[3], kept[3]]


@torch.no_grad()
def test_nothing_dropped_nothing_forgotten():
    net, inputs = shared("llava", "sdpa"), collate("llava", samples("llava"))
    plain = net.generate(**inputs, max_new_tokens=4, do_sample=False)
    for plan in ("outputaware", "visionzip:keep=6+outputaware"):
        with mllm.patch(net, plan) as patched:
            out = net.generate(**inputs, max_new_tokens=4, do_sample=False,
                               return_dict_in_generate=True)  # fmt: skip
            views = [patched.kv(out.past_key_values).view(i) for i in range(4)]
        assert len({int(v.valid.sum()) for v in views}) == 1
        assert torch.equal(out.sequences, plain) or "visionzip" in plan


@pytest.mark.parametrize("make", [
    lambda: OutputAware(first=-1),
    lambda: KeyTokens(share=0.0), lambda: WindowMerge(window=1), lambda: WindowMerge(share=2.0),
])  # fmt: skip
def test_bad_values(make):
    with pytest.raises(PlanError):
        make()
