"""Routers over depth, against a decoder written out by hand: `pmod`."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from families import LAYERS, collate, model, samples
from layer_oracle import Edits, run, run_with_gradients
from matrix import equal
from torch.utils.flop_counter import FlopCounterMode
from zoo import check_family, shared

import mllm
from mllm.errors import PlanError
from mllm.routers import PMoD
from mllm.routers.base import Score, choose
from mllm.routers.schedules import ratios
from mllm.routers.stats import plot

FAMILIES = ["llava", "qwen2_5_vl", "internvl", "gemma3"]
#: Layers 1 to 3 of 4 routed, on 12, 5 and 5 of 16 tokens.
PLAN = PMoD(max_ratio=0.8, min_ratio=0.32)


def teach(net, seed: int = 7, size: float = 0.3):
    """Give routers weights as if they were trained: the same for the same widths."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.mllm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) * size)
    return net.mllm


def by_hand(family, s, bank, stage=PLAN, edit=None):
    """The card's layer in loops: what takes part, what is multiplied by what."""
    edit = edit or Edits()
    table = ratios(stage.schedule, LAYERS, stage.shift, stage.max_ratio, stage.min_ratio)
    for layer, share in table.items() if s.pictures else ():
        x = run_with_gradients(family, s, edit).hidden[layer]
        part = bank[str(layer)]
        score = x @ part.weight[0] + part.bias
        visual = s.visual.nonzero()[:, 0].tolist()
        best = sorted(visual, key=lambda i: -float(score[i].detach()))[: int(share * len(visual))]
        kept = torch.tensor([i in best for i in range(len(s.ids))])
        skipped = s.visual & ~kept
        weight = 1 + stage.scale * torch.tanh(score)
        edit.take[layer, "attn"] = edit.take[layer, "mlp"] = ~skipped
        edit.scale[layer, "mlp"] = torch.where(kept, weight, 1.0)
        edit.add[layer] = torch.where(skipped[:, None], (weight - 1)[:, None] * x, 0)
    return edit


def test_the_schedule_of_the_card():
    table = ratios("shiftedcos", 32, 0.5, 0.85, 0.15)
    want = [.8445, .8061, .7645, .7202, .6737, .6253, .5757, .5253, .4747, .4243, .3747, .3263,
            .2798, .2355, .1939, .1555] + [.15] * 8  # fmt: skip
    assert list(table) == list(range(8, 32))
    assert list(table.values()) == pytest.approx(want, abs=6e-5)
    assert (8 + sum(table.values())) / 32 == pytest.approx(0.5375, abs=5e-5)
    assert list(ratios("deep", 32, 0.5, 0.85, 0.15)) == list(range(2, 31))
    assert list(ratios("interleave", 32, 0.5, 0.85, 0.15)) == list(range(1, 32, 2))
    line = ratios("shiftedlinear", 32, 0.5, 0.85, 0.15)
    assert line[31] == 0.15 and line[16] == pytest.approx(1 - 16 / 31)


