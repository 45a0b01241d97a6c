"""Trained stages that speak of all tokens, later ones too, against a decoder by hand."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from families import LAYERS, collate, model, samples
from layer_oracle import Edits, run, run_with_gradients
from matrix import equal
from test_routers import teach
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from zoo import check_family

import mllm
from mllm.errors import PlanError
from mllm.routers import GammaMoD, LayerSkip, MoD, MoH, SkipFFN
from mllm.routers.arank import arank

FAMILIES = ["llava", "qwen2_5_vl", "internvl", "gemma3"]
MORE = torch.tensor([31, 32, 33])
#: Thresholds at which some rows run and some do not, with weights of `teach`.
PLANS = [
    MoD(capacity=0.5),
    MoD(capacity=0.3, scope="visual", gate="tanh"),
    GammaMoD(threshold=0.4, later=0.6, layers=(1, 2)),
]
NAMES = ["mod", "mod-visual", "gammamod"]
each = pytest.mark.parametrize("stage", PLANS, ids=NAMES)


def decoded(net, family, batch, patched):
    """Logits of every sample and of MORE behind it, decoded in a padded batch."""
    inputs = collate(family, batch)
    mask = inputs["attention_mask"]
    out = net(**inputs)
    prompts, steps = tiny.per_sample(out.logits, mask), []
    stats = patched.router_stats()
    for token in MORE:
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        given = {"attention_mask": mask} if len(batch) > 1 else {}
        cache = out.past_key_values
        out = net(input_ids=token.expand(len(batch), 1), past_key_values=cache, **given)
        steps.append(out.logits[:, -1])
    assert stats == patched.router_stats(), "those of the prompt"
    return [torch.cat([p, torch.stack([x[b] for x in steps])]) for b, p in enumerate(prompts)]


def by_hand(family, s, bank, stage, more=None, learns=False):
    """The cards' layers in loops; returns the edits, and the auxiliary losses of every row."""
    edit, losses, prompt = Edits(), [], len(s.ids)
    for layer in stage.at_depth(LAYERS).layers if s.pictures else ():
        x = run_with_gradients(family, s, edit, more).hidden[layer]
        visual = torch.zeros(len(x), dtype=torch.bool)
        visual[:prompt] = s.visual
        part = bank[str(layer)]
        if isinstance(stage, GammaMoD):
            normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
            logits = normed @ part.weight.T
            p = logits.softmax(-1)[:, 1]
            if learns:
                early = list(range(int(visual.nonzero()[-1]) + 1))
                best = sorted(early, key=lambda i: -float(p[i].detach()))
                gone = best[len(early) - int(len(early) * (1 - stage.capacity)) :]
                take = torch.tensor([i not in gone for i in range(len(x))])
            else:
                limits = [stage.threshold if i < prompt else stage.later for i in range(len(x))]
                take = p > torch.tensor(limits)
            losses.append(F.cross_entropy(logits, take.long(), reduction="none"))
            edit.scale[layer, "mlp"] = torch.where(take, p, 1.0)
        else:
            score = x @ part.weight[0] + part.bias
            among = visual if stage.scope == "visual" else torch.ones(len(x), dtype=torch.bool)
            ranked = [i for i in range(len(x)) if among[i] and (learns or i < prompt)]
            count = int(stage.capacity * len(ranked))
            best = sorted(ranked, key=lambda i: -float(score[i].detach()))[:count]
            take = torch.tensor([i in best or not bool(among[i]) for i in range(len(x))])
            if stage.scope == "all":
                guess = bank[f"{layer}_later"](x.detach())[:, 0]
                take[prompt:] |= guess[prompt:] >= 0
                target = take.float()
                losses.append(F.binary_cross_entropy_with_logits(guess, target, reduction="none"))
            weight = score if stage.gate == "raw" else 1 + 0.2 * torch.tanh(score)
            edit.whole[layer] = torch.where(take & among, weight, 1.0)
        edit.take[layer, "attn"] = edit.take[layer, "mlp"] = take
    return edit, losses


