"""Draws that all processes share; LayerSkip's; and mixture of recursions, against a loop."""

from __future__ import annotations

import copy
import json
import random
import shutil
from fractions import Fraction

import families
import family_oracles
import layer_oracle
import pytest
import torch
from families import collate, model, samples
from layer_oracle import Edits, run, run_with_gradients
from matrix import equal
from safetensors.torch import load_file
from test_depth import MORE, decoded
from test_routers import teach
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from train_tiny import save_small
from zoo import check_family

import mllm
from mllm.compressors import FastV, SnapKV, VisionZip
from mllm.errors import PlanError
from mllm.routers import LayerSkip, MoR
from mllm.routers.schedules import draw
from mllm.training.recipe import validate
from mllm.training.run import run as run_recipe
from mllm.training.trainer import seal


def test_draws_are_those_of_seed_and_step():
    """Any process at any time draws the same, and nobody else's generator moves."""
    random.seed(1)
    before = random.getstate(), torch.get_rng_state()
    found = [draw("abc", [5, 3, 2], seed=7, step=i) for i in range(2000)]
    assert found[1234] == draw("abc", [5, 3, 2], seed=7, step=1234)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])
    shares = [found.count(x) / 2000 for x in "abc"]
    assert shares == pytest.approx([0.5, 0.3, 0.2], abs=0.04)
    assert draw([8], None, 0, 0) == 8
    assert {draw("abc", [1, 0, 1], 0, i) for i in range(99)} == {"a", "c"}


def test_draws_of_other_seeds_are_others():
    """Not those of the next step: seed and step are no sum."""
    one, two = ([draw(range(100), None, seed, i) for i in range(50)] for seed in (0, 1))
    assert len(set(one)) > 25 and one[1:] != two[:-1]
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 10


# --- LayerSkip's draws


def step(net, inputs, patched):
    """The loss of a forward that learns, and its exits'."""
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    loss = net(**inputs, labels=labels).loss
    return float(loss.detach()), float(patched.losses["exits"])


def test_layerskip_draws_by_what_the_model_has_learnt_from():
    """The same again where training goes on, whatever others have drawn in between."""
    net, inputs = model("llava").train(), collate("llava", samples("llava"))
    with mllm.patch(net, LayerSkip(dropout=0.9, every=2)) as patched:
        found = [step(net, inputs, patched) for _ in range(6)]
        assert patched.learnt == 6 and len(set(found)) > 3
        torch.manual_seed(99)
        with torch.no_grad():
            net(**inputs)
        assert patched.learnt == 6, "nothing was learnt"
        patched.learnt = 3
        before = torch.get_rng_state()
        assert [step(net, inputs, patched) for _ in range(3)] == found[3:]
        assert torch.equal(before, torch.get_rng_state())


def test_processes_have_the_same_exits_and_drop_samples_of_their_own(monkeypatch):
    net, inputs = model("llava").train(), collate("llava", samples("llava"))
    found = {}
    for dropout in (0.0, 0.9):
        for rank in (0, 1):
            monkeypatch.setattr("mllm.routers.layerskip.rank", lambda rank=rank: rank)
            with mllm.patch(net, LayerSkip(dropout=dropout, every=3)) as patched:
                found[dropout, rank] = [step(net, inputs, patched) for _ in range(4)]
    assert found[0.0, 0] == found[0.0, 1] and len(set(found[0.0, 0])) > 1
    assert found[0.9, 0] != found[0.9, 1]


