"""Merging inside the vision tower against a tower written out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import oracles
import pytest
import tiny
import torch
from matrix import LAYERS, SIDE, anatomy, equal, fresh, reference
from torch.utils.flop_counter import FlopCounterMode

import mllm
from mllm.compressors import DivPrune, FastV, ToMe, VisionZip
from mllm.compressors.base import (
    Budget,
    Keep,
    Merge,
    Positions,
    TokenReducer,
    TowerContext,
    VisionAttention,
    VisionKeys,
)
from mllm.errors import PlanError
from mllm.plan import MethodInfo


def tower(model, pixels, stage):
    """The features of one picture, the patch that each stands for, and where each patch went."""
    net = model.model.vision_tower
    net = getattr(net, "vision_model", net)
    heads = model.config.vision_config.num_attention_heads
    x = net.embeddings(pixels[None])[0]
    prefix = int(hasattr(net, "pre_layrnorm"))
    if prefix:
        x = net.pre_layrnorm(x)
    size = [1.0] * len(x)
    groups = [[i - prefix] for i in range(len(x))]  # patches in each token, the seat first
    pairs = stage.r if len(stage.r) > 1 else stage.r * len(net.encoder.layers)
    for i, block in enumerate(net.encoder.layers[:-1]):
        h, a = block.layer_norm1(x), block.self_attn
        q, k, v = (oracles.heads(p(h), heads) for p in (a.q_proj, a.k_proj, a.v_proj))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if stage.proportional:
            logits = logits + torch.tensor(size).log()
        x = x + a.out_proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
        if i < len(pairs):
            unit = k.mean(0) / k.mean(0).norm(dim=-1, keepdim=True)
            found = []
            for e in range(0, len(x), 2):
                like = {o: float(unit[e] @ unit[o]) for o in range(1, len(x), 2)}
                target = max(like, key=like.get)
                if e >= prefix:
                    found.append((-like[target], e, target))
            moved = {e: target for _, e, target in sorted(found)[: pairs[i]]}
            total = x * torch.tensor(size)[:, None]
            for e, target in moved.items():
                total[target] += total[e]
                size[target] += size[e]
                groups[target] += groups[e]
            left = [t for t in range(len(x)) if t not in moved]
            x = torch.stack([total[t] / size[t] for t in left])
            size, groups = [size[t] for t in left], [groups[t] for t in left]
        x = x + block.mlp(block.layer_norm2(x))
    into = {p: group[0] for group in groups for p in group}
    return x[prefix:], [group[0] for group in groups[prefix:]], into


@pytest.mark.parametrize("stage", [
    ToMe(r=(3,)), ToMe(r=(1,)), ToMe(r=(3,), proportional=False), ToMe(r=(0, 1)),
    ToMe(r=(9, 2)), ToMe(r=(3,), positions="original"),
])  # fmt: skip
@pytest.mark.parametrize("kind", ["alone", "padded"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("which", ["clip", "siglip"])
@torch.no_grad()
def test_merging_in_the_tower(stage, kind, attn, which):
    batch = tiny.samples(kind, side=SIDE)
    inputs = tiny.collate(batch)
    net = fresh(attn, tower=which)
    net(**inputs)  # transformers adds hooks of its own in the first forward
    before = anatomy(net)
    with mllm.patch(net, stage) as patched:
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        merged, kept = patched.ledger.merged_into, patched.ledger.kept("llm")
        out = net.generate(
            **inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True,
            output_logits=True,
        )  # fmt: skip
    assert anatomy(net) == before
    plain = reference(which)
    for b, sample in enumerate(batch):
        blocks, want = [], []
        for picture in sample.pixels:
            features, seats, into = tower(plain, picture, stage)
            order = sorted(range(len(seats)), key=lambda i, seats=seats: seats[i])
            at = len(blocks) * SIDE**2
            blocks.append(
                oracles.Block(oracles.project(plain, features)[order], sorted(seats), [])
            )
            want += [at + into[p] for p in range(SIDE**2)]
        assert merged[b].tolist() == want
        assert kept[b].tolist() == sorted(set(want))
        positions = stage.positions or "compact"
        rows = oracles.rebuilt(plain, sample, blocks, positions)
        steps = out.sequences[b, -4:]
        result = oracles.dense(plain, rows, steps).logits
        equal(logits[b][~sample.visual], result[: -4][rows.source < 0], f"sample {b}")
        equal(torch.stack([x[b] for x in out.logits]), result[-5:-1], f"steps of sample {b}")


@torch.no_grad()
def test_nothing_merged_is_nothing_changed():
    inputs = tiny.collate(tiny.samples(side=SIDE))
    for attn in ("sdpa", "eager"):
        net = fresh(attn)
        plain = net(**inputs).logits
        with mllm.patch(net, ToMe(keep=1.0, positions="original")) as patched:
            real = inputs["attention_mask"].bool()
            assert torch.equal(net(**inputs).logits[real], plain[real])
            data = patched.ledger.as_dict()
        assert data["vision_flops"][0] > 0
        assert torch.equal(net(**inputs).logits, plain)


@torch.no_grad()
def test_the_tower_costs_less():
    inputs = tiny.collate(tiny.samples("alone", side=SIDE))
    net = fresh("eager")
    costs = []
    for pairs in (0, 3):
        with mllm.patch(net, ToMe(r=(pairs,))) as patched:
            with FlopCounterMode(display=False) as counter:
                net(**inputs)
        data, counted = patched.ledger.as_dict(), counter.get_total_flops()
        assert abs(data["prefill_flops"][0] - counted) <= 0.01 * counted
        costs.append(data["vision_flops"][0])
    assert costs[1] < 0.9 * costs[0]


@torch.no_grad()
def test_stages_behind_it():
    """What the tower leaves goes on through the projector, a reducer and a cut."""
    inputs = tiny.collate(tiny.samples(side=SIDE))
    net = fresh()
    with mllm.patch(net, [ToMe(r=(3,)), DivPrune(keep=5), FastV(layer=2, keep=2)]) as patched:
        net(**inputs)
        data = patched.ledger.as_dict()
    assert [row["visual"] for row in data["layers"]] == [[5, 10, 0]] * 2 + [[2, 4, 0]] * 2
    assert len(data["layers"]) == LAYERS


@torch.no_grad()
def test_a_stage_behind_the_projector_reads_what_is_left():
    """Keys of the last block, where tokens are; zero where they have merged away."""
    seen = {}

    @dataclass
    class Reader(TokenReducer):
        keep: Budget = 1.0
        positions: Positions | None = None
        info = MethodInfo("reader", "pre_llm")

        def reads(self):
            return {"keys": VisionKeys(), "attention": VisionAttention(query="received")}

        def reduce(self, ctx):
            seen.update(keys=ctx["keys"], attention=ctx["attention"], valid=ctx.valid)
            return [Keep(ctx.valid)]

    net = fresh()
    inputs = tiny.collate(tiny.samples(side=SIDE))
    last = net.model.vision_tower
    last = getattr(last, "vision_model", last).encoder.layers[-2].self_attn.k_proj
    handle = last.register_forward_hook(lambda module, args, out: seen.update(own=out))
    with mllm.patch(net, [ToMe(r=(3, 0)), Reader()]):
        net(**inputs)
    handle.remove()
    own = seen["own"].unflatten(2, (-1, seen["keys"].shape[2])).mean(2)[:, 1:]
    assert seen["valid"].sum(1).tolist() == [own.shape[1]] * 3 != [SIDE**2] * 3
    equal(seen["keys"][seen["valid"]], own.flatten(0, 1), "keys")
    for value in (seen["keys"].abs().sum(2), seen["attention"]):
        assert (value > 0).tolist() == seen["valid"].tolist()


def test_what_is_refused():
    from families import model

    for family in ("gemma3", "qwen2_5_vl", "llava_next", "internvl"):
        with pytest.raises(PlanError, match="joins tower tokens"):
            mllm.patch(model(family), ToMe())
    for plan, reason in (
        ([ToMe(), VisionZip(keep=4)], "needs all tokens of the tower"),
        ([ToMe(), ToMe()], "same tokens"),
    ):
        with pytest.raises(PlanError, match=reason) as caught:
            mllm.patch(fresh(), plan)
        assert caught.value.expected == "a stage behind the projector"


@torch.no_grad()
def test_unequal_counts():
    class Uneven(ToMe):
        def merge(self, ctx):
            into = super().merge(ctx).into
            into[0] = torch.arange(into.shape[1])
            return Merge(into)

    net = fresh()
    with mllm.patch(net, Uneven(r=(3,))), pytest.raises(PlanError, match="equally many"):
        net(**tiny.collate(tiny.samples(side=SIDE)))


def steps(stage, patches, depth, prefix=1):
    """Patches behind each block."""
    left = []
    for block in range(depth):
        there = left[-1] if left else patches
        ctx = TowerContext(
            stage, torch.randn(2, prefix + there, 4), None, block=block, depth=depth,
            grid=(1, patches), prefix=prefix, size=torch.ones(2, prefix + there),
        )  # fmt: skip
        into = stage.merge(ctx).into
        stay = into == torch.arange(into.shape[1])
        assert stay[:, :prefix].all() and (into[:, prefix:] >= prefix).all()
        assert stay.gather(1, into).all(), "who receives stays"
        left.append(int(stay[0].sum()) - prefix)
    return left


@pytest.mark.parametrize("keep, pairs", [(192, (16, 17)), (128, (19, 20)), (64, (22, 23))])
def test_tome_at_the_published_budgets(keep, pairs):
    """Exactly the budget behind the 23 blocks that LLaVA-1.5 uses of CLIP."""
    left = steps(ToMe(keep=keep), 576, 23)
    assert left[-1] == keep
    assert {a - b for a, b in zip([576, *left], left, strict=False)} == set(pairs)


def test_tome_schedules():
    assert steps(ToMe(r=(17,)), 576, 23)[-1] == 576 - 17 * 23
    assert steps(ToMe(r=(2, 0, 5)), 16, 3) == [14, 14, 9]
    falling = steps(ToMe(keep=6, inflect=-1.0), 16, 4)
    assert falling == [12, 8, 7, 6] and steps(ToMe(keep=6, inflect=1.0), 16, 4) == [15, 14, 10, 6]
    assert steps(ToMe(keep=1), 16, 5)[-1] == 1
    assert steps(ToMe(keep=5), 16, 2, prefix=0) == [10, 5]
    assert steps(ToMe(keep=1), 2, 3, prefix=0) == [2, 1, 1]


def test_tome_refuses_what_pairs_cannot_reach():
    with pytest.raises(PlanError, match="at least 4 of 16") as caught:
        steps(ToMe(keep=3), 16, 2)
    assert caught.value.expected == "keep >= 4"
    for bad in (dict(inflect=2.0), dict(r=(-1,))):
        with pytest.raises(PlanError, match="no schedule"):
            ToMe(**bad)


def test_tome_ties_go_to_the_earlier_token():
    stage, keys = ToMe(r=(3,)), torch.ones(3, 11, 4)
    ctx = TowerContext(
        stage, keys, None, block=0, depth=2, grid=(2, 5), prefix=1, size=keys[..., 0]
    )
    assert stage.merge(ctx).into.tolist() == [[0, 1, 1, 3, 1, 5, 1, 7, 8, 9, 10]] * 3
