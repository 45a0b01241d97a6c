"""Croc's stage of training by hand: tokens that are hidden, a prompt that sees itself, a loss."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import LAYERS, model, reference, samples
from family_oracles import features
from layer_oracle import Edits, run_with_gradients
from matrix import equal
from scipy.optimize import linear_sum_assignment
from test_learned import attend, linear, norm, teach, two
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo import _placed, check_family

import mllm
from mllm.compressors import Croc, FastV
from mllm.compressors.croc import assign
from mllm.errors import DataError, PlanError

PLANS = {
    "paper": Croc(pool=40),
    "code": Croc(pool=9, match="nearest", share=0.5, weight=3.0, beta=0.5),
    "causal": Croc(pool=40, mixed=False, share=1.0),
}
each = pytest.mark.parametrize("stage", PLANS.values(), ids=PLANS)


def drawn(stage, s, ranks):
    """Visual tokens of a sample that are replaced, from the numbers that its rows have drawn."""
    own = s.visual.nonzero()[:, 0]
    count = len(own) - int(len(own) * (1 - stage.share))
    rows = torch.zeros(len(s.ids), dtype=torch.bool)
    rows[own[ranks[own].argsort(descending=True)[:count]]] = True
    return rows


def matched(stage, x, pool):
    far = torch.stack([(x - token).square().sum(1).sqrt() for token in pool], 1).detach()
    if stage.match == "nearest":
        return pool[far.argmin(1)]
    return pool[torch.from_numpy(linear_sum_assignment(far.double().numpy())[1])]


def told(part, x):
    heard = torch.stack([attend(part.attention, row, x, x) for row in x])
    x = norm(x + heard, part.norm_attention)
    return linear(norm(x + two(x, part.ffn), part.norm_ffn), part.resize)


def smooth(a, b, beta):
    far = (a - b).abs()
    return torch.where(far < beta, far.square() / (2 * beta), far - beta / 2)


def by_hand(family, batch, bank, stage, ranks):
    """The loss of a batch whose last three tokens are answers, and that of what is told."""
    answers, lost = [], []
    for s, own in zip(batch, ranks, strict=True):
        edit = Edits()
        if s.pictures:
            rows = drawn(stage, s, own)

            def write(h, rows=rows):
                h = h.clone()
                h[rows] = matched(stage, h[rows].detach(), bank["pool"].tokens)
                return h

            first = len(s.ids) - 3

            def show(n, first=first):
                return (torch.arange(n) < first).expand(n, n)

            edit.write[0] = write
            for layer in range(LAYERS) if stage.mixed else ():
                edit.show[layer] = show
        seen = run_with_gradients(family, s, edit)
        answers.append(F.cross_entropy(seen.logits[-4:-1], s.ids[-3:], reduction="none"))
        if s.pictures:
            left = reference(family).get_decoder().norm(seen.hidden[-1])[s.visual]
            shown = torch.cat(features(family, s)).detach()
            shown = shown / shown.norm(dim=1, keepdim=True)
            lost.append(smooth(told(bank["teller"], left), shown, stage.beta))
    loss = torch.cat(lost).mean()
    return torch.cat(answers).mean() + stage.weight * loss, loss


def _training(family, checkpointed=False, attn="sdpa"):
    net = model(family, attn).train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    if checkpointed:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    return net


def _inputs(family, batch):
    inputs = _placed(family, batch)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    return inputs | {"labels": labels}


@each
@pytest.mark.parametrize("family, attn, checkpointed", [
    ("llava", "sdpa", False), ("llava", "eager", True), ("internvl", "sdpa", True),
    ("internvl", "eager", False),
])  # fmt: skip
def test_a_step_is_that_of_the_loops(family, attn, checkpointed, stage):
    """Loss and all gradients, of a padded batch with one text alone in it."""
    batch = samples(family)
    net, inputs = _training(family, checkpointed, attn), _inputs(family, batch)
    with mllm.patch(net, stage) as patched:
        teach(net.mllm)
        patched.learnt = 5
        loss = net(**inputs, use_cache=False).loss
        loss.backward()
        telling, seed = patched.losses["telling"], patched.plan.seed_for(0, 5, 0)
        bank = net.mllm._modules["0"]
        mine = {name: p.grad for name, p in bank.named_parameters()}
        own = copy.deepcopy(bank).requires_grad_()
        language = {n: p.grad for n, p in net.get_decoder().layers[0].named_parameters()}
    own.zero_grad()
    width = inputs["input_ids"].shape[1]
    ranks = torch.rand(len(batch), width, generator=torch.Generator().manual_seed(seed))
    ranks = [row[width - len(s.ids) :] for row, s in zip(ranks, batch, strict=True)]
    want, lost = by_hand(family, batch, own, stage, ranks)
    want.backward()
    equal(telling, lost, "telling", 1e-5)
    equal(loss, want, "loss", 1e-4)
    for name, p in own.named_parameters():
        # All keys of an attention may move together: softmax does not see it.
        assert mine[name].abs().max() > 0 or name.endswith("key.bias"), name
        equal(mine[name], p.grad, name, 2e-4 * max(1.0, float(p.grad.abs().max())))
    assert all(grad.abs().max() > 0 for grad in language.values())


def test_every_sample_has_tokens_of_its_own_and_every_step_others():
    """Behind each forward the draw is another; the same again where training goes on."""
    net, inputs = _training("llava"), _inputs("llava", samples("llava"))
    stage, entered = PLANS["paper"], []
    handle = net.get_decoder().layers[0].input_layernorm.register_forward_pre_hook(
        lambda _, args: entered.append(args[0].detach())
    )
    visual = inputs["input_ids"] == net.config.image_token_id
    with mllm.patch(net, stage) as patched:
        pool = net.mllm._modules["0"]["pool"].tokens.detach()
        for step in (0, 1, 0):
            patched.learnt = step
            net(**inputs, use_cache=False)
    handle.remove()
    found = [(rows[:, :, None] == pool).all(-1) for rows in entered]
    for own in found:
        assert not own[~visual].any()
        assert own.sum((1, 2)).tolist() == [12, 24, 0], "three of four"
        assert own.sum(1).max() == 1, "none twice in a sample"
    assert not torch.equal(found[0].any(2), found[1].any(2))
    assert torch.equal(found[0], found[2])


@torch.no_grad()
def test_at_inference_nothing_changes():
    """Bit for bit, with labels too, and in training mode without any."""
    net, inputs = model("llava"), _inputs("llava", samples("llava"))
    plain = net(**inputs)
    with mllm.patch(net, PLANS["paper"]) as patched:
        teach(net.mllm)
        mine = net(**inputs)
        assert torch.equal(mine.logits, plain.logits) and torch.equal(mine.loss, plain.loss)
        assert patched.losses == {}
        row = patched.ledger.as_dict()
        assert row["prefill_flops"] == row["baseline_prefill_flops"]
    check_family("llava", PLANS["paper"])
    check_family("qwen2_5_vl", [PLANS["code"], FastV(layer=2, keep=0.5)])


def test_tokens_that_have_left_are_not_told():
    """A stage inside the LLM, too, works on what is written there."""
    net, inputs = _training("llava"), _inputs("llava", samples("llava"))
    with mllm.patch(net, [PLANS["code"], FastV(layer=2, keep=0.5)]) as patched:
        net(**inputs, use_cache=False).loss.backward()
        assert patched.losses["telling"] > 0
        assert [len(kept) for kept in patched.ledger.kept(3)] == [8, 16, 0]


def test_text_alone_gives_every_parameter_a_gradient():
    net = _training("llava")
    with mllm.patch(net, PLANS["paper"]):
        net(**_inputs("llava", samples("llava", "text"))).loss.backward()
        for name, p in net.mllm.named_parameters():
            assert p.grad is not None and not p.grad.any(), name


@each
def test_flops_of_a_step_are_what_torch_counts(stage):
    net, batch = _training("llava", attn="eager"), samples("llava", "alone")
    inputs = _inputs("llava", batch)
    with mllm.patch(net, stage) as patched:
        with FlopCounterMode(display=False) as counter:
            net(**inputs, use_cache=False)
        row = patched.ledger.as_dict()
    n, width = int(batch[0].visual.sum()), 48
    attended = 4 * n * n * width  # torch does not count sdpa on a CPU
    want = counter.get_total_flops() + attended
    assert row["prefill_flops"][0] == pytest.approx(want, rel=1e-4)


def test_what_is_learnt_is_saved_and_read_bit_for_bit(tmp_path):
    net, inputs = _training("llava"), _inputs("llava", samples("llava"))

    def loss():
        with torch.enable_grad():
            return net(**inputs, use_cache=False).loss.detach()

    with mllm.patch(net, PLANS["paper"]) as patched:
        new = loss()
        teach(net.mllm)
        patched.learnt = 0
        want = loss()
        assert not torch.equal(new, want)
        patched.save_adapter(tmp_path)
    with mllm.patch(net, tmp_path):
        assert torch.equal(loss(), want)
    with mllm.patch(net, Croc(pool=41)) as patched:
        with pytest.raises(PlanError) as caught:
            patched.load_adapter(tmp_path)
    assert caught.value.argument == "plan"


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 7), (5, 5), (12, 40), (30, 31)])
def test_assignments_are_the_best(rows, columns):
    """Of random costs, of clusters with many ties, and of rows that all want the same."""
    g = np.random.default_rng(0)
    for cost in (
        g.random((rows, columns)), g.integers(0, 3, (rows, columns)).astype(float),
        np.tile(g.random(columns), (rows, 1)),
    ):  # fmt: skip
        mine, theirs = assign(cost), linear_sum_assignment(cost)
        assert len(set(mine.tolist())) == rows and mine.min() >= 0
        assert cost[np.arange(rows), mine].sum() == pytest.approx(cost[theirs].sum())


@pytest.mark.parametrize("bad, argument", [
    (dict(share=0.0), "share"), (dict(share=1.5), "share"), (dict(pool=0), "pool"),
    (dict(match="best"), "match"), (dict(weight=-1.0), "weight"), (dict(beta=0.0), "beta"),
    (dict(positions="compact"), "positions"),
])  # fmt: skip
def test_bad_values(bad, argument):
    with pytest.raises(PlanError) as caught:
        Croc(**bad)
    assert caught.value.argument == argument


def test_a_pool_that_is_too_small():
    net, inputs = _training("llava"), _inputs("llava", samples("llava"))
    with mllm.patch(net, Croc(pool=23)), pytest.raises(DataError, match="24 visual") as caught:
        net(**inputs, use_cache=False)
    assert caught.value.argument == "pool"


def test_reentrant_checkpointing_is_refused():
    net = _training("llava")
    net.gradient_checkpointing_enable({"use_reentrant": True})
    with mllm.patch(net, PLANS["paper"]), pytest.raises(PlanError, match="reentrant"):
        net(**_inputs("llava", samples("llava")))
