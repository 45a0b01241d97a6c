"""Merging inside the vision tower against a tower written out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import oracles
import pytest
import tiny
import torch
from matrix import LAYERS, SIDE, anatomy, equal, fresh, reference
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import mllm
from mllm.compressors import DivPrune, FastV, VisionZip
from mllm.compressors.base import Context, Merge, Positions, TowerReducer
from mllm.errors import PlanError
from mllm.plan import MethodInfo


@dataclass
class Bipartite(TowerReducer):
    """ToMe, as short as it is: even tokens go into the odd tokens that they are most like."""

    removed: int = 3
    at: tuple[int, ...] = (0, 1)
    positions: Positions | None = None

    info = MethodInfo("bipartite", "pre_llm")

    def blocks(self, depth: int) -> Sequence[int]:
        return self.at

    def merge(self, ctx: Context) -> Merge:
        keys = F.normalize(ctx["keys"].float(), dim=-1)
        images, tokens, _ = keys.shape
        even = torch.arange(ctx.prefix, tokens, 2)
        odd = torch.arange(ctx.prefix + 1, tokens, 2)
        like = keys[:, even] @ keys[:, odd].transpose(1, 2)
        best, to = like.max(2)
        gone = best.argsort(dim=1, descending=True, stable=True)[:, : self.removed]
        into = torch.arange(tokens).repeat(images, 1)
        return Merge(into.scatter(1, even[gone], odd[to].gather(1, gone)))


class Weightless(Bipartite):
    """Attention that does not look at sizes."""

    proportional = False


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
    for i, block in enumerate(net.encoder.layers[:-1]):
        h, a = block.layer_norm1(x), block.self_attn
        q, k, v = (oracles.heads(p(h), heads) for p in (a.q_proj, a.k_proj, a.v_proj))
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if stage.proportional:
            logits = logits + torch.tensor(size).log()
        x = x + a.out_proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
        if i in stage.at:
            unit = k.mean(0) / k.mean(0).norm(dim=-1, keepdim=True)
            found = []
            for e in range(prefix, len(x), 2):
                like = {o: float(unit[e] @ unit[o]) for o in range(prefix + 1, len(x), 2)}
                target = max(like, key=like.get)
                found.append((-like[target], e, target))
            moved = {e: target for _, e, target in sorted(found)[: stage.removed]}
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


@pytest.mark.parametrize("stage", [Bipartite(), Weightless(), Bipartite(removed=1, at=(1,)),
                                   Bipartite(positions="original")])  # fmt: skip
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
        with mllm.patch(net, Bipartite(removed=0, positions="original")) as patched:
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
    for removed in (0, 3):
        with mllm.patch(net, Bipartite(removed=removed)) as patched:
            with FlopCounterMode(display=False) as counter:
                net(**inputs)
        data, counted = patched.ledger.as_dict(), counter.get_total_flops()
        # The matching itself is the method's to book.
        assert abs(data["prefill_flops"][0] - counted) <= 0.01 * counted
        costs.append(data["vision_flops"][0])
    assert costs[1] < 0.9 * costs[0]


@torch.no_grad()
def test_stages_behind_it():
    """What the tower leaves goes on through the projector, a reducer and a cut."""
    inputs = tiny.collate(tiny.samples(side=SIDE))
    net = fresh()
    with mllm.patch(net, [Bipartite(), DivPrune(keep=5), FastV(layer=2, keep=2)]) as patched:
        net(**inputs)
        data = patched.ledger.as_dict()
    assert [row["visual"] for row in data["layers"]] == [[5, 10, 0]] * 2 + [[2, 4, 0]] * 2
    assert len(data["layers"]) == LAYERS


def test_what_is_refused():
    from families import model

    for family in ("gemma3", "qwen2_5_vl", "llava_next", "internvl"):
        with pytest.raises(PlanError, match="joins tower tokens"):
            mllm.patch(model(family), Bipartite())
    for plan, reason in (
        ([Bipartite(), VisionZip(keep=4)], "needs all tokens of the tower"),
        ([Bipartite(), Bipartite()], "same tokens"),
    ):
        with pytest.raises(PlanError, match=reason) as caught:
            mllm.patch(fresh(), plan)
        assert caught.value.expected == "a stage behind the projector"


@torch.no_grad()
def test_unequal_counts():
    class Uneven(Bipartite):
        def merge(self, ctx):
            into = super().merge(ctx).into
            into[0] = torch.arange(into.shape[1])
            return Merge(into)

    net = fresh()
    with mllm.patch(net, Uneven()), pytest.raises(PlanError, match="equally many"):
        net(**tiny.collate(tiny.samples(side=SIDE)))