def test_ties_are_spread_and_do_not_depend_on_padding():
    """A router that knows nothing keeps tokens from the whole picture."""
    visual = torch.zeros(2, 580, dtype=torch.bool)
    visual[0, 2:578], visual[1, 4:] = True, True
    kept = choose(torch.zeros(2, 580), visual, torch.tensor([144, 144]))
    assert kept.sum(1).tolist() == [144, 144]
    assert torch.equal(kept[0, 2:578], kept[1, 4:])
    quarters = kept[0, 2:578].view(4, 144).sum(1)
    assert int(quarters.min()) >= 34
    first = choose(torch.arange(580.0).expand(2, -1), visual, torch.tensor([1, 2]))
    assert first[0].nonzero()[:, 0].tolist() == [577] and first[1].nonzero().shape[0] == 2


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_pmod_equals_its_description(family, attn, side):
    batch, net = samples(family), model(family, attn)
    inputs = collate(family, batch, side)
    with mllm.patch(net, PLAN) as patched:
        bank = teach(net)._modules["0"]
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        row = patched.ledger.as_dict()
    for b, s in enumerate(batch):
        want = run(family, s, by_hand(family, s, bank)).logits
        equal(logits[b], want, f"sample {b}", 2e-4 * max(1.0, float(want.std())))
        n = int(s.visual.sum())
        seen = [n, *(int(r * n) for r in ratios("shiftedcos", LAYERS, 0.5, 0.8, 0.32).values())]
        assert [layer["visual"][b] for layer in row["layers"]] == seen


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_identity(family, attn):
    """Ratio 1 and new routers: bit for bit the model; so is the model afterwards."""
    net = model(family, attn)
    inputs = collate(family, samples(family))
    names, plain = list(net.state_dict()), net(**inputs).logits
    with mllm.patch(net, PMoD(**PMoD.identity)):
        assert torch.equal(net(**inputs).logits, plain)
        added = [name for name in net.state_dict() if name not in names]
        assert added == [
            f"mllm.0.{i}.{p}" for i in range(LAYERS) for p in ("weight", "bias")
        ]
        assert [n for n in net.state_dict() if n in names] == names
    assert list(net.state_dict()) == names
    assert torch.equal(net(**inputs).logits, plain)


@pytest.mark.parametrize("family", [*FAMILIES, "llava_next"])
@torch.no_grad()
def test_batched_equals_alone(family):
    """Decode included; with pre-LLM and in-LLM stages around it."""
    check_family(family, PLAN)
    assert not hasattr(shared(family, "sdpa"), "mllm")


@torch.no_grad()
def test_beside_other_stages():
    check_family("llava", [mllm.compressors.VisionZip(keep=10), PLAN])
    check_family("llava", [mllm.compressors.FastV(layer=2, keep=0.5), PLAN])
    check_family("llava", [PLAN, mllm.compressors.SnapKV(budget=6, window=2)])


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_layer_stores_what_ran_and_decode_is_as_without_a_cache(family):
    net = model(family)
    (s,) = samples(family, "alone")
    inputs, n = collate(family, [s]), int(s.visual.sum())
    text = len(s.ids) - n
    more = torch.tensor([31, 32, 33])
    with mllm.patch(net, PLAN):
        bank = teach(net)._modules["0"]
        out = net(**inputs)
        cache, logits = out.past_key_values, []
        shares = [1.0, *ratios("shiftedcos", LAYERS, 0.5, 0.8, 0.32).values()]
        slots = [text + int(n * share) for share in shares]
        windows = [None if family != "gemma3" else w for w in (11, 11, None, 11)]
        want = [a if w is None else min(a, w) for a, w in zip(slots, windows, strict=True)]
        assert [layer.slots for layer in cache.layers] == want or family == "gemma3"
        assert cache.get_seq_length() == len(s.ids)
        for token in more:
            step = net(input_ids=token.view(1, 1), past_key_values=cache)
            logits.append(step.logits[0, -1])
    want = run(family, s, by_hand(family, s, bank), more).logits
    equal(torch.stack(logits), want[-3:], "decode", 2e-4 * max(1.0, float(want.std())))


@torch.no_grad()
def test_ledger_is_what_torch_counts():
    net = model("llava", "eager")
    inputs = collate("llava", samples("llava", "alone"))
    with mllm.patch(net, PLAN) as patched:
        with FlopCounterMode(display=False) as counter:
            net(**inputs)
        row = patched.ledger.as_dict()
    # transformers 5.17 makes rotary tables by a product.
    assert row["prefill_flops"][0] == pytest.approx(counter.get_total_flops(), rel=1e-4)
    assert row["visual_avg"] == [(16 + 12 + 5 + 5) / 4]
    assert row["prefill_flops"][0] < row["baseline_prefill_flops"][0]
    assert any("know nothing" in note for note in row["notes"])