@pytest.mark.slow
def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path):
    """Steps of two forwards; the stop is between the second and the third."""
    written = {
        "version": 1,
        "model": {"path": str(save_small(tmp_path / "small")), "dtype": "float32"},
        "plan": "layerskip:dropout=0.9:every=2",
        "data": [{"path": "yardstick", "tasks": ["exist", "ocr_word"], "limit": 8}],
        "train": {"seed": 3, "max_steps": 4, "per_device_train_batch_size": 1,
                  "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "save_steps": 2},
    }  # fmt: skip
    first, second = (
        validate(written | {"output": {"dir": str(tmp_path / n)}}) for n in ("first", "second")
    )
    run_recipe(first)
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    for name in ("checkpoint-4", "model"):
        shutil.rmtree(tmp_path / "second" / name)
    record = json.loads((tmp_path / "second/run.json").read_text())
    (tmp_path / "second/run.json").write_text(json.dumps(record | {"status": "stopped"}))
    # What torch's own generator had drawn is no help.
    for state in (tmp_path / "second/checkpoint-2").glob("rng_state*"):
        state.unlink()
    seal(tmp_path / "second/checkpoint-2")
    run_recipe(second, resume=True)
    one, two = (load_file(tmp_path / n / "model/model.safetensors") for n in ("first", "second"))
    assert all(torch.equal(one[k], two[k]) for k in one)


# --- mixture of recursions

FAMILIES = ["llava", "qwen2_5_vl", "internvl", "gemma3"]
PLANS = {
    "expert": MoR(auxiliary=0.3),
    "expert-3": MoR(recursions=3, layers=(0, 1, 2), least=0.4, scale=1.5, auxiliary=0.3),
    "token": MoR(recursions=3, layers=(0, 1, 2), routing="token", auxiliary=0.3),
}
each = pytest.mark.parametrize("stage", PLANS.values(), ids=list(PLANS))


def by_hand(family, s, bank, stage, more=None, learns=False, layers=None):
    """The card's rounds in loops.

    Returns:
        The edits; of expert choice the losses of the rows that compete, by recursion, of token
        choice probabilities and depths of all rows.
    """
    edit, aside, prompt = Edits(), [], len(s.ids)
    layers, rounds = layers or stage.layers or (1, 2), stage.recursions
    size = len(layers) // rounds
    least = Fraction(1, rounds) if stage.least is None else Fraction(str(stage.least))
    n = prompt if more is None else prompt + len(more)
    active = list(range(n))
    for r in range(rounds if s.pictures else 0):
        first = layers[r * size]
        x = run_with_gradients(family, s, edit, more).hidden[first]
        if stage.routing == "expert":
            part, start = bank[str(first)], x
            score = x @ part.weight[0] + part.bias
            if r:
                compete = [i for i in active if learns or i < prompt]
                room = int((n if learns else prompt) * (1 - (1 - least) * Fraction(r, rounds - 1)))
                best = sorted(compete, key=lambda i: -float(score[i].detach()))[:room]
                target = torch.tensor([float(i in best) for i in compete])
                aside.append(
                    F.binary_cross_entropy_with_logits(score[compete], target, reduction="none")
                )
                active = best + [i for i in active if i not in compete and score[i] >= 0]
            weight = stage.scale / (1 + (-score).exp())
            ended = active
        else:
            if not r:
                part, start = bank[str(first)], x
                p = (x @ part.weight.T + part.bias).softmax(-1)
                depth = [max(range(rounds), key=lambda j: float(p[i, j])) + 1 for i in range(n)]
                aside.append((p, F.one_hot(torch.tensor(depth) - 1, rounds).float()))
                chosen = torch.stack([p[i, depth[i] - 1] for i in range(n)])
            active = [i for i in active if depth[i] > r]
            weight = 1 + (chosen - chosen.detach())
            ended = [i for i in active if depth[i] == r + 1]
        taken, last = (torch.tensor([i in rows for i in range(n)]) for rows in (active, ended))
        for layer in range(first, first + size):
            edit.take[layer, "attn"] = edit.take[layer, "mlp"] = taken
        weight = torch.where(last, weight, 1.0)[:, None]
        edit.write[first + size] = lambda h, a=start, w=weight: a + w * (h - a)
    return edit, aside


def close(got, want, what):
    equal(got, want, what, 2e-4 * max(1.0, float(want.std())))


@each
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_mor_equals_its_description(family, stage):
    """Every sample of a padded batch, and what is decoded behind it; the ledger has what ran."""
    net, batch = model(family), samples(family)
    inputs = collate(family, batch)
    with mllm.patch(net, stage) as patched:
        bank = teach(net)._modules["0"]
        logits = decoded(net, family, batch, patched)
        net(**inputs)
        layers = patched.ledger.as_dict()["layers"]
    skipped = 0
    for b, s in enumerate(batch):
        edit, _ = by_hand(family, s, bank, stage, MORE)
        close(logits[b], run(family, s, edit, MORE).logits, f"sample {b}")
        for (layer, _), taken in edit.take.items():
            assert layers[layer]["tokens"][b] == int(taken[: len(s.ids)].sum())
            skipped += int((~taken[-3:]).sum())
    assert skipped > 0, "later tokens leave too"


@pytest.mark.parametrize("routing", ["expert", "token"])
@torch.no_grad()
def test_recursions_of_several_layers(routing, monkeypatch):
    """Six layers, of which two times two are the span; eager attention."""
    monkeypatch.setattr(families, "LAYERS", 6)
    net, whole = model("llava", "eager"), model("llava", "eager")
    for module in (layer_oracle, family_oracles):
        monkeypatch.setattr(module, "reference", lambda family: whole)
    batch, stage = samples("llava"), MoR(routing=routing)
    with mllm.patch(net, stage) as patched:
        assert patched.plan.stages[0].layers == (1, 2, 3, 4)
        bank = teach(net)._modules["0"]
        logits = decoded(net, "llava", batch, patched)
    for b, s in enumerate(batch):
        edit, _ = by_hand("llava", s, bank, stage, MORE, layers=(1, 2, 3, 4))
        close(logits[b], run("llava", s, edit, MORE).logits, f"sample {b}")


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_identity_of_mor(family, attn):
    """New routers let later tokens go on, and all tokens under token choice."""
    net = model(family, attn)
    inputs = collate(family, samples(family))
    plain, answer = net(**inputs).logits, net.generate(**inputs, max_new_tokens=4)
    for stage in (MoR(**MoR.identity), MoR(routing="token")):
        with mllm.patch(net, stage):
            assert torch.equal(net(**inputs).logits, plain)
            assert torch.equal(net.generate(**inputs, max_new_tokens=4), answer)


@each
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "llava_next"])
@torch.no_grad()
def test_batched_equals_alone(family, stage):
    check_family(family, stage)


