"""DPN against a decoder written out by hand, with cells as lists of rows."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from families import KITS, LAYERS, collate, model, samples
from layer_oracle import Edits, run, run_with_gradients
from matrix import equal
from test_depth import MORE, decoded
from test_routers import teach
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo import check_family

import mllm
from mllm.compressors import FastV, SnapKV, VisionZip
from mllm.errors import PlanError
from mllm.routers import DPN

FAMILIES = ["llava", "qwen2_5_vl", "internvl", "gemma3"]
#: Sharp enough that samples choose differently, with weights of `teach`.
SHARP = dict(temperature=0.3, least=2)
PLANS = {
    "max": DPN(**SHARP),
    "avg": DPN(pool="avg", query="text", router="linear", pools=("1x1", "2x1", "3x2"), **SHARP),
    "probability": DPN(weight="probability", least=5, temperature=0.3, layers=(1, 3)),
    "token": DPN(query="router", **SHARP),
}
each = pytest.mark.parametrize("stage", PLANS.values(), ids=PLANS)


def grids(s):
    """Per frame of each picture, its rows of sequence places."""
    rows, found, at = s.visual.nonzero()[:, 0].tolist(), [], 0
    for picture in s.pictures:
        high, wide = picture.grid
        for _ in range(max(1, picture.frames)):
            found.append([rows[at + r * wide : at + (r + 1) * wide] for r in range(high)])
            at += high * wide
    return found


def cells(grid, size):
    """The cells of a grid, each a list of rows of places."""
    high, wide = size
    return [
        [[row[c : c + wide] for row in grid[r : r + high]] for c in range(0, len(grid[0]), wide)]
        for r in range(0, len(grid), high)
    ]


def seat(cell, size):
    return cell[min(size[0] // 2, len(cell) - 1)][min(size[1] // 2, len(cell[0]) - 1)]


def router(part, stage, x):
    if stage.router == "linear":
        return x @ part.outer.weight.T
    normed = (x - x.mean()) / (x.var(correction=0) + 1e-5).sqrt() * part.scale + part.shift
    return F.gelu(normed @ part.inner.weight.T) @ part.outer.weight.T


def by_hand(family, s, bank, stage, more=None, prompt=None, drawn=None):
    """The card's layers in loops; returns edits, the choices, and each layer's probabilities."""
    edit, stage, seen = Edits(), stage.at_depth(LAYERS), []
    own, prompt = grids(s), len(s.ids) if prompt is None else prompt
    if stage.query == "router" and s.pictures:
        edit.insert[0] = prompt - 1, bank["token"].weight
        edit.compact |= set() if KITS[family].mrope else {0}
    for number, layer in enumerate(stage.layers if s.pictures else ()):
        x = run_with_gradients(family, s, edit, more).hidden[layer]
        first = int(s.visual.nonzero()[0])
        if stage.query == "last":
            c = x[prompt - 1]
        elif stage.query == "router":
            c = x[prompt]
        else:
            c = x[[i for i in range(first, prompt) if not s.visual[i]]].mean(0)
        p = (router(bank[str(layer)], stage, c) / stage.temperature).softmax(0)
        here = sum(len(row) for grid in own for row in grid)
        left = [sum(len(row) for g in own for row in cells(g, size)) for size in stage.sizes]
        allowed = [e for e, n in enumerate(left) if n >= stage.least or n == here]
        best = max(allowed, key=lambda e: float(p[e].detach()))
        chosen = best if drawn is None else drawn[number]
        seen.append((chosen, p))
        size, new, gone = stage.sizes[chosen], x.clone(), torch.zeros(len(s.ids), dtype=torch.bool)
        weight = p[chosen] if stage.weight == "probability" else 1 + p[chosen] - p[chosen].detach()
        for grid in own:
            for cell in (cell for row in cells(grid, size) for cell in row):
                rows = [i for row in cell for i in row]
                values = x[rows].amax(0) if stage.pool == "max" else x[rows].mean(0)
                new[seat(cell, size)] = weight * values
                gone[[i for i in rows if i != seat(cell, size)]] = True
        own = [[[seat(cell, size) for cell in row] for row in cells(g, size)] for g in own]
        edit.write[layer] = lambda h, new=new: torch.cat([new, h[len(new) :]])
        edit.drop[layer] = gone
        edit.compact |= set() if KITS[family].mrope else {layer}
    return edit, seen


@each
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_equals_its_description(family, attn, stage):
    """Of a padded batch, and of the tokens decoded behind it; rows really leave."""
    net, batch = model(family, attn), samples(family)
    with mllm.patch(net, stage) as patched:
        bank = teach(net)._modules["0"]
        logits = decoded(net, family, batch, patched)
        net(**collate(family, batch))
        visual = [row["visual"] for row in patched.ledger.as_dict()["layers"]]
    chosen = set()
    for b, s in enumerate(batch):
        edit, seen = by_hand(family, s, bank, stage, MORE)
        found = run(family, s, edit, MORE)
        there = torch.cat([~s.visual, torch.ones(3, dtype=torch.bool)])
        near = 2e-4 * max(1.0, float(found.logits.std()))
        equal(logits[b][there], found.logits[there], f"sample {b}", near)
        assert visual[-1][b] == int((s.visual & found.alive[: len(s.ids)]).sum())
        chosen |= {e for e, _ in seen}
    assert chosen - {0}, "something was pooled"


def test_samples_choose_differently():
    """Or the tests above would say little of ragged batches."""
    net, batch = model("llava"), samples("llava")
    with mllm.patch(net, PLANS["max"]):
        bank = teach(net)._modules["0"]
    with torch.no_grad():
        chosen = [[e for e, _ in by_hand("llava", s, bank, PLANS["max"])[1]] for s in batch[:2]]
    assert chosen[0] != chosen[1]


@each
@pytest.mark.parametrize("family", [*FAMILIES, "llava_next"])
@torch.no_grad()
def test_batched_equals_alone(family, stage):
    check_family(family, stage)


@torch.no_grad()
def test_beside_other_stages():
    stage = DPN(layers=(2, 3), **SHARP)
    check_family("llava", [VisionZip(keep=10), stage])
    check_family("llava", [FastV(layer=1, keep=0.5), stage])
    check_family("llava", [stage, SnapKV(budget=6, window=2)])


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_finest_pool_is_the_model(family, attn):
    net = model(family, attn)
    inputs = collate(family, samples(family))
    plain, answer = net(**inputs).logits, net.generate(**inputs, max_new_tokens=4)
    for pool in ("max", "avg"):
        with mllm.patch(net, DPN(**DPN.identity, pool=pool)):
            assert torch.equal(net(**inputs).logits, plain)
            assert torch.equal(net.generate(**inputs, max_new_tokens=4), answer)
    assert torch.equal(net(**inputs).logits, plain)


@torch.no_grad()
def test_a_choice_for_all_samples():
    """The ratio of an evaluation: whatever routers and `least` say."""
    net = model("llava")
    with mllm.patch(net, DPN(choice=(1, 2, 0))) as patched:
        net(**collate("llava", samples("llava")))
        layers = patched.ledger.as_dict()["layers"]
    assert [row["visual"] for row in layers] == [
        [16, 32, 0], [8, 16, 0], [2, 4, 0], [2, 4, 0]
    ]  # fmt: skip
    with mllm.patch(net, DPN(choice=(1,), layers=(2,), least=9)) as patched:
        net(**collate("llava", samples("llava")))
        assert patched.ledger.tokens(2)[0] - patched.ledger.tokens(1)[0] == -8
    with mllm.patch(net, DPN(layers=(2,), least=17)) as patched:
        net(**collate("llava", samples("llava", "alone")))
        assert patched.ledger.as_dict()["kept_llm"] == [16]
        assert len(patched.ledger.kept(2)[0]) == 16, "nothing leaves 17 of 16"


def training(family, stage, drawn, monkeypatch, checkpointed=False, **more):
    """Loss, gradients and auxiliary loss of one step in which the draws are given."""
    batch = samples(family)
    inputs = collate(family, batch)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    net = model(family).train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    if checkpointed:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    calls = iter(zip(*drawn, strict=True))
    monkeypatch.setattr(
        torch.Tensor, "multinomial", lambda p, n: torch.tensor([[e] for e in next(calls)])
    )
    rows = []
    handle = (
        net.get_decoder()
        .layers[-1]
        .input_layernorm.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    )
    with mllm.patch(net, stage) as patched:
        teach(net)
        loss = net(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        bank = net.mllm._modules["0"]
        grads = {name: p.grad for name, p in bank.named_parameters()}
        named = {name: float(x) for name, x in patched.losses.items()}
        own = copy.deepcopy(bank).requires_grad_()
    handle.remove()
    monkeypatch.undo()
    own.zero_grad()
    return batch, loss, grads, named, own, rows[0]


@each
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_gradients(family, checkpointed, stage, monkeypatch):
    """Loss and all gradients are those of the loop; rows leave in training too."""
    count = len(stage.at_depth(LAYERS).layers)
    drawn = [(1, 2, 0)[:count], (2, 0, 1)[:count], (0, 0, 0)[:count]]
    batch, loss, mine, named, own, rows = training(family, stage, drawn, monkeypatch, checkpointed)
    answers, reached = [], [[] for _ in range(count)]
    with torch.enable_grad():
        for s, choices in zip(batch, drawn, strict=True):
            edit, seen = by_hand(family, s, own, stage, prompt=len(s.ids) - 3, drawn=choices)
            found = run_with_gradients(family, s, edit)
            answers.append(F.cross_entropy(found.logits[-4:-1], s.ids[-3:], reduction="none"))
            for layer, (_, p) in enumerate(seen):
                best, index = p.max(0)
                reached[layer].append(best * index)
        hinge = sum(F.relu(stage.target - torch.stack(x).mean()) for x in reached) / count
        want = torch.cat(answers).mean() + stage.auxiliary * hinge
    want.backward()
    equal(loss, want, "loss", 1e-5)
    assert named == {"pools": pytest.approx(float(hinge), abs=1e-5)}
    longest = max(len(s.ids) for s in batch)
    assert rows < longest, f"{rows} of {longest} rows enter the last layer"
    for name, p in own.named_parameters():
        assert float(p.grad.abs().max()) > 0, name
        equal(mine[name], p.grad, name, 1e-4 * max(1.0, float(p.grad.abs().max())))


def test_draws_follow_the_router(monkeypatch):
    """What may not be chosen is never drawn; a sample without a choice is left alone."""
    seen = []

    def multinomial(p, n):
        seen.append(p.clone())
        return p.argmax(1, keepdim=True)

    net = model("llava").train()
    inputs = collate("llava", samples("llava"))
    with mllm.patch(net, DPN(layers=(2,), least=5)) as patched:
        teach(net)
        monkeypatch.setattr(torch.Tensor, "multinomial", multinomial)
        net(**inputs, labels=inputs["input_ids"], use_cache=False)
        net.eval()(**inputs)
        assert len(seen) == 1, "nothing is drawn at inference"
        assert patched.router_stats()[0]["layer"] == 2
    one, two, _ = seen[0]
    assert one[2] == 0 and one[:2].min() > 0, "4 of 16 tokens are too few"
    assert two.min() > 0 and float(two.sum()) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_ledger_is_what_torch_counts():
    net = model("llava", "eager")
    inputs = collate("llava", samples("llava", "alone"))
    with mllm.patch(net, PLANS["max"]) as patched:
        teach(net)
        with FlopCounterMode(display=False) as counter:
            net(**inputs)
        row = patched.ledger.as_dict()
    assert row["prefill_flops"][0] == pytest.approx(counter.get_total_flops(), rel=1e-4)
    assert row["prefill_flops"][0] < row["baseline_prefill_flops"][0]


@pytest.mark.parametrize("stage", [PLANS["token"], PLANS["avg"]], ids=["token", "linear"])
@torch.no_grad()
def test_an_adapter_is_the_same_bit_for_bit(stage, tmp_path):
    net, inputs = model("llava"), collate("llava", samples("llava"))
    with mllm.patch(net, stage) as patched:
        teach(net)
        want = net(**inputs).logits
        patched.save_adapter(tmp_path / "adapter")
    with mllm.patch(net, str(tmp_path / "adapter")):
        assert torch.equal(net(**inputs).logits, want)


def test_text_alone_gives_every_parameter_a_gradient():
    net = model("llava").train()
    inputs = collate("llava", samples("llava", "text"))
    with mllm.patch(net, PLANS["token"]):
        net(**inputs, labels=inputs["input_ids"]).loss.backward()
        for name, p in net.mllm.named_parameters():
            assert p.grad is not None and not p.grad.any(), name


@torch.no_grad()
def test_the_paper_s_layers():
    stage = DPN().at_depth(32)
    assert stage.layers == (8, 16, 24), "behind 7, 15 and 23"
    assert DPN(query="router").at_depth(4).layers == (1, 2, 3)


@pytest.mark.parametrize("bad, argument", [
    (dict(pools=()), "pools"), (dict(pools=("1x1", "2")), "pools"), (dict(pools=("0x1",)), "pools"),
    (dict(choice=(0, 0)), "choice"), (dict(choice=(0, 3, 0)), "choice"),
    (dict(layers=(2, 1)), "layers"), (dict(layers=(4,)), "layer"), (dict(layers=()), "layers"),
    (dict(temperature=0.0), "temperature"), (dict(least=0), "least"),
    (dict(auxiliary=-1.0), "auxiliary"), (dict(target=-1.0), "target"),
    (dict(query="router", layers=(0, 2)), "layers"),
])  # fmt: skip
def test_bad_values(bad, argument):
    net = model("llava")
    with pytest.raises(PlanError) as caught:
        mllm.patch(net, DPN(**bad))
    assert caught.value.argument == argument
    assert not hasattr(net, "mllm")


def test_rotary_rows_and_columns_cannot_be_renumbered():
    with pytest.raises(PlanError, match="renumbered"):
        mllm.patch(model("qwen2_5_vl"), DPN(positions="compact"))


def test_batches_are_padded_to_the_longest_alone():
    """No row is there for a sample that does not need it."""
    net, batch = model("llava"), samples("llava")
    inputs = collate("llava", batch)
    rows = []
    handle = (
        net.get_decoder()
        .layers[3]
        .input_layernorm.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    )
    with torch.no_grad(), mllm.patch(net, DPN(choice=(2, 2, 0))) as patched:
        teach(net)
        kept = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        most = max(patched.ledger.tokens(3))
    handle.remove()
    assert rows == [most] and len(kept[0]) == len(batch[0].ids)