@pytest.mark.parametrize("reentrant", [None, False])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_gradients(family, reentrant):
    """Loss and gradients of all routers are those of the loop, checkpointing or not."""
    batch = samples(family)
    inputs = collate(family, batch)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    net = model(family).train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    if reentrant is not None:
        net.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with mllm.patch(net, PLAN):
        teach(net)
        loss = net(**inputs, labels=labels).loss
        loss.backward()
        bank = net.mllm._modules["0"]
        mine = {name: p.grad for name, p in bank.named_parameters()}
        own = copy.deepcopy(bank).requires_grad_()
    own.zero_grad()
    losses = []
    with torch.enable_grad():
        for s in batch:
            logits = run_with_gradients(family, s, by_hand(family, s, own)).logits
            losses.append(
                torch.nn.functional.cross_entropy(logits[-4:-1], s.ids[-3:], reduction="none")
            )
    want = torch.cat(losses).mean()
    want.backward()
    equal(loss, want, "loss", 1e-5)
    for name, p in own.named_parameters():
        # What the last layer makes of visual tokens is read by nobody.
        assert (float(mine[name].abs().max()) > 0) == (not name.startswith("3")), name
        equal(mine[name], p.grad, name, 1e-4 * max(1.0, float(p.grad.abs().max())))


@torch.no_grad()
def test_statistics(tmp_path):
    """Of samples with images, whatever the padding; scores as the card computes them."""
    (s,) = samples("llava", "alone")
    net = model("llava")
    with mllm.patch(net, PLAN) as patched:
        part = teach(net)._modules["0"]["1"]
        net(**collate("llava", [s]))
        found = patched.router_stats()
        plot(found, tmp_path / "routers.png")
    kept = [(row["layer"], row["kept"]) for row in found]
    assert kept == [(1, 12 / 16), (2, 5 / 16), (3, 5 / 16)]
    score = run("llava", s).hidden[1][s.visual] @ part.weight[0] + part.bias
    assert found[0]["score_mean"] == pytest.approx(float(score.mean()), abs=1e-4)
    assert found[0]["score_std"] == pytest.approx(float(score.std(correction=0)), abs=1e-4)
    assert (tmp_path / "routers.png").stat().st_size > 1000


def test_text_alone_gives_every_router_a_gradient():
    """Other ranks of the same step wait for it."""
    net = model("llava").train()
    inputs = collate("llava", samples("llava", "text"))
    with mllm.patch(net, PLAN):
        net(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, p in net.mllm.named_parameters():
            assert p.grad is not None and not p.grad.any(), name


def test_scores_are_fp32_under_autocast_and_in_bf16():
    score = Score(8, std=1.0)
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(score(x), score.weight.new_tensor(score(x).tolist()))
        assert score(x).dtype == torch.float32
    half = copy.deepcopy(score).bfloat16()
    assert half(x.bfloat16()).dtype == torch.float32


def test_a_copy_of_the_model_has_no_plan():
    net = model("llava")
    with mllm.patch(net, PLAN):
        plain = copy.deepcopy(net)
        assert not hasattr(plain, "mllm") and hasattr(net, "mllm")


@pytest.mark.parametrize("bad, argument", [
    (dict(min_ratio=0.0), "min_ratio"), (dict(min_ratio=0.9), "min_ratio"),
    (dict(max_ratio=1.5), "max_ratio"), (dict(scale=1.0), "scale"),
    (dict(layers=(2, 9)), "layers"), (dict(layers=(1, 1)), "layers"), (dict(layers=()), "layers"),
    (dict(layers=(-1,)), "layers"), (dict(positions="compact"), "positions"),
    (dict(shift=3.0), "max_ratio"),
])  # fmt: skip
def test_bad_values(bad, argument):
    net = model("llava")
    with pytest.raises(PlanError) as caught:
        mllm.patch(net, PMoD(**bad))
    assert caught.value.argument == argument
    assert not hasattr(net, "mllm")

