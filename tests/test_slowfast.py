"""`slowfast` and `lookingtolearn` by hand: a decoder that meets slow tokens one by one."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from families import KITS, LAYERS, collate, model, reference, samples
from family_oracles import features
from layer_oracle import Edits, run, run_with_gradients
from matrix import equal
from test_depth import MORE
from test_routers import teach
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo import _placed, check_family, check_generation

import mllm
from mllm.compressors import AvgPool, FastV, LookingToLearn, SnapKV, Stride
from mllm.errors import PlanError
from mllm.routers import SlowFast

FAMILIES = ["llava", "qwen2_5_vl", "internvl", "gemma3", "qwen3_vl"]
PLANS = {
    "two": SlowFast(layers=(1, 2)),
    "behind": SlowFast(every=2, system=False),
    "token": LookingToLearn(layers=(1, 2)),
    "feature": LookingToLearn(every=2, system=False, shares="feature"),
    "hard": LookingToLearn(layers=(0, 3), shares="feature", gate="hard"),
}
each = pytest.mark.parametrize("stage", PLANS.values(), ids=PLANS)


def grid(families):
    """Of `lookingtolearn` all families have one kind of gate; the rest is slow."""
    for family in families:
        for name, stage in PLANS.items():
            fast = name not in ("feature", "hard") or family in ("llava", "qwen3_vl")
            marks = [] if fast else [pytest.mark.slow]
            yield pytest.param(family, stage, marks=marks, id=f"{family}-{name}")


def decoded(net, family, batch):
    """Logits of every sample and of MORE behind it, at the positions that generate() gives."""
    inputs, mrope = _placed(family, batch), KITS[family].mrope
    mask = inputs["attention_mask"]
    out = net(**inputs)
    found = tiny.per_sample(out.logits, mask)
    for token in MORE:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        given = {} if mrope else {"attention_mask": mask, "position_ids": mask.sum(1)[:, None] - 1}
        ids = token.expand(len(batch), 1)
        out = net(input_ids=ids, past_key_values=out.past_key_values, **given)
        found = [torch.cat([x, out.logits[b, -1:]]) for b, x in enumerate(found)]
    return found


def taken(stage, gate, out, met):
    """What a token goes on with, from what its heads give and what they have met."""
    z, warm = out.flatten(), torch.tanh(gate.warm)
    if not isinstance(stage, LookingToLearn):
        return out + torch.tanh(z @ gate.score.weight[0] + gate.score.bias) * warm * met
    g = torch.sigmoid(gate.score.weight @ torch.cat([z, met.flatten()]) + gate.score.bias)
    if stage.gate == "hard":
        g = g.round().detach() + g - g.detach()
    g = 1 - (1 - g) * warm
    g = g.view_as(out) if stage.shares == "feature" else g
    return g * out + (1 - g) * met


def by_hand(family, s, bank, stage, edit=None):
    """What heads give in hybrid layers; later tokens meet the slow tokens as text does."""
    edit, stage, net = edit or Edits(), stage.at_depth(LAYERS), reference(family)
    first = int(s.visual.nonzero()[0]) if s.pictures else 0
    for layer in stage.layers if s.pictures else ():
        module, gate = bank[f"{layer}_kv"], bank[f"{layer}_gate"]
        block = net.get_decoder().layers[layer]
        slow = block.input_layernorm(torch.cat(features(family, s)).float())
        both = slow @ module.weight.T + module.bias
        dim = block.self_attn.head_dim
        keys, values = (x.view(len(x), -1, dim) for x in both.chunk(2, 1))
        if module.norm is not None:
            keys = module.norm(keys)

        def beside(q, out, keys=keys, values=values, gate=gate, scaling=block.self_attn.scaling):
            found, group = out.clone(), len(q) // keys.shape[1]
            for i in range(q.shape[1]):
                if i < len(s.ids) and s.visual[i] or not stage.system and i < first:
                    continue
                met = [
                    (keys[:, h // group] @ q[h, i] * scaling).softmax(0) @ values[:, h // group]
                    for h in range(len(q))
                ]
                found[:, i] = taken(stage, gate, out[:, i], torch.stack(met))
            return found

        edit.beside[layer] = beside
    return edit


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family, stage", grid(FAMILIES))
@torch.no_grad()
def test_it_equals_its_description(family, attn, stage):
    """Of a padded batch with fast tokens alone in the sequence, and of tokens behind it."""
    net = model(family, attn)
    batch = samples(family, "alone" if "qwen" in family else "padded")
    fast = Stride(keep=5, positions="original")
    with mllm.patch(net, [fast, stage]) as patched:
        bank = teach(net)._modules["1"]
        logits = decoded(net, family, batch)
        kept = patched.ledger.kept("llm")
    for b, s in enumerate(batch):
        gone = s.visual.clone()
        gone[s.visual.nonzero()[kept[b], 0]] = False
        edit = by_hand(family, s, bank, stage, Edits(drop={0: gone}))
        want = run(family, s, edit, MORE).logits
        there = torch.cat([~gone, torch.ones(3, dtype=torch.bool)])
        near = 2e-4 * max(1.0, float(want.std()))
        equal(logits[b][there], want[there], f"sample {b}", near)


@pytest.mark.parametrize("method", [SlowFast, LookingToLearn])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_new_parts_change_nothing(family, attn, method):
    """Bit for bit, with all tokens kept; trained ones do change answers."""
    net, inputs = model(family, attn), collate(family, samples(family))
    plain, answer = net(**inputs).logits, net.generate(**inputs, max_new_tokens=4)
    with mllm.patch(net, method(every=1)) as patched:
        assert torch.equal(net(**inputs).logits, plain)
        assert torch.equal(net.generate(**inputs, max_new_tokens=4), answer)
        attention = net.get_decoder().layers[0].self_attn
        part = net.mllm._modules["0"]["0_kv"]
        assert torch.equal(part.weight[: len(part.weight) // 2], attention.k_proj.weight)
        assert torch.equal(part.weight[len(part.weight) // 2 :], attention.v_proj.weight)
        teach(net)
        assert not torch.equal(net(**inputs).logits[0], plain[0])
        assert patched.ledger.as_dict()["kv_bytes"] > patched.ledger.as_dict()["baseline_kv_bytes"]
    assert torch.equal(net(**inputs).logits, plain)


@pytest.mark.parametrize("family, stage", grid([*FAMILIES, "llava_next"]))
@torch.no_grad()
def test_batched_equals_alone(family, stage):
    check_family(family, stage)


@torch.no_grad()
def test_beside_other_stages():
    stage = PLANS["two"]
    check_family("llava", [AvgPool(keep=4), stage])
    check_family("llava", [stage, FastV(layer=2, keep=0.5)])
    check_family("llava", [stage, SnapKV(budget=6, window=2)])
    check_family("llava", [stage, mllm.routers.PMoD(max_ratio=0.8, min_ratio=0.32)])


@each
def test_generation_with_and_without_a_cache(stage):
    check_generation("llava", [Stride(keep=5), stage], teach)


@torch.no_grad()
def test_a_second_turn_still_knows_the_picture():
    """Its text meets the slow tokens that are on the cache, and the cache can be copied."""
    net, (s,) = model("llava"), samples("llava", "alone")
    inputs = collate("llava", [s])
    with mllm.patch(net, [Stride(keep=5), PLANS["two"]]):
        teach(net)
        out = net(**inputs)
        held = copy.deepcopy(out.past_key_values)
        want = net(**{**inputs, "input_ids": torch.cat([s.ids, MORE])[None],
                      "attention_mask": torch.ones(1, len(s.ids) + 3)}).logits[0, -3:]  # fmt: skip
        for cache in (out.past_key_values, held):
            equal(net(input_ids=MORE[None], past_key_values=cache).logits[0], want, "turn", 1e-4)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family, stage", grid(["llava", "gemma3"]))
def test_gradients(family, checkpointed, stage):
    """Loss and all gradients are those of the loop; the projector learns from slow tokens."""
    batch = samples(family)
    inputs = _placed(family, batch)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    net = model(family).train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    if checkpointed:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    with mllm.patch(net, stage):
        teach(net)
        loss = net(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        bank = net.mllm._modules["0"]
        mine = {name: p.grad for name, p in bank.named_parameters()}
        own = copy.deepcopy(bank).requires_grad_()
    own.zero_grad()
    answers = []
    with torch.enable_grad():
        for s in batch:
            logits = run_with_gradients(family, s, by_hand(family, s, own, stage)).logits
            answers.append(F.cross_entropy(logits[-4:-1], s.ids[-3:], reduction="none"))
        want = torch.cat(answers).mean()
    want.backward()
    equal(loss, want, "loss", 1e-5)
    for name, p in own.named_parameters():
        assert mine[name].abs().max() > 0, name
        equal(mine[name], p.grad, name, 1e-4 * max(1.0, float(p.grad.abs().max())))


@pytest.mark.parametrize("plan", ["two", "token"])
def test_new_gates_learn(plan):
    """A gate that is zero gets a gradient all the same; with it the rest follows."""
    net, inputs = model("llava").train(), collate("llava", samples("llava"))
    with mllm.patch(net, PLANS[plan]):
        net(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        assert all(net.mllm._modules["0"][f"{i}_gate"].warm.grad.any() for i in (1, 2))
        assert net.model.multi_modal_projector.linear_2.weight.grad.any()


def test_the_projector_learns_from_slow_tokens():
    net, inputs = model("llava").train(), collate("llava", samples("llava"))
    grads = []
    for warm in (0.0, 1.0):
        with mllm.patch(net, PLANS["two"]):
            with torch.no_grad():
                for i in (1, 2):
                    net.mllm._modules["0"][f"{i}_gate"].warm.fill_(warm)
            net.zero_grad()
            net(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
            grads.append(net.model.multi_modal_projector.linear_2.weight.grad.clone())
    assert (grads[0] - grads[1]).abs().max() > 1e-5


@pytest.mark.parametrize("plan", ["two", "feature"])
def test_text_alone_gives_every_parameter_a_gradient(plan):
    for family in ("llava", "qwen3_vl"):
        net = model(family).train()
        inputs = collate(family, samples(family, "text"))
        with mllm.patch(net, PLANS[plan]):
            net(**inputs, labels=inputs["input_ids"]).loss.backward()
            for name, p in net.mllm.named_parameters():
                assert p.grad is not None and not p.grad.any(), name


@each
@torch.no_grad()
def test_an_adapter_is_the_same_bit_for_bit(stage, tmp_path):
    net, inputs = model("llava"), collate("llava", samples("llava"))
    with mllm.patch(net, stage) as patched:
        teach(net)
        want = net(**inputs).logits
        patched.save_adapter(tmp_path / "adapter")
    with mllm.patch(net, str(tmp_path / "adapter")):
        assert torch.equal(net(**inputs).logits, want)


@torch.no_grad()
def test_an_adapter_of_other_gates_is_refused(tmp_path):
    net = model("llava")
    with mllm.patch(net, PLANS["token"]) as patched:
        patched.save_adapter(tmp_path)
    with mllm.patch(net, PLANS["token"].replace(shares="feature")) as patched:
        with pytest.raises(PlanError) as caught:
            patched.load_adapter(tmp_path)
    assert caught.value.argument == "plan"


@each
@torch.no_grad()
def test_flops_are_what_torch_counts(stage):
    """But for attention to slow tokens, which torch does not count on a CPU."""
    net, (s,) = model("llava", "eager"), samples("llava", "alone")
    with mllm.patch(net, stage) as patched:
        with FlopCounterMode(display=False) as counter:
            net(**collate("llava", [s]))
        row = patched.ledger.as_dict()
    rows, slow, width = len(s.ids), int(s.visual.sum()), 48
    met = 2 * 4 * rows * slow * width
    assert row["prefill_flops"][0] == pytest.approx(counter.get_total_flops() + met, rel=1e-4)


@torch.no_grad()
def test_a_reduced_sequence_is_shorter_and_text_is_left_alone():
    net, batch = model("llava"), samples("llava")
    inputs = collate("llava", batch)
    plain = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
    with mllm.patch(net, [Stride(keep=5), PLANS["two"]]) as patched:
        teach(net)
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        assert patched.ledger.as_dict()["kept_llm"] == [5, 10, 0]
    equal(logits[2], plain[2], "without pictures", 1e-5)


@pytest.mark.parametrize("bad, argument", [
    (dict(every=0), "every"), (dict(layers=(4,)), "layers"), (dict(layers=(1, 1)), "layers"),
    (dict(layers=()), "layers"), (dict(positions="compact"), "positions"),
    (dict(shares="head"), "shares"), (dict(gate="gumbel"), "gate"),
])  # fmt: skip
def test_bad_values(bad, argument):
    net = model("llava")
    with pytest.raises(PlanError) as caught:
        mllm.patch(net, LookingToLearn(**bad))
    assert caught.value.argument == argument
    assert not hasattr(net, "mllm")


@pytest.mark.parametrize("before", ["visionzip:keep=4", "downsample:keep=4", "tome:keep=8"])
def test_stages_that_leave_no_slow_tokens(before):
    with pytest.raises(PlanError) as caught:
        mllm.patch(model("llava"), f"{before}+slowfast")
    assert caught.value.argument == "plan"