@each
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_equals_its_description(family, attn, stage):
    """Every sample of a padded batch; the ledger has what ran, text included."""
    batch, net = samples(family), model(family, attn)
    inputs = collate(family, batch)
    with mllm.patch(net, stage) as patched:
        bank = teach(net)._modules["0"]
        logits = tiny.per_sample(net(**inputs).logits, inputs["attention_mask"])
        row = patched.ledger.as_dict()
    for b, s in enumerate(batch):
        edit, _ = by_hand(family, s, bank, stage)
        want = run(family, s, edit).logits
        equal(logits[b], want, f"sample {b}", 2e-4 * max(1.0, float(want.std())))
        for layer in stage.at_depth(LAYERS).layers if s.pictures else ():
            took = edit.take[layer, "mlp"]
            seen = row["layers"][layer]
            assert seen["tokens"][b] == int(took.sum())
            assert seen["visual"][b] == int((took & s.visual).sum())


@each
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_decode_is_as_without_a_cache(family, stage):
    """Later tokens decide for themselves; those that pass a layer by are not in its cache."""
    net, batch = model(family), samples(family)
    with mllm.patch(net, stage) as patched:
        bank = teach(net)._modules["0"]
        logits = decoded(net, family, batch, patched)
    skipped = 0
    for b, s in enumerate(batch):
        edit, _ = by_hand(family, s, bank, stage, MORE)
        want = run(family, s, edit, MORE).logits
        equal(logits[b], want, f"sample {b}", 2e-4 * max(1.0, float(want.std())))
        skipped += sum(int((~take[-3:]).sum()) for take in edit.take.values())
    assert skipped > 0 or getattr(stage, "scope", "all") == "visual"


@each
@torch.no_grad()
def test_text_alone_is_left_alone(stage):
    net, inputs = model("llava"), collate("llava", samples("llava", "text"))
    plain = net.generate(**inputs, max_new_tokens=5, do_sample=False)
    with mllm.patch(net, stage):
        teach(net)
        assert torch.equal(net.generate(**inputs, max_new_tokens=5, do_sample=False), plain)


@each
@torch.no_grad()
def test_generation_with_and_without_a_cache(stage):
    net = model("llava")
    inputs = collate("llava", samples("llava"))
    options = dict(max_new_tokens=5, do_sample=False)
    with mllm.patch(net, stage):
        teach(net)
        cached = net.generate(**inputs, **options)
        assert torch.equal(cached, net.generate(**inputs, **options, use_cache=False))
        beams = net.generate(**inputs, **options, num_beams=2)
        assert torch.equal(beams, net.generate(**inputs, **options, num_beams=2, use_cache=False))


@each
@pytest.mark.parametrize("family", [*FAMILIES, "llava_next"])
@torch.no_grad()
def test_batched_equals_alone(family, stage):
    check_family(family, stage)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_identity_of_mod(family, attn):
    """Everything runs, at weight 1; a predictor that knows nothing lets later tokens run."""
    net = model(family, attn)
    inputs = collate(family, samples(family))
    plain, answer = net(**inputs).logits, net.generate(**inputs, max_new_tokens=4)
    with mllm.patch(net, MoD(**MoD.identity)):
        assert torch.equal(net(**inputs).logits, plain)
        assert torch.equal(net.generate(**inputs, max_new_tokens=4), answer)


@each
@torch.no_grad()
def test_ledger_is_what_torch_counts(stage):
    net = model("llava", "eager")
    inputs = collate("llava", samples("llava", "alone"))
    with mllm.patch(net, stage) as patched:
        teach(net)
        with FlopCounterMode(display=False) as counter:
            net(**inputs)
        row = patched.ledger.as_dict()
    assert row["prefill_flops"][0] == pytest.approx(counter.get_total_flops(), rel=1e-4)
    assert row["prefill_flops"][0] < row["baseline_prefill_flops"][0]