@torch.no_grad()
def test_beside_other_stages():
    """Rows leave before the span and inside of it, and the cache below it."""
    for stage in (PLANS["expert"], PLANS["token"]):
        check_family("llava", [VisionZip(keep=10), stage])
        check_family("llava", [stage, FastV(layer=2, keep=0.5)])
        check_family("llava", [stage, SnapKV(budget=6, window=2)])


@each
@torch.no_grad()
def test_generation_with_and_without_a_cache(stage):
    """Of samples with pictures; text alone is left alone."""
    net, options = model("llava"), dict(max_new_tokens=5, do_sample=False)
    inputs, text = (collate("llava", samples("llava", kind)) for kind in ("padded", "text"))
    plain = net.generate(**text, **options)
    with mllm.patch(net, stage):
        teach(net)
        for more in ({}, {"num_beams": 2}):
            cached = net.generate(**inputs, **options, **more)
            assert torch.equal(cached, net.generate(**inputs, **options, **more, use_cache=False))
        assert torch.equal(net.generate(**text, **options), plain)


@each
@torch.no_grad()
def test_ledger_is_what_torch_counts(stage):
    net, inputs = model("llava", "eager"), collate("llava", samples("llava", "alone"))
    with mllm.patch(net, stage) as patched:
        teach(net)
        with FlopCounterMode(display=False) as counter:
            net(**inputs)
        row = patched.ledger.as_dict()
    assert row["prefill_flops"][0] == pytest.approx(counter.get_total_flops(), rel=1e-4)
    assert row["prefill_flops"][0] < row["baseline_prefill_flops"][0]


@each
@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_mor(checkpointed, stage):
    """Loss, auxiliary losses and all gradients are those of the loop, checkpointing or not."""
    batch, net = samples("llava"), model("llava").train()
    inputs = collate("llava", batch)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    if checkpointed:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    with mllm.patch(net, stage) as patched:
        teach(net, size=0.03)
        loss = net(**inputs, labels=labels).loss
        loss.backward()
        mine = {name: p.grad for name, p in net.mllm._modules["0"].named_parameters()}
        own = copy.deepcopy(net.mllm._modules["0"]).requires_grad_()
        added = float(patched.losses["recursion"])
    own.zero_grad()
    answers, aside = [], {}
    with torch.enable_grad():
        for s in batch:
            edit, found = by_hand("llava", s, own, stage, learns=True)
            logits = run_with_gradients("llava", s, edit).logits
            answers.append(F.cross_entropy(logits[-4:-1], s.ids[-3:], reduction="none"))
            for r, rows in enumerate(found):
                aside.setdefault(r, []).append(rows)
        if stage.routing == "expert":
            more = sum(torch.cat(rows).mean() for rows in aside.values())
        else:
            mean, load = (torch.cat(x).mean(0) for x in zip(*aside[0], strict=True))
            more = stage.recursions * (mean * load).sum()
        want = torch.cat(answers).mean() + stage.auxiliary * more
    want.backward()
    assert added == pytest.approx(float(more.detach()), abs=1e-4)
    equal(loss, want, "loss", 1e-4)
    for name, p in own.named_parameters():
        assert mine[name].any(), name
        equal(mine[name], p.grad, name, 1e-4 * max(1.0, float(p.grad.abs().max())))


@torch.no_grad()
def test_what_mor_has_learnt_comes_back(tmp_path):
    net, inputs = model("llava"), collate("llava", samples("llava"))
    for name, stage in PLANS.items():
        with mllm.patch(net, stage) as patched:
            teach(net)
            patched.save_adapter(tmp_path / name)
            logits, found = net(**inputs).logits, patched.router_stats()
        with mllm.patch(net, tmp_path / name) as patched:
            assert torch.equal(net(**inputs).logits, logits)
            assert patched.router_stats() == found
        assert found[0]["kept"] == 1 and found[-1]["kept"] < 1 and len(found) == stage.recursions


@pytest.mark.parametrize("bad, argument", [
    (dict(recursions=1), "recursions"), (dict(recursions=3), "recursions"),
    (dict(least=0.0), "least"), (dict(least=1.5), "least"), (dict(scale=0.0), "scale"),
    (dict(auxiliary=-1.0), "auxiliary"), (dict(positions="compact"), "positions"),
    (dict(layers=(0, 2)), "layers"), (dict(layers=(0, 1, 2)), "layers"),
    (dict(layers=(2, 3)), "layers"), (dict(layers=(1, 1)), "layers"),
])  # fmt: skip
def test_bad_values_of_mor(bad, argument):
    net = model("llava")
    with pytest.raises(PlanError) as caught:
        mllm.patch(net, MoR(**bad))
    assert caught.value.argument == argument and not hasattr(net, "mllm")