@each
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_gradients(family, checkpointed, stage):
    """Loss, auxiliary losses and all gradients are those of the loop, checkpointing or not."""
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
    with mllm.patch(net, stage) as patched:
        teach(net)
        loss = net(**inputs, labels=labels).loss
        loss.backward()
        bank = net.mllm._modules["0"]
        mine = {name: p.grad for name, p in bank.named_parameters()}
        own = copy.deepcopy(bank).requires_grad_()
        named = {name: float(x) for name, x in patched.losses.items()}
    own.zero_grad()
    answers, extra = [], {}
    with torch.enable_grad():
        for s in batch:
            edit, losses = by_hand(family, s, own, stage, learns=True)
            logits = run_with_gradients(family, s, edit).logits
            answers.append(F.cross_entropy(logits[-4:-1], s.ids[-3:], reduction="none"))
            for layer, found in enumerate(losses):
                extra.setdefault(layer, []).append(found)
    want = torch.cat(answers).mean()
    if extra:
        more = sum(torch.cat(rows).mean() for rows in extra.values())
        want = want + stage.auxiliary * more
        assert list(named.values()) == pytest.approx([float(more)], abs=1e-4)
    want.backward()
    equal(loss, want, "loss", 1e-5)
    for name, p in own.named_parameters():
        equal(mine[name], p.grad, name, 1e-4 * max(1.0, float(p.grad.abs().max())))
        last = isinstance(stage, MoD) and stage.scope == "visual" and name.startswith("3")
        assert (float(mine[name].abs().max()) > 0) == (not last), name


@pytest.mark.parametrize("kind, bad, argument", [
    (MoD, dict(capacity=0.0), "capacity"), (MoD, dict(capacity=1.5), "capacity"),
    (MoD, dict(layers=(4,)), "layers"), (MoD, dict(auxiliary=-1.0), "auxiliary"),
    (GammaMoD, dict(threshold=1.0), "threshold"), (GammaMoD, dict(later=-0.1), "later"),
    (GammaMoD, dict(layers=(1, 1)), "layers"), (GammaMoD, dict(positions="compact"), "positions"),
])  # fmt: skip
def test_bad_values(kind, bad, argument):
    net = model("llava")
    with pytest.raises(PlanError) as caught:
        mllm.patch(net, kind(**bad))
    assert caught.value.argument == argument
    assert not hasattr(net, "mllm")


@torch.no_grad()
def test_ranks_are_those_of_the_attention_maps():
    batch, net = samples("llava"), model("llava")
    pictured = [s for s in batch if s.pictures]
    got = arank(net, [collate("llava", pictured)])
    ranks = [[torch.linalg.matrix_rank(w).float().mean() for w in run("llava", s).weights]
             for s in pictured]  # fmt: skip
    want = torch.tensor(ranks).mean(0)
    assert got == pytest.approx(want.tolist(), abs=0.3)


# --- MoH: heads instead of rows

HEADS = MoH(shared=0.25, active=0.75, balance=0.3)


def heads_by_hand(family, s, bank, more=None):
    """The card's gates in loops; returns the edits, and per layer the rows of its balance loss."""
    edit, seen = Edits(), []
    for layer in range(LAYERS) if s.pictures else ():
        x = run_with_gradients(family, s, edit, more).hidden[layer]
        scores = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() @ bank[str(layer)].weight.T
        heads = scores.shape[1] - 2
        shared = round(HEADS.shared * heads)
        chosen = round(HEADS.active * heads) - shared
        q, p = scores[:, :shared].softmax(-1), scores[:, shared:heads].softmax(-1)
        kinds, gates, masks = scores[:, heads:].softmax(-1) * 2, [], []
        for t in range(len(x)):
            best = sorted(range(heads - shared), key=lambda e: (-float(p[t, e].detach()), e))
            mask = torch.tensor([float(e in best[:chosen]) for e in range(heads - shared)])
            routed = p[t] * mask / (p[t] * mask).sum() * chosen
            gates.append(torch.cat([kinds[t, 0] * q[t] * shared, kinds[t, 1] * routed]))
            masks.append(mask)
        edit.heads[layer] = torch.stack(gates)
        seen.append((p, torch.stack(masks)))
    return edit, seen


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_moh_equals_its_description(family, attn):
    """Of a padded batch, and of the tokens decoded behind it."""
    net, batch = model(family, attn), samples(family)
    with mllm.patch(net, HEADS) as patched:
        bank = teach(net)._modules["0"]
        logits = decoded(net, family, batch, patched)
    for b, s in enumerate(batch):
        edit, _ = heads_by_hand(family, s, bank, MORE)
        want = run(family, s, edit, MORE).logits
        equal(logits[b], want, f"sample {b}", 2e-4 * max(1.0, float(want.std())))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_moh(checkpointed):
    batch = samples("llava")
    inputs = collate("llava", batch)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    net = model("llava").train()
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    if checkpointed:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    with mllm.patch(net, HEADS):
        teach(net)
        loss = net(**inputs, labels=labels).loss
        loss.backward()
        mine = {name: p.grad for name, p in net.mllm._modules["0"].named_parameters()}
        own = copy.deepcopy(net.mllm._modules["0"]).requires_grad_()
    own.zero_grad()
    answers, rows = [], {}
    with torch.enable_grad():
        for s in batch:
            edit, seen = heads_by_hand("llava", s, own)
            logits = run_with_gradients("llava", s, edit).logits
            answers.append(F.cross_entropy(logits[-4:-1], s.ids[-3:], reduction="none"))
            for layer, pair in enumerate(seen):
                rows.setdefault(layer, []).append(pair)
        want = torch.cat(answers).mean()
        for pairs in rows.values():
            p, mask = (torch.cat(x).mean(0) for x in zip(*pairs, strict=True))
            want = want + HEADS.balance * (p * mask).mean() * len(p) ** 2 / LAYERS
    want.backward()
    equal(loss, want, "loss", 1e-5)
    for name, p in own.named_parameters():
        assert mine[name].abs().max() > 0, name
        equal(mine[name], p.grad, name, 1e-4 * max(1.0, float(p.grad.abs().max())))


@pytest.mark.parametrize("bad, argument", [
    (dict(shared=0.0), "shared"), (dict(active=0.5), "active"), (dict(active=1.1), "active"),
    (dict(balance=-1.0), "balance"), (dict(layers=(9,)), "layers"), (dict(shared=0.01), "shared"),
])  # fmt: skip
def test_bad_values_of_moh(bad, argument):
    net = model("llava")
    with pytest.raises(PlanError) as caught:
        mllm.patch(net, MoH(**bad))
    assert caught.value.argument == argument and not hasattr(net, "mllm")


# --- Skip-Vision: visual tokens that pass FFNs by

SKIPS = [SkipFFN(budget=0.25), SkipFFN(budget=3, summary=False), SkipFFN(budget=0.5, evict=False)]


def skips_by_hand(s, bank, stage, hidden):
    """The card's layers in loops; answers do not see what has left the cache."""
    edit = Edits()
    if not s.pictures:
        return edit
    visual = s.visual.nonzero()[:, 0].tolist()
    n = len(visual)
    count = min(n, stage.budget) if isinstance(stage.budget, int) else round(n * stage.budget)
    # The last token, and those at which so many more make another whole part.
    runs = [i for place, i in enumerate(visual, 1) if place * count % n < count]
    assert len(runs) == count and runs[-1] == visual[-1]
    skipped = s.visual & ~torch.tensor([i in runs for i in range(len(s.ids))])
    for layer in range(LAYERS):
        edit.take[layer, "mlp"] = ~skipped
        if stage.evict:
            edit.forget[layer] = skipped
    if stage.summary:
        x = hidden[skipped]
        normed = (x - x.mean(-1, True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
        score = normed @ bank["summary"].score.weight[0] + bank["summary"].score.bias
        edit.insert[0] = max(visual), (score.softmax(0) @ x)[None]
    return edit


@pytest.mark.parametrize("stage", SKIPS, ids=["all", "ffn", "summary"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_skipffn_equals_its_description(family, stage):
    net, batch = model(family), samples(family)
    with mllm.patch(net, stage) as patched:
        bank = teach(net)._modules["0"] if stage.summary else None
        logits = decoded(net, family, batch, patched)
        net(**collate(family, batch))
        row = patched.ledger.as_dict()
    assert row["prefill_flops"][0] < row["baseline_prefill_flops"][0]
    for b, s in enumerate(batch):
        edit = skips_by_hand(s, bank, stage, run(family, s).hidden[0])
        want = run(family, s, edit, MORE).logits
        equal(logits[b], want, f"sample {b}", 2e-4 * max(1.0, float(want.std())))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_skipffn(checkpointed):
    batch = samples("llava")
    inputs = collate("llava", batch)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    net, stage = model("llava").train(), SKIPS[0]
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    if checkpointed:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    with mllm.patch(net, stage):
        teach(net)
        loss = net(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
        mine = {name: p.grad for name, p in net.mllm._modules["0"].named_parameters()}
        own = copy.deepcopy(net.mllm._modules["0"]).requires_grad_()
    own.zero_grad()
    answers = []
    with torch.enable_grad():
        for s in batch:
            edit = skips_by_hand(s, own, stage, run("llava", s).hidden[0])
            logits = run_with_gradients("llava", s, edit).logits
            answers.append(F.cross_entropy(logits[-4:-1], s.ids[-3:], reduction="none"))
        want = torch.cat(answers).mean()
    want.backward()
    equal(loss, want, "loss", 1e-5)
    assert mine["summary.score.weight"].any()
    for name, p in own.named_parameters():
        equal(mine[name], p.grad, name, 1e-4 * max(1.0, float(p.grad.abs().max())))


# --- LayerSkip: exits, and layers left out


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_exit_is_the_model_without_its_last_layers(family):
    net, batch = model(family), samples(family)
    inputs = collate(family, batch)
    plain = net(**inputs).logits
    with mllm.patch(net, LayerSkip()):
        assert torch.equal(net(**inputs).logits, plain)
    with mllm.patch(net, LayerSkip(exit=2)) as patched:
        net(**inputs)
        assert [row["visual"][0] for row in patched.ledger.as_dict()["layers"]][2:] == [0, 0]
        logits = decoded(net, family, batch, patched)
    for b, s in enumerate(batch):
        edit, none = Edits(), torch.zeros(len(s.ids) + 3, dtype=torch.bool)
        for layer in (2, 3) if s.pictures else ():
            edit.take[layer, "attn"] = edit.take[layer, "mlp"] = none
        want = run(family, s, edit, MORE).logits
        equal(logits[b], want, f"sample {b}", 2e-4 * max(1.0, float(want.std())))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_exits_learn_to_answer(checkpointed):
    """The loss and a gradient, with samples that pass layers by; every layer is an exit."""
    batch = samples("llava")
    inputs = collate("llava", batch)
    labels = inputs["input_ids"].clone()
    labels[:, :-3] = -100
    net, stage = model("llava").train(), LayerSkip(dropout=0.9, every=1, scale=0.5)
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.eval()
    if checkpointed:
        net.gradient_checkpointing_enable({"use_reentrant": False})
    with mllm.patch(net, stage) as patched:
        patched.learnt = 6
        loss = net(**inputs, labels=labels).loss
        loss.backward()
        exits, seed = patched.losses["exits"], patched.plan.seed_for(0, 6, 0)
    drawn = torch.rand(LAYERS, len(batch), generator=torch.Generator().manual_seed(seed))
    passed = [(drawn[i] < stage.chance(i, LAYERS)).tolist() for i in range(1, LAYERS)]
    assert any(any(p[:2]) for p in passed)
    answers, early = [], {}
    lm = net.model.language_model
    for b, s in enumerate(batch):
        edit = Edits()
        for layer in range(1, LAYERS) if s.pictures else ():
            take = torch.full((len(s.ids),), not passed[layer - 1][b])
            edit.take[layer, "attn"] = edit.take[layer, "mlp"] = take
        seen = run("llava", s, edit)
        answers.append(F.cross_entropy(seen.logits[-4:-1], s.ids[-3:], reduction="none"))
        for layer in range(1, LAYERS) if s.pictures else ():
            with torch.no_grad():
                logits = net.lm_head(lm.norm(seen.hidden[layer]))[-4:-1]
            lost = F.cross_entropy(logits, s.ids[-3:], reduction="none")
            early.setdefault(layer - 1, []).append(lost)
    means = {layer: torch.cat(rows).mean() for layer, rows in early.items()}
    weights = {layer: (layer + 1) * (layer + 2) / (LAYERS * (LAYERS + 1)) for layer in means}
    want = torch.cat(answers).mean() + 0.5 * sum(weights[i] * means[i] for i in means)
    equal(loss, want, "loss", 1e-4)
    equal(exits, sum(means.values()), "exits", 1e-4)
    assert net.lm_head.weight.grad.any() and lm.layers[0].mlp.up_proj.weight.grad.any()


@pytest.mark.parametrize("bad, argument", [
    (dict(dropout=1.0), "dropout"), (dict(every=0), "every"), (dict(exit=4), "exit"),
    (dict(exit=0), "exit"), (dict(scale=-1.0), "scale"),
])  # fmt: skip
def test_bad_values_of_layerskip(bad, argument):
    with pytest.raises(PlanError) as caught:
        mllm.patch(model("llava"), LayerSkip(**bad))
    assert caught.value.argument == argument
